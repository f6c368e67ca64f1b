"""Splits made from raw downloads: rules, names, labels, and lists that are missing or broken."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import NAMES, RAW, ROOT, SPLITS, VARIANTS, check_refused, make_small_dataset
from scipy.io import savemat

from datasets import DATASETS, build_dataset, build_test_dataset

DIVIDED = ("dtd", "eurosat", "caltech101", "food101", "oxford_flowers")  # 50 / 20 / 30
LINES = (ROOT / "datasets/imagenet_classnames.txt").read_text().splitlines()
WNIDS, IMAGENET_NAMES = zip(*(line.split(maxsplit=1) for line in LINES), strict=True)


@pytest.mark.parametrize("name", RAW)
def test_published_rule_divides_classes(tmp_path, name):
    folder = make_small_dataset(name, tmp_path, classes=10, per_class=13)
    published_path = folder / DATASETS[name].split_file
    published = json.loads(published_path.read_text())
    published_path.unlink()
    build_dataset(name, tmp_path, 1)
    split = json.loads((folder / published_path.name.replace("zhou", "so")).read_text())
    # 6 or 9 images for training and 3 or 2 for validation: 13 in all, or 9 besides 4 for testing.
    counts, labels = (6, 3, 4) if name in DIVIDED else (7, 2, 4), range(len(NAMES[name]))
    for part, count in zip(SPLITS, counts, strict=True):
        assert Counter(label for _, label, _ in split[part]) == dict.fromkeys(labels, count)
    entries = [sorted(sum((parts[part] for part in SPLITS), [])) for parts in (split, published)]
    assert entries[0] == entries[1]  # the same images, labels and class names, each once
    if name not in DIVIDED:
        assert sorted(split["test"]) == sorted(published["test"])


def test_cars_list_in_devkit(tmp_path):
    folder = make_small_dataset("stanford_cars", tmp_path, split=False)
    name = "cars_test_annos_withlabels.mat"
    (folder / name).rename(folder / "devkit" / name)
    assert len(build_dataset("stanford_cars", tmp_path, 1).test) == 6


LISTS = [
    ("sun397", "ClassName.txt"),
    ("oxford_flowers", "imagelabels.mat"),
    ("oxford_flowers", "cat_to_name.json"),
    ("stanford_cars", "devkit/cars_meta.mat"),
]


@pytest.mark.parametrize("name, file", LISTS)
def test_unreadable_list_is_named(tmp_path, name, file):
    path = make_small_dataset(name, tmp_path, split=False) / file
    contents = [b"what is this\n", b"\xff\xfe\x80"]
    if path.suffix == ".mat":
        contents.append(path.read_bytes()[:200])
    for content in contents:
        path.write_bytes(content)
        check_refused(name, tmp_path, f"{path}.*get (it|the file) again")
    path.unlink()
    check_refused(name, tmp_path, f"no {DATASETS[name].split_file}, and the download lacks {path}")


@pytest.mark.parametrize(
    "name, file, line, message",
    [
        ("sun397", "Training_01.txt", "/q/quarry/sun_1.jpg", "line 19 of .*'/q/quarry/sun_1.jpg'"),
        ("sun397", "ClassName.txt", "/q/quarry", "no training images of the class 'quarry'"),
        ("oxford_pets", "annotations/test.txt", "beagle_1", "line 7 of .*'beagle_1'"),
        ("oxford_pets", "annotations/test.txt", "beagle_1 1 1 1", "label 0 for 'abyssinian' and"),
        ("ucf101", "ucfTrainTestlist/testlist01.txt", "TaiChi/v_TaiChi_g01_c01.avi", "line 7 of"),
        ("fgvc", "images_variant_train.txt", "0000001 Concorde", "line 13 of .*Concorde"),
    ],
)
def test_wrong_line_is_named(tmp_path, name, file, line, message):
    path = make_small_dataset(name, tmp_path, split=False) / file
    path.write_text(f"{path.read_text()}{line}\n")
    check_refused(name, tmp_path, message)


def test_flower_without_name_is_refused(tmp_path):
    folder = make_small_dataset("oxford_flowers", tmp_path, split=False)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 1, 9]])})
    check_refused("oxford_flowers", tmp_path, "imagelabels.mat has no readable .*KeyError.'9'")


def test_imagenet_needs_both_class_folders(tmp_path):
    folder = make_small_dataset("imagenet", tmp_path, classes=2)
    (folder / "val/n01440764").rename(folder / "val/n01484850")
    check_refused("imagenet", tmp_path, f"the download lacks {folder}/val/n01440764")
    (folder / "val").rename(tmp_path / "val")
    check_refused("imagenet", tmp_path, f"the image folder {folder}/val is missing")


def test_classnames_txt_names_imagenet(tmp_path):
    folder = make_small_dataset("imagenet", tmp_path, classes=2)
    names = tmp_path / "imagenet/classnames.txt"
    names.write_text("n01440764 a fish\nn99999999 nothing\n")
    assert build_dataset("imagenet", tmp_path, 1).classnames == ["a fish", "goldfish"]
    names.write_text("n01440764\n")
    check_refused("imagenet", tmp_path, "txt, 'n01440764', is no known 'n01440764 tench'")
    names.unlink()
    for part in ("train", "val"):
        (folder / part / "n01440764").rename(folder / part / "mine")
    check_refused("imagenet", tmp_path, "class folder mine has no name.*classnames.txt")


@pytest.mark.parametrize("name", VARIANTS)
def test_imagenet_variants_have_test_images(tmp_path, name):
    make_small_dataset(name, tmp_path, classes=12, per_class=4)
    state = random.getstate()
    dataset = build_dataset(name, tmp_path, 16)
    assert random.getstate() == state
    assert dataset.train_x == dataset.val == [] and dataset.new_classes is None
    assert dataset.classnames == list(IMAGENET_NAMES[:12])
    # Numbered folders are sorted as text on the disk: 10 and 11 come before 2.
    assert [item.label for item in dataset.test] == [label for label in range(12) for _ in "ab"]
    for item in dataset.test:
        assert Path(item.impath).parent.name in (str(item.label), WNIDS[item.label])
    assert build_test_dataset(name, tmp_path) == dataset


def test_imagenet_part_has_own_labels(tmp_path):
    images = make_small_dataset("imagenet_a", tmp_path, classes=1) / "imagenet-a"
    for number in (7, 600, 90):
        shutil.copytree(images / WNIDS[0], images / WNIDS[number])
    shutil.rmtree(images / WNIDS[0])
    expected = [IMAGENET_NAMES[number] for number in (7, 90, 600)]
    assert build_test_dataset("imagenet_a", tmp_path).classnames == expected
    (tmp_path / "imagenet").mkdir()
    names = tmp_path / "imagenet/classnames.txt"
    names.write_text(f"{WNIDS[90]} my name\n")  # of a part of ImageNet
    expected[1] = "my name"
    assert build_test_dataset("imagenet_a", tmp_path).classnames == expected
    names.rename(images.parent / "classnames.txt")  # as CoOp has it
    assert build_test_dataset("imagenet_a", tmp_path).classnames == expected
