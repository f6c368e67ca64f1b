"""`build_dataset`: from a row of the table to a few-shot task."""

import os
import random
import sys

from datasets.base import (
    TEMPLATE,
    DatasetSpec,
    Entry,
    FewShotDataset,
    Item,
    Source,
    Split,
    find_source,
)
from datasets.checks import shortfall
from datasets.sampling import draw_shots
from datasets.splits import read_split
from datasets.table import DATASETS
from utils import nearest


def find_spec(name: str) -> DatasetSpec:
    """The row of a dataset.

    Raises:
        ValueError: There is no such name; the error lists those that there are.
    """
    if name not in DATASETS:
        hint = nearest(str(name), DATASETS)
        raise ValueError(f"unknown dataset {name!r}{hint}; valid: {', '.join(DATASETS)}")
    return DATASETS[name]


def build_dataset(name: str, root_path: str | os.PathLike | None, shots: int) -> FewShotDataset:
    """Read a dataset and draw its few shots with Python's global `random`, seeded by the caller.

    Numbers of classes and images that differ from the published ones are said on standard error,
    and so is a split that is not the published one.

    Args:
        name: A name of the table `DATASETS`.
        root_path: The folder of all datasets; None for those that are made on first use.
        shots: Training images per class; min(shots, 4) are drawn for validation.

    Raises:
        ValueError: An unknown name, shots below 1, no root_path, or broken data.
        FileNotFoundError: A folder, list or image is missing.
    """
    spec = find_spec(name)
    if not isinstance(shots, int) or shots < 1:
        raise ValueError(f"shots must be a whole number of at least 1, not {shots!r}")
    source, split = _read(name, root_path, save=True)
    if missing := shortfall(source, split):
        print(f"note: {missing}", file=sys.stderr)
    try:
        train, val = draw_shots(split, shots, spec.together)
    except ValueError as error:
        raise source.error(str(error)) from error

    def items(entries: list[Entry]) -> list[Item]:
        return [Item(source.locate(path), label, name) for path, label, name in entries]

    return FewShotDataset(
        name,
        items(train),
        items(val),
        items(split.test),
        list(split.names.values()),
        list(TEMPLATE),
        split.data(),
        str(source.images),
    )


def describe_data(name: str, root_path: str | os.PathLike | None) -> dict[str, str | int]:
    """Say which data `build_dataset` would use: what it gives as `data`.

    Nothing is drawn, printed or written.

    Args:
        name: A name of the table `DATASETS`.
        root_path: The folder of all datasets; None for those that are made on first use.

    Raises:
        ValueError: As `build_dataset`.
        FileNotFoundError: As `build_dataset`.
    """
    return _read(name, root_path, save=False)[1].data()


def _read(name: str, root_path: str | os.PathLike | None, save: bool) -> tuple[Source, Split]:
    """Read and check all entries, leaving Python's global generator as it was."""
    spec, state = find_spec(name), random.getstate()
    try:
        source = find_source(name, spec, root_path, prepare=save)
        split, problems = read_split(source, save)
    finally:
        random.setstate(state)  # importing what a reader needs may draw: scikit-learn does
    if problems:
        first, more = problems[0], len(problems) - 1
        if more:
            command = f"python -m datasets --root_path {root_path} --dataset {name}"
            raise type(first)(f"{first} (`{command}` lists this and {more} more)")
        raise first
    return source, split
