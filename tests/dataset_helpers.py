"""Small copies of every dataset's real folder layout: images, lists, .mat files, split files.

    make_dataset("oxford_pets", root, convention="lora", split=False, classes=3, per_class=8)

Written from the layouts themselves, not from the code under test.
"""

import io
import json
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

ROOT = Path(__file__).parents[1]
PARTS = ("train", "val", "test")
Parts = dict[str, list[list]]  # part: [[path, label, class name], ...]

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

# Real class names where there are any so many; names like them beyond.
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
    size: tuple[int, int] = (40, 32),
) -> None:
    """Write a small copy of a dataset, the raw download's lists always included.

    Args:
        name: Its name on the command line.
        root: Folder of all datasets; its own folder is made below it.
        convention: "coop" or "lora", the two sets of folder names.
        split: Write the published split file, too, where the dataset has one.
        classes: Number of classes.
        per_class: Images per class, half of them for training, a fifth for validation, the rest
            for testing. ImageNet has per_class training images and half as many for testing; its
            variants have half of per_class, for testing.
        size: Width and height of the images.
    """
    folder = Path(root) / LAYOUTS[name][("coop", "lora").index(convention)]
    folder.mkdir(parents=True, exist_ok=True)
    parts = WRITERS[name](folder, class_names(name, classes), per_class, size)
    split_file = LAYOUTS[name][2]
    if split_file and (split or name == "digits"):
        for part in PARTS:  # so that labels do not appear in order
            random.Random(part).shuffle(parts[part])
        (folder / split_file).write_text(json.dumps(parts))


def change_split(folder: Path, change: Callable[[dict], object]) -> None:
    """Apply a function to the split file in a dataset's folder: it changes its argument."""
    (path,) = folder.glob("split_zhou_*.json")
    split = json.loads(path.read_text())
    change(split)
    path.write_text(json.dumps(split))


def refused(name: str, root: Path, message: str = ".") -> str:
    """Check that a dataset is refused in one sentence, which a pattern fits; return it."""
    import pytest

    from datasets import build_dataset

    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        build_dataset(name, root, 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def class_names(name: str, classes: int) -> list[str]:
    """Class names as the raw download spells them."""
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


def write_image(path: Path, label: int, index: int, size: tuple[int, int]) -> None:
    """Write one image: its class's colour with some noise of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded_image(label, index, size, "PNG" if path.suffix == ".png" else "JPEG"))


@lru_cache(maxsize=4096)
def encoded_image(label: int, index: int, size: tuple[int, int], form: str) -> bytes:
    """The bytes of such an image's file."""
    colour = np.random.RandomState(label).randint(40, 216, 3)
    noise = np.random.RandomState(1000 * label + index).randint(-40, 40, (size[1], size[0], 1))
    file = io.BytesIO()
    Image.fromarray((colour + noise).astype(np.uint8)).save(file, form)
    return file.getvalue()


def part_of(index: int, per_class: int) -> str:
    """The part that a class's image belongs to."""
    train, val = max(1, per_class // 2), round(per_class / 5)
    return "train" if index < train else "val" if index < train + val else "test"


def _write(
    folder: Path,
    names: list[str],
    per_class: int,
    size: tuple[int, int],
    path_of: Callable[[int, int, int, str], str],
) -> Parts:
    """Write all images at path_of(label, index, running number, part); return their entries."""
    parts: Parts = {part: [] for part in PARTS}
    number = 0
    for label, name in enumerate(names):
        for index in range(per_class):
            number += 1
            part = part_of(index, per_class)
            path = path_of(label, index, number, part)
            write_image(folder / path, label, index, size)
            parts[part].append([path, label, name])
    return parts


def _class_folders(images: str, ending: str = "jpg", naming: Callable[[str], str] = str):
    """A writer of one folder for each class, labelled in sorted order."""

    def write(folder: Path, names: list[str], per_class: int, size: tuple[int, int]) -> Parts:
        if ending == "jpg":
            names = sorted(names)

        def path_of(label: int, index: int, number: int, part: str) -> str:
            return f"{names[label]}/{names[label]}_{index:04d}.{ending}"

        (folder / images).mkdir(exist_ok=True)
        (folder / images / ".directory").write_text("hidden")
        (folder / images / "readme.txt").write_text("no image")
        titles = [naming(name) for name in names]
        return _write(folder / images, titles, per_class, size, path_of)

    return write


def _eurosat_name(folder: str) -> str:
    return dict(zip(NAMES["eurosat"], EUROSAT_NAMES, strict=True)).get(folder, folder)


def _caltech(folder: Path, names: list[str], per_class: int, size: tuple[int, int]) -> Parts:
    for ignored in ("BACKGROUND_Google", "Faces_easy"):
        write_image(folder / "101_ObjectCategories" / ignored / "image_0001.jpg", 0, 0, size)

    def naming(name: str) -> str:
        return CALTECH_NAMES.get(name, name)

    return _class_folders("101_ObjectCategories", naming=naming)(folder, names, per_class, size)


def _imagenet(folder: Path, lines: list[str], per_class: int, size: tuple[int, int]) -> Parts:
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


def _variant(images: str, numbered: bool = False, naming: str = "{wnid}_{i}.JPEG"):
    """A writer of class folders of test images, named by WordNet ids or by ImageNet's labels."""

    def write(folder: Path, lines: list[str], per_class: int, size: tuple[int, int]) -> Parts:
        (folder / images).mkdir()
        (folder / images / "README.txt").write_text("what the images are")
        for label, wnid in enumerate(line.split()[0] for line in lines):
            for i in range(max(1, per_class // 2)):
                place = str(label) if numbered else wnid
                path = folder / images / place / naming.format(wnid=wnid, i=i)
                write_image(path, label, 700 + i, size)
        return {}

    return write


def _fgvc(folder: Path, names: list[str], per_class: int, size: tuple[int, int]) -> Parts:
    (folder / "variants.txt").write_text("".join(f"{name}\n" for name in names))
    parts = _write(
        folder / "images", names, per_class, size, lambda label, index, n, part: f"{n:07d}.jpg"
    )
    for part in PARTS:
        lines = [f"{path[:-4]} {name}\n" for path, _, name in sorted(parts[part], reverse=True)]
        (folder / f"images_variant_{part}.txt").write_text("".join(lines))
    return parts


def _cars(folder: Path, names: list[str], per_class: int, size: tuple[int, int]) -> Parts:
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


def _flowers(folder: Path, names: list[str], per_class: int, size: tuple[int, int]) -> Parts:
    parts = _write(
        folder / "jpg", names, per_class, size, lambda label, index, n, part: f"image_{n:05d}.jpg"
    )
    entries = sorted(entry for part in PARTS for entry in parts[part])
    labels = np.array([[label + 1 for _, label, _ in entries]], dtype=np.uint8)
    savemat(folder / "imagelabels.mat", {"labels": labels})
    numbers = {str(label + 1): name for label, name in enumerate(names)}
    (folder / "cat_to_name.json").write_text(json.dumps(numbers))
    return parts


def _pets(folder: Path, names: list[str], per_class: int, size: tuple[int, int]) -> Parts:
    def path_of(label: int, index: int, number: int, part: str) -> str:
        return f"{names[label]}_{index + 1}.jpg"

    titles = [name.lower() for name in names]
    parts = _write(folder / "images", titles, per_class, size, path_of)
    lists = {"trainval.txt": parts["train"] + parts["val"], "test.txt": parts["test"]}
    (folder / "annotations").mkdir(exist_ok=True)
    for file, entries in lists.items():
        lines = [f"{path[:-4]} {label + 1} 1 {label + 1}\n" for path, label, _ in entries]
        (folder / "annotations" / file).write_text("".join(lines))
    return parts


def _sun397(folder: Path, names: list[str], per_class: int, size: tuple[int, int]) -> Parts:
    def path_of(label: int, index: int, number: int, part: str) -> str:
        return f"{names[label][1:]}/sun_{number:06d}.jpg"

    titles = [" ".join(reversed(name.split("/")[2:])) for name in names]
    parts = _write(folder / "SUN397", titles, per_class, size, path_of)
    (folder / "ClassName.txt").write_text("".join(f"{name}\n" for name in names))
    lists = {"Training": parts["train"] + parts["val"], "Testing": parts["test"]}
    for file, entries in lists.items():
        (folder / f"{file}_01.txt").write_text("".join(f"/{path}\n" for path, _, _ in entries))
    return parts


def _ucf101(folder: Path, names: list[str], per_class: int, size: tuple[int, int]) -> Parts:
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

    def videos(entries: list[list], labelled: bool) -> str:
        lines = []
        for path, label, _ in entries:
            video = f"{names[label]}/{Path(path).stem}.avi"
            lines.append(f"{video} {label + 1}\n" if labelled else f"{video}\n")
        return "".join(lines)

    (lists / "trainlist01.txt").write_text(videos(parts["train"] + parts["val"], True))
    (lists / "testlist01.txt").write_text(videos(parts["test"], False))
    return parts


WRITERS: dict[str, Callable[[Path, list[str], int, tuple[int, int]], Parts]] = {
    "imagenet": _imagenet,
    "sun397": _sun397,
    "fgvc": _fgvc,
    "eurosat": _class_folders("2750", naming=_eurosat_name),
    "stanford_cars": _cars,
    "food101": _class_folders("images"),
    "oxford_pets": _pets,
    "oxford_flowers": _flowers,
    "caltech101": _caltech,
    "dtd": _class_folders("images"),
    "ucf101": _ucf101,
    "imagenetv2": _variant("imagenetv2-matched-frequency-format-val", True, "{i}f{wnid}.jpeg"),
    "imagenet_sketch": _variant("images", naming="sketch_{i}.JPEG"),
    "imagenet_a": _variant("imagenet-a", naming="0.0_fox squirrel _ fox_0.5_{i}.jpg"),
    "imagenet_r": _variant("imagenet-r", naming="art_{i}.jpg"),
    "digits": _class_folders("images", ending="png"),
}
