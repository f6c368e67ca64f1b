"""A user's own images as a dataset: a folder, a CSV or a JSON file; DATASETS.md shows the forms."""

import csv
import io
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from datasets.base import SPLITS, DatasetDir, DatasetInfo, RawSample, Split
from datasets.files import IMAGE_EXTENSIONS, list_entries, list_images, nfc, read_text
from datasets.readers import digest_key, split_trainval, split_trainvaltest
from datasets.splits import read_split_file
from datasets.transforms import OTHER_FORMATS, detect_gray_range, detect_other_format
from utils import plural, truncate_list

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
GRAY_EXTENSIONS = (".png", ".pgm", ".tif", ".tiff")  # of formats with more than eight bits
Parts = dict[str, list[RawSample]]  # by SPLITS


def custom_dataset_info(name: str) -> DatasetInfo:
    """Make the row of a folder, a .csv or a .json; a ValueError if there is nothing of the kind."""
    path = Path(os.path.abspath(os.path.expanduser(name)))
    readers = {".csv": read_csv, ".tsv": read_csv, ".json": read_json_list}
    reader = read_image_folder if path.is_dir() else readers.get(path.suffix.lower())
    if not reader or not path.exists():
        remedy = "--dataset takes a known name, or one of these"
        raise ValueError(f"there is no folder, .csv or .json {path}: {remedy}; see DATASETS.md")
    folder = path if path.is_dir() else path.parent
    read_data = partial(read_custom_dataset, reader=reader, path=path)
    return DatasetInfo("Your own images", read_data=read_data, custom_path=folder)


def is_path(name: str) -> bool:
    """Return whether a name that is not in the catalog can only be meant as a path."""
    looks_so = os.sep in name or name.startswith("~") or name.endswith((".csv", ".tsv", ".json"))
    return looks_so or os.path.exists(name)


def dataset_stem(path: str) -> str:
    """Return the name of a folder, or of a file without its extension."""
    path = Path(os.path.abspath(os.path.expanduser(path)))
    return (path.name if path.is_dir() else path.stem) or "root"


def read_custom_dataset(
    dataset_dir: DatasetDir, reader: Callable[[DatasetDir, Path], Split], path: Path
) -> Split:
    """Read own images; find the range of gray pictures of more than eight bits in 500 of them."""
    split = reader(dataset_dir, path)
    images = sorted({image for image, _, _ in split.samples()}, key=digest_key)
    images = [image for image in images if image.lower().endswith(GRAY_EXTENSIONS)]
    gray_range = detect_gray_range([dataset_dir.image_path(image) for image in images[:500]])
    split = replace(split, origin="own", gray_range=gray_range)
    if not gray_range:
        return split
    values = "values from {:g} to {:g} are scaled to black to white".format(*gray_range)
    note = f"gray pictures of more than eight bits: {values}"
    return replace(split, notes=(*split.notes, note))


def read_image_folder(dataset_dir: DatasetDir, path: Path) -> Split:
    """Read class folders, or folders of parts with class folders in them."""
    top = list_entries(path)
    places = {name: list_entries(path / name) for name in top[1] if name.lower() in SPLIT_ALIASES}
    has_parts = len(places) > 1 or any(subdirs for _, subdirs, _ in places.values())
    ignored: dict[str, list[str]] = defaultdict(list)
    if has_parts:
        others = [name for name in top[1] if name not in places]
        ignored["folders other than those of the parts"] = others
    else:
        places = {"": top}
    labels = number_classes(nfc(name) for _, subdirs, _ in places.values() for name in subdirs)
    if not labels:
        files = truncate_list(top[0] + top[1]) or "it is empty"
        raise ValueError(f"{path} has no class folders ({files}): sort its images into some")
    parts: Parts = {part: [] for part in SPLITS}
    for place, (files, _, dead_links) in {"": top, **places}.items():
        ignored[OUTSIDE_CLASSES] += list_files(dataset_dir, place, files, dead_links, ignored)
    for place, (_, subdirs, _) in places.items():
        part = SPLIT_ALIASES[place.lower()] if has_parts else "train"
        for folder in sorted(subdirs, key=lambda folder: labels[nfc(folder)]):
            images = list_class(dataset_dir, os.path.join(place, folder), ignored)
            parts[part] += [(image, labels[nfc(folder)], nfc(folder)) for image in images]
    split = make_split(path, parts, labels, has_parts)
    notes = [*split.notes, *describe_ignored(ignored)]
    counts = Counter(nfc(image) for image, _, _ in split.samples())
    if twins := [image for image, count in counts.items() if count > 1]:
        names = truncate_list(twins)
        notes.append(f"{names}: there twice, in both of Unicode's forms; both are taken")
    return replace(split, files_exist=True, notes=tuple(notes))


def list_class(dataset_dir: DatasetDir, folder: str, ignored: dict[str, list[str]]) -> list[str]:
    """Return the paths of a class folder's images; add what is not taken to `ignored`, by kind."""
    files, subdirs, dead_links = list_entries(dataset_dir.image_path(folder))
    for subdir in (f"{folder}/{name}" for name in subdirs):
        deeper = list_images(dataset_dir.image_path(subdir))
        ignored[DEEPER] += [f"{subdir}/{name}" for name in deeper]
    return list_files(dataset_dir, folder, files, dead_links, ignored)


def list_files(
    dataset_dir: DatasetDir,
    folder: str,
    files: list[str],
    dead_links: list[str],
    ignored: dict[str, list[str]],
) -> list[str]:
    """Return the paths of a folder's images; add its other files and dead links to `ignored`."""
    ignored[DEAD_LINKS] += [os.path.join(folder, name) for name in dead_links]
    images: list[str] = []
    for path in (os.path.join(folder, name) for name in files):
        kind = ignored_kind(dataset_dir.image_path(path))
        (ignored[kind] if kind else images).append(path)
    return images


def ignored_kind(file: str) -> str:
    """Return the kind of a file that is no image, or ""."""
    extension = os.path.splitext(file)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return ""
    with suppress(Exception):  # a damaged file makes Pillow fail in any way
        if other := detect_other_format(file):
            return f"{other} files"
        with Image.open(file, formats=FORMATS_BY_CONTENT):
            return ""
    return f"{extension} files" if extension else "files without extension"


def describe_ignored(ignored: dict[str, list[str]]) -> Iterator[str]:
    for kind, paths in ignored.items():
        if paths:
            remedy = f": {REMEDIES[kind]}" if kind in REMEDIES else ""
            yield f"not taken: {len(paths)} {kind} ({truncate_list(sorted(paths))}){remedy}"


def read_json_list(dataset_dir: DatasetDir, path: Path) -> Split:
    form = '{"train": [[path, label, class name], ...], "val": [...], "test": [...]}'
    split = read_split_file(dataset_dir, path, f"save it as UTF-8, in the form {form}")
    parts, notes = drop_repeats(path, split.parts)
    return replace(split, **parts, notes=notes)


def read_csv(dataset_dir: DatasetDir, path: Path) -> Split:
    """Read the columns path, label and perhaps split; other columns do not matter.

    The separator is a comma, a semicolon or a tab; a first line `sep=;` of Excel's is skipped.
    """
    text = read_text(path, "save it as UTF-8 (in Excel, as CSV UTF-8)")
    if text.lower().startswith("sep="):
        text = text.partition("\n")[2]
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), delimiter=separator, restval="")
    try:
        columns = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV ({error}): correct it") from error
    if not {"path", "label"} <= set(columns):
        given = truncate_list(columns) or "none"
        raise ValueError(f"{path} has the columns {given}: it needs path,label or path,label,split")
    labels = number_classes(nfc(row["label"].strip()) for row in rows)
    if labels and all(re.fullmatch(r"-?\d+\.0+", name) for name in labels):
        reason = "as pandas writes numbers in a column with an empty cell"
        remedy = "write names or whole numbers"
        raise ValueError(f"{path} has the labels {truncate_list(labels)}, {reason}: {remedy}")
    parts: Parts = {part: [] for part in SPLITS}
    for number, row in enumerate(rows, start=2):
        part = SPLIT_ALIASES.get(row.get("split", "train").strip().lower())
        image, name = row["path"].strip(), nfc(row["label"].strip())
        if not (part and image and name):
            needs = "a path, a label and, in a column split, train, val or test"
            raise ValueError(f"line {number} of {path} needs {needs}, not {row}")
        if "://" in image:
            raise ValueError(f"line {number} of {path} names the URL {image}: download it")
        parts[part].append((dataset_dir.find_path(image), labels[name], name))
    parts, notes = drop_repeats(path, parts)
    split = make_split(path, parts, labels, has_parts="split" in columns)
    return replace(split, notes=split.notes + notes)


def drop_repeats(source_path: Path, parts: Parts) -> tuple[Parts, tuple[str, ...]]:
    """Drop repeats from a user's list, with a note; one path in two places is a ValueError."""
    places: dict[str, tuple[str, str]] = {}  # part and class by path
    unique: Parts = {part: [] for part in parts}
    for part, samples in parts.items():
        for path, label, name in samples:
            path = posixpath.normpath(path)
            if path not in places:
                places[path] = part, name
                unique[part].append((path, label, name))
            elif places[path] != (part, name):
                raise ValueError(
                    f"{source_path} has the image {path} twice, in {' as '.join(places[path])} and "
                    f"in {part} as {name}: take one of the lines out"
                )
    repeats = sum(map(len, parts.values())) - len(places)
    notes = (f"{plural(repeats, 'repeated line')} of {source_path} dropped",) if repeats else ()
    return unique, notes


def number_classes(names: Iterable[str]) -> dict[str, int]:
    """Return the label of each class: in the order of names, or of values if all are numbers."""
    names = sorted(set(names))
    if all(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in names):
        names.sort(key=float)
    return {name: label for label, name in enumerate(names)}


def make_split(source_path: Path, parts: Parts, labels: dict[str, int], has_parts: bool) -> Split:
    """Make a split of named parts, or divide each class of the only one.

    Where only training and validation images are given, as in imagenette, the latter are the test.
    """
    names = {label: name for name, label in labels.items()}
    train, val, test = parts.values()
    if not has_parts:
        return replace(split_trainvaltest(source_path, train, names), has_parts=False)
    if train and val and not test:
        split = split_trainval(source_path, train, val, names)
        note = "there is no test part: its validation images are the test images"
        return replace(split, notes=(note,))
    if not val:
        return split_trainval(source_path, train, test, names)
    return Split(str(source_path), train, val, test, names)
