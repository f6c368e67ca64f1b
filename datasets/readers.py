"""Splits made from raw downloads, by the lists in them and by CoOp's rules.

Where the download does not divide its images, 50 % of each class become training images, 20 %
validation images and the rest test images; where it names the test images, 20 % of each class's
training images become validation images. Shares are rounded. The order is that of a digest of the
files' names.
"""

import hashlib
import os
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
    nfc,
    read_json,
    read_text,
)
from utils import Progress, truncate_list

IMAGENET_CLASSNAMES = Path(__file__).with_name("imagenet_classnames.txt")
T = TypeVar("T")


def read_class_folders(
    dataset_dir: DatasetDir, names: Mapping[str, str] | None = None, ignored: Collection[str] = ()
) -> Split:
    """Read one folder for each class, in sorted order.

    Args:
        dataset_dir: The dataset's folder.
        names: Class names of folders that are not called by their class's name.
        ignored: Folders to leave out.
    """
    folders = [name for name in list_subdirs(dataset_dir.image_dir) if name not in ignored]
    classnames = {label: (names or {}).get(name, name) for label, name in enumerate(folders)}
    samples = _list_classes(dataset_dir, folders, classnames)
    return replace(split_trainvaltest(dataset_dir.image_dir, samples, classnames), files_exist=True)


def read_fgvc(dataset_dir: DatasetDir) -> Split:
    """Read lists with lines "0034309 Boeing 707-320"; variants.txt has the order of the labels."""
    variants = dataset_dir.path / "variants.txt"
    lists = [dataset_dir.path / f"images_variant_{split}.txt" for split in SPLITS]
    names = parse_lines(variants, "variant", str)
    labels = {name: label for label, name in enumerate(names)}

    def parse(line: str) -> RawSample:
        image, name = line.split(maxsplit=1)
        return f"{image}.jpg", labels[name], name

    splits = [parse_lines(path, "image variant", parse) for path in lists]
    return Split(f"{dataset_dir.path}/images_variant_*.txt", *splits, dict(enumerate(names)))


def read_flowers(dataset_dir: DatasetDir) -> Split:
    """Read the label of each image from imagelabels.mat, the names from cat_to_name.json."""
    mat, names_file = dataset_dir.path / "imagelabels.mat", dataset_dir.path / "cat_to_name.json"
    labels, names = _read_mat(mat, "labels", int), read_json(names_file)
    try:
        names = {int(label): str(name) for label, name in names.items()}
        names = {label: names[label] for label in sorted(set(labels))}
    except (AttributeError, ValueError, LookupError) as error:
        raise ValueError(
            f"{names_file} does not have a name for each label in {mat} ({error!r}): get it again"
        ) from error
    new_labels = {label: new for new, label in enumerate(names)}
    samples = [
        (f"image_{number:05d}.jpg", new_labels[label], names[label])
        for number, label in enumerate(labels, start=1)
    ]
    return split_trainvaltest(mat, samples, dict(enumerate(names.values())))


def read_cars(dataset_dir: DatasetDir) -> Split:
    """Read lists and names from .mat files; the year goes to the front of a name."""
    devkit, tests = dataset_dir.path / "devkit", "cars_test_annos_withlabels.mat"
    tests = devkit / tests if (devkit / tests).is_file() else dataset_dir.path / tests
    meta, training = devkit / "cars_meta.mat", devkit / "cars_train_annos.mat"
    words = [name.rsplit(" ", 1) for name in _read_mat(meta, "class_names", str)]
    names = {label: " ".join(reversed(name)) for label, name in enumerate(words)}

    def read(path: Path, folder: str) -> list[RawSample]:
        def parse(record: Any) -> RawSample:
            label = int(record["class"]) - 1
            return f"{folder}/{record['fname']}", label, names[label]

        return _read_mat(path, "annotations", parse)

    train, test = read(training, "cars_train"), read(tests, "cars_test")
    return split_trainval(devkit, train, test, names)


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

    def parse_class(line: str) -> tuple[str, int]:
        label, name = line.split()
        return name, int(label) - 1

    def classname(name: str) -> str:
        return "_".join(re.findall("[A-Z][^A-Z]*", name))

    files = ("classInd.txt", "trainlist01.txt", "testlist01.txt")
    index, *lists = [dataset_dir.path / "ucfTrainTestlist" / file for file in files]
    labels = dict(parse_lines(index, "number class", parse_class))

    def parse(line: str) -> RawSample:
        folder, video = line.split()[0].split("/")
        name = classname(folder)
        return f"{name}/{video.removesuffix('.avi')}.jpg", labels[folder], name

    train, test = (parse_lines(path, "class/video", parse) for path in lists)
    names = {label: classname(name) for name, label in labels.items()}
    return split_trainval(lists[0], train, test, names)


def read_imagenet(dataset_dir: DatasetDir) -> Split:
    """Read train/ and val/; labels follow the sorted WordNet ids of the folders in train/."""
    image_dir = dataset_dir.image_dir
    wnids, tested = (list_subdirs(image_dir / split) for split in ("train", "val"))
    if not wnids or wnids != tested:
        differing = sorted(set(wnids) ^ set(tested))
        raise ValueError(
            f"train/ and val/ in {image_dir} need the same class folders like n01440764, but only "
            f"one of them has {truncate_list(differing) or 'any'}: sort the images of both"
        )
    names = _wnid_classnames(dataset_dir, wnids)
    train, test = (
        _list_classes(dataset_dir, [f"{split}/{wnid}" for wnid in wnids], names)
        for split in ("train", "val")
    )
    return Split(str(image_dir), train, [], test, names, files_exist=True)


def read_imagenet_variant(dataset_dir: DatasetDir) -> Split:
    """Read class folders of test images, named by WordNet ids or by ImageNet's labels.

    Labels follow the sorted WordNet ids of the classes that are there, which makes them ImageNet's
    own labels if all are.
    """
    wnids = sorted(_read_classnames(IMAGENET_CLASSNAMES))
    by_label = {str(label): wnid for label, wnid in enumerate(wnids)}  # ImageNetV2: 0 to 999
    folders = {by_label.get(name, name): name for name in list_subdirs(dataset_dir.image_dir)}
    if not folders:
        raise ValueError(f"{dataset_dir.image_dir} has no class folders like n01440764")
    names = _wnid_classnames(dataset_dir, sorted(folders))
    test = _list_classes(dataset_dir, [folders[wnid] for wnid in sorted(folders)], names)
    return Split(str(dataset_dir.image_dir), [], [], test, names, files_exist=True)


def _list_classes(
    dataset_dir: DatasetDir, folders: list[str], names: dict[int, str]
) -> list[RawSample]:
    """Return the images of class folders, which are in the order of their labels."""
    return [
        (f"{folder}/{name}", label, names[label])
        for label, folder in enumerate(Progress(folders, desc=dataset_dir.name, unit="class"))
        for name in list_images(dataset_dir.image_path(folder))
    ]


def _wnid_classnames(dataset_dir: DatasetDir, wnids: list[str]) -> dict[int, str]:
    """Return the class name of each label.

    Names come from the first classnames.txt in the dataset's own folder, in the one above a folder
    called images, or in ImageNet's; and from the published list if it does not name a class.
    """
    path, imagenet = dataset_dir.path, dataset_dir.root / "imagenet"
    folder = path.parent if path.name == "images" else path
    files = [place / "classnames.txt" for place in (path, folder, imagenet, imagenet / "images")]
    names = _read_classnames(IMAGENET_CLASSNAMES)
    if file := next(filter(Path.is_file, files), None):
        names |= _read_classnames(file)
    if unnamed := [wnid for wnid in wnids if wnid not in names]:
        raise ValueError(
            f"the class folder {truncate_list(unnamed)} has no name: give it one in "
            f"{folder / 'classnames.txt'}, in a line like 'n01440764 tench'"
        )
    return {label: names[wnid] for label, wnid in enumerate(wnids)}


def _read_classnames(path: Path) -> dict[str, str]:
    """Read lines of a WordNet id and a class name."""

    def parse(line: str) -> tuple[str, str]:
        wnid, name = line.split(maxsplit=1)
        return wnid, name

    return dict(parse_lines(path, "n01440764 tench", parse))


def split_trainvaltest(source_path: Path, samples: list[RawSample], names: dict[int, str]) -> Split:
    """Divide the samples of each class 50 / 20 / 30, in the order of `digest_key`."""
    train, val, test = [], [], []
    for group in _sorted_groups(samples):
        first = round(0.5 * len(group))
        second = first + round(0.2 * len(group))
        train += group[:first]
        val += group[first:second]
        test += group[second:]
    return Split(str(source_path), train, val, test, names)


def split_trainval(
    source_path: Path, trainval: list[RawSample], test: list[RawSample], names: dict[int, str]
) -> Split:
    """Make 20 % of each class's training images validation images, as `digest_key` has them."""
    train, val = [], []
    for group in _sorted_groups(trainval):
        count = round(0.2 * len(group))
        val += group[:count]
        train += group[count:]
    return Split(str(source_path), train, val, test, dict(sorted(names.items())))


def _sorted_groups(samples: list[RawSample]) -> list[list[RawSample]]:
    """Return the samples of each class by label, in the order of `digest_key`."""
    groups = sorted(group_by_label(samples), key=lambda group: group[0][1])
    return [sorted(group, key=lambda sample: digest_key(sample[0])) for group in groups]


def digest_key(path: str) -> tuple[bytes, str]:
    """Return the key that brings a class's images into the order in which they are divided.

    It is a digest of the file's name: one file more moves only images at the parts' borders.
    """
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
                raise ValueError(
                    f"line {number} of {path}, {line[:60]!r}, is not '{form}', or its class is "
                    "unknown: get the file again"
                ) from error
    return parsed


def _read_mat(path: Path, key: str, parse: Callable[[Any], T]) -> list[T]:
    """Parse each element of a vector in a .mat file."""
    import numpy as np
    from scipy.io import loadmat  # only three datasets need it, and without their split file

    with open(path, "rb") as file:
        try:
            values = loadmat(file, simplify_cells=True, variable_names=[key])[key]
            return [parse(value) for value in np.ravel(np.asarray(values, dtype=object))]
        except Exception as error:  # a damaged file makes the reader fail in any way
            raise ValueError(
                f"{path} has no readable '{key}' ({type(error).__name__}: {error}): get it again"
            ) from error
