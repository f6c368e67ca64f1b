"""Split files: the published ones, and those made from a raw download when there is none."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets.base import PARTS, Entry, Source, Split, few_of
from datasets.checks import check_split
from utils import atomic_write


def read_split(source: Source, save: bool = True) -> Split:
    """Read all entries of a dataset; what is wrong with them goes to `source.problems`.

    The published split file decides when it is there. Otherwise the split made by an earlier run
    is used again, or one is made from the raw download, which leaves Python's global generator
    alone, and saved beside the data under a name of its own.

    Args:
        source: The dataset's folder.
        save: Save a split that was made, and announce it on standard error.

    Raises:
        ValueError: A list or split file cannot be read at all.
        FileNotFoundError: There is neither split file nor raw list.
    """
    spec = source.spec
    if spec.split is None:
        return _read_raw(source)
    published = source.folder / spec.split
    if os.path.lexists(published):
        return read_split_file(source, published)
    made = source.folder / made_name(spec.split)
    if os.path.lexists(made):
        split, state = read_split_file(source, made), "made earlier"
    elif spec.read is None:
        remedy = f"move {source.folder} away, and it is made again"
        raise source.error(f"the split file {published} is missing; {remedy}", FileNotFoundError)
    elif source.problems:  # no image folder: there is nothing to make a split of
        raise source.problems.pop()
    else:
        split, state = _read_raw(source), "not saved"
        if save and not source.problems:
            state = _save(made, split)
    if save and not source.problems:
        print(
            f"{source.name}: there is no {spec.split} in {source.folder}; using a split made from "
            f"the raw data ({made.name}, {state}), not comparable to published figures. "
            f"DATASETS.md, section {spec.title}, says where to get the published one.",
            file=sys.stderr,
        )
    return replace(split, published=False)


def _read_raw(source: Source) -> Split:
    """Read the download's own folders and lists."""
    try:
        return source.spec.read(source)
    except PermissionError as error:
        raise source.error(f"{error.filename} may not be read; correct its permissions") from error


def made_name(split: str) -> str:
    """Name of the split made here in place of a published one."""
    return split.replace("split_zhou_", "split_so_")


def _save(path: Path, split: Split) -> str:
    """Write a split in the published ones' form; say what became of it."""
    parts = {part: getattr(split, part) for part in PARTS}
    note = "made by datasets/raw.py from the raw download; not comparable to published figures"
    try:
        atomic_write(path, json.dumps({"note": note, **parts}))
    except OSError as error:
        return f"not saved: {error.strerror or error}"
    return "saved for the next run"


def read_split_file(source: Source, path: Path) -> Split:
    """Read {"train": [[relative path, label, class name], ...], "val": ..., "test": ...}."""
    remedy = "get the file again"
    if path.name == made_name(source.spec.split):
        remedy = "delete it, and it is made again"
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")  # reading a pipe would never end
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise source.error(f"{path} cannot be read as JSON ({error}); {remedy}") from error
    data = data if isinstance(data, dict) else {}
    if lacking := [part for part in PARTS if not isinstance(data.get(part), list)]:
        raise source.error(f"the split file {path} lacks the part {', '.join(lacking)}; {remedy}")
    parts: dict[str, list[Entry]] = {part: [] for part in PARTS}
    bad = []
    for part in PARTS:
        for entry in data[part]:
            if _well_formed(entry):
                parts[part].append(tuple(entry))
            else:
                bad.append(f"{part}: {repr(entry)[:60]}")
    if bad:
        source.report(
            f"the split file {path} has entries that are not [path, label, class name]: "
            f"{few_of(bad)}; {remedy}"
        )
    return check_split(source, str(path), **parts)


def _well_formed(entry: Any) -> bool:
    """Whether an entry is a path, a label and a class name."""
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    path, label, name = entry
    if not isinstance(path, str) or not isinstance(name, str) or type(label) is not int:
        return False
    try:
        (path + name).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return "\0" not in path + name and bool(name.strip())
