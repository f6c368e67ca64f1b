"""Splits: published split files, those made from a raw download, and the checks of both."""

import json
import os
import posixpath
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from datasets.base import SPLITS, DatasetDir, DatasetInfo, Split, list_entries, nfc, read_json
from utils import atomic_write, plural, truncate_list

SPLIT_TITLES = {"train": "training", "val": "validation", "test": "test"}
T = TypeVar("T")
NOT_UTF_8 = re.compile("[\ud800-\udfff]")  # how Python spells such bytes in a file's name
UNSAFE_PATH = re.compile(r"^([A-Za-z]:)?[/\\]|(^|[/\\])\.\.([/\\]|$)")  # absolute, or with ".."


def read_split(dataset_dir: DatasetDir) -> Split:
    """Read all samples of a dataset: from the published split file, or from the raw download.

    Nothing is written, and Python's global `random` is not used.

    Raises:
        ValueError: A list or split file does not have the expected content.
        OSError: It cannot be read, or the image folder or a list is missing.
    """
    info, path = dataset_dir.info, dataset_dir.path
    if missing := [str(folder) for folder in info.image_dirs(path) if not os.path.isdir(folder)]:
        raise FileNotFoundError(f"the image folder {truncate_list(missing)} is missing")
    if info.split_file and os.path.lexists(path / info.split_file):
        return read_split_file(dataset_dir, path / info.split_file)
    try:
        split = info.read_data(dataset_dir)
    except FileNotFoundError as error:
        without = f"there is no {info.split_file}, and " if info.split_file else ""
        raise FileNotFoundError(f"{without}the download lacks {error.filename}") from error
    return replace(split, origin="made") if info.split_file else split


def read_split_file(dataset_dir: DatasetDir, path: Path) -> Split:
    """Read {"train": [[path, label, class name], ...], "val": [...], "test": [...]}."""
    data = read_json(path)
    parts = [data.get(part) for part in SPLITS] if isinstance(data, dict) else [None]
    if not all(isinstance(part, list) for part in parts):
        raise ValueError(f"{path} lacks a list named train, val or test: get the file again")
    if bad := [repr(sample)[:60] for part in parts for sample in part if not is_sample(sample)]:
        form = "[path, label, class name]"
        raise ValueError(f"{path} has entries that are not {form}: {truncate_list(bad)}")
    rows = [
        (part, dataset_dir.find_path(image), (label, nfc(name)))
        for part, samples in zip(SPLITS, parts, strict=True)
        for image, label, name in samples
    ]
    origin, notes = "published", ()
    if dataset_dir.info.custom_path:
        origin, (rows, notes) = "own", drop_repeats(path, rows)
    parts = [[(image, *sample) for p, image, sample in rows if p == part] for part in SPLITS]
    names = dict(sorted(sample for _, _, sample in rows))
    return Split(str(path), *parts, names, origin, notes=notes)


def drop_repeats(
    source_path: Path, rows: Iterable[tuple[str, str, T]]
) -> tuple[list[tuple[str, str, T]], tuple[str, ...]]:
    """Drop repeats among rows (part, path, label) of a user's list, with a note on them.

    Raises:
        ValueError: One path is in two parts or has two labels.
    """
    rows = [(part, posixpath.normpath(path), label) for part, path, label in rows]
    unique = list(dict.fromkeys(rows))
    places: dict[str, tuple[str, T]] = {}
    for part, path, label in unique:
        previous = places.setdefault(path, (part, label))
        if previous != (part, label):
            raise ValueError(
                f"{source_path} has the image {path} twice, in {previous[0]} as {previous[1]} and "
                f"in {part} as {label}: take one of the lines out"
            )
    repeats = len(rows) - len(unique)
    return unique, (f"{plural(repeats, 'repeated line')} of {source_path} dropped",)[: repeats > 0]


def is_sample(value: Any) -> bool:
    """Return whether a value is [path, label, class name]."""
    if not isinstance(value, list) or list(map(type, value)) != [str, int, str]:
        return False
    return bool(value[0] and value[2].strip())


def save_generated_split(dataset_dir: DatasetDir, split: Split) -> None:
    """Save a split made from the raw download, and print that it is not the published one.

    It is saved next to the data under another name, with the SHA-256 of its samples. An earlier one
    of other samples is replaced.
    """
    split_file = dataset_dir.info.split_file
    path = dataset_dir.path / split_file.replace("split_zhou_", "split_so_")
    note = "made from the raw download; not comparable to published figures"
    parts = {part: getattr(split, part) for part in SPLITS}
    content = json.dumps({"note": note, "digest": split.sha256(), **parts}).encode()
    state = "made now"
    try:
        if path.exists():
            is_same = path.read_bytes() == content
            state = "made earlier" if is_same else "made again, since the data has changed"
        if state != "made earlier":
            atomic_write(path, content)
    except OSError as error:
        state += f", not saved: {error.strerror or error}"
    print(
        f"note: {dataset_dir.name}: there is no {split_file} in {dataset_dir.path}; using a split "
        f"made from the raw data ({path.name}, {state}), not comparable to published figures; see "
        f"DATASETS.md, section {dataset_dir.info.title}, for the published one",
        file=sys.stderr,
    )


def check_split(dataset_dir: DatasetDir, split: Split) -> None:
    """Check labels, paths, files and classes; raise the first fault as ValueError or OSError."""
    for check in CHECKS:
        check(dataset_dir, split)


def check_labels(dataset_dir: DatasetDir, split: Split) -> None:
    """Check that labels run from 0, and that each stands for one class name."""
    names = split.lab2cname
    labels = sorted({*names, *(label for _, label, _ in split.samples())})
    if not labels:
        raise FileNotFoundError(f"{split.source_path} has no images: add them or get it again")
    if dataset_dir.info.custom_path and len(labels) == 1:
        raise ValueError(f"{split.source_path} has one class: a task takes two or more")
    if unexpected := sorted(set(labels) ^ set(range(len(labels)))):
        raise ValueError(
            f"labels in {split.source_path} must run from 0 to {len(labels) - 1} without gaps, but "
            f"{truncate_list(map(str, unexpected))} is missing or extra"
        )
    for _, label, name in split.samples():
        if name != names[label]:
            raise ValueError(
                f"in {split.source_path}, label {label} stands for {names[label]!r} and {name!r}"
            )


def check_paths(dataset_dir: DatasetDir, split: Split) -> None:
    """Check that paths and class names are text, and that paths stay in the image folder."""
    paths = dict.fromkeys(path for path, _, _ in split.samples())
    if bad := [name for name in (*paths, *split.lab2cname.values()) if NOT_UTF_8.search(name)]:
        raise ValueError(f"{split.source_path} has {truncate_list(bad)}, not UTF-8: rename it")
    if outside := [path for path in paths if UNSAFE_PATH.search(path)]:
        raise ValueError(
            f"{split.source_path} names {truncate_list(outside)}, outside of the image folder "
            f"{dataset_dir.image_dir}: paths must be relative and without '..'"
        )


def check_files(dataset_dir: DatasetDir, split: Split) -> None:
    """Check that all images exist.

    Each folder is listed once: on a network file system that is far cheaper than a question for
    each image.
    """
    if split.files_exist:
        return
    paths = dict.fromkeys(path for path, _, _ in split.samples())
    files = set()
    for folder in {os.path.dirname(path) for path in paths}:
        with suppress(OSError, ValueError):  # no such folder, or a name that no folder can have
            names = list_entries(dataset_dir.image_path(folder))[0]
            files.update(os.path.join(folder, name) for name in names)
    # Hidden files are not in the list, nor are names in other capitals where case does not count.
    missing = [
        path for path in paths.keys() - files if not os.path.isfile(dataset_dir.image_path(path))
    ]
    if missing:
        raise FileNotFoundError(
            f"{truncate_list(sorted(missing))}: named in {split.source_path}, missing in "
            f"{dataset_dir.image_dir} ({len(missing)} of {plural(len(paths), 'image')}): correct "
            "the paths, or complete the download"
        )


def check_classes(dataset_dir: DatasetDir, split: Split) -> None:
    """Check that each class has images to train and to test with."""
    notes = "".join(f"; {note}" for note in split.notes)
    for part in ("test",) if dataset_dir.info.test_only else ("train", "test"):
        present = {label for _, label, _ in getattr(split, part)}
        if lacking := [repr(name) for i, name in split.lab2cname.items() if i not in present]:
            raise ValueError(
                f"{split.source_path} has no {SPLIT_TITLES[part]} images of the class "
                f"{truncate_list(lacking)}: add some, 4 if the class is divided here, or remove "
                f"the class{notes}"
            )


CHECKS = (check_labels, check_paths, check_files, check_classes)


def format_counts(info: DatasetInfo, split: Split) -> dict[str, str]:
    """Return the numbers of classes and images: "47", or "12 of 47" if 47 were published.

    They are named "classes" and as in SPLITS; parts that the dataset does not have are left out.
    """
    counts = {"classes": len(split.lab2cname), **split.num_images()}
    published = dict(zip(counts, (info.num_classes, *info.num_images), strict=True))
    return {
        key: str(count) if published[key] in (None, count) else f"{count} of {published[key]}"
        for key, count in counts.items()
        if count or published[key] is not None
    }


def count_mismatch(dataset_dir: DatasetDir, split: Split) -> str:
    """Return a sentence on numbers that differ from the published ones, or ""."""
    nouns = {"classes": "classes", **{part: f"{t} images" for part, t in SPLIT_TITLES.items()}}
    counts = format_counts(dataset_dir.info, split)
    differing = [f"{text} {nouns[key]}" for key, text in counts.items() if " of " in text]
    if not differing:
        return ""
    return (
        f"{dataset_dir.name}: not the published numbers in {dataset_dir.path}: "
        f"{', '.join(differing)}; the download is incomplete, or this is another split; see "
        f"DATASETS.md, section {dataset_dir.info.title}"
    )
