"""The way to a dataset's folder: two conventions, links, left-overs, data that is elsewhere."""

import shutil
from pathlib import Path

import pytest
from dataset_helpers import ELEVEN, LAYOUTS, check_refused, make_small_dataset

from datasets import DATASETS, build_dataset
from datasets.base import IGNORED_DIRS


def test_dataset_dir_prefers_coops_name(tmp_path):
    make_small_dataset("dtd", tmp_path, "lora")
    (tmp_path / "dtd").mkdir(exist_ok=True)
    assert "/DTD/" in build_dataset("dtd", tmp_path, 1).test[0].impath  # the other one is empty
    make_small_dataset("dtd", tmp_path, "coop")
    assert "/dtd/" in build_dataset("dtd", tmp_path, 1).test[0].impath


@pytest.mark.parametrize("name", ELEVEN)
def test_missing_dataset_names_folder_searched(tmp_path, name):
    section = f"see DATASETS.md, section {DATASETS[name].title}"
    with pytest.raises(ValueError, match=f"{name} needs --root_path.*{section}"):
        build_dataset(name, None, 1)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/no is not a folder.*{section}"):
        build_dataset(name, tmp_path / "no", 1)
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}; .*{section}") as caught:
        build_dataset(name, tmp_path, 1)
    assert all(folder in str(caught.value) for folder in LAYOUTS[name][:2])


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", ["dtd", "sun397"])
def test_missing_image_dir_is_named(tmp_path, name, split):
    image_dir = make_small_dataset(name, tmp_path, split=split) / DATASETS[name].image_dir
    image_dir.rename(tmp_path / "moved")
    check_refused(name, tmp_path, f"the image folder {image_dir} is missing")


@pytest.mark.parametrize(
    "name, split, link",
    [
        ("eurosat", True, ""),
        ("dtd", False, "images/meshed"),
        ("dtd", False, "images/meshed/meshed_0000.jpg"),
    ],
)
def test_links_are_followed(tmp_path, name, split, link):
    """Subsets of a shared copy, and caches of DVC, git-annex or a hub, are made of links."""
    for root in ("original", "linked"):
        folder = make_small_dataset(name, tmp_path / root, split=split)
    shutil.move(folder / link, tmp_path / "elsewhere")
    (folder / link).symlink_to(tmp_path / "elsewhere")
    original, linked = (build_dataset(name, tmp_path / root, 2) for root in ("original", "linked"))
    assert linked.fingerprint == original.fingerprint and Path(linked.test[0].impath).is_file()


@pytest.mark.parametrize("name, images", [("dtd", "images"), ("imagenet", "val")])
def test_left_overs_are_ignored(tmp_path, name, images):
    folder = make_small_dataset(name, tmp_path, split=False) / images
    before = build_dataset(name, tmp_path, 1)
    one_class = next(path for path in folder.iterdir() if path.is_dir())
    for ignored in (*IGNORED_DIRS, "__MACOSX", "$RECYCLE.BIN", ".Trash-0"):
        (folder / ignored / one_class.name).mkdir(parents=True, exist_ok=True)
        (folder / ignored / "x.jpg").write_bytes(b"x")
    for place in (folder, one_class):
        for file in ("._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (place / file).write_bytes(b"x")
    (one_class / "@eaDir/a.jpg").mkdir(parents=True)  # Synology's, a folder for each image
    after = build_dataset(name, tmp_path, 1)
    assert (after.classnames, after.fingerprint) == (before.classnames, before.fingerprint)


# dataset, where its folder is instead, what to do
MOVED = [
    ("caltech101", "caltech-101/caltech-101", "move all that is in {}/caltech-101/caltech-101 to"),
    ("food101", "food101", "rename {}/food101 to {}/food-101"),
    ("oxford_flowers", "oxford_flowers/flowers-102", "s/flowers-102 to {}/oxford_flowers;"),
    ("fgvc", "fgvc_aircraft/fgvc-aircraft-2013b/data", "-2013b/data to {}/fgvc_aircraft;"),
    ("imagenet", "ILSVRC/Data/CLS-LOC", "move {}/ILSVRC/Data/CLS-LOC to {}/imagenet/images"),
]


@pytest.mark.parametrize("name, place, hint", MOVED)
def test_moved_dataset_gets_a_hint(tmp_path, name, place, hint):
    folder = make_small_dataset(name, tmp_path / "made", split=False)
    root = tmp_path / "root"
    (root / place).parent.mkdir(parents=True)
    folder.rename(root / place)
    assert hint.replace("{}", str(root)) in check_refused(name, root)


# dataset, a folder below its own, where that is instead, what to do
MOVED_IMAGES = [
    ("eurosat", "2750", "EuroSAT_RGB", "rename {}/EuroSAT_RGB to {}/2750"),
    ("sun397", "SUN397", "../SUN397", "move {}/../SUN397 to {}/SUN397"),
    ("stanford_cars", "cars_test", "cars_test/cars_test", "{}/cars_test/cars_test to {}/cars_test"),
    ("imagenet_a", "imagenet-a", "../imagenet-a", "move {}/../imagenet-a to {}/imagenet-a"),
]


@pytest.mark.parametrize("name, images, place, hint", MOVED_IMAGES)
def test_moved_images_get_a_hint(tmp_path, name, images, place, hint):
    folder = make_small_dataset(name, tmp_path / "root")
    (folder / images).rename(tmp_path / "aside")
    (folder / place).parent.mkdir(exist_ok=True)
    (tmp_path / "aside").rename(folder / place)
    hint = hint.replace("{}/..", str(tmp_path / "root")).replace("{}", str(folder))
    assert hint in check_refused(name, tmp_path / "root")


def test_root_inside_dataset_is_noticed(tmp_path):
    folder = make_small_dataset("dtd", tmp_path)
    assert f"name the folder above, {tmp_path}, as --root_path" in check_refused("dtd", folder)
