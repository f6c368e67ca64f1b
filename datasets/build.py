"""From a dataset's name to a few-shot task: `build_dataset`."""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from datasets.base import DatasetDir, Datum, FewShotDataset, Split, dataset_errors, find_dataset_dir
from datasets.catalog import dataset_name, get_dataset_info
from datasets.fewshot import generate_fewshot_dataset, load_fewshot_split
from datasets.files import PathLike
from datasets.prompts import rename_classes, resolve_templates
from datasets.splits import count_mismatch, find_problems, read_split, save_generated_split


def build_dataset(
    name: str,
    root_path: PathLike | None,
    shots: int,
    *,
    classnames: PathLike | None = None,
    template: str | Sequence[str] | None = None,
    fewshot_split: PathLike | None = None,
    subsample: str = "all",
) -> FewShotDataset:
    """Read a dataset and draw its few shots with Python's global `random`, seeded by the caller.

    Args:
        name: A name of the catalog `DATASETS`, or the path of own images.
        root_path: The folder of all datasets; None for own images and the digits.
        shots: Training images per class; min(shots, 4) are drawn for validation.
        classnames: YAML file with the names that prompts give the classes (see `rename_classes`).
        template: Prompts with {}, or "dataset" or "clip" (see `resolve_templates`).
        fewshot_split: List of images to take instead of the draw (see `load_fewshot_split`).
        subsample: "base" or "new" for one half of the classes. The few are drawn for all classes
            first, so that a seed means the same images.

    Raises:
        ValueError, FileNotFoundError: The data or an argument is broken or missing.
    """
    info = get_dataset_info(name)
    if not isinstance(shots, int) or shots < 1:
        raise ValueError(f"shots must be a whole number of at least 1, not {shots!r}")
    templates = resolve_templates(template, info)
    dataset_dir, split = _read_dataset(name, root_path)
    if info.custom_path and subsample != "all" and (num_classes := len(split.lab2cname)) < 4:
        remedy = "--subsample takes four or more, two in each half"
        raise ValueError(f"{name} has {num_classes} classes: {remedy}")
    _print_notes(dataset_dir, split)
    split = rename_classes(split, classnames)
    if fewshot_split:
        train, val = load_fewshot_split(fewshot_split, split, subsample)
    else:
        train, val = generate_fewshot_dataset(split, shots, info.val_from_train)
    few = replace(split, train=train, val=val)
    make = partial(_make_dataset, dataset_dir, split, few, templates)
    new_classes = make("new") if subsample == "base" else None
    return replace(make(subsample), new_classes=new_classes)


def build_test_dataset(
    name: str, root_path: PathLike | None, *, template: str | Sequence[str] | None = None
) -> FewShotDataset:
    """Read a dataset that is only tested on; arguments and errors are those of `build_dataset`.

    All own images without named parts are test images.
    """
    templates = resolve_templates(template, get_dataset_info(name))
    dataset_dir, split = _read_dataset(name, root_path, test_only=True)
    _print_notes(dataset_dir, split)
    few = replace(split, train=[], val=[])
    return _make_dataset(dataset_dir, split, few, templates, "all")


def dataset_fingerprint(
    name: str,
    root_path: PathLike | None,
    classnames: PathLike | None = None,
    subsample: str = "all",
    *,
    test_only: bool = False,
) -> dict[str, str | int]:
    """Return the fingerprint of `build_dataset`'s data, or of `build_test_dataset`'s."""
    _, split = _read_dataset(name, root_path, test_only)
    return rename_classes(split, classnames).fingerprint(subsample)


def _read_dataset(
    name: str, root_path: PathLike | None, test_only: bool = False
) -> tuple[DatasetDir, Split]:
    info, state = get_dataset_info(name), random.getstate()
    try:
        dataset_dir = find_dataset_dir(dataset_name(name), info, root_path)
        with dataset_errors(dataset_dir):
            split = read_split(dataset_dir)
            if test_only and info.custom_path:
                tested = split.test if split.has_parts else sorted(split.samples())
                split = replace(split, train=[], val=[], test=tested)
            for problem in find_problems(dataset_dir, split, test_only):
                raise ValueError(problem)
    finally:
        random.setstate(state)  # importing scikit-learn for the digits draws from it
    return dataset_dir, split


def _print_notes(dataset_dir: DatasetDir, split: Split) -> None:
    if split.origin == "made":
        save_generated_split(dataset_dir, split)
    for note in (*split.notes, *count_mismatch(dataset_dir, split)):
        print(f"note: {dataset_dir.name}: {note}", file=sys.stderr)


def _make_dataset(
    dataset_dir: DatasetDir, split: Split, few: Split, templates: list[str], subsample: str
) -> FewShotDataset:
    half = few.subsample_classes(subsample)
    parts = [
        [Datum(dataset_dir.image_path(path), *rest, split.gray_range) for path, *rest in samples]
        for samples in half.parts.values()
    ]
    classnames, image_dir = list(half.lab2cname.values()), str(dataset_dir.image_dir)
    fingerprint = split.fingerprint(subsample)
    return FewShotDataset(dataset_dir.name, *parts, classnames, templates, fingerprint, image_dir)
