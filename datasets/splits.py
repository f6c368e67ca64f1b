"""Split files: the published ones, and those made from a raw download where there is none."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets.base import SPLITS, DatasetDir, RawSample, Split
from datasets.checks import check_split
from utils import atomic_write, truncate_list

Read = tuple[Split, list[Exception]]


def read_split(source: DatasetDir, save: bool = True) -> Read:
    """Read all entries of a dataset, and all that is wrong with them.

    The published split file decides when it is there. Otherwise a split is made from the raw
    download, which leaves Python's global generator alone, and saved beside the data under a name
    of its own. The saved one is used as long as the download gives the same.

    Args:
        source: The dataset's folder.
        save: Save a split that was made, and announce it on standard error.

    Raises:
        ValueError: A list or split file cannot be read at all.
        FileNotFoundError: The image folder is missing, or all that a split can be made of.
    """
    spec = source.spec
    if spec.prepare and not os.path.lexists(source.folder / spec.split):
        return spec.read(source), []  # as it will be made on first use
    folders = [str(path) for path in spec.image_folders(source.folder) if not path.is_dir()]
    if folders:
        raise source.missing(f"the image folder {truncate_list(folders)} is missing")
    if spec.split and os.path.lexists(source.folder / spec.split):
        return read_split_file(source, source.folder / spec.split)
    try:
        split = spec.read(source)
    except PermissionError as error:
        raise source.error(f"{error.filename} may not be read; correct its permissions") from error
    if spec.split and not spec.place:
        return _made_split(source, replace(split, kind="made"), save)
    return split, check_split(source, split)


def _made_split(source: DatasetDir, fresh: Split, save: bool) -> Read:
    """The split that an earlier run saved, if it was made of the same data; else the fresh one."""
    spec, digest = source.spec, fresh.digest()
    path = source.folder / generated_split_name(spec.split)
    saved = _load(source, path) if os.path.lexists(path) else None
    if saved and saved.get("digest") == digest:
        split, problems = read_split_file(source, path)
        split, state = replace(split, kind="made"), "made earlier"
    else:
        split, problems, state = fresh, check_split(source, fresh), "made now"
        if saved:
            state = "made anew: the data has changed since the saved one was made"
            if "digest" not in saved:
                state = "made anew: the saved one does not say of which data it was made"
        if save and not problems:
            state += _save(path, split, digest)
    if save and not problems:
        print(
            f"note: {source.name}: there is no {spec.split} in {source.folder}; using a split made "
            f"from the raw data ({path.name}, {state}), not comparable to published figures. "
            f"DATASETS.md, section {spec.title}, says where to get the published one.",
            file=sys.stderr,
        )
    return split, problems


def generated_split_name(split: str) -> str:
    """Name of the split made here in place of a published one."""
    return split.replace("split_zhou_", "split_so_")


def _save(path: Path, split: Split, digest: str) -> str:
    """Write a split in the published ones' form; return what to say of a failure."""
    note = "made by datasets/readers.py from the raw download; not comparable to published figures"
    parts = {part: getattr(split, part) for part in SPLITS}
    try:
        atomic_write(path, json.dumps({"note": note, "digest": digest, **parts}))
    except OSError as error:
        return f", not saved: {error.strerror or error}"
    return ""


def read_split_file(source: DatasetDir, path: Path) -> Read:
    """Read {"train": [[relative path, label, class name], ...], "val": ..., "test": ...}."""
    data = _load(source, path)
    parts: dict[str, list[RawSample]] = {part: [] for part in SPLITS}
    names: dict[int, str] = {}
    bad = []
    for part in SPLITS:
        for entry in data[part]:
            if is_valid_entry(entry):
                image, label, name = entry
                parts[part].append((to_posix_path(source, image), label, name))
                names.setdefault(label, name)
            else:
                bad.append(f"{part}: {repr(entry)[:60]}")
    kind = "own" if source.spec.place else "published"
    split = Split(str(path), **parts, names=dict(sorted(names.items())), kind=kind)
    problems = check_split(source, split)
    if bad:
        form = "entries that are not [path, label, class name]"
        problems.insert(
            0, source.unreadable(path, f"has {form}: {truncate_list(bad)}; {_remedy(source, path)}")
        )
    return split, problems


def _load(source: DatasetDir, path: Path) -> dict[str, Any]:
    """The content of a split file, with a list for each part."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")  # reading a pipe would never end
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        fault = f"cannot be read as JSON ({error}); {_remedy(source, path)}"
        raise source.unreadable(path, fault) from error
    data = data if isinstance(data, dict) else {}
    if lacking := [part for part in SPLITS if not isinstance(data.get(part), list)]:
        raise source.unreadable(
            path, f"lacks the part {', '.join(lacking)}; {_remedy(source, path)}"
        )
    return data


def _remedy(source: DatasetDir, path: Path) -> str:
    """What helps with a broken split file."""
    made = path.name.startswith("split_so_")
    return "delete it, and it is made again" if made else source.remedy("get the file again")


def to_posix_path(source: DatasetDir, path: str) -> str:
    """A path as written on Windows, with "/" where that finds the file."""
    if "\\" in path and os.path.isfile(source.locate(path.replace("\\", "/"))):
        return path.replace("\\", "/")
    return path


def is_valid_entry(entry: Any) -> bool:
    """Whether an entry is a path, a label and a class name."""
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    path, label, name = entry
    if not isinstance(path, str) or not isinstance(name, str) or type(label) is not int:
        return False
    try:
        (path + name).encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in path + name and bool(name.strip())
