"""The way to a dataset's folder: two conventions, links, left-overs, data that lies elsewhere."""

import os
import shutil
from pathlib import Path

import pytest
from dataset_helpers import ELEVEN, LAYOUTS, make_dataset, refused

from datasets import DATASETS, build_dataset
from datasets.base import IGNORED_DIRS


def test_the_coop_folder_is_preferred_and_an_empty_one_is_not(tmp_path):
    make_dataset("dtd", tmp_path, "lora", size=(8, 8))
    (tmp_path / "dtd").mkdir(exist_ok=True)
    assert "/DTD/" in build_dataset("dtd", tmp_path, 1).test[0].impath
    make_dataset("dtd", tmp_path, "coop", size=(8, 8))
    assert "/dtd/" in build_dataset("dtd", tmp_path, 1).test[0].impath


def test_the_aircraft_archive_may_lie_as_it_was_unpacked(tmp_path):
    make_dataset("fgvc", tmp_path, size=(8, 8))
    (tmp_path / "fgvc-aircraft-2013b").mkdir()
    (tmp_path / "fgvc_aircraft").rename(tmp_path / "fgvc-aircraft-2013b/data")
    assert len(build_dataset("fgvc", tmp_path, 1).train_x) == 3


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", [n for n in ELEVEN if DATASETS[n].images != "."])
def test_a_missing_image_folder_is_named(tmp_path, name, split):
    make_dataset(name, tmp_path, split=split, size=(8, 8))
    folder = tmp_path / LAYOUTS[name][0]
    (folder / DATASETS[name].images).rename(tmp_path / "moved")
    refused(name, tmp_path, f"the image folder {folder}/{DATASETS[name].images} is missing")


@pytest.mark.parametrize(
    "name, split, link",
    [
        ("eurosat", True, ""),
        ("eurosat", True, "2750"),
        ("eurosat", True, "2750/Forest"),
        ("eurosat", True, "2750/Forest/Forest_0000.jpg"),
        ("dtd", False, "images/meshed"),
        ("dtd", False, "images/meshed/meshed_0000.jpg"),
        ("stanford_cars", True, "cars_train"),
        ("imagenet", False, "train"),
        ("imagenet", False, "train/n01440764"),
        ("imagenet", False, "val/n01440764/ILSVRC2012_val_00000001.JPEG"),
    ],
)
def test_links_are_followed_wherever_they_lead(tmp_path, name, split, link):
    """Subsets of a shared copy, and caches of DVC, git-annex or a hub, are made of links."""
    for root in ("whole", "linked"):
        make_dataset(name, tmp_path / root, split=split, size=(8, 8))
    path = tmp_path / "linked" / LAYOUTS[name][0] / link
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    whole, linked = (build_dataset(name, tmp_path / root, 2) for root in ("whole", "linked"))
    assert linked.fingerprint == whole.fingerprint and Path(linked.test[0].impath).is_file()


@pytest.mark.parametrize(
    "name, images", [("dtd", "images"), ("imagenet", "train"), ("imagenet", "val")]
)
def test_left_overs_of_archives_and_file_servers_are_no_classes(tmp_path, name, images):
    make_dataset(name, tmp_path, split=False, size=(8, 8))
    folder = tmp_path / LAYOUTS[name][0] / images
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    before = build_dataset(name, tmp_path, 1)
    for left in (
        *IGNORED_DIRS,
        "__MACOSX",
        "System Volume Information",
        "$RECYCLE.BIN",
        ".Trash-0",
    ):
        (folder / left / names[0]).mkdir(parents=True, exist_ok=True)
        (folder / left / "x.jpg").write_bytes(b"x")
    for place in (folder, folder / names[0]):
        (place / "._a.jpg").write_bytes(b"\0\5\x16\7Mac OS X")
        for file in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (place / file).write_bytes(b"x")
    (folder / names[0] / "@eaDir/a.jpg").mkdir(parents=True)  # Synology's, a folder for each image
    (folder / names[0] / "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg").write_bytes(b"x")
    after = build_dataset(name, tmp_path, 1)
    assert (after.classnames, after.fingerprint) == (before.classnames, before.fingerprint)


# dataset, where its folder lies, what to do
MOVED = [
    ("caltech101", "caltech101", "rename {}/caltech101 to {}/caltech-101"),
    ("caltech101", "caltech-101/caltech-101", "move all that is in {}/caltech-101/caltech-101 to"),
    ("food101", "food-101/food-101", "move all that is in {}/food-101/food-101 to {}/food-101;"),
    ("food101", "food101", "rename {}/food101 to {}/food-101"),
    ("dtd", "dtd/dtd", "move all that is in {}/dtd/dtd to {}/dtd;"),
    ("oxford_pets", "oxford-iiit-pet", "rename {}/oxford-iiit-pet to {}/oxford_pets"),
    ("oxford_flowers", "flowers-102", "rename {}/flowers-102 to {}/oxford_flowers"),
    ("oxford_flowers", "oxford_flowers/flowers-102", "s/flowers-102 to {}/oxford_flowers;"),
    ("eurosat", "EuroSAT", "rename {}/EuroSAT to {}/eurosat"),
    ("stanford_cars", "stanford_cars/stanford_cars", "s/stanford_cars to {}/stanford_cars;"),
    ("ucf101", "UCF-101", "rename {}/UCF-101 to {}/ucf101"),
    ("fgvc", "fgvc-aircraft-2013b", "rename {}/fgvc-aircraft-2013b to {}/fgvc_aircraft"),
    ("fgvc", "fgvc_aircraft/fgvc-aircraft-2013b/data", "-2013b/data to {}/fgvc_aircraft;"),
    ("sun397", "sun397/sun397", "move all that is in {}/sun397/sun397 to {}/sun397;"),
    ("imagenet", "ILSVRC/Data/CLS-LOC", "move {}/ILSVRC/Data/CLS-LOC to {}/imagenet/images"),
]


@pytest.mark.parametrize("name, place, remedy", MOVED)
def test_a_dataset_one_level_deeper_or_under_another_name_says_what_to_move(
    tmp_path, name, place, remedy
):
    for split in (True, False):
        make_dataset(name, tmp_path / "made", split=split, size=(8, 8))
        root = tmp_path / str(split)
        (root / place).parent.mkdir(parents=True)
        (tmp_path / "made" / LAYOUTS[name][0]).rename(root / place)
        assert remedy.replace("{}", str(root)) in refused(name, root)


# dataset, folder below its own, where that lies instead, what to do
IMAGES_MOVED = [
    ("eurosat", "2750", "EuroSAT_RGB", "rename {}/EuroSAT_RGB to {}/2750"),
    ("eurosat", "2750", "../EuroSAT_RGB", "move {}/../EuroSAT_RGB to {}/2750"),
    ("eurosat", "2750", "2750/2750", "move all that is in {}/2750/2750 to {}/2750"),
    ("sun397", "SUN397", "../SUN397", "move {}/../SUN397 to {}/SUN397"),
    (
        "stanford_cars",
        "cars_test",
        "cars_test/cars_test",
        "in {}/cars_test/cars_test to {}/cars_test",
    ),
    ("stanford_cars", "cars_train", "car_ims", "{}/car_ims is another release, whose images are"),
    ("oxford_pets", "images", "images/images", "move all that is in {}/images/images to {}/images"),
]


@pytest.mark.parametrize("name, images, place, remedy", IMAGES_MOVED)
def test_images_one_level_deeper_or_under_another_name_say_what_to_move(
    tmp_path, name, images, place, remedy
):
    for split in (True, False):
        root = tmp_path / str(split)
        make_dataset(name, root, split=split, size=(8, 8))
        folder = root / LAYOUTS[name][0]
        (folder / images).rename(tmp_path / "aside")
        (folder / place).parent.mkdir(exist_ok=True)
        (tmp_path / "aside").rename(folder / place)
        remedy_here = remedy.replace("{}/..", str(root)).replace("{}", str(folder))
        assert remedy_here in refused(name, root)


def test_a_dataset_s_own_folder_as_root_is_told_from_the_folder_above(tmp_path):
    make_dataset("dtd", tmp_path, size=(8, 8))
    assert f"name the folder above, {tmp_path}, as --root_path" in refused("dtd", tmp_path / "dtd")


def test_a_link_to_itself_is_neither_a_class_nor_an_image(tmp_path):
    make_dataset("dtd", tmp_path, split=False, size=(8, 8))
    for link in ("loop", "banded/loop.jpg"):
        os.symlink(tmp_path / "dtd/images" / link, tmp_path / "dtd/images" / link)
    assert build_dataset("dtd", tmp_path, 1).classnames == ["banded", "meshed", "polka-dotted"]
