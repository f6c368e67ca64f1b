"""Split files: broken ones, those written on Windows, and those made here from the raw download."""

import json
import os
import random

import pytest
from dataset_helpers import RAW, change_split, check_refused, make_small_dataset, write_image

import datasets.splits
from datasets import DATASETS, build_dataset, dataset_fingerprint


@pytest.fixture
def eurosat(tmp_path):
    """EuroSAT's folder in a root of its own."""
    return make_small_dataset("eurosat", tmp_path)


@pytest.fixture
def dtd(tmp_path):
    """DTD's folder without a split file, in a root of its own."""
    return make_small_dataset("dtd", tmp_path, split=False)


def replace_first(*entry):
    """A change of the split file: its first entry is replaced."""

    def change(split):
        split["train"][0] = list(entry)

    return change


BROKEN = {  # how the split file is spoilt: what the error must say
    "part": (lambda s: s.pop("val"), "lacks a list named val: get the file again"),
    "pair": (replace_first("a.jpg", 0), "not .path, label, class name.: .'a.jpg', 0"),
    "true label": (replace_first("a.jpg", True, "a"), "not .path, label, class name."),
    "blank name": (replace_first("a.jpg", 0, " "), "not .path, label, class name."),
    "zero byte": (replace_first("a\0/b.jpg", 1, "Forest"), r"'a\\x00/b.jpg': named in .*, missing"),
    "surrogate": (replace_first("\ud800/b.jpg", 1, "Forest"), "not UTF-8: rename it"),
    "two names": (replace_first("a.jpg", 1, "Wood"), "label 1 for '(Wood|Forest)' and"),
    "gap": (replace_first("a.jpg", 9, "a"), "must run from 0 without gaps, but 3, 9 is missing"),
    "absolute": (replace_first("/etc/passwd", 1, "Forest"), "passwd, outside .* must be relative"),
    "windows": (replace_first("Forest/..\\..\\x.jpg", 1, "Forest"), "x.jpg, outside of the image"),
    "missing": (replace_first("Forest/x.jpg", 1, "Forest"), "Forest/x.jpg: .*: correct the paths"),
    "no test": (lambda s: s.update(test=[]), "has no test images of the class 'Annual Crop Land'"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid s", "is a Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html><html>403</html>", "is a web page, not the file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_split_file_is_named(eurosat, case):
    change, message = BROKEN[case]
    if isinstance(change, bytes):
        (eurosat / "split_zhou_EuroSAT.json").write_bytes(change)
    else:
        change_split(eurosat, change)
    error = check_refused("eurosat", eurosat.parent, message)
    assert "split_zhou_EuroSAT.json" in error and "see DATASETS.md, section EuroSAT" in error


def test_backslashes_are_read_as_slashes(eurosat):
    before = build_dataset("eurosat", eurosat.parent, 2)

    def change(split):
        for part, entries in split.items():
            split[part] = [[path.replace("/", "\\"), *rest] for path, *rest in entries]

    change_split(eurosat, change)
    assert build_dataset("eurosat", eurosat.parent, 2).fingerprint == before.fingerprint
    write_image(eurosat / "2750/Forest/a\\b.jpg", 1, 0)  # a name of its own on Linux
    change_split(eurosat, lambda s: s["test"].append(["Forest/a\\b.jpg", 1, "Forest"]))
    assert build_dataset("eurosat", eurosat.parent, 2).test[-1].impath.endswith("Forest/a\\b.jpg")


@pytest.mark.parametrize("name", RAW)
def test_made_split_is_saved(tmp_path, capsys, name):
    folder = make_small_dataset(name, tmp_path, split=False)
    made = folder / DATASETS[name].split_file.replace("zhou", "so")
    state = random.getstate()
    fingerprint = dataset_fingerprint(name, tmp_path)  # prints and writes nothing
    assert capsys.readouterr().err == "" and not made.exists() and random.getstate() == state
    random.seed(11)
    dataset = build_dataset(name, tmp_path, 2)
    assert dataset.fingerprint == fingerprint and fingerprint["split"] == "made"
    note = capsys.readouterr().err.splitlines()[0]
    assert "not comparable to published figures" in note and "made now" in note
    assert f"section {DATASETS[name].title}" in note
    content = made.read_bytes()
    random.seed(11)
    assert build_dataset(name, tmp_path, 2) == dataset and made.read_bytes() == content
    assert "made earlier" in capsys.readouterr().err


def test_changed_folder_remakes_split(dtd, capsys):
    before = build_dataset("dtd", dtd.parent, 1).fingerprint
    (dtd / "images/meshed/meshed_0001.jpg").rename(dtd / "images/meshed/a.jpg")
    capsys.readouterr()
    dataset = build_dataset("dtd", dtd.parent, 1)
    assert "made again, since the data has changed" in capsys.readouterr().err
    assert dataset.fingerprint["digest"] != before["digest"]
    saved = json.loads((dtd / "split_so_DescribableTextures.json").read_text())
    assert saved["digest"] == dataset.fingerprint["digest"]
    build_dataset("dtd", dtd.parent, 1)
    assert "made earlier" in capsys.readouterr().err


def test_unwritable_folder_gives_its_split(dtd, capsys, monkeypatch):
    def refuse(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(datasets.splits, "atomic_write", refuse)
    assert len(build_dataset("dtd", dtd.parent, 1).train_x) == 3
    assert "made now, not saved: Permission denied" in capsys.readouterr().err


def test_unusable_folder_leaves_no_split(dtd):
    (dtd / "images/zigzagged").mkdir()
    check_refused("dtd", dtd.parent, "no training images of the class 'zigzagged'")
    assert not list(dtd.glob("split_so_*"))


def test_names_outside_utf8_are_refused(dtd):
    latin = os.fsdecode("K\xe4se".encode("latin-1"))
    (dtd / "images/meshed").rename(dtd / "images" / latin)
    check_refused("dtd", dtd.parent, r"images has '.*K\\udce4se.*, not UTF-8: rename it")
