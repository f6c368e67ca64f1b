"""A user's own images: folders, CSV and JSON files, names, templates, lists of images."""

import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from dataset_helpers import make_dataset, write_image

from datasets import (
    DATASETS,
    build_dataset,
    check_dataset,
    dataset_name,
    describe_data,
    fewshot_json,
    find_spec,
)
from datasets.__main__ import main as doctor
from datasets.base import TEMPLATE

SIZES = {"Käse Brot": 12, "a.b": 10, "zoo_bar": 5}
NAMES = list(SIZES)  # as they sort: by code point
PARTED = [("train", "test"), ("Train", "Val", "Test"), ("train", "validation", "test")]
PARTED += [("train", "valid", "test")]


def fill(folder, sizes):
    """Write class folders of some images each, of all kinds."""
    for label, (name, count) in enumerate(sizes.items()):
        for index in range(count):
            ending = ("png", "JPG", "jpeg", "WebP")[index % 4]
            write_image(folder / name / f"{index}.{ending}", label, index, (8, 8))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder of class folders, in the current directory."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "mine", SIZES)
    return tmp_path / "mine"


def rows(mine):
    """Path from the folder above, and class, of each image."""
    images = sorted(path for path in mine.rglob("*") if path.is_file())
    return [(f"mine/{path.parent.name}/{path.name}", path.parent.name) for path in images]


def write_csv(path, rows, header="path,label"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]))
    return str(path)


def built(name, shots=2, seed=1, **more):
    random.seed(seed)
    return build_dataset(name, None, shots, **more)


# Folders


def test_each_class_of_a_folder_is_divided_and_nothing_is_written(mine):
    before = sorted(mine.parent.rglob("*"))
    dataset = built(str(mine))
    assert dataset.name == "mine" and dataset.classnames == sorted(NAMES)
    assert dataset.template == TEMPLATE and dataset.data["split"] == "own"
    counts = [dataset.data[part] for part in ("train", "val", "test")]
    assert counts == [6 + 5 + 2, 2 + 2 + 1, 4 + 3 + 2]
    for item in dataset.train_x + dataset.val + dataset.test:
        assert Path(item.impath).is_file() and Path(item.impath).parent.name == item.classname
    assert describe_data(str(mine), None) == dataset.data
    assert built(str(mine)) == dataset and sorted(mine.parent.rglob("*")) == before


def test_a_folder_and_a_known_dataset_of_the_same_images_draw_the_same(tmp_path):
    make_dataset("dtd", tmp_path, split=False, per_class=20, size=(8, 8))
    random.seed(5)
    known = build_dataset("dtd", tmp_path, 3)
    own = built(str(tmp_path / "dtd/images"), 3, 5)
    for part in ("train_x", "val", "test"):
        assert getattr(own, part) == getattr(known, part)
    assert own.data["digest"] == known.data["digest"]


@pytest.mark.parametrize("parts", PARTED)
def test_folders_of_parts_are_those_parts(tmp_path, parts):
    for part in parts:
        fill(tmp_path / part, {"b": 10, "a": 5})
    dataset = built(str(tmp_path))
    held_out = 0 if len(parts) == 3 else 3
    assert [dataset.data[p] for p in ("train", "val", "test")] == [
        15 - held_out,
        held_out or 15,
        15,
    ]
    assert dataset.classnames == ["a", "b"]
    assert all(f"/{parts[-1]}/" in item.impath for item in dataset.test)
    assert all(f"/{parts[-2]}/" in item.impath for item in dataset.val)
    assert not {i.impath for i in dataset.train_x} & {i.impath for i in dataset.val}


def test_each_folder_is_listed_once(mine, monkeypatch):
    listed, scandir = Counter(), os.scandir

    def counted(path):
        listed[os.path.normpath(path)] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    built(str(mine))
    assert listed == dict.fromkeys([str(mine), *(str(mine / name) for name in NAMES)], 1)


def test_folders_named_by_numbers_are_sorted_as_numbers(tmp_path):
    fill(tmp_path, {"10": 4, "9": 4, "1": 4})
    assert built(str(tmp_path)).classnames == ["1", "9", "10"]


# Names of datasets


def test_a_known_name_wins_unless_a_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "dtd", {"a": 4, "b": 4})
    assert find_spec("dtd") is DATASETS["dtd"]
    for name in ("./dtd", "dtd/", "~/dtd", f"{tmp_path}/dtd"):
        assert describe_data(name, None)["split"] == "own" and dataset_name(name) == "dtd"
    (tmp_path / "dtd").rename(tmp_path / "my.set")
    check_dataset("my.set")
    assert dataset_name("my.set") == "my.set" and dataset_name("x/some.csv") == "some"


# CSV and JSON


def test_a_csv_without_parts_is_divided_as_the_folder_is(mine):
    path = write_csv(mine.parent / "list.csv", [(p, n, "-") for p, n in rows(mine)], "path,label,x")
    listed, found = built(path), built(str(mine))
    assert listed.name == "list" and listed.data["digest"] != found.data["digest"]  # other paths
    for part in ("train_x", "val", "test", "classnames"):
        assert getattr(listed, part) == getattr(found, part)


@pytest.mark.parametrize("words", [("train", "val", "test"), ("Train", "validation", "TEST")])
def test_a_csv_with_parts_and_numbers_keeps_both(mine, words):
    number = dict(zip(NAMES, (10, 9, -1), strict=True))
    listed = [(n % 3, path, number[name]) for n, (path, name) in enumerate(rows(mine))]
    path = write_csv(
        mine.parent / "list.csv", [(words[n], name, p) for n, p, name in listed], "Split,label,path"
    )
    dataset = built(path)
    assert dataset.classnames == ["-1", "9", "10"]
    assert {i.impath for i in dataset.test} == {
        str(mine.parent / p) for n, p, _ in listed if n == 2
    }
    assert dataset.data["val"] == sum(n == 1 for n, _, _ in listed)


def test_a_json_is_read_as_split_files_are(tmp_path):
    make_dataset("dtd", tmp_path, size=(8, 8))
    split = tmp_path / "dtd/split_zhou_DescribableTextures.json"
    (tmp_path / "dtd/images/my.json").write_text(split.read_text())
    random.seed(1)
    known = build_dataset("dtd", tmp_path, 2)
    own = built(str(tmp_path / "dtd/images/my.json"))
    assert (own.train_x, own.val, own.test) == (known.train_x, known.val, known.test)
    assert own.data == {**known.data, "split": "own"} and own.name == "my"


def test_the_doctor_takes_a_path(mine, capsys):
    assert doctor(["--dataset", str(mine), "--decode"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == "mine mine own 3 13 5 9 ok".split()
    (mine / "a.b/0.png").write_bytes(b"x")
    assert doctor(["--dataset", str(mine), "--decode"]) == 1
    assert f"a.b/0.png in {mine} cannot be decoded" in capsys.readouterr().out


# Names of classes and templates


def test_names_from_a_file_are_in_items_digest_and_prompts(mine):
    names = mine.parent / "names.yaml"
    names.write_text("zoo_bar: bar in a zoo\na.b: no\n")
    plain, dataset = built(str(mine)), built(str(mine), classnames=names)
    expected = {"zoo_bar": "bar in a zoo", "a.b": "no"}
    assert dataset.classnames == [expected.get(name, name) for name in plain.classnames]
    assert [i.impath for i in dataset.train_x] == [i.impath for i in plain.train_x]
    assert {i.classname for i in dataset.test} == set(dataset.classnames)
    assert dataset.data["digest"] != plain.data["digest"]
    assert describe_data(str(mine), None, classnames=names) == dataset.data


@pytest.mark.parametrize("text", ["0: fields\n", "Annual Crop Land: fields\n"])
def test_classes_of_a_known_dataset_are_renamed_by_label_or_name(tmp_path, text):
    make_dataset("eurosat", tmp_path, size=(8, 8))
    (tmp_path / "names.yaml").write_text(text)
    dataset = build_dataset("eurosat", tmp_path, 1, classnames=str(tmp_path / "names.yaml"))
    assert dataset.classnames[:2] == ["fields", "Forest"]


def test_templates_are_texts_or_those_of_the_field(mine, tmp_path):
    texts = ["{} here.", "a {}"]
    assert built(str(mine), template=texts).template == texts
    assert built(str(mine), template="a {}").template == ["a {}"]
    assert built(str(mine), template=["dataset"]).template == TEMPLATE
    assert len(built(str(mine), template=["clip"]).template) == 7
    make_dataset("oxford_pets", tmp_path, size=(8, 8))
    dataset = build_dataset("oxford_pets", tmp_path, 1, template=["dataset"])
    assert dataset.template == ["a photo of a {}, a type of pet."]


# Lists of images


def test_a_list_from_one_disk_gives_the_same_images_on_another(mine, tmp_path):
    fill(tmp_path / "other/mine", SIZES)
    first = built(str(mine), seed=3)
    path = tmp_path / "few.json"
    path.write_text(fewshot_json(first))
    assert re.fullmatch(r"[^/]+/\d+\.\w+", json.loads(path.read_text())["train"][0][0])
    random.seed(0)
    state = random.getstate()
    second = build_dataset(str(tmp_path / "other/mine"), None, 1, fewshot_list=path)
    assert random.getstate() == state and second.data == first.data
    assert fewshot_json(second) == fewshot_json(first)
    assert second.train_x[0].impath.startswith(str(tmp_path / "other"))


@pytest.mark.parametrize("prefix", ["", "/home/them/dtd/images/", "D:\\data\\images\\", "images/"])
def test_lists_of_cross_modal_adaptation_are_read(tmp_path, capsys, prefix):
    make_dataset("dtd", tmp_path, size=(8, 8))
    random.seed(2)
    drawn = build_dataset("dtd", tmp_path, 2)
    listed = {
        part: [{"impath": prefix + i, "label": label, "classname": n} for i, label, n in entries]
        for part, entries in json.loads(fewshot_json(drawn)).items()
    }
    (tmp_path / "few.json").write_text(json.dumps(listed))
    capsys.readouterr()
    assert build_dataset("dtd", tmp_path, 2, fewshot_list=tmp_path / "few.json") == drawn
    assert "few.json" not in capsys.readouterr().err
    build_dataset("dtd", tmp_path, 1, fewshot_list=tmp_path / "few.json")
    assert "few.json has 6 training images for 3 classes, not 1 for each" in capsys.readouterr().err


def test_a_list_may_leave_out_the_first_folders_where_that_is_clear(tmp_path):
    for part in ("train", "test"):
        fill(tmp_path / "mine" / part, {"a": 3, "b": 3})
    listed = {"train": [["a/1.JPG", 0, "a"]], "val": []}
    (tmp_path / "few.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="names the image a/1.JPG, which several images"):
        built(str(tmp_path / "mine"), fewshot_list=tmp_path / "few.json")
    (tmp_path / "mine/test/a/1.JPG").rename(tmp_path / "mine/test/a/7.JPG")
    dataset = built(str(tmp_path / "mine"), fewshot_list=tmp_path / "few.json")
    assert [i.impath for i in dataset.train_x] == [str(tmp_path / "mine/train/a/1.JPG")]


# Refusals: class folders and how many images each has; what the error must say, {} for the folder
FOLDERS = {
    "": "{} has no class folders: sort",
    "a:6": "{} has one class, 'a'; a task takes two or more",
    "in/a:6 in/b:6": "name {}/in as --dataset",
    "a:6 b:0": "no training images of the class 'b'; add some",
    "a:6 b:3": "no test images of the class 'b'; add some, 4 for a class",
    "train/a:2 train/b:2 test/a:1 test/b:0": "no test images of the class 'b'",
    "train/a:2 train/b:2 test/a:1 test/c:1": "train/ and test/ in {} have different classes: b, c",
    "train/a:2 test/a:2 val/b:1": "train/ and val/ in {} have different classes: a, b",
    "train/a:2 test/a:2 val/a:2 valid/a:2": "has test, train, val, valid: keep one",
    "train/a:2 val/a:2": "{} has train/, val/ but no test/",
    "train:2 test:2": "test, {0}/train has no class folders",
}
# The text of a CSV beside folders a and b of six images each
CSVS = {
    "file;label\na;b": "no column path and no column label but file;label: its first line",
    "": "no column path and no column label but none",
    "path,label": "has no images at all; add some",
    "path,label\na/x.png,a\na/y.png,a\nb/0.png,b": "a/x.png, a/y.png: named in .*(2 of 3 images)",
    "path,label,split\na/0.png,a,tets": "line 2 has the split 'tets' (did you mean 'test'?)",
    "path,label,split\na/0.png,a,test\nb/0.png,b": "line 3 has the split '': valid are train",
    "path,label\na/0.png": "line 2 lacks its path or its label",
    'path,label\n"a/0.png,a': "cannot be read as CSV",
    "path,label,split\n/x,a,test\na/0.png,a,train\nb/0.png,b,train": "names /x, outside",
    "path,label,split\na/0.png,a,train\na/1.JPG,a,test": "has one class, 'a'",
    "path,label,split\na/0.png,a,train\na/1.JPG,a,test\nb/0.png,b,train": "no test images of the",
}
# An argument, the content of the file that it names (or its value), what the error must say
ARGUMENTS = [
    ("name", None, "there is no {}/file: --dataset takes"),
    ("name", "a picture", "file is not a folder, a .csv or a .json"),
    ("classnames", None, "there is no file {}/file: --classnames takes"),
    (
        "classnames",
        "A: x\nzzz: y",
        "names 'A' (did you mean 'a'?), 'zzz', a class that {} does not",
    ),
    ("classnames", "0: x\n7: y", "names '7', a class"),
    ("classnames", "- a", "is not made of lines like"),
    ("classnames", "a:", "has no name for a: it takes lines like"),
    ("classnames", "a: [", "cannot be read as YAML"),
    ("template", ["a photo"], "the template 'a photo' must have {{}} exactly once"),
    ("template", ["a {}", "{} {}"], "the template '{{}} {{}}' must have {{}} exactly once"),
    ("template", ["{} {x}"], "must have {{}} exactly once"),
    ("template", [], "the template is empty and must have"),
    ("fewshot_list", None, "there is no file {}/file: --fewshot_list takes"),
    ("fewshot_list", "{", "cannot be read as JSON"),
    ("fewshot_list", '{"train": [], "val": []}', "has no list of images named train"),
    ("fewshot_list", ["a/0.png", "0", "a"], "entries in train that are not"),
    ("fewshot_list", ["a/7.png", 0, "a"], "names the image a/7.png, which {} does not have"),
    ("fewshot_list", ["a/0.png", 0, "aa"], "names the class 'aa' (did you mean 'a'?), which {}"),
    ("fewshot_list", ["a/0.png", 1, "a"], "gives a/0.png the label 1 and the class 'a', which are"),
]


def refused(folder, message, name=None, **arguments):
    """Check that a dataset is refused in one sentence."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        built(name or str(folder), **arguments)
    pieces = message.format(folder).split(".*")
    assert re.search(".*".join(map(re.escape, pieces)), str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", FOLDERS)
def test_a_folder_that_cannot_serve_is_refused(tmp_path, sizes):
    for name, count in (pair.split(":") for pair in sizes.split()):
        (tmp_path / name).mkdir(parents=True)
        fill(tmp_path, {name: int(count)})
    refused(tmp_path, FOLDERS[sizes])


@pytest.mark.parametrize("text", CSVS)
def test_a_csv_that_cannot_serve_is_refused(tmp_path, text):
    fill(tmp_path, {"a": 6, "b": 6})
    (tmp_path / "list.csv").write_text(text)
    refused(tmp_path, CSVS[text], str(tmp_path / "list.csv"))


@pytest.mark.parametrize("argument, content, message", ARGUMENTS)
def test_an_argument_that_does_not_fit_the_data_is_refused(tmp_path, argument, content, message):
    fill(tmp_path, {"a": 6, "b": 6})
    value = content if argument == "template" else str(tmp_path / "file")
    if argument == "fewshot_list" and isinstance(content, list):
        content = json.dumps({"train": [content], "val": []})
    if isinstance(content, str):
        (tmp_path / "file").write_text(content)
    refused(tmp_path, message, **{argument: value})


def test_a_test_image_in_a_list_is_refused(mine):
    item = built(str(mine)).test[0]
    entry = [item.impath, item.label, item.classname]
    (mine.parent / "few.json").write_text(json.dumps({"train": [entry], "val": []}))
    refused(mine, "a test image in {}: take it out", fewshot_list=mine.parent / "few.json")
