"""Splits made from raw downloads: rules, names, labels; ImageNet's folders and FGVC's lists."""

import json
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import CALTECH_NAMES, EUROSAT_NAMES, LAYOUTS, WITH_SPLIT, make_dataset, refused
from scipy.io import savemat

from datasets import build_dataset

RAW = tuple(name for name in WITH_SPLIT if name != "digits")
SHARED = ("dtd", "eurosat", "caltech101", "food101", "oxford_flowers")  # 50 / 20 / 30


@pytest.mark.parametrize("name", RAW)
def test_the_published_rule_divides_each_class(tmp_path, name):
    make_dataset(name, tmp_path, split=True, per_class=13, size=(8, 8))
    folder = tmp_path / LAYOUTS[name][0]
    published = json.loads((folder / LAYOUTS[name][2]).read_text())
    (folder / LAYOUTS[name][2]).unlink()
    build_dataset(name, tmp_path, 1)
    split = json.loads((folder / LAYOUTS[name][2].replace("zhou", "so")).read_text())
    # 6 or 9 images for training and 3 or 2 for validation: 13 in all, or 9 besides 4 for testing.
    counts = (6, 3, 4) if name in SHARED else (7, 2, 4)
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        for label in range(3):
            assert sum(entry[1] == label for entry in split[part]) == count
    whole = [tuple(entry) for part in ("train", "val", "test") for entry in split[part]]
    expected = [tuple(entry) for part in ("train", "val", "test") for entry in published[part]]
    assert sorted(whole) == sorted(expected)  # the same images, labels and class names
    assert not {path for path, _, _ in split["train"]} & {path for path, _, _ in split["val"]}
    if name not in SHARED:
        assert sorted(split["test"]) == sorted(published["test"])


def test_class_names_are_the_published_ones(tmp_path):
    expected = {
        "eurosat": EUROSAT_NAMES,
        "caltech101": [*map(CALTECH_NAMES.get, ["Faces", "Leopards", "Motorbikes"]), "accordion"]
        + ["airplane"],
        "dtd": ["banded", "meshed", "polka-dotted"],
        "stanford_cars": ["2000 AM General Hummer SUV", "2012 Ram C/V Cargo Van Minivan"],
        "sun397": ["abbey", "indoor casino", "airplane_cabin", "zen_garden"],
        "ucf101": ["Apply_Eye_Makeup", "Basketball_Dunk", "Yo_Yo"],
        "oxford_pets": ["abyssinian", "american_bulldog", "american_pit_bull_terrier"],
        "oxford_flowers": ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"],
    }
    for name, names in expected.items():
        make_dataset(name, tmp_path, split=False, classes=len(names), size=(8, 8))
        assert build_dataset(name, tmp_path, 1).classnames == names


def test_background_and_easy_faces_are_left_out_of_caltech(tmp_path):
    make_dataset("caltech101", tmp_path, split=False, size=(8, 8))
    dataset = build_dataset("caltech101", tmp_path, 4)
    folders = {Path(item.impath).parent.name for item in dataset.train_x + dataset.test}
    assert folders == {"Faces", "Leopards", "Motorbikes"}


def test_the_cars_test_list_may_lie_in_the_devkit(tmp_path):
    make_dataset("stanford_cars", tmp_path, split=False, size=(8, 8))
    folder = tmp_path / "stanford_cars"
    name = "cars_test_annos_withlabels.mat"
    (folder / name).rename(folder / "devkit" / name)
    assert len(build_dataset("stanford_cars", tmp_path, 1).test) == 6


LISTS = {
    "sun397": ("ClassName.txt", "Training_01.txt", "Testing_01.txt"),
    "oxford_pets": ("annotations/trainval.txt", "annotations/test.txt"),
    "oxford_flowers": ("imagelabels.mat", "cat_to_name.json"),
    "stanford_cars": (
        "devkit/cars_meta.mat",
        "devkit/cars_train_annos.mat",
        "cars_test_annos_withlabels.mat",
    ),
    "ucf101": tuple(
        f"ucfTrainTestlist/{name}.txt" for name in ("classInd", "trainlist01", "testlist01")
    ),
}
FILES = [(name, file) for name, files in LISTS.items() for file in files]


@pytest.mark.parametrize("name", LISTS)
def test_missing_lists_are_named_beside_the_split_file_that_would_replace_them(tmp_path, name):
    make_dataset(name, tmp_path, split=False, size=(8, 8))
    for file in LISTS[name]:
        (tmp_path / LAYOUTS[name][0] / file).unlink()
        message = refused(name, tmp_path, f"there is no {LAYOUTS[name][2]}, and the download lacks")
        assert str(tmp_path / LAYOUTS[name][0] / file) in message


@pytest.mark.parametrize("name, file", FILES)
def test_a_list_of_rubbish_is_named(tmp_path, name, file):
    make_dataset(name, tmp_path, split=False, size=(8, 8))
    path = tmp_path / LAYOUTS[name][0] / file
    rubbish = [b"what is this\n", b"\xff\xfe\x80"]
    for content in rubbish + [path.read_bytes()[:200]] * (path.suffix == ".mat"):
        path.write_bytes(content)
        refused(name, tmp_path, f"{path}.*get (it|the file)")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:58\nsize 1\n")
    refused(name, tmp_path, f"{path} is a Git LFS pointer")


@pytest.mark.parametrize(
    "name, file, line, message",
    [
        ("sun397", "Training_01.txt", "/q/quarry/sun_1.jpg", r"line 19 \('/q/quarry/sun_1.jpg'\)"),
        ("sun397", "Training_01.txt", "/a/abbey/sun_0.jpg", "a/abbey/sun_0.jpg: named in"),
        ("sun397", "Testing_01.txt", "/a/abbey/../../../x.jpg", "line 7|outside"),
        ("sun397", "ClassName.txt", "/q/quarry", "no training images of the class 'quarry'"),
        ("oxford_pets", "annotations/test.txt", "beagle_1", r"line 7 \('beagle_1'\)"),
        ("oxford_pets", "annotations/test.txt", "beagle_1 1 1 1", "label 0 stands for 'abyss"),
        ("oxford_pets", "annotations/trainval.txt", "beagle_1 0 1 1", "must run from 0 to 3"),
        ("oxford_pets", "annotations/test.txt", "Abyssinian_99 1 1 1", "Abyssinian_99.jpg: named"),
        ("ucf101", "ucfTrainTestlist/testlist01.txt", "TaiChi/v_TaiChi_g01_c01.avi", "line 7"),
        ("ucf101", "ucfTrainTestlist/testlist01.txt", "YoYo/v_x.avi", "Yo_Yo/v_x.jpg: named in"),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "4 TaiChi", "the class 'Tai_Chi'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, name, file, line, message):
    make_dataset(name, tmp_path, split=False, size=(8, 8))
    path = tmp_path / LAYOUTS[name][0] / file
    path.write_text(f"{path.read_text()}{line}\n")
    refused(name, tmp_path, message)


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"other": [1]}, "no readable 'labels' .KeyError"),
        ({"labels": np.array([[1, 1, 9]])}, "no name for the label 9"),
        ({"labels": np.array([[1, 1, 0]])}, "no name for the label 0"),
        ({"labels": np.array([[np.nan]])}, "no readable 'labels'"),
        ({"labels": np.array([["__import__('os').abort()"]], object)}, "no readable 'labels'"),
        ({"labels": np.array([[1, 1, 10**11]])}, "has labels up to 100000000000"),
    ],
)
def test_labels_of_flowers_that_cannot_be_are_named(tmp_path, labels, message):
    make_dataset("oxford_flowers", tmp_path, split=False, size=(8, 8))
    folder = tmp_path / "oxford_flowers"
    if "up to" in message:
        (folder / "cat_to_name.json").write_text('{"1": "a", "100000000000": "b"}')
    savemat(folder / "imagelabels.mat", labels)
    refused("oxford_flowers", tmp_path, message)


def test_annotations_of_cars_without_a_class_are_named(tmp_path):
    make_dataset("stanford_cars", tmp_path, split=False, size=(8, 8))
    cars = tmp_path / "stanford_cars/devkit/cars_train_annos.mat"
    record = np.array([[(9.0, "00001.jpg")]], dtype=[("class", object), ("fname", object)])
    savemat(cars, {"annotations": record})
    refused("stanford_cars", tmp_path, "no readable 'annotations' .KeyError: 8")


def test_more_labels_than_flowers_are_missing_images(tmp_path):
    make_dataset("oxford_flowers", tmp_path, split=False, size=(8, 8))
    (tmp_path / "oxford_flowers/jpg/image_00003.jpg").unlink()
    refused("oxford_flowers", tmp_path, "image_00003.jpg: named in .*imagelabels.mat")


# ImageNet and FGVC


@pytest.mark.parametrize("convention", ["coop", "lora"])
def test_imagenet_without_a_part_or_class_folders_says_so(tmp_path, convention):
    make_dataset("imagenet", tmp_path, convention, size=(8, 8))
    folder = tmp_path / LAYOUTS["imagenet"][("coop", "lora").index(convention)]
    (folder / "val").rename(tmp_path / "val")
    refused("imagenet", tmp_path, f"the image folder {folder}/val is missing")
    (folder / "val").mkdir()
    (folder / "val/ILSVRC2012_val_00000001.JPEG").touch()
    refused("imagenet", tmp_path, f"{folder}/val has no class folders")


def test_imagenet_names_come_from_classnames_txt_when_it_is_there(tmp_path):
    make_dataset("imagenet", tmp_path, classes=2, size=(8, 8))
    names = tmp_path / "imagenet/classnames.txt"
    names.write_text("n01440764 a fish\nn01443537 gold fish\nn99999999 nothing\n")
    assert build_dataset("imagenet", tmp_path, 1).classnames == ["a fish", "gold fish"]
    names.write_text("n01440764\n")
    refused("imagenet", tmp_path, "classnames.txt is not made of lines like")
    names.write_text("n01440764 tench\n")
    refused("imagenet", tmp_path, "no class name for n01443537.*classnames.txt")


def test_imagenet_classes_without_images_are_named(tmp_path):
    make_dataset("imagenet", tmp_path, "lora", classes=2, size=(8, 8))
    folder = tmp_path / "imagenet"
    (folder / "val/n01440764").rename(folder / "val/n01484850")
    refused("imagenet", tmp_path, "lacks the folders n01484850 of val")
    (folder / "val/n01484850").rename(tmp_path / "aside")
    refused("imagenet", tmp_path, "no test images of the class 'tench'")


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("images_variant_train.txt", "0000001\n", "lines that are not 'image variant"),
        ("images_variant_train.txt", "0000001 Concorde\n", r"line 1 \('0000001 Concorde'\)"),
        ("images_variant_val.txt", "7777777 A300B4\n", "7777777.jpg: named in .*, missing"),
        ("variants.txt", "707-320\nA300B4\nBoeing 717\nConcorde\n", "the class 'Concorde'"),
        ("variants.txt", None, "the download lacks .*variants.txt; see"),
    ],
)
def test_broken_aircraft_lists_are_named(tmp_path, file, text, message):
    make_dataset("fgvc", tmp_path, size=(8, 8))
    path = tmp_path / "fgvc_aircraft" / file
    path.unlink() if text is None else path.write_text(text)
    refused("fgvc", tmp_path, message)
