"""A user's own images: folders, CSV and JSON files; class names and prompts."""

import random
import shutil
from pathlib import Path

import pytest
from dataset_helpers import SPLITS, make_small_dataset, write_image

from datasets import build_dataset, dataset_fingerprint, dataset_name, get_dataset_info
from datasets.base import DEFAULT_TEMPLATE

SIZES = {"Käse Brot": 12, "a.b": 10, "zoo_bar": 5}


def write_class_folders(folder, sizes):
    """Write class folders of some images each, with several extensions."""
    for label, (name, count) in enumerate(sizes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            extension = ("png", "JPG", "jpeg", "WebP")[index % 4]
            write_image(folder / name / f"{index}.{extension}", label, index)


def write_csv(folder, columns, row):
    """Write a CSV beside a folder: what `row` gives for each image's number, path and class."""
    images = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [row(n, f"mine/{i.parent.name}/{i.name}", i.parent.name) for n, i in enumerate(images)]
    (folder.parent / "list.csv").write_text("\n".join([columns, *rows]), encoding="utf-8-sig")
    return folder.parent / "list.csv"


def build(name, shots=2, root=None, **options):
    random.seed(1)
    return build_dataset(str(name), root, shots, **options)


def counts(dataset):
    return [dataset.fingerprint[part] for part in SPLITS]


@pytest.fixture
def mine(tmp_path):
    """A folder of class folders."""
    write_class_folders(tmp_path / "mine", SIZES)
    return tmp_path / "mine"


def test_folder_is_divided_by_class(mine):
    before = sorted(mine.parent.rglob("*"))
    dataset = build(mine)
    assert dataset.name == "mine" and dataset.classnames == sorted(SIZES)
    assert dataset.fingerprint["split"] == "own" and dataset.template == [DEFAULT_TEMPLATE]
    assert counts(dataset) == [6 + 5 + 2, 2 + 2 + 1, 4 + 3 + 2]
    for item in dataset.train_x + dataset.val + dataset.test:
        assert Path(item.impath).is_file() and Path(item.impath).parent.name == item.classname
    assert dataset_fingerprint(str(mine), None) == dataset.fingerprint
    assert build(mine) == dataset and sorted(mine.parent.rglob("*")) == before


@pytest.mark.parametrize("form", ["folder", "json"])
def test_own_images_are_drawn_alike(tmp_path, form):
    folder = make_small_dataset("dtd", tmp_path, split=form == "json", per_class=20)
    path = folder / "images"
    if form == "json":
        shutil.copy(folder / "split_zhou_DescribableTextures.json", path / "my.json")
        path /= "my.json"
    known, own = build("dtd", 3, root=tmp_path), build(path, 3)
    assert (own.train_x, own.val, own.test) == (known.train_x, known.val, known.test)
    assert own.fingerprint == {**known.fingerprint, "split": "own"}
    assert own.name == {"folder": "images", "json": "my"}[form]


@pytest.mark.parametrize("val", [None, "Val", "valid", "validation"])
def test_folders_of_parts_are_kept(tmp_path, val):
    for part in filter(None, ("Train", val, "test")):
        write_class_folders(tmp_path / part, {"10": 10, "9": 5, "1": 2})
    dataset = build(tmp_path)
    assert counts(dataset) == ([17, 17, 17] if val else [14, 3, 17])
    assert dataset.classnames == ["1", "9", "10"]  # as numbers
    for items, folder in ((dataset.test, "test"), (dataset.val, val or "Train")):
        assert all(f"/{folder}/" in item.impath for item in items)
    assert not {i.impath for i in dataset.train_x} & {i.impath for i in dataset.val}


def test_known_name_wins_over_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_class_folders(tmp_path / "dtd", {"a": 4, "b": 4})
    with pytest.raises(ValueError, match="dtd needs --root_path"):
        dataset_fingerprint("dtd", None)
    for name in ("./dtd", "dtd/", "~/dtd", f"{tmp_path}/dtd"):
        assert dataset_fingerprint(name, None)["split"] == "own" and dataset_name(name) == "dtd"
    (tmp_path / "dtd").rename(tmp_path / "my.set")
    get_dataset_info("my.set")
    with pytest.raises(ValueError, match="no folder, .csv or .json .*my.set/a/0.png"):
        get_dataset_info("my.set/a/0.png")
    assert dataset_name("my.set") == "my.set" and dataset_name("x/some.csv") == "some"


def test_csv_is_divided_as_folder(mine):
    table = build(write_csv(mine, "path,label,x", lambda n, path, name: f"{path},{name},-"))
    folder = build(mine)
    assert table.name == "list" and (table.train_x, table.val) == (folder.train_x, folder.val)
    assert table.test == folder.test
    assert table.fingerprint["digest"] != folder.fingerprint["digest"]  # other paths


@pytest.mark.parametrize("words", [SPLITS, ("Train", "valid", "TEST")])
def test_csv_keeps_parts_and_numbers(mine, words):
    number = dict(zip(SIZES, (10, 9, -1), strict=True))
    path = write_csv(
        mine, "Split,label,path", lambda n, p, name: f"{words[n % 3]},{number[name]},{p}"
    )
    dataset = build(path)
    assert dataset.classnames == ["-1", "9", "10"] and counts(dataset) == [9, 9, 9]
    lines = path.read_text().splitlines()[3::3]
    images = [f"{mine.parent}/{line.split(',')[2]}" for line in lines]
    assert [item.impath for item in dataset.test] == images


def test_classnames_rename_items_and_digest(mine):
    names = mine.parent / "names.yaml"
    names.write_text("zoo_bar: bar in a zoo\na.b: no\n")
    plain, dataset = build(mine), build(mine, classnames=names)
    assert dataset.classnames == ["Käse Brot", "no", "bar in a zoo"]
    assert [i.impath for i in dataset.train_x] == [i.impath for i in plain.train_x]
    assert {i.classname for i in dataset.test} == set(dataset.classnames)
    assert dataset.fingerprint["digest"] != plain.fingerprint["digest"]
    assert dataset_fingerprint(str(mine), None, classnames=names) == dataset.fingerprint


def test_classnames_by_label_or_name(tmp_path):
    make_small_dataset("eurosat", tmp_path)
    (tmp_path / "names.yaml").write_text("0: fields\nForest: wood")
    dataset = build("eurosat", root=tmp_path, classnames=tmp_path / "names.yaml")
    assert dataset.classnames == ["fields", "wood", "Herbaceous Vegetation Land"]


def test_templates_are_texts_or_words(mine):
    for template in (["{} here.", "a {}"], ["a {}"]):
        assert build(mine, template=template).template == template
    assert build(mine, template=["dataset"]).template == [DEFAULT_TEMPLATE]
    assert len(set(build(mine, template="clip").template)) == 7
    make_small_dataset("oxford_pets", mine.parent)
    pets = build("oxford_pets", root=mine.parent, template=["dataset"])
    assert pets.template == ["a photo of a {}, a type of pet."]


# Bad input: what it concerns (beside folders a and b of six images), its content, and what the
# error must say, with {} for the folder. "csv" and "parts" have the right header.
REFUSED = [
    ("folder", "", "{} has no class folders (list.csv): sort"),
    ("folder", "a:6", "{} has one class: a task takes two or more"),
    ("folder", "in/a:6 in/b:6", "name {}/in as --dataset"),
    ("folder", "a:6 b:3", "no test images of the class 'b': add some, 4 if the class"),
    ("folder", "train/a:2 train/b:2 test/a:1 test/b:0", "no test images of the class 'b'"),
    ("folder", "train/a:2 train/b:2 test/a:1 test/c:1", "same class folders, but only some have b"),
    ("folder", "train/a:2 test/a:2 val/a:2 valid/a:2", "has the folders test, train, val, valid"),
    ("folder", "train/a:2 val/a:2", "{} has one class: a task takes two or more"),
    ("text", "file;label\na;b", "has the columns file, label: the first line must be path,label"),
    ("csv", "", "has no images: add them"),
    ("csv", "a/y.png,a\na/x.png,a\nb/0.png,b", "missing in {} (2 of 3 images)"),
    ("csv", "a/0.png", "line 2 of {}/list.csv needs a path, a label"),
    ("csv", '"a/0.png,a', "is not CSV"),
    ("csv", "/x,a\nb/0.png,b", "names /x, outside"),
    ("parts", "a/0.png,a,test\nb/0.png,b", "line 3 of {}/list.csv needs"),
    ("json", None, "there is no folder, .csv or .json {}/list.json: --dataset takes"),
    ("json", "[]", "list.json lacks a list named train, val or test"),
    ("classnames", None, "there is no file {}/list.csv: --classnames takes"),
    ("classnames", "A: x\nzzz: y", "names 'A' (did you mean 'a'?), 'zzz', which is no class of {}"),
    ("classnames", "a:", "is not made of lines like 'folder: name for the prompt': a: "),
    ("classnames", "a: [", "is not YAML"),
    ("template", ["a photo"], "the template 'a photo' must have {{}} exactly"),
    ("template", ["a {}", "{x} {}", "{} {}"], "'{{x}} {{}}', '{{}} {{}}' must have {{}} exactly"),
    ("template", [], "the template is empty and must have"),
]
HEADERS = {"json": "", "text": "", "csv": "path,label\n", "parts": "path,label,split\n"}


@pytest.mark.parametrize("what, content, message", REFUSED)
def test_bad_input_is_refused(tmp_path, what, content, message):
    sizes = [pair.split(":") for pair in (content if what == "folder" else "a:6 b:6").split()]
    write_class_folders(tmp_path, {name: int(count) for name, count in sizes})
    file = tmp_path / ("list.json" if what == "json" else "list.csv")
    options = {"name": file if what in HEADERS else tmp_path}
    if what in ("classnames", "template"):
        options[what] = content if what == "template" else file
    if isinstance(content, str):
        file.write_text(HEADERS.get(what, "") + content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        build(**options)
    assert message.format(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
