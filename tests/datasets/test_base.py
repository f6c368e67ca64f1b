"""The way to a dataset's folder: two conventions, links, left-overs, data that is elsewhere."""

import shutil
from pathlib import Path

import pytest
from dataset_helpers import ELEVEN, LAYOUTS, check_refused, make_small_dataset

from datasets import DATASETS, build_dataset


def test_dataset_dir_prefers_coops_name(tmp_path):
    make_small_dataset("dtd", tmp_path, "lora")
    (tmp_path / "dtd").mkdir(exist_ok=True)
    assert "/DTD/" in build_dataset("dtd", tmp_path, 1).test[0].impath  # the other one is empty
    make_small_dataset("dtd", tmp_path, "coop")
    assert "/dtd/" in build_dataset("dtd", tmp_path, 1).test[0].impath


@pytest.mark.parametrize("name", ELEVEN)
def test_missing_dataset_names_folder_searched(tmp_path, name):
    section = f"see DATASETS.md, section {DATASETS[name].title}"
    with pytest.raises(ValueError, match=f"{name}: needs --root_path.*{section}"):
        build_dataset(name, None, 1)
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}; .*{section}") as caught:
        build_dataset(name, tmp_path, 1)
    assert all(folder in str(caught.value) for folder in LAYOUTS[name][:2])


@pytest.mark.parametrize("name, split", [("dtd", True), ("sun397", False)])
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
    for ignored in ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", ".Trash-0"):
        (folder / ignored / one_class.name).mkdir(parents=True)
        (folder / ignored / "x.jpg").write_bytes(b"x")
    for place in (folder, one_class):
        for file in ("._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (place / file).write_bytes(b"x")
    (one_class / "@eaDir/a.jpg").mkdir(parents=True)  # Synology's, a folder for each image
    after = build_dataset(name, tmp_path, 1)
    assert (after.classnames, after.fingerprint) == (before.classnames, before.fingerprint)


# Dataset, a folder of it, where that is instead, what to move: {} is the root.
MOVED = [
    ("caltech101", "caltech-101", "caltech-101/caltech-101", "all that is in {}/caltech-101/calt"),
    ("food101", "food-101", "food101", "move {}/food101 to {}/food-101;"),
    ("oxford_flowers", "oxford_flowers", "oxford_flowers/flowers-102", "102 to {}/oxford_flowers;"),
    ("fgvc", "fgvc_aircraft", "fgvc_aircraft/fgvc-2013b/data", "b/data to {}/fgvc_aircraft;"),
    ("imagenet", "imagenet/images", "ILSVRC/Data/CLS-LOC", "CLS-LOC to {}/imagenet;"),
    ("eurosat", "eurosat/2750", "eurosat/EuroSAT_RGB", "EuroSAT_RGB to {}/eurosat/2750"),
    ("sun397", "sun397/SUN397", "SUN397", "move {}/SUN397 to {}/sun397/SUN397"),
    ("stanford_cars", "stanford_cars/cars_test", "stanford_cars/cars_test/cars_test", "cars_test;"),
    ("imagenet_a", "imagenet-adversarial/imagenet-a", "imagenet-a", "to {}/imagenet-adversarial/"),
]


@pytest.mark.parametrize("name, folder, place, hint", MOVED)
def test_moved_folder_gets_a_hint(tmp_path, name, folder, place, hint):
    root = tmp_path / "root"
    make_small_dataset(name, root, split=False)
    (root / folder).rename(tmp_path / "aside")
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "aside").rename(root / place)
    assert hint.replace("{}", str(root)) in check_refused(name, root)
