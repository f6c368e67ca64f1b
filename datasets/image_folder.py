"""A user's own images as a dataset: a folder, a CSV or a JSON file.

DATASETS.md, section "Your own images", shows the forms. A JSON file is read as split files are.
"""

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from datasets.base import (
    IMAGE_EXTENSIONS,
    SPLITS,
    DatasetDir,
    DatasetInfo,
    RawSample,
    Split,
    list_entries,
    list_images,
    list_subdirs,
    nfc,
    read_text,
)
from datasets.readers import split_trainval, split_trainvaltest
from datasets.splits import drop_repeats
from datasets.transforms import OTHER_FORMATS, detect_other_format
from utils import truncate_list

# What people call the parts, in lower case.
SPLIT_ALIASES = {
    **dict.fromkeys(("train", "training", "train_set", "training_set"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "test_set"), "test"),
}
# Taken whatever the file is called; the others have weak signatures, or are raw photographs too.
FORMATS_BY_CONTENT = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
# What is not taken of an own folder, and what to do about it.
DEAD_LINKS, OUTSIDE_CLASSES = "links that lead nowhere", "images outside the class folders"
DEEPER = "images in folders within class folders"
REMEDIES = {
    **{f"{name} files": remedy for name, (_, _, remedy) in OTHER_FORMATS.items()},
    DEAD_LINKS: "run `dvc pull` or `git annex get`, or mount the disk that they lead to",
    DEEPER: "move them up into the class folder",
    OUTSIDE_CLASSES: "move them into a class folder",
}


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
        custom_path=path if path.is_dir() else path.parent,
    )
    extension = path.suffix.lower()
    if path.is_dir():
        return row(read_data=read_image_folder)
    if path.is_file() and extension in (".csv", ".tsv"):
        return row(read_data=partial(read_csv, file=path.name))
    if path.is_file() and extension == ".json":
        return row(split_file=path.name)
    raise ValueError(
        f"there is no folder, .csv or .json {path}: --dataset takes a known name, or one of these; "
        "see DATASETS.md, section Your own images"
    )


def is_path(name: str) -> bool:
    """Return whether a name that is not in the catalog can only be meant as a path."""
    extensions = (".csv", ".tsv", ".json", ".jsonl", ".pkl")
    looks_so = os.sep in name or name.startswith("~") or name.lower().endswith(extensions)
    return looks_so or os.path.exists(name)


def dataset_stem(path: str) -> str:
    """Return the name of a folder, or of a file without its extension."""
    path = os.path.abspath(os.path.expanduser(path))
    name = os.path.basename(path) or "root"
    return name if os.path.isdir(path) else os.path.splitext(name)[0]


def read_image_folder(dataset_dir: DatasetDir) -> Split:
    """Read class folders, or train/, test/ and perhaps val/ with class folders in them."""
    image_dir, lister = dataset_dir.image_dir, _ClassLister(dataset_dir)
    files, folders, dead_links = list_entries(image_dir)
    by_part = {
        folder: list_subdirs(image_dir / folder)
        for folder in folders
        if folder.lower() in SPLIT_ALIASES
    }
    if len(by_part) > 1 or any(by_part.values()):
        others = [name for name in folders if name not in by_part]
        lister.ignored["folders other than those of the parts"] = others
        split = _read_parts(image_dir, by_part, lister)
        return replace(split, notes=split.notes + lister.notes())
    if not folders:
        files = truncate_list(files) or "it is empty"
        raise ValueError(f"{image_dir} has no class folders ({files}): sort its images into some")
    lister.ignored[DEAD_LINKS] = dead_links
    lister.ignored[OUTSIDE_CLASSES] = [f for f in files if f.lower().endswith(IMAGE_EXTENSIONS)]
    by_name = lister.group_by_name(folders)
    names = natural_sort(by_name)
    samples = lister.list_samples(names, by_name)
    first = image_dir / folders[0]
    if len(folders) == 1 and not samples and list_subdirs(first):
        raise ValueError(f"{image_dir} has only the folder {folders[0]}: name {first} as --dataset")
    split = split_trainvaltest(image_dir, samples, dict(enumerate(names)))
    notes = lister.notes()
    return replace(split, origin="own", files_exist=True, has_parts=False, notes=notes)


def _read_parts(image_dir: Path, by_part: dict[str, list[str]], lister: "_ClassLister") -> Split:
    """Read folders called as the parts are, given the class folders in each."""
    folders = {SPLIT_ALIASES[folder.lower()]: folder for folder in by_part}
    complete = {"train", "test"} <= folders.keys() or folders.keys() in ({"test"}, {"train", "val"})
    if len(folders) < len(by_part) or not complete:
        raise ValueError(
            f"{image_dir} has the folders {truncate_list(by_part)}: it needs train/ and test/, and "
            "can have val/, each once"
        )
    by_name = {
        part: lister.group_by_name(by_part[folder], folder) for part, folder in folders.items()
    }
    classes = [by_class.keys() for by_class in by_name.values()]
    differing = sorted(set().union(*classes) - set(classes[0]).intersection(*classes))
    if differing or not classes[0]:
        only = f"only some have {truncate_list(differing)}" if differing else "they have none"
        raise ValueError(
            f"{truncate_list(by_part)} in {image_dir} need the same class folders, but {only}"
        )
    names = natural_sort(classes[0])
    parts = {part: lister.list_samples(names, by_name[part]) for part in folders}
    return replace(_make_split(image_dir, parts, names), files_exist=True)


class _ClassLister:
    """Lists the images of class folders, and counts by kind what it does not take."""

    def __init__(self, dataset_dir: DatasetDir) -> None:
        self.dataset_dir = dataset_dir
        self.ignored: dict[str, list[str]] = defaultdict(list)  # paths by kind
        self.duplicates: list[str] = []  # names of which both of Unicode's forms are there

    def group_by_name(self, names: Sequence[str], folder: str = "") -> dict[str, list[str]]:
        """Return the paths of entries of a folder by their names in NFC."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in names:
            groups[nfc(name)].append(os.path.join(folder, name))
        self.duplicates += [paths[0] for paths in groups.values() if len(paths) > 1]
        return groups

    def list_samples(self, names: Sequence[str], by_name: dict[str, list[str]]) -> list[RawSample]:
        """Return the samples of classes, given each one's folders by its name."""
        return [
            (path, label, name)
            for label, name in enumerate(names)
            for folder in by_name[name]
            for path in self._list_images(folder)
        ]

    def _list_images(self, folder: str) -> list[str]:
        files, subdirs, dead_links = list_entries(self.dataset_dir.image_path(folder))
        kinds = {name: self._ignored_kind(f"{folder}/{name}") for name in files}
        for name in filter(kinds.get, files):
            self.ignored[kinds[name]].append(f"{folder}/{name}")
        self.ignored[DEAD_LINKS] += [f"{folder}/{name}" for name in dead_links]
        for subdir in (f"{folder}/{name}" for name in subdirs):
            inner = list_images(self.dataset_dir.image_path(subdir))
            self.ignored[DEEPER] += [f"{subdir}/{name}" for name in inner]
        images = self.group_by_name([name for name in files if not kinds[name]], folder)
        return [path for paths in images.values() for path in paths]

    def _ignored_kind(self, path: str) -> str:
        """Return the kind of a file that is not taken, or ""."""
        extension = os.path.splitext(path)[1].lower()
        if extension in IMAGE_EXTENSIONS:
            return ""
        file = self.dataset_dir.image_path(path)
        with suppress(Exception):  # a damaged file makes Pillow fail in any way
            if other := detect_other_format(file):
                return f"{other} files"
            with Image.open(file, formats=FORMATS_BY_CONTENT):
                return ""
        return f"{extension} files" if extension else "files without extension"

    def notes(self) -> tuple[str, ...]:
        """Return what was not taken, and which names are there twice, in words."""
        notes = [
            f"not taken: {len(paths)} {kind} ({truncate_list(sorted(paths))})"
            + (f": {REMEDIES[kind]}" if kind in REMEDIES else "")
            for kind, paths in self.ignored.items()
            if paths
        ]
        if self.duplicates:
            names = truncate_list(sorted(self.duplicates))
            notes.append(f"{names}: there twice, in both of Unicode's forms; both are taken")
        return tuple(notes)


def read_csv(dataset_dir: DatasetDir, file: str) -> Split:
    """Read the columns path, label and perhaps split; other columns do not matter.

    The separator is a comma, a semicolon or a tab; a first line `sep=;` of Excel's is skipped.
    """
    path = dataset_dir.path / file
    text = read_text(path, "save it as UTF-8 (in Excel, as CSV UTF-8)")
    if text[:4].lower() == "sep=":
        text = text.partition("\n")[2]
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), delimiter=separator)
    try:
        columns = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        table = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV ({error}): correct it") from error
    if not {"path", "label"} <= set(columns):
        given = truncate_list(columns) or "none"
        raise ValueError(
            f"{path} has the columns {given}: its first line must be path,label or path,label,split"
        )
    rows: list[tuple[str, str, str]] = []  # part, path, class name
    for number, row in enumerate(table, start=2):
        cells = {column: (row[column] or "").strip() for column in columns}
        part = cells.get("split", "train").lower()
        if part not in SPLIT_ALIASES or not cells["path"] or not cells["label"]:
            raise ValueError(
                f"line {number} of {path} needs a path, a label and, if there is a column "
                f"split, train, val or test in it, not {cells}"
            )
        if "://" in cells["path"]:
            raise ValueError(f"line {number} of {path} names the URL {cells['path']}: download it")
        image = dataset_dir.find_path(cells["path"])
        rows.append((SPLIT_ALIASES[part], image, nfc(cells["label"])))
    rows, notes = drop_repeats(path, rows)
    names = natural_sort(name for _, _, name in rows)
    if names and all(re.fullmatch(r"-?\d+\.0+", name) for name in names):
        raise ValueError(
            f"{path} has the labels {truncate_list(names)}, as pandas writes numbers in a column "
            "with an empty cell: write names or whole numbers"
        )
    labels = {name: label for label, name in enumerate(names)}
    parts: dict[str, list[RawSample]] = defaultdict(list)
    for part, image, name in rows:
        parts[part].append((image, labels[name], name))
    if "split" not in columns:
        split = split_trainvaltest(path, parts["train"], dict(enumerate(names)))
        return replace(split, origin="own", has_parts=False, notes=notes)
    split = _make_split(path, parts, names)
    return replace(split, notes=split.notes + notes)


def _make_split(source_path: Path, parts: dict[str, list[RawSample]], names: list[str]) -> Split:
    """Make a split of parts; validation images come from training if there is no such part.

    Where only training and validation images are given, as in imagenette, the latter are the test.
    """
    notes = ()
    if parts.keys() == {"train", "val"}:
        parts = {"train": parts["train"], "test": parts["val"]}
        notes = ("there is no test part: its validation images are the test images",)
    train, val, test = (parts.get(part, []) for part in SPLITS)
    lab2cname = dict(enumerate(names))
    split = Split(str(source_path), train, val, test, lab2cname)
    if "val" not in parts:
        split = split_trainval(source_path, train, test, lab2cname)
    return replace(split, origin="own", notes=notes)


def natural_sort(names: Iterable[str]) -> list[str]:
    """Return distinct names, sorted; by value if all of them are numbers."""
    names = sorted(set(names))
    all_numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in names)
    return sorted(names, key=float) if all_numbers else names
