"""Checks of a split: labels, classes, files, numbers. Faults are returned, not raised.

One set of checks serves `build_dataset`, which ends with the first fault, and the doctor, which
shows them all.
"""

import os
import re
from collections.abc import Iterator

from datasets.base import DatasetDir, DatasetInfo, Split, exists
from utils import plural, truncate_list

NOT_UTF_8 = re.compile("[\ud800-\udfff]")  # how Python spells such bytes in a file's name
OUTSIDE = re.compile(r"^([A-Za-z]:)?[/\\]|(^|[/\\])\.\.([/\\]|$)")  # absolute, or with ".."
WORDS = {"train": "training", "val": "validation", "test": "test"}


def check_split(source: DatasetDir, split: Split) -> list[Exception]:
    """All faults of a split: in its classes, in its names, in its files."""
    checks = [check_labels, check_names, check_files, check_classes]
    if split.listed:
        checks.remove(check_files)
    return [fault for check in checks for fault in check(source, split)]


def check_labels(source: DatasetDir, split: Split) -> Iterator[Exception]:
    """Yield faults of labels that do not add up."""
    where, names = split.where, split.names
    again = source.remedy("get the file again")
    twice = {}
    for _, label, name in split.entries():
        if names.get(label, name) != name:
            twice[label] = f"label {label} stands for {names[label]!r} and {name!r}"
    if twice:
        yield source.error(f"in {where}, {truncate_list(twice.values())}; {again}")
    labels = sorted({*names, *(label for _, label, _ in split.entries())})
    if not labels:
        yield source.missing(
            f"{where} has no images at all", source.remedy("get it again", "add some")
        )
    elif source.spec.place and len(labels) == 1:
        yield source.error(f"{where} has one class, {names[labels[0]]!r}; a task takes two or more")
    elif labels != list(range(len(labels))):
        odd = set(labels) ^ set(range(len(labels)))
        yield source.error(
            f"labels in {where} must run from 0 to {len(labels) - 1}, one for each class, "
            f"which {truncate_list(map(str, sorted(odd)))} breaks; {again}"
        )


def check_classes(source: DatasetDir, split: Split) -> Iterator[Exception]:
    """Yield faults of classes without images to train or to test with."""
    names = split.names
    for part in ("test",) if source.spec.test_only else ("train", "test"):
        present = {label for _, label, _ in getattr(split, part)}
        if lacking := [repr(names[label]) for label in sorted(set(names) - present)]:
            yield source.missing(
                f"{split.where} has no {WORDS[part]} images of the class {truncate_list(lacking)}",
                source.remedy(
                    "the download or the list is incomplete",
                    "add some, 4 for a class that is to be divided here, or remove the class",
                ),
                ValueError,
            )


def check_names(source: DatasetDir, split: Split) -> Iterator[Exception]:
    """Yield faults of names: not text, or leading out of the image folder."""
    paths = dict.fromkeys(path for path, _, _ in split.entries())
    if garbled := [name for name in (*paths, *split.names.values()) if NOT_UTF_8.search(name)]:
        yield source.error(f"{split.where} has {truncate_list(garbled)}, not UTF-8; rename it")
    if outside := [path for path in paths if OUTSIDE.search(path)]:
        yield source.error(
            f"{split.where} names {truncate_list(outside)}, outside of the image folder "
            f"{source.images}: paths must be relative and without '..'"
        )


def check_files(source: DatasetDir, split: Split) -> Iterator[Exception]:
    """Yield the entries whose image is missing.

    Each folder is listed once, which on a network file system is far cheaper than asking for each
    image.
    """
    by_folder: dict[str, list[str]] = {}
    paths_of_all = dict.fromkeys(path for path, _, _ in split.entries())
    for path in paths_of_all:
        by_folder.setdefault(os.path.dirname(path), []).append(path)
    missing, instead = [], ""
    for folder, paths in by_folder.items():
        try:
            with os.scandir(source.locate(folder)) as listing:
                present = {item.name for item in listing if exists(item.is_file)}
        except (OSError, ValueError):  # no such folder, or a name that no folder can have
            present = set()
        for path in paths:
            name = os.path.basename(path)
            # A file system that ignores case may know a name that is not in its list.
            if name not in present and not os.path.isfile(source.locate(path)):
                if not missing:
                    stem = os.path.splitext(name)[0] + "."
                    instead = next((f" ({n} is there)" for n in present if n.startswith(stem)), "")
                missing.append(path)
    if missing:
        names = truncate_list(sorted(missing))
        yield source.missing(
            f"{names}: named in {split.where}, missing in {source.images}{instead} "
            f"({len(missing)} of {plural(len(paths_of_all), 'image')})",
            source.remedy("the download is incomplete or lies elsewhere", "correct the paths"),
        )


def format_counts(spec: DatasetInfo, split: Split) -> dict[str, str]:
    """Classes and images of each part: "47", "12 of 47" where another number was published.

    Returns:
        By "classes" and the names in PARTS; without parts that the dataset does not have.
    """
    found = {"classes": len(split.names), **split.counts()}
    published = dict(zip(found, (spec.classes, *spec.counts), strict=True))
    return {
        key: str(count) if published[key] in (None, count) else f"{count} of {published[key]}"
        for key, count in found.items()
        if count or published[key] is not None
    }


def count_mismatch(source: DatasetDir, split: Split) -> str:
    """A sentence on numbers that differ from the published ones; "" where none does."""
    nouns = {"classes": "classes", **{part: f"{word} images" for part, word in WORDS.items()}}
    found = format_counts(source.spec, split)
    differing = [f"{text} {nouns[key]}" for key, text in found.items() if " of " in text]
    if not differing:
        return ""
    return (
        f"{source.name}: not the published numbers in {source.folder}: {', '.join(differing)}; the "
        "download is incomplete, or this is another split; see DATASETS.md, section "
        f"{source.spec.title}"
    )
