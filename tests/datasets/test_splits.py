"""Split files: broken ones, those written on Windows, and those made here from the raw download."""

import json
import os
import random

import pytest
from dataset_helpers import LAYOUTS, WITH_SPLIT, change_split, make_dataset, refused, write_image

import datasets.splits
from datasets import DATASETS, build_dataset, dataset_fingerprint

RAW = tuple(name for name in WITH_SPLIT if name != "digits")
MADE = "split_so_DescribableTextures.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:5806e77c\nsize 350939004\n"
PAGE = "\n<!DOCTYPE html><html><body>403 Forbidden</body></html>"


@pytest.fixture
def eurosat(tmp_path):
    """EuroSAT's folder in a root of its own."""
    make_dataset("eurosat", tmp_path, size=(8, 8))
    return tmp_path / "eurosat"


@pytest.fixture
def dtd(tmp_path):
    """DTD's folder without a split file, in a root of its own."""
    make_dataset("dtd", tmp_path, split=False, size=(8, 8))
    return tmp_path / "dtd"


def first(value):
    """A change of the split file: its first entry is replaced."""

    def change(split):
        split["train"][0] = value

    return change


# The published file


BROKEN = {  # how the split file is spoilt: what the error must say
    "part": (lambda s: s.pop("val"), "lacks the part val"),
    "shape": (lambda s: s.clear(), "lacks the part train, val, test"),
    "pair": (first(["a.jpg", 0]), "not .path, label, class name.: train: .'a.jpg', 0"),
    "text label": (first(["a.jpg", "0", "a"]), "not .path, label, class name."),
    "true label": (first(["a.jpg", True, "a"]), "not .path, label, class name."),
    "blank name": (first(["a.jpg", 0, " "]), "not .path, label, class name."),
    "zero byte": (first(["a\0/b.jpg", 0, "a"]), "not .path, label, class name."),
    "surrogate": (first(["\ud800/b.jpg", 0, "a"]), "not .path, label, class name."),
    "lines": (first("a\nb"), r"train: 'a\\nb'"),
    "two names": (first(["a.jpg", 1, "Wood"]), "label 1 stands for '(Wood|Forest)' and"),
    "negative": (first(["a.jpg", -1, "a"]), "must run from 0 to 3.*-1, 3 breaks"),
    "gap": (first(["a.jpg", 9, "a"]), "must run from 0 to 3.*3, 9 breaks"),
    "absolute": (first(["/etc/passwd", 1, "Forest"]), "names /etc/passwd, outside"),
    "upwards": (first(["../../x.jpg", 1, "Forest"]), "names ../../x.jpg, outside"),
    "within": (first(["Forest/../Forest/Forest_0000.jpg", 1, "Forest"]), "/Forest_0000.jpg, outs"),
    "windows": (first(["Forest/..\\..\\x.jpg", 1, "Forest"]), r"x.jpg, outside of the image fo"),
    "missing": (first(["Forest/x.jpg", 1, "Forest"]), "Forest/x.jpg: named in .*, missing"),
    "no folder": (first(["Wood/x.jpg", 1, "Forest"]), "Wood/x.jpg: named in .*, missing"),
    "folder": (first(["Forest", 1, "Forest"]), "Forest: named in .*, missing"),
    "pipe": (first(["Forest/pipe.jpg", 1, "Forest"]), "Forest/pipe.jpg: named in .*, missing"),
    "long": (first([f"Forest/{'a' * 300}", 1, "Forest"]), "Forest/a*: named in .*, missing"),
    "other type": (first(["Forest/Forest_0000.tif", 1, "Forest"]), "Forest_0000.jpg is there"),
    "no test": (lambda s: s.update(test=[]), "has no test images of the class 'Annual Crop Land'"),
    "no training": (
        lambda s: s.update(train=[e for e in s["train"] if e[1] != 1]),
        "no training images of the class 'Forest'",
    ),
    "empty": (lambda s: s.update(train=[], val=[], test=[]), "has no images at all"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_split_file_is_named_with_what_is_wrong(eurosat, case):
    change, message = BROKEN[case]
    os.mkfifo(eurosat / "2750/Forest/pipe.jpg")  # which nobody may open: it would wait for ever
    change_split(eurosat, change)
    said = refused("eurosat", eurosat.parent, message)
    assert "split_zhou_EuroSAT.json" in said and "see DATASETS.md, section EuroSAT" in said


def link_to_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere.json")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


NOT_JSON = {
    "half": (lambda path: path.write_bytes(b"{"), "cannot be read as JSON"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "nothing": (lambda path: path.write_bytes(b""), "cannot be read as JSON"),
    "deep": (lambda path: path.write_bytes(b"[" * 100_000), "cannot be read as JSON"),
    "link to nowhere": (link_to_nowhere, "cannot be read as JSON"),
    "pipe": (pipe, "cannot be read as JSON .it is not a regular file"),
    "pointer": (lambda path: path.write_text(POINTER), "is a Git LFS pointer, .*git lfs pull"),
    "page": (lambda path: path.write_text(PAGE), "is a web page, not the file itself"),
}


@pytest.mark.parametrize("case", NOT_JSON)
def test_a_split_file_that_is_not_json_is_named_and_not_passed_over(eurosat, case):
    spoil, message = NOT_JSON[case]
    spoil(eurosat / "split_zhou_EuroSAT.json")
    refused("eurosat", eurosat.parent, f"split_zhou_EuroSAT.json {message}")


def test_backslashes_are_read_as_slashes_where_that_finds_the_file(eurosat):
    before = build_dataset("eurosat", eurosat.parent, 2)
    write_image(eurosat / "2750/Forest/a\\b.jpg", 1, 0, (8, 8))  # a name of its own on Linux
    change_split(
        eurosat,
        lambda s: s.update({p: [[e[0].replace("/", "\\"), *e[1:]] for e in s[p]] for p in s}),
    )
    assert build_dataset("eurosat", eurosat.parent, 2).fingerprint == before.fingerprint
    change_split(eurosat, lambda s: s["test"].append(["Forest/a\\b.jpg", 1, "Forest"]))
    assert build_dataset("eurosat", eurosat.parent, 2).test[-1].impath.endswith("Forest/a\\b.jpg")


def test_a_name_that_only_the_file_system_knows_is_no_missing_image(eurosat, monkeypatch):
    """As on a file system that ignores case: not in the folder's list, but there when asked."""
    path = eurosat / "2750/Forest/forest.JPG"
    change_split(eurosat, first(["Forest/forest.JPG", 1, "Forest"]))
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda p: os.fspath(p) == str(path) or isfile(p))
    assert len(build_dataset("eurosat", eurosat.parent, 1).train_x) == 3


# Splits made here


@pytest.mark.parametrize("convention", ["coop", "lora"])
@pytest.mark.parametrize("name", RAW)
def test_a_split_is_made_once_saved_and_announced(tmp_path, capsys, name, convention):
    make_dataset(name, tmp_path, convention, split=False, size=(8, 8))
    made = tmp_path / LAYOUTS[name][("coop", "lora").index(convention)]
    made /= LAYOUTS[name][2].replace("zhou", "so")
    state = random.getstate()
    data = dataset_fingerprint(name, tmp_path)  # says and writes nothing, draws no global numbers
    assert capsys.readouterr().err == "" and not made.exists() and random.getstate() == state
    random.seed(11)
    dataset = build_dataset(name, tmp_path, 2)
    assert dataset.fingerprint == data and data["split"] == "made"
    announced = capsys.readouterr().err.splitlines()[0]
    assert "not comparable to published figures" in announced and "made now" in announced
    assert f"section {DATASETS[name].title}" in announced
    stamp = made.stat().st_mtime_ns
    random.seed(11)
    assert build_dataset(name, tmp_path, 2) == dataset  # the saved one is used again
    assert made.stat().st_mtime_ns == stamp and dataset_fingerprint(name, tmp_path) == data
    assert "made earlier" in capsys.readouterr().err
    made.unlink()
    random.seed(11)
    assert build_dataset(name, tmp_path, 2) == dataset  # another making gives the same


def add_class(images):
    for index in range(4):
        write_image(images / f"zigzagged/{index}.jpg", 9, index, (8, 8))


FOLDER_CHANGES = {
    "class added": add_class,
    "class removed": lambda images: (images / "meshed").rename(images.parent / "aside"),
    "class renamed": lambda images: (images / "meshed").rename(images / "mesh"),
    "image added": lambda images: write_image(images / "meshed/x.jpg", 1, 9, (8, 8)),
    "image removed": lambda images: (images / "meshed/meshed_0001.jpg").unlink(),
    "image renamed": lambda images: (images / "meshed/meshed_0001.jpg").rename(
        images / "meshed/a.jpg"
    ),
}


@pytest.mark.parametrize("change", FOLDER_CHANGES)
def test_a_made_split_is_made_anew_where_its_folder_has_changed(dtd, capsys, change):
    before = build_dataset("dtd", dtd.parent, 1).fingerprint
    FOLDER_CHANGES[change](dtd / "images")
    capsys.readouterr()
    assert dataset_fingerprint("dtd", dtd.parent)["digest"] != before["digest"]
    dataset = build_dataset("dtd", dtd.parent, 1)
    assert "made anew: the data has changed since the saved one" in capsys.readouterr().err
    classes = [path.name for path in (dtd / "images").iterdir() if path.is_dir()]
    assert dataset.classnames == sorted(classes)
    saved = json.loads((dtd / MADE).read_text())
    assert [len(saved[p]) for p in ("train", "val", "test")] == list(dataset.fingerprint.values())[
        2:
    ]
    build_dataset("dtd", dtd.parent, 1)
    assert "made earlier" in capsys.readouterr().err


def test_a_made_split_of_an_older_version_is_made_anew(dtd, capsys):
    build_dataset("dtd", dtd.parent, 1)
    saved = json.loads((dtd / MADE).read_text())
    saved["train"].reverse()
    del saved["digest"]
    (dtd / MADE).write_text(json.dumps(saved))
    capsys.readouterr()
    build_dataset("dtd", dtd.parent, 1)
    assert "made anew: the saved one does not say of which data" in capsys.readouterr().err
    assert json.loads((dtd / MADE).read_text())["train"] != saved["train"]


def test_the_published_split_decides_when_both_are_there(dtd, capsys):
    build_dataset("dtd", dtd.parent, 1)
    make_dataset("dtd", dtd.parent, split=True, size=(8, 8))
    capsys.readouterr()
    assert build_dataset("dtd", dtd.parent, 1).fingerprint["split"] == "published"
    assert "made" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_still_gives_its_split(dtd, capsys, monkeypatch):
    def refuse(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(datasets.splits, "atomic_write", refuse)
    assert len(build_dataset("dtd", dtd.parent, 1).train_x) == 3
    assert "made now, not saved: Permission denied" in capsys.readouterr().err


def test_a_damaged_split_of_ours_says_how_to_have_it_made_again(dtd):
    (dtd / MADE).write_text("{")
    refused("dtd", dtd.parent, "split_so_.*delete it, and it is made again")


def test_a_folder_without_images_or_classes_leaves_no_split(dtd):
    (dtd / "images/zigzagged").mkdir()
    refused("dtd", dtd.parent, "no training images of the class 'zigzagged'")
    (dtd / "images").rename(dtd / "aside")
    (dtd / "images").mkdir()
    refused("dtd", dtd.parent, "dtd/images has no images at all")
    assert not list(dtd.glob("split_so_*"))


ODD = [
    'it\'s a "field"',
    "line\nbreak",
    "\x1b[31mred",
    "\u68ee\u6797",
    "no\u00a0break",
    "$(x); `y`",
]


def test_odd_names_of_folders_make_a_split_that_is_read_again(tmp_path):
    for label, name in enumerate(ODD):
        for index in range(4):
            path = tmp_path / "dtd/images" / name / f"{name} {index}.jpg"
            write_image(path, label, index, (8, 8))
    dataset = build_dataset("dtd", tmp_path, 1)
    assert dataset.classnames == sorted(ODD) and (tmp_path / "dtd" / MADE).exists()
    assert build_dataset("dtd", tmp_path, 1).test == dataset.test


@pytest.mark.parametrize("where", ["class", "image"])
def test_a_name_that_is_not_utf_8_is_named(dtd, where):
    latin = os.fsdecode("K\xe4se".encode("latin-1"))
    if where == "class":
        (dtd / "images/meshed").rename(dtd / "images" / latin)
    else:
        write_image(dtd / "images/meshed" / f"{latin}.jpg", 0, 0, (8, 8))
    refused("dtd", dtd.parent, r"images has '.*K\\udce4se.*, not UTF-8; rename it")
