"""Splits made from raw downloads, by the lists in them and the published rules.

The rules are CoOp's; the random numbers come from a generator of this file alone. Two rules divide
a class: 50 % train, 20 % validation, the rest test; or, where the download says which images are
for testing, 20 % of the training images become validation. Shares are rounded for each class.
"""

import json
import random
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from datasets.base import (
    SPLITS,
    DatasetDir,
    RawSample,
    Split,
    group_by_label,
    list_images,
    list_subdirs,
)
from utils import truncate_list

SEED = 1
T = TypeVar("T")


def read_class_folders(
    source: DatasetDir, names: Mapping[str, str] | None = None, ignored: Collection[str] = ()
) -> Split:
    """One folder for each class, in sorted order; the folder's name unless `names` has another."""
    classes = []
    for folder in list_subdirs(source.images):
        if folder not in ignored:
            classes.append(((names or {}).get(folder, folder), paths_in(source, folder)))
    return replace(split_trainvaltest(source.images, classes), listed=True)


def paths_in(source: DatasetDir, folder: str) -> list[str]:
    """Sorted paths of a folder's images, both below the image folder."""
    return [f"{folder}/{name}" for name in list_images(source.locate(folder))]


def read_fgvc(source: DatasetDir) -> Split:
    """Lines "0034309 Boeing 707-320" in the lists; labels follow the order in variants.txt."""
    lists = [source.folder / f"images_variant_{part}.txt" for part in SPLITS]
    require_files(source, source.folder / "variants.txt", *lists)
    names = parse_lines(source, source.folder / "variants.txt", "variant", str)
    labels = {name: label for label, name in enumerate(names)}

    def entry(line: str) -> RawSample:
        image, name = line.split(maxsplit=1)
        return f"{image}.jpg", labels[name], name

    form = "image variant, with a variant of variants.txt"
    parts = [parse_lines(source, path, form, entry) for path in lists]
    return Split(f"{source.folder}/images_variant_*.txt", *parts, dict(enumerate(names)))


def read_flowers(source: DatasetDir) -> Split:
    """Label i of imagelabels.mat belongs to image i; cat_to_name.json names the labels."""
    where, path = source.folder / "imagelabels.mat", source.folder / "cat_to_name.json"
    require_files(source, where, path)
    labels = _column(source, where, "labels", int)
    try:
        names = {int(k): str(v) for k, v in json.loads(read_text(source, path)).items()}
    except (ValueError, AttributeError) as error:
        fault = f"does not map numbers to names ({error}); get it again"
        raise source.unreadable(path, fault) from error
    if nameless := [str(label) for label in sorted(set(labels)) if label not in names or label < 1]:
        raise source.error(f"{path} has no name for the label {truncate_list(nameless)} of {where}")
    if max(labels, default=0) > len(labels):  # then some classes can have no image
        raise source.error(f"{where} has labels up to {max(labels)}; get it again")
    images: dict[int, list[str]] = {label: [] for label in range(1, max(labels, default=0) + 1)}
    for number, label in enumerate(labels, start=1):
        images[label].append(f"image_{number:05d}.jpg")
    return split_trainvaltest(
        where, [(names.get(label, str(label)), images[label]) for label in images]
    )


def read_cars(source: DatasetDir) -> Split:
    """Lists and names in .mat files; the year goes to the front of a name."""
    devkit, tests = source.folder / "devkit", "cars_test_annos_withlabels.mat"
    tests = devkit / tests if (devkit / tests).is_file() else source.folder / tests
    meta, training = devkit / "cars_meta.mat", devkit / "cars_train_annos.mat"
    require_files(source, meta, training, tests)
    words = [name.rsplit(" ", 1) for name in _column(source, meta, "class_names", str)]
    names = {label: " ".join(reversed(name)) for label, name in enumerate(words)}

    def entries(path: Path, folder: str) -> list[RawSample]:
        def entry(record: Any) -> RawSample:
            label = int(record["class"]) - 1
            return f"{folder}/{record['fname']}", label, names[label]

        return _column(source, path, "annotations", entry)

    train, test = entries(training, "cars_train"), entries(tests, "cars_test")
    return split_trainval(devkit, train, test, names)


def read_pets(source: DatasetDir) -> Split:
    """Lines "Abyssinian_100 1 1 1" of image, class from 1, species, breed in annotations/."""

    def entry(line: str) -> RawSample:
        image, label, _, _ = line.split()
        return f"{image}.jpg", int(label) - 1, image.rsplit("_", 1)[0].lower()

    lists = [source.folder / "annotations" / name for name in ("trainval.txt", "test.txt")]
    require_files(source, *lists)
    train, test = (parse_lines(source, path, "image class species breed", entry) for path in lists)
    names = {label: name for _, label, name in reversed([*train, *test])}
    return split_trainval(lists[0], train, test, dict(sorted(names.items())))


def read_sun397(source: DatasetDir) -> Split:
    """Lines "/c/casino/indoor" in ClassName.txt, "/c/casino/indoor/sun_x.jpg" in the lists."""
    lists = [source.folder / name for name in ("Training_01.txt", "Testing_01.txt")]
    require_files(source, source.folder / "ClassName.txt", *lists)
    classes = parse_lines(source, source.folder / "ClassName.txt", "/letter/class", _sun_class)
    labels = {folder: label for label, (folder, _) in enumerate(classes)}

    def entry(line: str) -> RawSample:
        path = line.lstrip("/")
        label = labels[path.rsplit("/", 1)[0]]
        return path, label, classes[label][1]

    form = "/letter/class/image of a class in ClassName.txt"
    train, test = (parse_lines(source, path, form, entry) for path in lists)
    return split_trainval(lists[0], train, test, dict(enumerate(name for _, name in classes)))


def _sun_class(line: str) -> tuple[str, str]:
    """Folder and name: "/c/casino/indoor" is "indoor casino"."""
    _, *words = line.lstrip("/").split("/")
    if not all(words) or not words:
        raise ValueError(line)
    return line.lstrip("/"), " ".join(reversed(words))


def read_ucf101(source: DatasetDir) -> Split:
    """Lines "1 ApplyEyeMakeup" in classInd.txt, "ApplyEyeMakeup/v_x.avi" in the lists."""

    def action(line: str) -> tuple[int, str]:
        label, name = line.split()
        return int(label) - 1, name

    def rename(name: str) -> str:
        return "_".join(re.findall("[A-Z][^A-Z]*", name))

    files = ("classInd.txt", "trainlist01.txt", "testlist01.txt")
    index, *lists = [source.folder / "ucfTrainTestlist" / file for file in files]
    require_files(source, index, *lists)
    classes = parse_lines(source, index, "number class", action)
    labels = {name: label for label, name in classes}

    def entry(line: str) -> RawSample:
        folder, video = line.split()[0].split("/")
        name = rename(folder)
        return f"{name}/{video.removesuffix('.avi')}.jpg", labels[folder], name

    form = "class/video of a class in classInd.txt"
    train, test = (parse_lines(source, path, form, entry) for path in lists)
    names = {label: rename(name) for label, name in sorted(classes)}
    return split_trainval(lists[0], train, test, names)


def split_trainvaltest(where: Path, classes: list[tuple[str, list[str]]]) -> Split:
    """Divide each class (name, its images) 50 / 20 / 30."""
    rng = random.Random(SEED)
    train, val, test = [], [], []
    for label, (name, images) in enumerate(classes):
        entries = [(path, label, name) for path in images]
        rng.shuffle(entries)
        first = round(0.5 * len(entries))
        second = first + round(0.2 * len(entries))
        train += entries[:first]
        val += entries[first:second]
        test += entries[second:]
    return Split(str(where), train, val, test, dict(enumerate(name for name, _ in classes)))


def split_trainval(
    where: Path, train: list[RawSample], test: list[RawSample], names: dict[int, str]
) -> Split:
    """Make 20 % of each class's training images validation."""
    rng = random.Random(SEED)
    rest, val = [], []
    for entries in sorted(group_by_label(train), key=lambda entries: entries[0][1]):
        rng.shuffle(entries)
        count = round(0.2 * len(entries))
        val += entries[:count]
        rest += entries[count:]
    return Split(str(where), rest, val, test, names)


def parse_lines(source: DatasetDir, path: Path, form: str, parse: Callable[[str], T]) -> list[T]:
    """Parse each line of a list.

    Raises:
        ValueError: Lines are of another form; the first few are named.
    """
    parsed, bad = [], []
    for number, line in enumerate(read_text(source, path).splitlines(), start=1):
        if line.strip():
            try:
                parsed.append(parse(line.strip()))
            except (ValueError, LookupError):
                bad.append(f"line {number} ({line.strip()[:60]!r})")
    if bad:
        fault = f"has lines that are not '{form}': {truncate_list(bad)}; get the file again"
        raise source.unreadable(path, fault)
    return parsed


def require_files(source: DatasetDir, *lists: Path) -> None:
    """Check that all lists of the download are there.

    Raises:
        FileNotFoundError: At least one is not; all such are named.
    """
    if missing := [str(path) for path in lists if not path.is_file()]:
        lacking = f"the download lacks {truncate_list(missing)}"
        if source.spec.split:
            lacking = f"there is no {source.spec.split}, and {lacking} to make a split from"
        raise source.missing(lacking)


def read_text(source: DatasetDir, path: Path) -> str:
    """The content of a text file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise source.unreadable(path, f"cannot be read ({error}); get the file again") from error


def _column(source: DatasetDir, path: Path, key: str, parse: Callable[[Any], T]) -> list[T]:
    """Parse each element of a vector in a .mat file."""
    import numpy as np  # these two only where a .mat file must be read
    from scipy.io import loadmat

    try:
        # Objects of MATLAB's classes come as data; v7.3 files, which are HDF5, are refused.
        values = loadmat(path, simplify_cells=True, variable_names=[key])[key]
        # A vector of one element comes as that element.
        values = values if isinstance(values, (list, np.ndarray)) else [values]
        return [parse(value) for value in np.ravel(np.asarray(values, dtype=object))]
    except Exception as error:  # a damaged file makes the reader fail in any way
        fault = f"has no readable '{key}' ({type(error).__name__}: {error}); get it again"
        raise source.unreadable(path, fault) from error
