"""ImageNet's variants: class folders by WordNet id or number, names, what people have instead."""

import random
import shutil

import pytest
from dataset_helpers import ROOT, VARIANTS, make_dataset, refused

from datasets import DATASETS, build_dataset, build_test_dataset
from datasets.__main__ import main

LINES = (ROOT / "datasets/imagenet_classnames.txt").read_text().splitlines()
NAMES = [line.split(maxsplit=1) for line in LINES]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_test_images_alone_and_draws_nothing(tmp_path, name):
    make_dataset(name, tmp_path, classes=12, per_class=4, size=(8, 8))
    state = random.getstate()
    dataset = build_dataset(name, tmp_path, 16)
    assert random.getstate() == state
    assert dataset.train_x == dataset.val == [] and dataset.new_classes is None
    assert dataset.classnames == [name for _, name in NAMES[:12]]
    # Numbered folders are sorted as text on the disk: 10 and 11 come before 2.
    assert [item.label for item in dataset.test] == [label for label in range(12) for _ in "ab"]
    for item in dataset.test:
        folder = item.impath.split("/")[-2]
        assert folder in (str(item.label), NAMES[item.label][0])
    assert build_test_dataset(name, tmp_path) == dataset


def test_all_numbers_of_imagenetv2_are_imagenets_labels(tmp_path):
    make_dataset("imagenetv2", tmp_path, classes=1000, per_class=2, size=(4, 4))
    dataset = build_test_dataset("imagenetv2", tmp_path)
    folders = [int(item.impath.split("/")[-2]) for item in dataset.test]
    assert folders == [item.label for item in dataset.test] == list(range(1000))
    assert dataset.classnames == [name for _, name in NAMES]


def test_a_set_of_200_classes_has_labels_of_its_own_and_imagenets_names(tmp_path):
    make_dataset("imagenet_a", tmp_path, classes=1, size=(8, 8))
    images = tmp_path / "imagenet-adversarial/imagenet-a"
    (first,) = (path for path in images.iterdir() if path.is_dir())
    for wnid in (NAMES[7][0], NAMES[600][0], NAMES[90][0]):
        shutil.copytree(first, images / wnid)
    shutil.rmtree(first)
    assert build_test_dataset("imagenet_a", tmp_path).classnames == [
        NAMES[i][1] for i in (7, 90, 600)
    ]
    (tmp_path / "imagenet").mkdir()
    names = tmp_path / "imagenet/classnames.txt"
    names.write_text(f"{NAMES[90][0]} my name\n")  # of a part of ImageNet
    expected = [NAMES[7][1], "my name", NAMES[600][1]]
    assert build_test_dataset("imagenet_a", tmp_path).classnames == expected
    names.rename(images.parent / "classnames.txt")  # as CoOp has it
    assert build_test_dataset("imagenet_a", tmp_path).classnames == expected


def test_where_people_have_them_instead_is_said(tmp_path, capsys):
    for name, found in {
        "imagenet_sketch": "imagenet-sketch/sketch",
        "imagenet_a": "imagenet-a",
        "imagenetv2": "imagenetv2-matched-frequency-format-val",
        "imagenet_r": "imagenet-rendition/imagenet-r/imagenet-r",
    }.items():
        row, root = DATASETS[name], tmp_path / f"of {name}"
        make_dataset(name, root, size=(8, 8))
        wanted = root / row.folders[0] / row.images
        wanted.rename(root / "aside")
        if not found.startswith(row.folders[0] + "/"):
            wanted.parent.rmdir()
        (root / found).parent.mkdir(parents=True, exist_ok=True)
        (root / "aside").rename(root / found)
        said = refused(name, root)
        assert f"{root / found} to {wanted}" in said
        assert main(["--root_path", str(root), "--dataset", name]) == 1
        assert said in capsys.readouterr().out


def test_folders_that_are_no_classes_are_named(tmp_path):
    make_dataset("imagenet_r", tmp_path, size=(8, 8))
    (tmp_path / "imagenet-rendition/imagenet-r/extra").mkdir()
    assert "no class name for extra" in refused("imagenet_r", tmp_path)
