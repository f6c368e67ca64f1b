"""Splits made from raw downloads, by the lists in them and by CoOp's rules.

Where the download does not divide its images, 50 % of each class become training images, 20 %
validation images and the rest test images; where it names the test images, 20 % of each class's
training images become validation images. The order is that of a digest of the files' names.
"""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from datasets.base import SPLITS, DatasetDir, RawSample, Split, group_by_label
from datasets.files import list_images, list_subdirs, nfc, read_json, read_text
from utils import Progress, truncate_list

IMAGENET_CLASSNAMES = Path(__file__).with_name("imagenet_classnames.txt")
T = TypeVar("T")


def read_class_folders(
    dataset_dir: DatasetDir, names: Mapping[str, str] | None = None, ignored: Collection[str] = ()
) -> Split:
    """Read a folder for each class, in sorted order; `names` has other names than the folders."""
    folders = [name for name in list_subdirs(dataset_dir.image_dir) if name not in ignored]
    classnames = {label: (names or {}).get(name, name) for label, name in enumerate(folders)}
    samples = _list_classes(dataset_dir, folders, classnames)
    return replace(split_trainvaltest(dataset_dir.image_dir, samples, classnames), files_exist=True)


def read_fgvc(dataset_dir: DatasetDir) -> Split:
    """Read lists with lines "0034309 Boeing 707-320"; variants.txt has the order of the labels."""
    lists = [dataset_dir.path / f"images_variant_{split}.txt" for split in SPLITS]
    names = parse_lines(dataset_dir.path / "variants.txt", "variant", str)
    labels = {name: label for label, name in enumerate(names)}

    def parse(line: str) -> RawSample:
        image, name = _split_line(line)
        return f"{image}.jpg", labels[name], name

    splits = [parse_lines(path, "image variant", parse) for path in lists]
    return Split(f"{dataset_dir.path}/images_variant_*.txt", *splits, dict(enumerate(names)))


def read_flowers(dataset_dir: DatasetDir) -> Split:
    """Read the label of each image from imagelabels.mat, the names from cat_to_name.json."""
    mat = dataset_dir.path / "imagelabels.mat"
    names = read_json(dataset_dir.path / "cat_to_name.json")

    def parse(label: Any) -> tuple[int, str]:
        return int(label) - 1, str(names[str(int(label))])

    classes = _read_mat(mat, "labels", parse)
    samples = [(f"image_{number:05d}.jpg", *c) for number, c in enumerate(classes, start=1)]
    return split_trainvaltest(mat, samples, dict(sorted(set(classes))))


def read_cars(dataset_dir: DatasetDir) -> Split:
    """Read lists and names from .mat files; the year goes to the front of a name."""
    devkit, tests = dataset_dir.path / "devkit", "cars_test_annos_withlabels.mat"
    tests = devkit / tests if (devkit / tests).is_file() else dataset_dir.path / tests
    names = _read_mat(devkit / "cars_meta.mat", "class_names", str)
    names = [" ".join(reversed(name.rsplit(" ", 1))) for name in names]

    def parse(record: Any) -> RawSample:
        label = int(record["class"]) - 1
        return record["fname"], label, names[label]

    train = _read_mat(devkit / "cars_train_annos.mat", "annotations", parse)
    train = [(f"cars_train/{file}", *rest) for file, *rest in train]
    test = [(f"cars_test/{file}", *rest) for file, *rest in _read_mat(tests, "annotations", parse)]
    return split_trainval(devkit, train, test, dict(enumerate(names)))


def read_pets(dataset_dir: DatasetDir) -> Split:
    """Read lines "Abyssinian_100 1 1 1": image, class from 1, species, breed."""

    def parse(line: str) -> RawSample:
        image, label, _, _ = line.split()
        return f"{image}.jpg", int(label) - 1, image.rsplit("_", 1)[0].lower()

    lists = [dataset_dir.path / "annotations" / name for name in ("trainval.txt", "test.txt")]
    train, test = (parse_lines(path, "image class species breed", parse) for path in lists)
    return split_trainval(lists[0], train, test, {i: name for _, i, name in [*test, *train]})


def read_sun397(dataset_dir: DatasetDir) -> Split:
    """Read lines "/c/casino/indoor" in ClassName.txt, "/c/casino/indoor/sun_x.jpg" in the lists."""

    def parse_class(line: str) -> tuple[str, str]:
        folder = line.lstrip("/")
        _, word, *more = folder.split("/")
        return folder, " ".join(reversed([word, *more]))

    files = ("ClassName.txt", "Training_01.txt", "Testing_01.txt")
    index, *lists = [dataset_dir.path / name for name in files]
    classes = parse_lines(index, "/letter/class", parse_class)
    labels = {folder: label for label, (folder, _) in enumerate(classes)}

    def parse(line: str) -> RawSample:
        path = line.lstrip("/")
        label = labels[path.rsplit("/", 1)[0]]
        return path, label, classes[label][1]

    train, test = (parse_lines(path, "/letter/class/image", parse) for path in lists)
    return split_trainval(lists[0], train, test, dict(enumerate(name for _, name in classes)))


def read_ucf101(dataset_dir: DatasetDir) -> Split:
    """Read lines "1 ApplyEyeMakeup" in classInd.txt, "ApplyEyeMakeup/v_x.avi" in the lists."""
    files = ("classInd.txt", "trainlist01.txt", "testlist01.txt")
    index, *lists = [dataset_dir.path / "ucfTrainTestlist" / file for file in files]
    labels = {c: int(number) - 1 for number, c in parse_lines(index, "number class", _split_line)}
    names = {c: "_".join(re.findall("[A-Z][^A-Z]*", c)) for c in labels}

    def parse(line: str) -> RawSample:
        folder, video = line.split()[0].split("/")
        name = names[folder]
        return f"{name}/{video.removesuffix('.avi')}.jpg", labels[folder], name

    train, test = (parse_lines(path, "class/video", parse) for path in lists)
    return split_trainval(lists[0], train, test, {labels[c]: name for c, name in names.items()})


def read_imagenet(dataset_dir: DatasetDir) -> Split:
    """Read train/ and val/; labels follow the sorted WordNet ids of the folders in train/."""
    wnids = list_subdirs(dataset_dir.image_dir / "train")
    names = _wnid_classnames(dataset_dir, wnids)
    train = _list_classes(dataset_dir, [f"train/{wnid}" for wnid in wnids], names)
    test = _list_classes(dataset_dir, [f"val/{wnid}" for wnid in wnids], names)
    return Split(str(dataset_dir.image_dir), train, [], test, names, files_exist=True)


def read_imagenet_variant(dataset_dir: DatasetDir) -> Split:
    """Read class folders, named by WordNet ids or, as in ImageNetV2, by ImageNet's labels."""
    wnids = sorted(_read_classnames(IMAGENET_CLASSNAMES))
    by_label = {str(label): wnid for label, wnid in enumerate(wnids)}
    folders = {by_label.get(name, name): name for name in list_subdirs(dataset_dir.image_dir)}
    names = _wnid_classnames(dataset_dir, sorted(folders))
    test = _list_classes(dataset_dir, [folders[wnid] for wnid in sorted(folders)], names)
    return Split(str(dataset_dir.image_dir), [], [], test, names, files_exist=True)


def _list_classes(
    dataset_dir: DatasetDir, folders: list[str], names: dict[int, str]
) -> list[RawSample]:
    return [
        (f"{folder}/{name}", label, names[label])
        for label, folder in enumerate(Progress(folders, desc=dataset_dir.name, unit="class"))
        for name in list_images(dataset_dir.image_path(folder))
    ]


def _wnid_classnames(dataset_dir: DatasetDir, wnids: list[str]) -> dict[int, str]:
    """Return the class name of each label: of a classnames.txt, or else the published one."""
    path, imagenet = dataset_dir.path, dataset_dir.root / "imagenet"
    files = [place / "classnames.txt" for place in (path, imagenet, imagenet / "images")]
    names = _read_classnames(IMAGENET_CLASSNAMES)
    if file := next(filter(Path.is_file, files), None):
        names |= _read_classnames(file)
    if unnamed := [wnid for wnid in wnids if wnid not in names]:
        line = f"a line like 'n01440764 tench' in {files[0]}"
        raise ValueError(f"the class folder {truncate_list(unnamed)} has no name: give it {line}")
    return {label: names[wnid] for label, wnid in enumerate(wnids)}


def _read_classnames(path: Path) -> dict[str, str]:
    return dict(parse_lines(path, "n01440764 tench", _split_line))


def _split_line(line: str) -> tuple[str, str]:
    first, rest = line.split(maxsplit=1)
    return first, rest


def split_trainvaltest(source_path: Path, samples: list[RawSample], names: dict[int, str]) -> Split:
    """Divide the samples of each class 50 / 20 / 30."""
    return Split(str(source_path), *_divide_classes(samples, 0.5, 0.2), names)


def split_trainval(
    source_path: Path, trainval: list[RawSample], test: list[RawSample], names: dict[int, str]
) -> Split:
    """Make 20 % of each class's training images validation images."""
    val, train = _divide_classes(trainval, 0.2)
    return Split(str(source_path), train, val, test, dict(sorted(names.items())))


def _divide_classes(samples: list[RawSample], *shares: float) -> list[list[RawSample]]:
    """Return such shares of each class, in the order of `digest_key`, and what remains."""
    parts: list[list[RawSample]] = [[] for _ in (*shares, "rest")]
    for group in sorted(group_by_label(samples), key=lambda group: group[0][1]):
        rest = sorted(group, key=lambda sample: digest_key(sample[0]))
        for part, share in zip(parts, shares, strict=False):
            count = round(share * len(group))
            part += rest[:count]
            rest = rest[count:]
        parts[-1] += rest
    return parts


def digest_key(path: str) -> tuple[bytes, str]:
    """Return a digest of a file's name: one file more moves only images at the parts' borders."""
    name = nfc(os.path.basename(path)).encode(errors="surrogateescape")
    return hashlib.sha256(name).digest(), path


def parse_lines(path: Path, form: str, parse: Callable[[str], T]) -> list[T]:
    """Parse each line of a list that is not blank; a ValueError names one of another form."""
    parsed = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line := line.strip():
            try:
                parsed.append(parse(line))
            except (ValueError, LookupError) as error:
                at = f"line {number} of {path}, {line[:60]!r}"
                raise ValueError(f"{at}, is no known '{form}': get it again") from error
    return parsed


def _read_mat(path: Path, key: str, parse: Callable[[Any], T]) -> list[T]:
    from scipy.io import loadmat  # only three datasets need it, and without their split file

    with open(path, "rb") as file:
        try:
            values = loadmat(file, simplify_cells=True, variable_names=[key])[key]
            return [parse(value) for value in np.ravel(np.asarray(values, dtype=object))]
        except Exception as error:  # a damaged file makes the reader fail in any way
            raise ValueError(f"{path} has no readable '{key}' ({error!r}): get it again") from error
