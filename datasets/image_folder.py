"""A user's own images as rows of the table, made on the fly: a folder, a CSV or a JSON file.

DATASETS.md, section "Your own images", shows the forms. A JSON file is read as the split files are.
"""

import csv
import io
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasets.base import (
    SPLITS,
    DatasetDir,
    DatasetInfo,
    RawSample,
    Split,
    group_by_label,
    list_subdirs,
    natural_sort,
)
from datasets.readers import paths_in, read_text, split_trainval, split_trainvaltest
from datasets.splits import to_posix_path
from utils import did_you_mean, truncate_list

TITLE = "Your own images"
SPLIT_ALIASES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


def is_path(name: str) -> bool:
    """Whether a name that is not in the table can only be meant as a path."""
    written = os.sep in name or "/" in name or name.startswith("~")
    return written or name.lower().endswith((".csv", ".json")) or os.path.exists(name)


def dataset_stem(path: str) -> str:
    """The name of a folder, or of a file without its ending."""
    path = _absolute(path)
    name = os.path.basename(path) or "root"
    return name if os.path.isdir(path) else os.path.splitext(name)[0]


def custom_dataset_info(name: str) -> DatasetInfo:
    """Make the row of a folder, a .csv or a .json; no image is looked at.

    Raises:
        ValueError: There is nothing of the kind at that path.
    """
    path = _absolute(name)
    if not os.path.exists(path):
        raise ValueError(
            f"there is no {path}: --dataset takes a known name, or a folder, .csv or .json of your "
            f"own images; see DATASETS.md, section {TITLE}"
        )
    folder, file = os.path.split(path)
    row = partial(
        DatasetInfo,
        title=TITLE,
        folders=(),
        images=".",
        split=None,
        read=read_image_folder,
        classes=None,
        counts=(None, None, None),
        url="",
    )
    if os.path.isdir(path):
        return row(place=Path(path))
    ending = os.path.splitext(file)[1].lower() if os.path.isfile(path) else ""
    if ending == ".csv":
        return row(place=Path(folder), read=partial(read_csv, file=file))
    if ending == ".json":
        return row(place=Path(folder), split=file)
    raise ValueError(f"{path} is not a folder, a .csv or a .json; see DATASETS.md, section {TITLE}")


def read_image_folder(source: DatasetDir) -> Split:
    """Read class folders, or train/, test/ and perhaps val/ of class folders."""
    folders = list_subdirs(source.images)
    inner = {name: list_subdirs(source.locate(name)) for name in folders if _part(name)}
    if len(inner) > 1 or any(inner.values()):
        return _read_parts(source, inner)
    if not folders:
        raise source.error(
            f"{source.images} has no class folders: sort its images into a folder for each class"
        )
    classes = [(name, paths_in(source, name)) for name in natural_sort(folders)]
    if len(classes) == 1 and not classes[0][1] and list_subdirs(source.locate(folders[0])):
        raise source.error(
            f"{source.images} has only the folder {folders[0]}, with folders in it: name "
            f"{source.locate(folders[0])} as --dataset"
        )
    return replace(split_trainvaltest(source.images, classes), kind="own", listed=True)


def _read_parts(source: DatasetDir, inner: dict[str, list[str]]) -> Split:
    """Read the folders of parts, each with the class folders named."""
    found = {_part(name): name for name in inner}
    if len(found) < len(inner):
        raise source.error(f"{source.images} has {truncate_list(inner)}: keep one for each part")
    if lacking := [f"{part}/" for part in ("train", "test") if part not in found]:
        raise source.error(
            f"{source.images} has {truncate_list(f'{name}/' for name in inner)} but no "
            f"{' and no '.join(lacking)}: make both, or name a folder of class folders"
        )
    if flat := [source.locate(name) for name in inner if not inner[name]]:
        raise source.error(
            f"{truncate_list(flat)} has no class folders: sort its images into a folder for each class"  # noqa: E501
        )
    train = inner[found["train"]]
    for folder, classes in inner.items():
        if differing := sorted(set(train) ^ set(classes)):
            raise source.error(
                f"{found['train']}/ and {folder}/ in {source.images} have different classes: "
                f"{truncate_list(differing)} in one of them alone; make them alike"
            )
    names = dict(enumerate(natural_sort(train)))
    parts: dict[str, list[RawSample]] = {part: [] for part in SPLITS}
    for part, folder in found.items():
        for label, name in names.items():
            parts[part] += [(path, label, name) for path in paths_in(source, f"{folder}/{name}")]
    return replace(_with_val(source, source.images, parts, names, "val" in found), listed=True)


def _with_val(
    source: DatasetDir,
    where: Path,
    parts: dict[str, list[RawSample]],
    names: dict[int, str],
    given: bool,
) -> Split:
    """The split of these parts, its validation images taken from training where none are given."""
    if not given:
        return replace(split_trainval(where, parts["train"], parts["test"], names), kind="own")
    present = {label for _, label, _ in parts["val"]}
    if lacking := [repr(name) for label, name in names.items() if label not in present]:
        raise source.error(
            f"{where} has no validation images of the class {truncate_list(lacking)}; add some, or "
            "take the validation part out"
        )
    return Split(str(where), **parts, names=names, kind="own")


def read_csv(source: DatasetDir, file: str) -> Split:
    """Read the columns path, label and perhaps split; other columns are left alone."""
    path = source.folder / file
    reader = csv.DictReader(io.StringIO(read_text(source, path)), strict=True)
    try:
        columns = [str(name).strip().lower() for name in reader.fieldnames or ()]
        if lacking := [name for name in ("path", "label") if name not in columns]:
            raise source.error(
                f"{path} has no column {' and no column '.join(lacking)} but "
                f"{truncate_list(columns) or 'none'}: its first line must be path,label or "
                "path,label,split"
            )
        reader.fieldnames, rows, bad = columns, [], []
        for row in reader:
            cells = [str(row.get(key) or "").strip() for key in ("path", "label", "split")]
            part = _part(cells[2]) if "split" in columns else "train"
            if not cells[0] or not cells[1]:
                bad.append(f"line {reader.line_num} lacks its path or its label")
            elif not part:
                hint = did_you_mean(cells[2], SPLITS)
                bad.append(f"line {reader.line_num} has the split {cells[2]!r}{hint}")
            else:
                rows.append((to_posix_path(source, cells[0]), cells[1], part))
    except csv.Error as error:
        raise source.unreadable(path, f"cannot be read as CSV ({error}); correct it") from error
    if bad:
        raise source.error(f"in {path}, {truncate_list(bad)}: valid are train, val and test")
    names = natural_sort(label for _, label, _ in rows)
    labels = {name: label for label, name in enumerate(names)}
    parts: dict[str, list[RawSample]] = {part: [] for part in SPLITS}
    for image, name, part in rows:
        parts[part].append((image, labels[name], name))
    if "split" not in columns:
        groups = group_by_label(sorted(parts["train"], key=lambda entry: (entry[1], entry[0])))
        classes = [(entries[0][2], [image for image, _, _ in entries]) for entries in groups]
        return replace(split_trainvaltest(path, classes), kind="own")
    return _with_val(source, path, parts, dict(enumerate(names)), bool(parts["val"]))


def _part(name: str) -> str | None:
    """The part that a folder or a cell of a CSV names, if it does."""
    return SPLIT_ALIASES.get(name.lower())


def _absolute(path: str) -> str:
    """The path from the root, whatever folder a later step works in."""
    return os.path.abspath(os.path.expanduser(path))
