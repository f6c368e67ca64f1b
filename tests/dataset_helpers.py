"""Small copies of every dataset's real folder layout: images, lists, .mat files, split files.

    make_dataset("oxford_pets", root, convention="lora", split=False, classes=3, per_class=8)

Written from the layouts themselves, not from the code under test.
"""

import io
import json
import random
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from datasets import build_dataset

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "val", "test")
Parts = dict[str, list[list]]  # part: [[path, label, class name], ...]
Size = tuple[int, int]

# dataset: its folder in the CoOp layout, in the CLIP-LoRA and SO one, split file
LAYOUTS = {
    "imagenet": ("imagenet/images", "imagenet", None),
    "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json"),
    "fgvc": ("fgvc_aircraft", "fgvc_aircraft", None),
    "eurosat": ("eurosat", "eurosat", "split_zhou_EuroSAT.json"),
    "stanford_cars": ("stanford_cars", "StanfordCars", "split_zhou_StanfordCars.json"),
    "food101": ("food-101", "Food101", "split_zhou_Food101.json"),
    "oxford_pets": ("oxford_pets", "OxfordPets", "split_zhou_OxfordPets.json"),
    "oxford_flowers": ("oxford_flowers", "Flower102", "split_zhou_OxfordFlowers.json"),
    "caltech101": ("caltech-101", "Caltech101", "split_zhou_Caltech101.json"),
    "dtd": ("dtd", "DTD", "split_zhou_DescribableTextures.json"),
    "ucf101": ("ucf101", "UCF101", "split_zhou_UCF101.json"),
    "imagenetv2": ("imagenetv2", "imagenetv2", None),
    "imagenet_sketch": ("imagenet-sketch", "imagenet-sketch", None),
    "imagenet_a": ("imagenet-adversarial", "imagenet-adversarial", None),
    "imagenet_r": ("imagenet-rendition", "imagenet-rendition", None),
    "digits": ("digits", "digits", "split_zhou_Digits.json"),
}
VARIANTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
ELEVEN = tuple(name for name in LAYOUTS if name not in (*VARIANTS, "digits"))
WITH_SPLIT = tuple(name for name, layout in LAYOUTS.items() if layout[2])

# Real class names where there are so many; names like them beyond.
NAMES = {
    "sun397": ["/a/abbey", "/c/casino/indoor", "/a/airplane_cabin", "/z/zen_garden"],
    "fgvc": ["707-320", "A300B4", "Boeing 717", "F/A-18"],
    "eurosat": ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"]
    + ["Pasture", "PermanentCrop", "Residential", "River", "SeaLake"],
    "stanford_cars": ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"],
    "food101": ["apple_pie", "baby_back_ribs", "baklava"],
    "oxford_pets": ["Abyssinian", "american_bulldog", "american_pit_bull_terrier"],
    "oxford_flowers": ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"],
    "caltech101": ["Faces", "Leopards", "Motorbikes", "accordion", "airplanes"],
    "dtd": ["banded", "meshed", "polka-dotted"],
    "ucf101": ["ApplyEyeMakeup", "BasketballDunk", "YoYo"],
    "digits": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
}
EUROSAT_NAMES = ["Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road"]
EUROSAT_NAMES += ["Industrial Buildings", "Pasture Land", "Permanent Crop Land"]
EUROSAT_NAMES += ["Residential Buildings", "River", "Sea or Lake"]
CALTECH_NAMES = {
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
}


def make_dataset(
    name: str,
    root: str | Path,
    convention: str = "coop",
    split: bool = True,
    classes: int = 3,
    per_class: int = 8,
    size: Size = (40, 32),
) -> Path:
    """Write a small copy of a dataset, the raw download's lists always included.

    Args:
        name: Its name on the command line.
        root: Folder of all datasets.
        convention: "coop" or "lora", the two sets of folder names.
        split: Write the published split file, too, if the dataset has one.
        classes: Number of classes.
        per_class: Images per class, half of them for training, a fifth for validation, the rest
            for testing. ImageNet has per_class training images and half as many for testing; its
            variants have half of per_class, for testing.
        size: Width and height of the images.

    Returns:
        The dataset's folder.
    """
    folder = Path(root) / LAYOUTS[name][("coop", "lora").index(convention)]
    folder.mkdir(parents=True, exist_ok=True)
    parts = WRITERS[name](folder, class_names(name, classes), per_class, size)
    split_file = LAYOUTS[name][2]
    if split_file and (split or name == "digits"):
        for part in SPLITS:  # so that labels do not appear in order
            random.Random(part).shuffle(parts[part])
        (folder / split_file).write_text(json.dumps(parts))
    return folder


make_small_dataset = partial(make_dataset, size=(8, 8))


def change_split(folder: Path, change: Callable[[dict], object]) -> None:
    """Apply a function to the split file in a dataset's folder: it changes its argument."""
    (path,) = folder.glob("split_zhou_*.json")
    split = json.loads(path.read_text())
    change(split)
    path.write_text(json.dumps(split))


def check_refused(name: str, root: Path, message: str = ".") -> str:
    """Check that a dataset is refused in one sentence that matches a pattern; return it."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        build_dataset(name, root, 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def class_names(name: str, classes: int) -> list[str]:
    """Return class names as the raw download spells them."""
    if name.startswith("imagenet"):
        lines = (ROOT / "datasets/imagenet_classnames.txt").read_text().splitlines()
        return lines[:classes]
    letters = [chr(ord("a") + i // 26) + chr(ord("a") + i % 26) for i in range(classes)]
    more = {
        "sun397": "/x/xx_{}",
        "stanford_cars": "Make {} 2010",
        "ucf101": "ZMove{}",
        "oxford_pets": "zebra_{}",
    }.get(name, "z {}" if name == "fgvc" else "z_{}")
    names = NAMES[name][:classes]
    return names + [more.format(letter) for letter in letters[len(names) :]]


def write_image(path: Path, label: int, index: int, size: Size = (8, 8)) -> None:
    """Write one image: its class's color with some noise of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_image(label, index, size, "PNG" if path.suffix == ".png" else "JPEG"))


@lru_cache(maxsize=4096)
def encode_image(label: int, index: int, size: Size, form: str) -> bytes:
    """Return the bytes of such an image's file."""
    color = np.random.RandomState(label).randint(40, 216, 3)
    noise = np.random.RandomState(1000 * label + index).randint(-40, 40, (size[1], size[0], 1))
    file = io.BytesIO()
    Image.fromarray((color + noise).astype(np.uint8)).save(file, form)
    return file.getvalue()


def _write(
    folder: Path,
    names: list[str],
    per_class: int,
    size: Size,
    path_of: Callable[[int, int, int, str], str],
) -> Parts:
    """Write all images at path_of(label, index, running number, part); return their entries."""
    parts: Parts = {part: [] for part in SPLITS}
    num_train, num_val = max(1, per_class // 2), round(per_class / 5)
    for number in range(len(names) * per_class):
        label, index = divmod(number, per_class)
        part = "train" if index < num_train else "val" if index < num_train + num_val else "test"
        path = path_of(label, index, number + 1, part)
        write_image(folder / path, label, index, size)
        parts[part].append([path, label, names[label]])
    return parts


def _class_folders(images: str, titles: dict[str, str] | None = None, extension: str = "jpg"):
    """Return a writer of one folder for each class, with other files beside the images."""

    def write(folder: Path, names: list[str], per_class: int, size: Size) -> Parts:
        def path_of(label: int, index: int, number: int, part: str) -> str:
            return f"{names[label]}/{names[label]}_{index:04d}.{extension}"

        names = names if extension == "png" else sorted(names)  # the digits are not sorted
        (folder / images).mkdir(exist_ok=True)
        (folder / images / ".directory").write_text("hidden")
        (folder / images / "readme.txt").write_text("no image")
        classnames = [(titles or {}).get(name, name) for name in names]
        return _write(folder / images, classnames, per_class, size, path_of)

    return write


def _caltech(folder: Path, names: list[str], per_class: int, size: Size) -> Parts:
    for ignored in ("BACKGROUND_Google", "Faces_easy"):
        write_image(folder / "101_ObjectCategories" / ignored / "image_0001.jpg", 0, 0, size)
    return _class_folders("101_ObjectCategories", CALTECH_NAMES)(folder, names, per_class, size)


def _imagenet(folder: Path, lines: list[str], per_class: int, size: Size) -> Parts:
    if folder.name == "images":  # CoOp's layout names the classes, the other one does not
        (folder.parent / "classnames.txt").write_text("".join(f"{line}\n" for line in lines))
    for label, wnid in enumerate(line.split()[0] for line in lines):
        for i in range(per_class):
            write_image(folder / f"train/{wnid}/{wnid}_{i}.JPEG", label, i, size)
        for i in range(max(1, per_class // 2)):
            number = i * len(lines) + label + 1
            path = folder / f"val/{wnid}/ILSVRC2012_val_{number:08d}.JPEG"
            write_image(path, label, 500 + i, size)
    return {}


def _imagenet_variant(images: str, filename: str, numbered: bool = False):
    """Return a writer of folders of test images, named by WordNet ids or by ImageNet's labels."""

    def write(folder: Path, lines: list[str], per_class: int, size: Size) -> Parts:
        (folder / images).mkdir()
        (folder / images / "README.txt").write_text("what the images are")
        for label, wnid in enumerate(line.split()[0] for line in lines):
            for i in range(max(1, per_class // 2)):
                name = str(label) if numbered else wnid
                write_image(folder / images / name / filename.format(i), label, 700 + i, size)
        return {}

    return write


def _fgvc(folder: Path, names: list[str], per_class: int, size: Size) -> Parts:
    (folder / "variants.txt").write_text("".join(f"{name}\n" for name in names))
    parts = _write(folder / "images", names, per_class, size, lambda _, __, n, ___: f"{n:07d}.jpg")
    for part in SPLITS:
        lines = [f"{path[:-4]} {name}\n" for path, _, name in sorted(parts[part], reverse=True)]
        (folder / f"images_variant_{part}.txt").write_text("".join(lines))
    return parts


def _cars(folder: Path, names: list[str], per_class: int, size: Size) -> Parts:
    def path_of(label: int, index: int, number: int, part: str) -> str:
        return f"cars_{'test' if part == 'test' else 'train'}/{number:05d}.jpg"

    titles = [f"{name.split()[-1]} {' '.join(name.split()[:-1])}" for name in names]
    parts = _write(folder, titles, per_class, size, path_of)

    def annotations(path: Path, entries: list[list]) -> None:
        kind = [(key, object) for key in ("bbox_x1", "class", "fname")]
        rows = [(1.0, float(label + 1), Path(path).name) for path, label, _ in entries]
        savemat(path, {"annotations": np.array([rows], dtype=kind).reshape(1, -1)})

    (folder / "devkit").mkdir(exist_ok=True)
    cell = np.empty((1, len(names)), dtype=object)
    cell[0] = names
    savemat(folder / "devkit/cars_meta.mat", {"class_names": cell})
    annotations(folder / "devkit/cars_train_annos.mat", parts["train"] + parts["val"])
    annotations(folder / "cars_test_annos_withlabels.mat", parts["test"])
    return parts


def _flowers(folder: Path, names: list[str], per_class: int, size: Size) -> Parts:
    parts = _write(
        folder / "jpg", names, per_class, size, lambda _, __, n, ___: f"image_{n:05d}.jpg"
    )
    entries = sorted(entry for part in SPLITS for entry in parts[part])
    labels = np.array([[label + 1 for _, label, _ in entries]], dtype=np.uint8)
    savemat(folder / "imagelabels.mat", {"labels": labels})
    numbers = {str(label + 1): name for label, name in enumerate(names)}
    (folder / "cat_to_name.json").write_text(json.dumps(numbers))
    return parts


def _pets(folder: Path, names: list[str], per_class: int, size: Size) -> Parts:
    def path_of(label: int, index: int, number: int, part: str) -> str:
        return f"{names[label]}_{index + 1}.jpg"

    titles = [name.lower() for name in names]
    parts = _write(folder / "images", titles, per_class, size, path_of)
    (folder / "annotations").mkdir(exist_ok=True)
    for file, entries in _two_lists(parts, "trainval.txt", "test.txt"):
        lines = [f"{path[:-4]} {label + 1} 1 {label + 1}\n" for path, label, _ in entries]
        (folder / "annotations" / file).write_text("".join(lines))
    return parts


def _sun397(folder: Path, names: list[str], per_class: int, size: Size) -> Parts:
    def path_of(label: int, index: int, number: int, part: str) -> str:
        return f"{names[label][1:]}/sun_{number:06d}.jpg"

    titles = [" ".join(reversed(name.split("/")[2:])) for name in names]
    parts = _write(folder / "SUN397", titles, per_class, size, path_of)
    (folder / "ClassName.txt").write_text("".join(f"{name}\n" for name in names))
    for file, entries in _two_lists(parts, "Training_01.txt", "Testing_01.txt"):
        (folder / file).write_text("".join(f"/{path}\n" for path, _, _ in entries))
    return parts


def _ucf101(folder: Path, names: list[str], per_class: int, size: Size) -> Parts:
    def title(name: str) -> str:
        words = "".join(f" {letter}" if letter.isupper() else letter for letter in name)
        return "_".join(words.split())

    def path_of(label: int, index: int, number: int, part: str) -> str:
        return f"{title(names[label])}/v_{names[label]}_g{index + 1:02d}_c01.jpg"

    titles = [title(name) for name in names]
    parts = _write(folder / "UCF-101-midframes", titles, per_class, size, path_of)
    lists = folder / "ucfTrainTestlist"
    lists.mkdir(exist_ok=True)
    (lists / "classInd.txt").write_text("".join(f"{i + 1} {n}\n" for i, n in enumerate(names)))
    for file, entries in _two_lists(parts, "trainlist01.txt", "testlist01.txt"):
        lines = [f"{names[label]}/{Path(path).stem}.avi" for path, label, _ in entries]
        if file == "trainlist01.txt":  # only this one has labels
            lines = [f"{line} {e[1] + 1}" for line, e in zip(lines, entries, strict=True)]
        (lists / file).write_text("".join(f"{line}\n" for line in lines))
    return parts


def _two_lists(parts: Parts, training: str, testing: str) -> list[tuple[str, list[list]]]:
    """Return the entries of a download's two lists, which know no validation images."""
    return [(training, parts["train"] + parts["val"]), (testing, parts["test"])]


WRITERS: dict[str, Callable[[Path, list[str], int, Size], Parts]] = {
    "imagenet": _imagenet,
    "sun397": _sun397,
    "fgvc": _fgvc,
    "eurosat": _class_folders("2750", dict(zip(NAMES["eurosat"], EUROSAT_NAMES, strict=True))),
    "stanford_cars": _cars,
    "food101": _class_folders("images"),
    "oxford_pets": _pets,
    "oxford_flowers": _flowers,
    "caltech101": _caltech,
    "dtd": _class_folders("images"),
    "ucf101": _ucf101,
    "imagenetv2": _imagenet_variant(
        "imagenetv2-matched-frequency-format-val", "{}f.jpeg", numbered=True
    ),
    "imagenet_sketch": _imagenet_variant("images", "sketch_{}.JPEG"),
    "imagenet_a": _imagenet_variant("imagenet-a", "0.0_fox squirrel _ fox_0.5_{}.jpg"),
    "imagenet_r": _imagenet_variant("imagenet-r", "art_{}.jpg"),
    "digits": _class_folders("images", extension="png"),
}
