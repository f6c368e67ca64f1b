"""Checks of a split's labels, classes and files: what is wrong is reported, not raised.

One set of checks serves `build_dataset`, which ends with the first report, and the doctor, which
shows them all.
"""

import os
from collections.abc import Iterable

from datasets.base import Entry, Source, Split, few_of, on_disk, there


def check_split(
    source: Source,
    where: str,
    train: list[Entry],
    val: list[Entry],
    test: list[Entry],
    classnames: Iterable[str] = (),
) -> Split:
    """Make a split of entries, reporting all that is wrong with its classes and its files."""
    split = check_classes(source, where, train, val, test, classnames)
    check_files(source, where, split)
    return split


def check_classes(
    source: Source,
    where: str,
    train: list[Entry],
    val: list[Entry],
    test: list[Entry],
    classnames: Iterable[str] = (),
) -> Split:
    """Make a split of entries, reporting labels and classes that do not add up.

    Args:
        source: Takes the reports.
        where: What the entries were read from.
        train: Its entries; so are `val` and `test`.
        val: May be empty.
        test: Must hold every class, like `train`.
        classnames: By label, where they are known apart from the entries.
    """
    names = dict(enumerate(classnames))
    twice = {}
    for _, label, name in (*train, *val, *test):
        if names.setdefault(label, name) != name:
            twice[label] = f"label {label} stands for {names[label]!r} and {name!r}"
    if twice:
        source.report(f"in {where}, {few_of(twice.values())}; get the file again")
    # What Python makes of bytes that are no text; a folder's name may hold any.
    if garbled := [
        n for n in names.values() if any("\ud800" <= letter <= "\udfff" for letter in n)
    ]:
        source.report(f"{where} has the class {few_of(garbled)}, which is no UTF-8; rename it")
    labels = sorted(names)
    if not labels:
        source.report(f"{where} has no images at all; get it again", FileNotFoundError)
    elif labels != list(range(len(labels))):
        odd = set(labels) ^ set(range(len(labels)))
        source.report(
            f"labels in {where} must run from 0 to {len(labels) - 1}, one for each class, "
            f"which {few_of(map(str, sorted(odd)))} breaks; get the file again"
        )
    for part, entries in (("training", train), ("test", test)):
        if lacking := set(names) - {label for _, label, _ in entries}:
            classes = few_of(repr(names[label]) for label in sorted(lacking))
            source.report(
                f"{where} has no {part} images of the class {classes}; "
                "the download or the list is incomplete"
            )
    return Split(train, val, test, [names[label] for label in labels])


def check_files(source: Source, where: str, split: Split) -> None:
    """Report entries whose image is missing or outside the image folder.

    Each folder is listed once, which on a network file system is far cheaper than asking for each
    image. The image folder may be a link to anywhere; what lies in it may not lead out of it.
    """
    if not os.path.isdir(source.images):
        return  # reported already
    by_folder: dict[str, list[str]] = {}
    for path in dict.fromkeys(path for path, _, _ in (*split.train, *split.val, *split.test)):
        by_folder.setdefault(os.path.dirname(path), []).append(path)
    missing, outside = [], []
    for folder, paths in by_folder.items():
        try:
            if _leaves(source, folder):
                outside += paths
                continue
            with os.scandir(source.locate(folder)) as listing:
                present = {item.name: item.is_symlink() for item in listing if there(item.is_file)}
        except (OSError, ValueError):  # no such folder, or no name that a folder can have
            present = {}
        for path in paths:
            name = on_disk(os.path.basename(path))
            # A file system that ignores case may know a name that is not in its list.
            if name not in present and not os.path.isfile(source.locate(path)):
                missing.append(path)
            elif present.get(name, True) and _leaves(source, path):
                outside.append(path)
    if outside:
        source.report(
            f"{where} names {few_of(outside)}, outside of the image folder {source.images}: paths "
            "must be relative, without '..' and not through a link that leads elsewhere"
        )
    if missing:
        source.report(
            f"{few_of(missing)}: named in {where}, missing in {source.images}; "
            "the download is incomplete or lies elsewhere",
            FileNotFoundError,
        )


def _leaves(source: Source, path: str) -> bool:
    """Whether a path of the split leads out of the image folder, links followed."""
    parts = path.replace("\\", "/").split("/")
    if os.path.isabs(path) or ".." in parts:
        return True
    top = parts[0] if parts[0] in source.spec.links else ""
    base = os.path.realpath(source.images / top)
    real = os.path.realpath(source.locate(path))
    return real != base and not real.startswith(os.path.join(base, ""))
