"""From a dataset's name to a few-shot task: `build_dataset`."""

import os
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from datasets.base import (
    DatasetDir,
    DatasetInfo,
    Datum,
    FewShotDataset,
    GrayRange,
    PathLike,
    Split,
    dataset_errors,
    find_dataset_dir,
)
from datasets.catalog import DATASETS
from datasets.fewshot import generate_fewshot_dataset, load_fewshot_split
from datasets.image_folder import custom_dataset_info, dataset_stem, is_path
from datasets.prompts import rename_classes, resolve_templates
from datasets.readers import digest_key
from datasets.splits import check_split, count_mismatch, read_split, save_generated_split
from datasets.transforms import detect_gray_range
from utils import did_you_mean


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

    Notes on standard error say where numbers of classes or images differ from the published ones,
    and where a split is not the published one.

    Args:
        name: A name of the catalog `DATASETS`, or the path of own images.
        root_path: The folder of all datasets; None for own images and the digits.
        shots: Training images per class; min(shots, 4) are drawn for validation.
        classnames: YAML file with the names that prompts give the classes (see `rename_classes`).
        template: Prompts with {}, or "dataset" or "clip" (see `resolve_templates`).
        fewshot_split: List of images to take instead of the draw (see `load_fewshot_split`).
        subsample: "base" or "new" for one half of the classes (see `Split.subsample_classes`). The
            few are drawn for all classes first, so that a seed means the same images.

    Raises:
        ValueError: An unknown name, shots below 1, no root_path, broken data, or names, a template
            or a list that do not fit the data.
        FileNotFoundError: A folder, list or image is missing.
    """
    info = get_dataset_info(name)
    if not isinstance(shots, int) or shots < 1:
        raise ValueError(f"shots must be a whole number of at least 1, not {shots!r}")
    templates = resolve_templates(template, info)
    dataset_dir, original = _read_dataset(name, root_path)
    if info.custom_path and subsample != "all" and len(original.lab2cname) < 4:
        raise ValueError(
            f"{dataset_dir.name} has {len(original.lab2cname)} classes: --subsample takes four or "
            "more, two in each half, since one class is always right"
        )
    _print_notes(dataset_dir, original)
    split = rename_classes(original, classnames)
    if fewshot_split:
        train, val = load_fewshot_split(fewshot_split, original, split, subsample)
    else:
        with dataset_errors(dataset_dir):
            train, val = generate_fewshot_dataset(split, shots, info.val_from_train)
    few = replace(split, train=train, val=val)
    gray_range = find_gray_range(dataset_dir, original)
    make = partial(_make_dataset, dataset_dir, templates=templates, gray_range=gray_range)
    dataset = make(few.subsample_classes(subsample), _fingerprint(split, subsample))
    if fewshot_split and len(dataset.train_x) != shots * len(dataset.classnames):
        print(
            f"note: {fewshot_split} has {len(dataset.train_x)} training images for "
            f"{len(dataset.classnames)} classes, not {shots} for each, as the results' folder says",
            file=sys.stderr,
        )
    if subsample == "base":
        new_classes = make(few.subsample_classes("new"), _fingerprint(split, "new"))
        dataset = replace(dataset, new_classes=new_classes)
    return dataset


def build_test_dataset(
    name: str,
    root_path: PathLike | None,
    *,
    template: str | Sequence[str] | None = None,
) -> FewShotDataset:
    """Read a dataset that is only tested on: it has no other images.

    All own images without named parts are test images.

    Arguments and errors are those of `build_dataset`.
    """
    templates = resolve_templates(template, get_dataset_info(name))
    dataset_dir, split = _read_dataset(name, root_path, test_only=True)
    _print_notes(dataset_dir, split, test_only=True)
    gray_range = find_gray_range(dataset_dir, split)
    task = replace(split, train=[], val=[])
    return _make_dataset(dataset_dir, task, split.fingerprint(), templates, gray_range)


def dataset_fingerprint(
    name: str,
    root_path: PathLike | None,
    classnames: PathLike | None = None,
    subsample: str = "all",
    *,
    test_only: bool = False,
) -> dict[str, str | int]:
    """Return the fingerprint of the data that `build_dataset` would use, without a draw.

    Arguments and errors are those of `build_dataset`; with test_only, it is the fingerprint of
    `build_test_dataset`'s data.
    """
    _, split = _read_dataset(name, root_path, test_only)
    return _fingerprint(rename_classes(split, classnames), subsample)


def get_dataset_info(name: str) -> DatasetInfo:
    """Return the row of a dataset: of the catalog, or made for a path of own images.

    Raises:
        ValueError: It is neither a name of the catalog nor such a path.
    """
    name = os.fspath(name)
    if name in DATASETS:
        return DATASETS[name]
    if is_path(name):
        return custom_dataset_info(name)
    raise ValueError(
        f"unknown dataset {name!r}{did_you_mean(name, DATASETS)}; valid: {', '.join(DATASETS)}, or "
        "the path of your own images: a folder, a .csv or a .json"
    )


def dataset_name(name: str) -> str:
    """Return what results call a dataset: its name, or the stem of its folder or file."""
    return name if name in DATASETS else dataset_stem(name)


def find_gray_range(dataset_dir: DatasetDir, split: Split) -> GrayRange | None:
    """Return the range of own gray pictures of more than eight bits, and print a note on it.

    It is that of 500 files, the first by their digests, of the formats that have so many bits.
    """
    if not dataset_dir.info.custom_path:
        return None
    paths = {path for path, _, _ in split.samples()}
    paths = [path for path in paths if path.lower().endswith((".png", ".pgm", ".tif", ".tiff"))]
    files = [dataset_dir.image_path(path) for path in sorted(paths, key=digest_key)[:500]]
    gray_range = detect_gray_range(files)
    if gray_range:
        print(
            f"note: {dataset_dir.name} has gray pictures of more than eight bits: values from "
            "{:g} to {:g} are scaled to black to white".format(*gray_range),
            file=sys.stderr,
        )
    return gray_range


def _read_dataset(
    name: str, root_path: PathLike | None, test_only: bool = False
) -> tuple[DatasetDir, Split]:
    """Read and check all samples, leaving Python's global `random` as it was."""
    info, state = get_dataset_info(name), random.getstate()
    try:
        dataset_dir = find_dataset_dir(dataset_name(name), info, root_path)
        with dataset_errors(dataset_dir):
            split = read_split(dataset_dir)
            if test_only and info.custom_path:
                tested = split.test if split.has_parts else sorted(split.samples())
                split = replace(split, train=[], val=[], test=tested)
                info = replace(info, num_images=(0, None, None))
                dataset_dir = replace(dataset_dir, info=info)
            check_split(dataset_dir, split)
    finally:
        random.setstate(state)  # importing scikit-learn for the digits draws from it
    return dataset_dir, split


def _print_notes(dataset_dir: DatasetDir, split: Split, test_only: bool = False) -> None:
    """Print what a user should know of the data on standard error; save a split made here."""
    name = dataset_dir.name
    if split.origin == "made":
        save_generated_split(dataset_dir, split)
    notes = [f"{name}: {note}" for note in split.notes]
    if mismatch := count_mismatch(dataset_dir, split):
        notes.append(mismatch)
    if dataset_dir.info.test_only and not test_only:
        notes.append(
            f"{name} has only test images; `--dataset imagenet --test_on {name}` trains on "
            "imagenet and tests on it"
        )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _fingerprint(split: Split, subsample: str) -> dict[str, str | int]:
    """Return the fingerprint of a half's data. A run on base classes tests on all of them."""
    half = split.subsample_classes(subsample)
    tested = replace(half, test=split.test) if subsample == "base" else half
    return half.fingerprint() | {"digest": tested.sha256()}


def _make_dataset(
    dataset_dir: DatasetDir,
    task: Split,
    fingerprint: dict[str, str | int],
    templates: list[str],
    gray_range: GrayRange | None,
) -> FewShotDataset:
    """Make a dataset of all samples of a split."""
    parts = [
        [Datum(dataset_dir.image_path(path), *rest, gray_range) for path, *rest in samples]
        for samples in (task.train, task.val, task.test)
    ]
    classnames, image_dir = list(task.lab2cname.values()), str(dataset_dir.image_dir)
    return FewShotDataset(dataset_dir.name, *parts, classnames, templates, fingerprint, image_dir)
