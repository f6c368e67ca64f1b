"""`build_dataset`: from a row of the table to a few-shot task."""

import os
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from datasets.base import (
    SPLITS,
    DatasetDir,
    DatasetInfo,
    Datum,
    FewShotDataset,
    RawSample,
    Split,
    find_dataset_dir,
)
from datasets.catalog import DATASETS
from datasets.checks import count_mismatch
from datasets.fewshot import generate_fewshot_dataset, load_fewshot_split
from datasets.image_folder import custom_dataset_info, dataset_stem, is_path
from datasets.prompts import rename_classes, resolve_templates
from datasets.splits import read_split
from utils import did_you_mean


def get_dataset_info(name: str) -> DatasetInfo:
    """The row of a dataset: of the table, or made for the path of a user's own images.

    Raises:
        ValueError: It is neither a name of the table nor such a path.
    """
    name = os.fspath(name)
    if name in DATASETS:
        return DATASETS[name]
    if is_path(name):
        return custom_dataset_info(name)
    raise ValueError(
        f"unknown dataset {name!r}{did_you_mean(name, DATASETS)}; valid: {', '.join(DATASETS)}, or the "  # noqa: E501
        "path of your own images: a folder, a .csv or a .json"
    )


def validate_dataset_name(name: str) -> None:
    """Check that a dataset is in the table or an existing path; no image is looked at.

    Raises:
        ValueError: It is neither.
    """
    get_dataset_info(name)


def dataset_name(name: str) -> str:
    """What results call a dataset: its name in the table, or its folder's or its file's stem."""
    return name if name in DATASETS else dataset_stem(name)


def build_dataset(
    name: str,
    root_path: str | os.PathLike | None,
    shots: int,
    *,
    classnames: str | os.PathLike | None = None,
    template: str | Sequence[str] | None = None,
    fewshot_split: str | os.PathLike | None = None,
    subsample: str = "all",
) -> FewShotDataset:
    """Read a dataset and draw its few shots with Python's global `random`, seeded by the caller.

    Numbers of classes and images that differ from the published ones are said on standard error,
    and so is a split that is not the published one.

    Args:
        name: A name of the table `DATASETS`, or the path of own images.
        root_path: The folder of all datasets; None for those that are made on first use, and for
            own images.
        shots: Training images per class; min(shots, 4) are drawn for validation.
        classnames: YAML file with the names that prompts give the classes (see `rename`).
        template: Prompts with {}, or "dataset" or "clip" (see `resolve_templates`).
        fewshot_split: JSON file of images to take in place of the draw (see `load_fewshot_split`).
        subsample: "base" or "new" for this half of the classes (see `Split.half`); the few are
            drawn for all of them first, so that a seed means the same images. "base" has the other
            half as `new_classes`.

    Raises:
        ValueError: An unknown name, shots below 1, no root_path, broken data, or names, a template
            or a list that do not fit the data.
        FileNotFoundError: A folder, list or image is missing.
    """
    spec = get_dataset_info(name)
    if not isinstance(shots, int) or shots < 1:
        raise ValueError(f"shots must be a whole number of at least 1, not {shots!r}")
    prompts = resolve_templates(template, spec)
    source, original = _read(name, root_path, save=True)
    split = rename_classes(original, classnames)
    if missing := count_mismatch(source, split):
        print(f"note: {missing}", file=sys.stderr)
    if spec.test_only:
        print(
            f"note: {name} has test images alone, for the zero-shot accuracy; `--dataset imagenet "
            f"--test_on {name}` tests on it what was learnt on imagenet",
            file=sys.stderr,
        )
    if fewshot_split:
        train, val = load_fewshot_split(fewshot_split, original, split, subsample)
    else:
        try:
            train, val = generate_fewshot_dataset(split, shots, spec.together)
        except ValueError as error:
            raise source.error(str(error)) from error
    few = replace(split, train=train, val=val)
    task = few.half(subsample)
    if fewshot_split and len(task.train) != shots * len(task.names):
        print(
            f"note: {fewshot_split} has {len(task.train)} training images for {len(task.names)} "
            f"classes, not {shots} for each, which the results are filed under",
            file=sys.stderr,
        )
    dataset = _items(source, task, prompts, _data(split, subsample))
    if subsample == "base":
        new = _items(source, few.half("new"), prompts, _data(split, "new"))
        return replace(dataset, new_classes=new)
    return dataset


def build_test_dataset(
    name: str,
    root_path: str | os.PathLike | None,
    *,
    template: str | Sequence[str] | None = None,
) -> FewShotDataset:
    """Read a dataset to test on: nothing is drawn, and there are test images alone.

    Arguments and errors are those of `build_dataset`.
    """
    prompts = resolve_templates(template, get_dataset_info(name))
    source, split = _read(name, root_path, save=True)
    if missing := count_mismatch(source, split):
        print(f"note: {missing}", file=sys.stderr)
    return _items(source, replace(split, train=[], val=[]), prompts, split.fingerprint())


def dataset_fingerprint(
    name: str,
    root_path: str | os.PathLike | None,
    classnames: str | os.PathLike | None = None,
    subsample: str = "all",
) -> dict[str, str | int]:
    """Say which data `build_dataset` would use: what it gives as `fingerprint`.

    Nothing is drawn, printed or written. Arguments and errors are those of `build_dataset`.
    """
    return _data(rename_classes(_read(name, root_path, save=False)[1], classnames), subsample)


def _data(split: Split, subsample: str) -> dict[str, str | int]:
    """What a result says of its data. A run on base classes tests on all of them."""
    half = split.half(subsample)
    tested = replace(half, test=split.test) if subsample == "base" else half
    return half.fingerprint() | {"digest": tested.digest()}


def _items(
    source: DatasetDir, task: Split, prompts: list[str], data: dict[str, str | int]
) -> FewShotDataset:
    """A dataset of all entries of a split."""

    def items(entries: list[RawSample]) -> list[Datum]:
        return [Datum(source.locate(path), label, name) for path, label, name in entries]

    parts = (items(getattr(task, part)) for part in SPLITS)
    names = list(task.names.values())
    return FewShotDataset(source.name, *parts, names, prompts, data, str(source.images))


def _read(name: str, root_path: str | os.PathLike | None, save: bool) -> tuple[DatasetDir, Split]:
    """Read and check all entries, leaving Python's global generator as it was."""
    spec, state = get_dataset_info(name), random.getstate()
    try:
        source = find_dataset_dir(dataset_name(name), spec, root_path, prepare=save)
        split, problems = read_split(source, save)
    finally:
        random.setstate(state)  # importing what a reader needs may draw: scikit-learn does
    if problems:
        first, more = problems[0], len(problems) - 1
        if more:
            root = f" --root_path {root_path}" if spec.needs_root else ""
            command = f"python -m datasets{root} --dataset {shlex.quote(name)}"
            raise type(first)(f"{first} (`{command}` lists this and {more} more)")
        raise first
    return source, split
