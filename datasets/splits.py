"""Splits: published split files, those made from a raw download, and the checks of both."""

import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets.base import SPLITS, DatasetDir, DatasetInfo, Split
from datasets.files import PathLike, list_entries, nfc, read_json
from utils import atomic_write, plural, truncate_list

SAMPLE_KEYS = ("impath", "label", "classname")
NOT_UTF_8 = re.compile("[\ud800-\udfff]")  # how Python spells such bytes in a file's name
UNSAFE_PATH = re.compile(r"^([A-Za-z]:)?[/\\]|(^|[/\\])\.\.([/\\]|$)")  # absolute, or with ".."


def read_split(dataset_dir: DatasetDir) -> Split:
    """Read all samples of a dataset: from the published split file, or from the raw download."""
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


def read_split_file(
    dataset_dir: DatasetDir, path: Path, remedy: str = "get the file again"
) -> Split:
    """Read a file as `parse_samples` describes it, with all three parts."""
    data = read_json(path, remedy)
    parts = {
        part: [(dataset_dir.find_path(image), label, nfc(name)) for image, label, name in samples]
        for part, samples in parse_samples(data, SPLITS, path, remedy).items()
    }
    classes = {sample[1:] for samples in parts.values() for sample in samples}
    return Split(str(path), **parts, lab2cname=dict(sorted(classes)))


def parse_samples(
    data: Any, parts: Iterable[str], path: PathLike, remedy: str
) -> dict[str, list[list]]:
    """Check a list {"train": [[path, label, class name], ...], ...}; return its samples by part.

    An entry may also be a dict of SAMPLE_KEYS, as in lists of the cross-modal adaptation code.
    """
    samples = {}
    for part in parts:
        entries = data.get(part) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path} lacks a list named {part}: {remedy}")
        entries = [[e.get(k) for k in SAMPLE_KEYS] if isinstance(e, dict) else e for e in entries]
        if bad := [repr(entry)[:60] for entry in entries if not is_sample(entry)]:
            form = "[path, label, class name]"
            raise ValueError(f"{path} has entries in {part} that are not {form}: {bad[0]}")
        samples[part] = entries
    return samples


def is_sample(value: Any) -> bool:
    if not isinstance(value, list) or list(map(type, value)) != [str, int, str]:
        return False
    return bool(value[0] and value[2].strip())


def save_generated_split(dataset_dir: DatasetDir, split: Split) -> None:
    """Save a split made from the raw download next to the data, and print that it was made."""
    split_file = dataset_dir.info.split_file
    path = dataset_dir.path / split_file.replace("split_zhou_", "split_so_")
    note = "made from the raw download; not comparable to published figures"
    content = json.dumps({"note": note, "digest": split.sha256(), **split.parts}).encode()
    state = "made earlier"
    try:
        if not path.exists() or path.read_bytes() != content:
            state = "made again, since the data has changed" if path.exists() else "made now"
            atomic_write(path, content)
    except OSError as error:
        state += f", not saved: {error.strerror or error}"
    print(
        f"note: {dataset_dir.name}: there is no {split_file} in {dataset_dir.path}; using a split "
        f"made from the raw data ({path.name}, {state}), not comparable to published figures; see "
        f"DATASETS.md, section {dataset_dir.info.title}, for the published one",
        file=sys.stderr,
    )


def find_problems(dataset_dir: DatasetDir, split: Split, test_only: bool = False) -> Iterator[str]:
    """Yield what is wrong with a split's labels, class names, paths, files and classes."""
    source, names, folder = split.source_path, split.lab2cname, dataset_dir.image_dir
    classes = sorted({*names.items(), *(sample[1:] for sample in split.samples())})
    labels = {label for label, _ in classes}
    if not labels:
        yield f"{source} has no images: add them or get it again"
    if dataset_dir.info.custom_path and len(labels) == 1:
        inner = folder / classes[0][1]
        yield f"{source} has one class: a task takes two or more (are they in {inner}?)"
    if unexpected := sorted(labels ^ set(range(len(labels)))):
        numbers = truncate_list(map(str, unexpected))
        yield f"labels in {source} must run from 0 without gaps, but {numbers} is missing or extra"
    for label, name in classes:
        if name != names[label]:
            yield f"{source} has label {label} for {names[label]!r} and {name!r}: number them anew"
    paths = dict.fromkeys(path for path, _, _ in split.samples())
    if bad := [name for name in (*paths, *names.values()) if NOT_UTF_8.search(name)]:
        yield f"{source} has {truncate_list(bad)}, not UTF-8: rename it"
    if outside := [path for path in paths if UNSAFE_PATH.search(path)]:
        yield (
            f"{source} names {truncate_list(outside)}, outside of the image folder {folder}: paths "
            "must be relative and without '..'"
        )
    missing = [] if split.files_exist else find_missing(dataset_dir, paths)
    if missing:
        count = f"{len(missing)} of {plural(len(paths), 'image')}"
        yield (
            f"{truncate_list(missing)}: named in {source}, missing in {folder} ({count}): correct "
            "the paths, or complete the download"
        )
    notes = "".join(f"; {note}" for note in split.notes)
    needed = {"train": "training", "test": "test"}
    for part in ("test",) if test_only or dataset_dir.info.test_only else needed:
        present = {label for _, label, _ in split.parts[part]}
        if lacking := [repr(name) for label, name in names.items() if label not in present]:
            yield (
                f"{source} has no {needed[part]} images of the class {truncate_list(lacking)}: add "
                f"some, 4 if the class is divided here, or remove the class{notes}"
            )


def find_missing(dataset_dir: DatasetDir, paths: Collection[str]) -> list[str]:
    """Return the paths that are no files. On network disks, listing folders is the fastest way."""
    files = set()
    for folder in {os.path.dirname(path) for path in paths}:
        with suppress(OSError, ValueError):  # no such folder, or a name that no folder can have
            names = list_entries(dataset_dir.image_path(folder))[0]
            files.update(os.path.join(folder, name) for name in names)
    # Hidden files are not in the list, nor are names in other capitals where case does not count.
    unlisted = sorted(set(paths) - files)
    return [path for path in unlisted if not os.path.isfile(dataset_dir.image_path(path))]


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


def count_mismatch(dataset_dir: DatasetDir, split: Split) -> Iterator[str]:
    """Yield a sentence on numbers that differ from the published ones, if any do."""
    counts = format_counts(dataset_dir.info, split)
    if differing := [f"{text} {key}" for key, text in counts.items() if " of " in text]:
        yield (
            f"not the published numbers in {dataset_dir.path}: {', '.join(differing)}; incomplete, "
            f"or another split; see DATASETS.md, section {dataset_dir.info.title}"
        )
