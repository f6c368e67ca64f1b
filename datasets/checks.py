"""Checks of a split: labels, classes, files, numbers. Faults are returned, not raised.

One set of checks serves `build_dataset`, which ends with the first fault, and the doctor, which
shows them all.
"""

import os
from collections.abc import Iterator

from datasets.base import PARTS, DatasetSpec, Source, Split, exists
from utils import first_few

WORDS = {"train": "training", "val": "validation", "test": "test"}


def check_split(source: Source, split: Split) -> list[Exception]:
    """All faults of a split: in its classes, in its names, in its files."""
    return [*check_classes(source, split), *check_names(source, split), *check_files(source, split)]


def check_classes(source: Source, split: Split) -> Iterator[Exception]:
    """Yield faults of labels and classes that do not add up."""
    where, names = split.where, split.names
    twice = {}
    for _, label, name in split.entries():
        if names.get(label, name) != name:
            twice[label] = f"label {label} stands for {names[label]!r} and {name!r}"
    if twice:
        yield source.error(f"in {where}, {first_few(twice.values())}; get the file again")
    labels = sorted({*names, *(label for _, label, _ in split.entries())})
    if not labels:
        yield source.missing(f"{where} has no images at all", "get it again")
    elif labels != list(range(len(labels))):
        odd = set(labels) ^ set(range(len(labels)))
        yield source.error(
            f"labels in {where} must run from 0 to {len(labels) - 1}, one for each class, "
            f"which {first_few(map(str, sorted(odd)))} breaks; get the file again"
        )
    for part in ("train", "test"):
        present = {label for _, label, _ in getattr(split, part)}
        if lacking := [repr(names[label]) for label in sorted(set(names) - present)]:
            yield source.missing(
                f"{where} has no {WORDS[part]} images of the class {first_few(lacking)}",
                "the download or the list is incomplete",
                ValueError,
            )


def check_names(source: Source, split: Split) -> Iterator[Exception]:
    """Yield faults of names: not text, or leading out of the image folder."""
    garbled, outside = [], []
    for path in dict.fromkeys([*(path for path, _, _ in split.entries()), *split.names.values()]):
        try:
            path.encode()
        except UnicodeEncodeError:  # bytes on the disk that are not UTF-8
            garbled.append(path)
    for path in dict.fromkeys(path for path, _, _ in split.entries()):
        if (
            os.path.isabs(path)
            or path[:1] in ("/", "\\")
            or ".." in path.replace("\\", "/").split("/")
        ):
            outside.append(path)
    if garbled:
        yield source.error(f"{split.where} has {first_few(garbled)}, not UTF-8; rename it")
    if outside:
        yield source.error(
            f"{split.where} names {first_few(outside)}, outside of the image folder "
            f"{source.images}: paths must be relative and without '..'"
        )


def check_files(source: Source, split: Split) -> Iterator[Exception]:
    """Yield the entries whose image is missing.

    Each folder is listed once, which on a network file system is far cheaper than asking for each
    image.
    """
    by_folder: dict[str, list[str]] = {}
    for path in dict.fromkeys(path for path, _, _ in split.entries()):
        by_folder.setdefault(os.path.dirname(path), []).append(path)
    missing, instead = [], ""
    for folder, paths in by_folder.items():
        try:
            with os.scandir(source.locate(folder)) as listing:
                present = {item.name for item in listing if exists(item.is_file)}
        except (OSError, ValueError):  # no such folder, or a name that no folder can have
            present = set()
        # A file system that ignores case may know a name that is not in its list.
        lost = [
            path
            for path in paths
            if os.path.basename(path) not in present and not os.path.isfile(source.locate(path))
        ]
        missing += lost
        if lost and not instead:
            stem = os.path.splitext(os.path.basename(lost[0]))[0]
            others = [name for name in present if os.path.splitext(name)[0] == stem]
            instead = f" ({others[0]} is there instead)" if others else ""
    if missing:
        yield source.missing(
            f"{first_few(missing)}: named in {split.where}, missing in {source.images}{instead}",
            "the download is incomplete or lies elsewhere",
        )


def numbers(spec: DatasetSpec, split: Split) -> dict[str, str]:
    """Classes and images of each part: "47", "12 of 47" where another number was published.

    Returns:
        By "classes" and the names in PARTS; without parts that the dataset does not have.
    """
    found = {"classes": len(split.names), **{part: len(getattr(split, part)) for part in PARTS}}
    published = dict(zip(found, (spec.classes, *spec.counts), strict=True))
    return {
        key: str(count) if count == published[key] else f"{count} of {published[key]}"
        for key, count in found.items()
        if published[key] is not None
    }


def shortfall(source: Source, split: Split) -> str:
    """A sentence on numbers that differ from the published ones; "" where none does."""
    nouns = {"classes": "classes", **{part: f"{word} images" for part, word in WORDS.items()}}
    found = numbers(source.spec, split)
    differing = [f"{text} {nouns[key]}" for key, text in found.items() if " of " in text]
    if not differing:
        return ""
    return (
        f"{source.name}: not the published numbers in {source.folder}: {', '.join(differing)}; the "
        "download is incomplete, or this is another split; see DATASETS.md, section "
        f"{source.spec.title}"
    )
