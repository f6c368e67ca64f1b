"""Small copies of every dataset's real folder layout: images, lists, .mat files, split files."""

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

from datasets import DATASETS, build_dataset, digits

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
RAW = tuple(name for name in ELEVEN if LAYOUTS[name][2])  # where a missing split is made

# Real classes: as the raw download spells them, and their published names
NAMES = {
    "sun397": {
        "/a/abbey": "abbey", "/c/casino/indoor": "indoor casino",
        "/a/airplane_cabin": "airplane_cabin", "/z/zen_garden": "zen_garden",
    },
    "fgvc": {name: name for name in ("707-320", "A300B4", "Boeing 717", "F/A-18")},
    "eurosat": {
        "AnnualCrop": "Annual Crop Land", "Forest": "Forest",
        "HerbaceousVegetation": "Herbaceous Vegetation Land", "Highway": "Highway or Road",
        "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
        "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
        "River": "River", "SeaLake": "Sea or Lake",
    },
    "stanford_cars": {
        "AM General Hummer SUV 2000": "2000 AM General Hummer SUV",
        "Ram C/V Cargo Van Minivan 2012": "2012 Ram C/V Cargo Van Minivan",
        "Volvo 240 Sedan 1993": "1993 Volvo 240 Sedan",
    },
    "food101": {name: name for name in ("apple_pie", "baby_back_ribs", "baklava")},
    "oxford_pets": {"Abyssinian": "abyssinian", "pug": "pug", "shiba_inu": "shiba_inu"},
    "oxford_flowers": {
        name: name for name in ("pink primrose", "hard-leaved pocket orchid", "canterbury bells")
    },
    "caltech101": {
        "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike",
        "accordion": "accordion", "airplanes": "airplane",
    },
    "dtd": {name: name for name in ("banded", "meshed", "polka-dotted", "striped", "zigzagged")},
    "ucf101": {
        "ApplyEyeMakeup": "Apply_Eye_Makeup", "BasketballDunk": "Basketball_Dunk", "YoYo": "Yo_Yo",
    },
    "digits": {name: name for name in digits.CLASSNAMES},
}  # fmt: skip


def make_dataset(
    name, root, convention="coop", split=True, classes=3, per_class=8, size=(40, 32)
) -> Path:
    """Write a small copy of a dataset, the raw download's lists always included; return its folder.

    `convention` is "coop" or "lora", the two sets of folder names. `split` writes the published
    split file, too, if the dataset has one. Of the images of each class half are for training, a
    fifth for validation, the rest for testing; ImageNet has per_class training images and half as
    many for testing, its variants only the latter. `size` is their width and height.
    """
    folder = Path(root) / LAYOUTS[name][("coop", "lora").index(convention)]
    folder.mkdir(parents=True, exist_ok=True)
    if name.startswith("imagenet"):
        _write_imagenet(name, folder, classes, per_class, size)
        return folder
    names = list(NAMES[name])[:classes]
    parts = _write_images(name, folder / DATASETS[name].image_dir, names, per_class, size)
    if name in LISTS:
        LISTS[name](folder, names, parts)
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


def write_image(path: Path, label: int, index: int, size: Size = (8, 8)) -> None:
    """Write one image: its class's color with some noise of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encode_image(label, index, size, "PNG" if path.suffix == ".png" else "JPEG"))


@lru_cache(maxsize=4096)
def _encode_image(label: int, index: int, size: Size, form: str) -> bytes:
    color = np.random.RandomState(label).randint(40, 216, 3)
    noise = np.random.RandomState(1000 * label + index).randint(-40, 40, (size[1], size[0], 1))
    file = io.BytesIO()
    Image.fromarray((color + noise).astype(np.uint8)).save(file, form)
    return file.getvalue()


def _write_images(name: str, folder: Path, names: list[str], per_class: int, size: Size) -> Parts:
    """Write all images of a dataset that has no ImageNet classes; return their entries."""
    parts: Parts = {part: [] for part in SPLITS}
    num_train, num_val = max(1, per_class // 2), round(per_class / 5)
    for number in range(len(names) * per_class):
        label, index = divmod(number, per_class)
        part = "train" if index < num_train else "val" if index < num_train + num_val else "test"
        path = PATHS.get(name, "{name}/{name}_{index:04d}.jpg").format(
            name=names[label].lstrip("/"), classname=NAMES[name][names[label]],
            index=index, one=index + 1, number=number + 1,
            trainval="test" if part == "test" else "train",
        )  # fmt: skip
        write_image(folder / path, label, index, size)
        parts[part].append([path, label, NAMES[name][names[label]]])
    for file in (".directory", "readme.txt"):
        (folder / file).write_text("no image")
    return parts


# Where images are, if not in "{name}/{name}_{index:04d}.jpg"
PATHS = {
    "sun397": "{name}/sun_{number:06d}.jpg",
    "fgvc": "{number:07d}.jpg",
    "stanford_cars": "cars_{trainval}/{number:05d}.jpg",
    "oxford_pets": "{name}_{one}.jpg",
    "oxford_flowers": "image_{number:05d}.jpg",
    "ucf101": "{classname}/v_{name}_g{one:02d}_c01.jpg",
    "digits": "{name}/{name}_{index:04d}.png",
}


def _fgvc(folder: Path, names: list[str], parts: Parts) -> None:
    _write_lines(folder / "variants.txt", names)
    for part in SPLITS:
        lines = [f"{path[:-4]} {name}" for path, _, name in sorted(parts[part], reverse=True)]
        _write_lines(folder / f"images_variant_{part}.txt", lines)


def _cars(folder: Path, names: list[str], parts: Parts) -> None:
    (folder / "devkit").mkdir(exist_ok=True)
    cell = np.empty((1, len(names)), dtype=object)
    cell[0] = names
    savemat(folder / "devkit/cars_meta.mat", {"class_names": cell})
    files = ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat")
    for file, entries in _two_lists(parts, *files):
        kind = [(key, object) for key in ("bbox_x1", "class", "fname")]
        rows = [(1.0, float(label + 1), Path(path).name) for path, label, _ in entries]
        savemat(folder / file, {"annotations": np.array([rows], dtype=kind).reshape(1, -1)})


def _flowers(folder: Path, names: list[str], parts: Parts) -> None:
    entries = sorted(entry for part in SPLITS for entry in parts[part])
    labels = np.array([[label + 1 for _, label, _ in entries]], dtype=np.uint8)
    savemat(folder / "imagelabels.mat", {"labels": labels})
    numbers = {str(label + 1): name for label, name in enumerate(names)}
    (folder / "cat_to_name.json").write_text(json.dumps(numbers))


def _pets(folder: Path, names: list[str], parts: Parts) -> None:
    for file, entries in _two_lists(parts, "trainval.txt", "test.txt"):
        lines = [f"{path[:-4]} {label + 1} 1 {label + 1}" for path, label, _ in entries]
        _write_lines(folder / "annotations" / file, lines)


def _sun397(folder: Path, names: list[str], parts: Parts) -> None:
    _write_lines(folder / "ClassName.txt", names)
    for file, entries in _two_lists(parts, "Training_01.txt", "Testing_01.txt"):
        _write_lines(folder / file, [f"/{path}" for path, _, _ in entries])


def _ucf101(folder: Path, names: list[str], parts: Parts) -> None:
    lists = folder / "ucfTrainTestlist"
    _write_lines(lists / "classInd.txt", [f"{i + 1} {name}" for i, name in enumerate(names)])
    for file, entries in _two_lists(parts, "trainlist01.txt", "testlist01.txt"):
        line = "{}/{}.avi {}" if file == "trainlist01.txt" else "{}/{}.avi"  # without labels
        lines = [line.format(names[i], Path(path).stem, i + 1) for path, i, _ in entries]
        _write_lines(lists / file, lines)


def _caltech(folder: Path, names: list[str], parts: Parts) -> None:
    for ignored in ("BACKGROUND_Google", "Faces_easy"):
        write_image(folder / "101_ObjectCategories" / ignored / "image_0001.jpg", 0, 0)


LISTS = {
    "sun397": _sun397, "fgvc": _fgvc, "stanford_cars": _cars, "oxford_pets": _pets,
    "oxford_flowers": _flowers, "caltech101": _caltech, "ucf101": _ucf101,
}  # fmt: skip


def _two_lists(parts: Parts, training: str, testing: str) -> list[tuple[str, list[list]]]:
    """Return the entries of a download's two lists, which know no validation images."""
    return [(training, parts["train"] + parts["val"]), (testing, parts["test"])]


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _write_imagenet(name: str, folder: Path, classes: int, per_class: int, size: Size) -> None:
    """Write class folders, named by WordNet ids or, in ImageNetV2, by ImageNet's labels."""
    lines = (ROOT / "datasets/imagenet_classnames.txt").read_text().splitlines()[:classes]
    if folder.name == "images":  # CoOp's layout names the classes, the other one does not
        _write_lines(folder.parent / "classnames.txt", lines)
    for label, wnid in enumerate(line.split()[0] for line in lines):
        if name == "imagenet":
            for i in range(per_class):
                write_image(folder / f"train/{wnid}/{wnid}_{i}.JPEG", label, i, size)
        for i in range(max(1, per_class // 2)):
            number = i * len(lines) + label + 1
            path = TEST_PATHS[name].format(wnid=wnid, label=label, i=i, number=number)
            write_image(folder / path, label, 500 + i, size)


TEST_PATHS = {
    "imagenet": "val/{wnid}/ILSVRC2012_val_{number:08d}.JPEG",
    "imagenetv2": "imagenetv2-matched-frequency-format-val/{label}/{i}f.jpeg",
    "imagenet_sketch": "images/{wnid}/sketch_{i}.JPEG",
    "imagenet_a": "imagenet-a/{wnid}/0.0_fox squirrel _ fox_0.5_{i}.jpg",
    "imagenet_r": "imagenet-r/{wnid}/art_{i}.jpg",
}
