"""A user's own images: folders, CSV and JSON files, names, templates, lists of images."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from dataset_helpers import PARTS, make_dataset, write_image

from datasets import build_dataset, dataset_fingerprint, dataset_name, validate_dataset_name
from datasets.__main__ import main as doctor
from datasets.base import TEMPLATE
from datasets.fewshot import dump_fewshot_split

SIZES = {"Käse Brot": 12, "a.b": 10, "zoo_bar": 5}


def fill(folder, sizes):
    """Write class folders of some images each, of all kinds."""
    for label, (name, count) in enumerate(sizes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            ending = ("png", "JPG", "jpeg", "WebP")[index % 4]
            write_image(folder / name / f"{index}.{ending}", label, index, (8, 8))


def built(name, shots=2, seed=1, root=None, **more):
    random.seed(seed)
    return build_dataset(str(name), root, shots, **more)


@pytest.fixture
def mine(tmp_path):
    """A folder of class folders."""
    fill(tmp_path / "mine", SIZES)
    return tmp_path / "mine"


def listed(mine, columns, row):
    """A CSV beside that folder: what `row` gives for each image's number, path and class."""
    images = sorted(path for path in mine.rglob("*") if path.is_file())
    rows = [row(n, f"mine/{i.parent.name}/{i.name}", i.parent.name) for n, i in enumerate(images)]
    (mine.parent / "list.csv").write_text("\n".join([columns, *rows]), encoding="utf-8-sig")
    return mine.parent / "list.csv"


def test_each_class_of_a_folder_is_divided_and_nothing_is_written(mine):
    before = sorted(mine.parent.rglob("*"))
    dataset = built(mine)
    assert dataset.name == "mine" and dataset.classnames == sorted(SIZES)
    assert dataset.fingerprint["split"] == "own" and dataset.template == TEMPLATE
    assert [dataset.fingerprint[part] for part in PARTS] == [6 + 5 + 2, 2 + 2 + 1, 4 + 3 + 2]
    for item in dataset.train_x + dataset.val + dataset.test:
        assert Path(item.impath).is_file() and Path(item.impath).parent.name == item.classname
    assert dataset_fingerprint(str(mine), None) == dataset.fingerprint
    assert built(mine) == dataset and sorted(mine.parent.rglob("*")) == before


@pytest.mark.parametrize("form", ["folder", "json"])
def test_the_images_of_a_known_dataset_are_drawn_alike_as_own_ones(tmp_path, form):
    make_dataset("dtd", tmp_path, split=form == "json", per_class=20, size=(8, 8))
    images = tmp_path / "dtd/images"
    if form == "json":
        shutil.copy(tmp_path / "dtd/split_zhou_DescribableTextures.json", images / "my.json")
        images /= "my.json"
    known, own = built("dtd", 3, root=tmp_path), built(images, 3)
    assert (own.train_x, own.val, own.test) == (known.train_x, known.val, known.test)
    assert own.fingerprint == {**known.fingerprint, "split": "own"} and own.name in ("images", "my")


@pytest.mark.parametrize("val", [None, "Val", "valid", "validation"])
def test_folders_of_parts_are_those_parts(tmp_path, val):
    for part in filter(None, ("Train", val, "test")):
        fill(tmp_path / part, {"10": 10, "9": 5, "1": 2})
    dataset = built(tmp_path)
    assert [dataset.fingerprint[p] for p in PARTS] == ([17, 17, 17] if val else [14, 3, 17])
    assert dataset.classnames == ["1", "9", "10"]  # as numbers
    for items, folder in ((dataset.test, "test"), (dataset.val, val or "Train")):
        assert all(f"/{folder}/" in item.impath for item in items)
    assert not {i.impath for i in dataset.train_x} & {i.impath for i in dataset.val}


def test_each_folder_is_listed_once(mine, monkeypatch):
    seen, scandir = Counter(), os.scandir

    def counted(path):
        seen[os.path.normpath(path)] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    built(mine)
    assert seen == dict.fromkeys([str(mine), *(str(mine / name) for name in SIZES)], 1)


def test_a_known_name_wins_unless_a_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "dtd", {"a": 4, "b": 4})
    with pytest.raises(ValueError, match="dtd needs --root_path"):
        dataset_fingerprint("dtd", None)
    for name in ("./dtd", "dtd/", "~/dtd", f"{tmp_path}/dtd"):
        assert dataset_fingerprint(name, None)["split"] == "own" and dataset_name(name) == "dtd"
    (tmp_path / "dtd").rename(tmp_path / "my.set")
    validate_dataset_name("my.set")
    with pytest.raises(ValueError, match="0.png is not a folder, a .csv or a .json"):
        validate_dataset_name("my.set/a/0.png")
    assert dataset_name("my.set") == "my.set" and dataset_name("x/some.csv") == "some"


def test_a_csv_without_parts_is_divided_as_the_folder_is(mine):
    csv = built(listed(mine, "path,label,x", lambda n, path, name: f"{path},{name},-"))
    folder = built(mine)
    assert (
        csv.name == "list" and csv.fingerprint["digest"] != folder.fingerprint["digest"]
    )  # other paths
    assert (csv.train_x, csv.val, csv.test) == (folder.train_x, folder.val, folder.test)


@pytest.mark.parametrize("words", [PARTS, ("Train", "valid", "TEST")])
def test_a_csv_with_parts_and_numbers_keeps_both(mine, words):
    number = dict(zip(SIZES, (10, 9, -1), strict=True))
    path = listed(mine, "Split,label,path", lambda n, p, name: f"{words[n % 3]},{number[name]},{p}")
    dataset = built(path)
    assert dataset.classnames == ["-1", "9", "10"]
    assert [dataset.fingerprint[part] for part in PARTS] == [9, 9, 9]
    lines = path.read_text().splitlines()[3::3]
    assert [i.impath for i in dataset.test] == [f"{mine.parent}/{x.split(',')[2]}" for x in lines]


def test_the_doctor_takes_a_path(mine, capsys):
    assert doctor(["--dataset", str(mine), "--decode"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == "mine mine own 3 13 5 9 ok".split()
    (mine / "a.b/0.png").write_bytes(b"x")
    assert doctor(["--dataset", str(mine), "--decode"]) == 1
    assert f"a.b/0.png in {mine} cannot be decoded" in capsys.readouterr().out


def test_names_from_a_file_are_in_items_and_digest(mine):
    names = mine.parent / "names.yaml"
    names.write_text("zoo_bar: bar in a zoo\na.b: no\n")
    plain, dataset = built(mine), built(mine, classnames=names)
    assert dataset.classnames == ["Käse Brot", "no", "bar in a zoo"]
    assert [i.impath for i in dataset.train_x] == [i.impath for i in plain.train_x]
    assert {i.classname for i in dataset.test} == set(dataset.classnames)
    assert dataset.fingerprint["digest"] != plain.fingerprint["digest"]
    assert dataset_fingerprint(str(mine), None, classnames=names) == dataset.fingerprint


def test_classes_of_a_known_dataset_are_renamed_by_label_or_name(tmp_path):
    make_dataset("eurosat", tmp_path, size=(8, 8))
    (tmp_path / "names.yaml").write_text("0: fields\nForest: wood")
    dataset = built("eurosat", root=tmp_path, classnames=tmp_path / "names.yaml")
    assert dataset.classnames[:2] == ["fields", "wood"]


def test_templates_are_texts_or_those_of_the_field(mine):
    for template in (["{} here.", "a {}"], ["a {}"]):
        assert built(mine, template=template).template == template
    assert built(mine, template=["dataset"]).template == TEMPLATE
    assert len(set(built(mine, template="clip").template)) == 7
    make_dataset("oxford_pets", mine.parent, size=(8, 8))
    pets = built("oxford_pets", root=mine.parent, template=["dataset"])
    assert pets.template == ["a photo of a {}, a type of pet."]


@pytest.mark.parametrize("prefix", ["", "/home/them/images/", "D:\\data\\images\\", "images/"])
@pytest.mark.parametrize("keys", [None, ("impath", "label", "classname")])
def test_a_list_gives_the_same_images_on_another_disk(mine, tmp_path, capsys, prefix, keys):
    fill(tmp_path / "other/mine", SIZES)
    first = built(mine, seed=3)
    few = json.loads(dump_fewshot_split(first))
    for part in few:
        entries = [[prefix + path, label, name] for path, label, name in few[part]]
        few[part] = [dict(zip(keys, e, strict=True)) for e in entries] if keys else entries
    (tmp_path / "few.json").write_text(json.dumps(few))
    more = {"fewshot_split": tmp_path / "few.json"}
    second = built(tmp_path / "other/mine", **more)
    assert (
        random.getstate() == random.Random(1).getstate() and second.fingerprint == first.fingerprint
    )
    assert dump_fewshot_split(second) == dump_fewshot_split(first) and capsys.readouterr().err == ""
    built(mine, 1, **more)
    assert "few.json has 6 training images for 3 classes, not 1 for" in capsys.readouterr().err


def test_a_list_may_leave_out_the_first_folders_where_that_is_clear(tmp_path):
    for part in ("train", "test"):
        fill(tmp_path / part, {"a": 3, "b": 3})
    (tmp_path / "few.json").write_text('{"train": [["a/1.JPG", 0, "a"]], "val": []}')
    with pytest.raises(ValueError, match="names the image a/1.JPG, which several images"):
        built(tmp_path, fewshot_split=tmp_path / "few.json")
    (tmp_path / "test/a/1.JPG").unlink()
    (item,) = built(tmp_path, fewshot_split=tmp_path / "few.json").train_x
    assert item.impath == str(tmp_path / "train/a/1.JPG")


# Bad input: what it concerns (beside folders a and b of six images), its content, and what the
# error must say, with {} for the folder. "csv" and "parts" have the header that is due.
REFUSED = [
    ("folder", "", "{} has no class folders: sort"),
    ("folder", "a:6", "{} has one class, 'a'; a task takes two or more"),
    ("folder", "in/a:6 in/b:6", "name {}/in as --dataset"),
    ("folder", "a:6 b:0", "no training images of the class 'b'; add some"),
    ("folder", "a:6 b:3", "no test images of the class 'b'; add some, 4 for a class"),
    ("folder", "train/a:2 train/b:2 test/a:1 test/b:0", "no test images of the class 'b'"),
    ("folder", "train/a:2 train/b:2 test/a:1 test/c:1", "{} have different classes: b, c"),
    ("folder", "train/a:2 test/a:2 val/b:1", "train/ and val/ in {} have different classes: a, b"),
    ("folder", "train/a:2 test/a:2 val/a:2 valid/a:2", "has test, train, val, valid: keep one"),
    ("folder", "train/a:2 test/a:2 val/a:0", "no validation images of the class 'a'; add some, or"),
    ("folder", "train/a:2 val/a:2", "{} has train/, val/ but no test/"),
    ("folder", "train:2 test:2", "/test, {}/train has no class folders"),
    ("text", "file;label\na;b", "and no column label but file;label: its first line must be path,"),
    ("text", "", "no column path and no column label but none"),
    ("csv", "", "has no images at all; add some"),
    ("csv", "a/y.png,a\na/x.png,a\nb/0.png,b", "missing in {} (2 of 3 images)"),
    ("csv", "a/0.png", "line 2 lacks its path or its label"),
    ("csv", '"a/0.png,a', "cannot be read as CSV"),
    ("csv", "/x,a\nb/0.png,b", "names /x, outside"),
    ("parts", "a/0.png,a,tets", "line 2 has the split 'tets' (did you mean 'test'?)"),
    ("parts", "a/0.png,a,test\nb/0.png,b", "line 3 has the split '': valid are train"),
    ("parts", "a/0.png,a,train\na/1.JPG,a,test\nb/0.png,b,train", "no test images of the class"),
    ("json", None, "there is no {}/list.json: --dataset takes"),
    ("json", "[]", "list.json lacks the part train, val, test; correct it"),
    ("json", None, "there is no {}/list.json: --dataset takes"),
    ("classnames", None, "there is no file {}/list.csv: --classnames takes"),
    ("classnames", "A: x\nzzz: y", "names 'A' (did you mean 'a'?), 'zzz', a class that {} does"),
    ("classnames", "0: x\n7: y", "names '7', a class"),
    ("classnames", "- a", "is not made of lines like"),
    ("classnames", "a:", "has no name for a: it takes lines like"),
    ("classnames", "a: [", "cannot be read as YAML"),
    ("template", ["a photo"], "the template 'a photo' must have {{}} exactly"),
    ("template", ["a {}", "{x} {}", "{} {}"], "'{{x}} {{}}', '{{}} {{}}' must have {{}} exactly"),
    ("template", [], "the template is empty and must have"),
    ("fewshot_split", None, "there is no file {}/list.csv: --fewshot_split takes"),
    ("fewshot_split", "{", "cannot be read as JSON"),
    ("fewshot_split", '{"train": [], "val": []}', "has no list of images named train"),
    ("fewshot_split", '["a/0.png", "0", "a"]', "entries in train that are not"),
    ("fewshot_split", '["a/7.png", 0, "a"]', "names the image a/7.png, which {} does not have"),
    ("fewshot_split", '["a/0.png", 0, "aa"]', "names the class 'aa' (did you mean 'a'?), which {}"),
    ("fewshot_split", '["a/0.png", 1, "a"]', "gives a/0.png the label 1 and the class 'a', which"),
    ("fewshot_split", '["a/1.JPG", 0, "a"]', "names a/1.JPG, a test image in {}: take it out"),
]
HEADERS = {"json": "", "text": "", "csv": "path,label\n", "parts": "path,label,split\n"}


@pytest.mark.parametrize("what, content, message", REFUSED)
def test_bad_input_gets_one_sentence(tmp_path, what, content, message):
    sizes = [pair.split(":") for pair in (content if what == "folder" else "a:6 b:6").split()]
    fill(tmp_path, {name: int(count) for name, count in sizes})
    file, more = tmp_path / {"json": "list.json"}.get(what, "list.csv"), {"name": tmp_path}
    if what in HEADERS:
        more = {"name": file}
    elif what != "folder":
        more[what] = content if what == "template" else file
    if what == "fewshot_split" and content and content.startswith("["):
        content = f'{{"train": [{content}], "val": []}}'
    if isinstance(content, str):
        file.write_text(HEADERS.get(what, "") + content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        built(**more)
    assert message.format(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
