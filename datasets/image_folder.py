"""A user's own images as a dataset: a folder, a CSV or a JSON file.

DATASETS.md, section "Your own images", shows the forms. A JSON file is read as split files are.
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
    list_subdirs,
    natural_sort,
    read_text,
)
from datasets.readers import list_image_paths, split_trainval, split_trainvaltest
from utils import truncate_list

SPLIT_ALIASES = {part: part for part in SPLITS} | {"valid": "val", "validation": "val"}


def custom_dataset_info(name: str) -> DatasetInfo:
    """Make the row of a folder, a .csv or a .json; no image is read.

    Raises:
        ValueError: There is nothing of the kind at that path.
    """
    path = Path(os.path.abspath(os.path.expanduser(name)))
    row = partial(
        DatasetInfo,
        title="Your own images",
        dataset_dirs=(),
        image_dir=".",
        num_classes=None,
        num_images=(None, None, None),
    )
    if os.path.isdir(path):
        return row(custom_path=path, read_data=read_image_folder)
    if os.path.isfile(path) and path.suffix.lower() == ".csv":
        return row(custom_path=path.parent, read_data=partial(read_csv, file=path.name))
    if os.path.isfile(path) and path.suffix.lower() == ".json":
        return row(custom_path=path.parent, split_file=path.name)
    raise ValueError(
        f"there is no folder, .csv or .json {path}: --dataset takes a known name, or one of these "
        "with your own images; see DATASETS.md, section Your own images"
    )


def is_path(name: str) -> bool:
    """Return whether a name that is not in the catalog can only be meant as a path."""
    looks_so = os.sep in name or name.startswith("~") or name.lower().endswith((".csv", ".json"))
    return looks_so or os.path.exists(name)


def dataset_stem(path: str) -> str:
    """Return the name of a folder, or of a file without its extension."""
    path = os.path.abspath(os.path.expanduser(path))
    name = os.path.basename(path) or "root"
    return name if os.path.isdir(path) else os.path.splitext(name)[0]


def read_image_folder(dataset_dir: DatasetDir) -> Split:
    """Read class folders, or train/, test/ and perhaps val/ with class folders in them."""
    folders = list_subdirs(dataset_dir.image_dir)
    by_part = {
        folder: list_subdirs(dataset_dir.image_path(folder))
        for folder in folders
        if folder.lower() in SPLIT_ALIASES
    }
    if len(by_part) > 1 or any(by_part.values()):
        return _read_parts(dataset_dir, by_part)
    if not folders:
        raise ValueError(
            f"{dataset_dir.image_dir} has no class folders: sort its images into a folder for each "
            "class"
        )
    classes = [(name, list_image_paths(dataset_dir, name)) for name in natural_sort(folders)]
    first = dataset_dir.image_path(folders[0])
    if len(classes) == 1 and not classes[0][1] and list_subdirs(first):
        raise ValueError(
            f"{dataset_dir.image_dir} has only the folder {folders[0]}, with folders in it: name "
            f"{first} as --dataset"
        )
    split = split_trainvaltest(dataset_dir.image_dir, classes)
    return replace(split, origin="own", files_exist=True)


def _read_parts(dataset_dir: DatasetDir, by_part: dict[str, list[str]]) -> Split:
    """Read folders called as the parts are, given the class folders in each."""
    image_dir = dataset_dir.image_dir
    folders = {SPLIT_ALIASES[folder.lower()]: folder for folder in by_part}
    if len(folders) < len(by_part) or not {"train", "test"} <= folders.keys():
        raise ValueError(
            f"{image_dir} has the folders {truncate_list(by_part)}: it needs train/ and test/, and "
            "can have val/, each once; or name a folder of class folders"
        )
    classes = [set(subdirs) for subdirs in by_part.values()]
    differing = sorted(set.union(*classes) - set.intersection(*classes))
    if differing or not classes[0]:
        only = f"only some have {truncate_list(differing)}" if differing else "they have none"
        raise ValueError(
            f"{truncate_list(by_part)} in {image_dir} need the same class folders, but {only}: "
            "sort their images into a folder for each class"
        )
    names = natural_sort(classes[0])
    parts = {
        part: [
            (path, label, name)
            for label, name in enumerate(names)
            for path in list_image_paths(dataset_dir, f"{folders[part]}/{name}")
        ]
        for part in folders
    }
    return replace(_make_split(image_dir, parts, names), files_exist=True)


def read_csv(dataset_dir: DatasetDir, file: str) -> Split:
    """Read the columns path, label and perhaps split; other columns do not matter."""
    path = dataset_dir.path / file
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    parts: dict[str, list[tuple[str, str]]] = {}
    try:
        columns = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        if not {"path", "label"} <= set(columns):
            raise ValueError(
                f"{path} has the columns {truncate_list(columns) or 'none'}: its first line must "
                "be path,label or path,label,split"
            )
        for row in reader:
            cells = {column: (row[column] or "").strip() for column in columns}
            part = cells.get("split", "train").lower()
            if part not in SPLIT_ALIASES or not cells["path"] or not cells["label"]:
                raise ValueError(
                    f"line {reader.line_num} of {path} needs a path, a label and, if there is a "
                    f"column split, train, val or test in it, not {cells}"
                )
            image = dataset_dir.to_posix_path(cells["path"])
            parts.setdefault(SPLIT_ALIASES[part], []).append((cells["label"], image))
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV ({error}): correct it") from error
    names = natural_sort(name for rows in parts.values() for name, _ in rows)
    if "split" not in columns:
        images = {name: [] for name in names}
        for name, image in sorted(parts.get("train", [])):
            images[name].append(image)
        return replace(split_trainvaltest(path, list(images.items())), origin="own")
    labels = {name: label for label, name in enumerate(names)}
    samples = {
        part: [(image, labels[name], name) for name, image in rows] for part, rows in parts.items()
    }
    return _make_split(path, samples, names)


def _make_split(source_path: Path, parts: dict[str, list[RawSample]], names: list[str]) -> Split:
    """Make a split of parts; validation images come from training if there is no such part."""
    train, val, test = (parts.get(part, []) for part in SPLITS)
    lab2cname = dict(enumerate(names))
    if "val" not in parts:
        return replace(split_trainval(source_path, train, test, lab2cname), origin="own")
    present = {label for _, label, _ in val}
    if lacking := [repr(name) for label, name in lab2cname.items() if label not in present]:
        raise ValueError(
            f"{source_path} has no validation images of the class {truncate_list(lacking)}: add "
            "some, or take the validation part out"
        )
    return Split(str(source_path), train, val, test, lab2cname, origin="own")
