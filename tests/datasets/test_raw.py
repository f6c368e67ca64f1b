"""Splits made from raw downloads: counts, names, labels, saving, and broken lists."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import CALTECH_NAMES, EUROSAT_NAMES, LAYOUTS, WITH_SPLIT, make_dataset
from scipy.io import savemat

import datasets.splits
from datasets import DATASETS, build_dataset
from datasets.base import find_source
from datasets.splits import read_split

RAW = tuple(name for name in WITH_SPLIT if name != "digits")
SHARED = ("dtd", "eurosat", "caltech101", "food101", "oxford_flowers")  # 50 / 20 / 30


def made_split(name, root):
    """The split that a run left beside the data."""
    folder = root / LAYOUTS[name][0]
    return json.loads((folder / LAYOUTS[name][2].replace("zhou", "so")).read_text())


def paths(part):
    return {path for path, _, _ in part}


@pytest.mark.parametrize("convention", ["coop", "lora"])
@pytest.mark.parametrize("name", RAW)
def test_a_split_is_made_once_saved_and_announced(tmp_path, capsys, name, convention):
    make_dataset(name, tmp_path, convention, split=False, size=(8, 8))
    random.seed(11)
    first = build_dataset(name, tmp_path, 2)
    announced = capsys.readouterr().err.splitlines()
    assert len(announced) == 1 and "not comparable to published figures" in announced[0]
    assert f"section {DATASETS[name].title}" in announced[0]
    assert not first.published
    folder = tmp_path / LAYOUTS[name][("coop", "lora").index(convention)]
    made = folder / LAYOUTS[name][2].replace("zhou", "so")
    stamp = made.stat().st_mtime_ns
    random.seed(11)
    assert build_dataset(name, tmp_path, 2) == first  # the saved one is used again
    assert made.stat().st_mtime_ns == stamp
    assert "made earlier" in capsys.readouterr().err
    made.unlink()
    random.seed(11)
    assert build_dataset(name, tmp_path, 2) == first  # another making gives the same


@pytest.mark.parametrize("name", RAW)
def test_making_a_split_leaves_the_global_generator_alone(tmp_path, name):
    make_dataset(name, tmp_path, split=False, size=(8, 8))
    random.seed(11)
    before = random.getstate()
    split = read_split(find_source(name, DATASETS[name], tmp_path))
    assert split.train and random.getstate() == before


@pytest.mark.parametrize("name", RAW)
def test_the_published_rule_divides_each_class(tmp_path, name):
    make_dataset(name, tmp_path, split=True, per_class=13, size=(8, 8))
    folder = tmp_path / LAYOUTS[name][0]
    published = json.loads((folder / LAYOUTS[name][2]).read_text())
    (folder / LAYOUTS[name][2]).unlink()
    build_dataset(name, tmp_path, 1)
    split = made_split(name, tmp_path)
    # 6 or 9 images for training and 3 or 2 for validation: 13 in all, or 9 besides 4 for testing.
    counts = (6, 3, 4) if name in SHARED else (7, 2, 4)
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        for label in range(3):
            assert sum(entry[1] == label for entry in split[part]) == count
    whole = [tuple(entry) for part in ("train", "val", "test") for entry in split[part]]
    expected = [tuple(entry) for part in ("train", "val", "test") for entry in published[part]]
    assert sorted(whole) == sorted(expected)  # the same images, labels and class names
    assert not paths(split["train"]) & paths(split["val"])
    if name not in SHARED:
        assert paths(split["test"]) == paths(published["test"])


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


def test_the_published_split_decides_when_both_are_there(tmp_path, capsys):
    make_dataset("dtd", tmp_path, split=False, size=(8, 8))
    build_dataset("dtd", tmp_path, 1)
    make_dataset("dtd", tmp_path, split=True, size=(8, 8))
    capsys.readouterr()
    assert build_dataset("dtd", tmp_path, 1).published
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_still_gives_its_split(tmp_path, capsys, monkeypatch):
    make_dataset("dtd", tmp_path, split=False, size=(8, 8))

    def refuse(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(datasets.splits, "atomic_write", refuse)
    assert len(build_dataset("dtd", tmp_path, 1).train_x) == 3
    assert "not saved: Permission denied" in capsys.readouterr().err


def test_a_damaged_split_of_ours_says_how_to_have_it_made_again(tmp_path):
    make_dataset("dtd", tmp_path, split=False, size=(8, 8))
    (tmp_path / "dtd/split_so_DescribableTextures.json").write_text("{")
    with pytest.raises(ValueError, match="split_so_.*delete it, and it is made again"):
        build_dataset("dtd", tmp_path, 1)


def test_nothing_is_saved_of_a_broken_download(tmp_path):
    make_dataset("dtd", tmp_path, split=False, size=(8, 8))
    (tmp_path / "dtd/images/zigzagged").mkdir()
    with pytest.raises(ValueError, match="no training images of the class 'zigzagged'"):
        build_dataset("dtd", tmp_path, 1)
    assert not list((tmp_path / "dtd").glob("split_so_*"))


def test_a_download_without_class_folders_has_no_images(tmp_path):
    (tmp_path / "dtd/images").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="dtd/images has no images at all"):
        build_dataset("dtd", tmp_path, 1)


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


@pytest.mark.parametrize("name, file", FILES)
def test_a_missing_list_is_named_beside_the_split_file_that_would_replace_it(tmp_path, name, file):
    make_dataset(name, tmp_path, split=False, size=(8, 8))
    path = tmp_path / LAYOUTS[name][0] / file
    path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        build_dataset(name, tmp_path, 1)
    assert f"there is no {LAYOUTS[name][2]}, and the download lacks {path}" in str(caught.value)
    for other in LISTS[name]:
        (tmp_path / LAYOUTS[name][0] / other).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError) as caught:
        build_dataset(name, tmp_path, 1)
    assert all(other in str(caught.value) for other in LISTS[name])


@pytest.mark.parametrize("name, file", FILES)
def test_a_list_of_rubbish_is_named(tmp_path, name, file):
    make_dataset(name, tmp_path, split=False, size=(8, 8))
    path = tmp_path / LAYOUTS[name][0] / file
    for rubbish in (b"what is this\n", b"\xff\xfe\x80", path.read_bytes()[:200]):
        path.write_bytes(rubbish)
        if not path.suffix == ".mat" and rubbish.isascii() and rubbish != b"what is this\n":
            continue  # a shorter list of text is still a list
        with pytest.raises((ValueError, FileNotFoundError), match=f"{path}.*get (it|the file)"):
            build_dataset(name, tmp_path, 1)


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
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_dataset(name, tmp_path, 1)


def test_mat_files_without_what_they_should_hold_are_named(tmp_path):
    make_dataset("oxford_flowers", tmp_path, split=False, size=(8, 8))
    labels = tmp_path / "oxford_flowers/imagelabels.mat"
    savemat(labels, {"other": [1]})
    with pytest.raises(ValueError, match="no readable 'labels' .KeyError"):
        build_dataset("oxford_flowers", tmp_path, 1)
    savemat(labels, {"labels": np.array([[1, 1, 9]])})
    with pytest.raises(ValueError, match="no name for the label 9"):
        build_dataset("oxford_flowers", tmp_path, 1)
    savemat(labels, {"labels": np.array([[1, 1, 0]])})
    with pytest.raises(ValueError, match="no name for the label 0"):
        build_dataset("oxford_flowers", tmp_path, 1)
    make_dataset("stanford_cars", tmp_path, split=False, size=(8, 8))
    cars = tmp_path / "stanford_cars/devkit/cars_train_annos.mat"
    record = np.array([[(9.0, "00001.jpg")]], dtype=[("class", object), ("fname", object)])
    savemat(cars, {"annotations": record})
    with pytest.raises(ValueError, match="no readable 'annotations' .KeyError: 8"):
        build_dataset("stanford_cars", tmp_path, 1)


def test_more_labels_than_flowers_are_missing_images(tmp_path):
    make_dataset("oxford_flowers", tmp_path, split=False, size=(8, 8))
    (tmp_path / "oxford_flowers/jpg/image_00003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="image_00003.jpg: named in .*imagelabels.mat"):
        build_dataset("oxford_flowers", tmp_path, 1)
