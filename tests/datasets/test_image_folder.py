"""A user's own images: folders, CSV and JSON files; class names and prompts."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import SPLITS, make_small_dataset, write_image
from PIL import Image

from datasets import (
    build_dataset,
    build_test_dataset,
    dataset_fingerprint,
    dataset_name,
    dump_fewshot_split,
    get_dataset_info,
)
from datasets.__main__ import main as check
from datasets.base import DEFAULT_TEMPLATE
from datasets.readers import split_trainvaltest

SIZES = {"Käse Brot": 12, "a.b": 10, "zoo_bar": 5}


def write_class_folders(folder, sizes, extensions=(".png", ".JPG", ".jpeg", ".WebP")):
    """Write class folders of some images each."""
    for label, (name, count) in enumerate(sizes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            extension = extensions[index % len(extensions)]
            write_image(folder / name / f"{index}{extension}", label, index)
    return folder


def write_folder(folder, names="cat dog", extension=".jpg"):
    return write_class_folders(folder, dict.fromkeys(names.split(), 6), [extension])


def write_list(folder, rows, header="path,label", sep=","):
    lines = [header.replace(",", sep), *(sep.join(map(str, row)) for row in rows)]
    (folder / "list.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    return folder / "list.csv"


def rows(folder):
    """A row for each image of class folders: its path from the folder above, and its class."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder.parent)), path.parent.name) for path in files]


def build(name, shots=2, root=None, **options):
    random.seed(1)
    return build_dataset(str(name), root, shots, **options)


def refusal(name, **options):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        build(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def counts(dataset):
    return [dataset.fingerprint[part] for part in SPLITS]


@pytest.fixture
def photos(tmp_path):
    """A folder of class folders."""
    return write_class_folders(tmp_path / "mine", SIZES)


def test_folder_is_divided_by_class(photos):
    before = sorted(photos.parent.rglob("*"))
    dataset = build(photos)
    assert dataset.name == "mine" and dataset.classnames == sorted(SIZES)
    assert dataset.fingerprint["split"] == "own" and dataset.template == [DEFAULT_TEMPLATE]
    assert counts(dataset) == [6 + 5 + 2, 2 + 2 + 1, 4 + 3 + 2]
    for item in dataset.train_x + dataset.val + dataset.test:
        assert Path(item.impath).is_file() and Path(item.impath).parent.name == item.classname
    assert dataset_fingerprint(str(photos), None) == dataset.fingerprint
    assert build(photos) == dataset and sorted(photos.parent.rglob("*")) == before


@pytest.mark.parametrize("form", ["folder", "json"])
def test_own_images_are_drawn_alike(tmp_path, form):
    folder = make_small_dataset("dtd", tmp_path, split=form == "json", per_class=20)
    path = folder / "images"
    if form == "json":
        path /= "my.json"
        shutil.copy(folder / "split_zhou_DescribableTextures.json", path)
    known, own = build("dtd", 3, root=tmp_path), build(path, 3)
    assert (own.train_x, own.val, own.test) == (known.train_x, known.val, known.test)
    assert own.fingerprint == {**known.fingerprint, "split": "own"}
    assert own.name == {"folder": "images", "json": "my"}[form]


@pytest.mark.parametrize(
    "train, val, test",
    [
        ("Train", None, "test"),
        ("train", "Val", "TEST"),
        ("Training", "valid", "Testing"),
        ("training_set", "validation", "test_set"),
        ("train", None, "val"),  # as in imagenette
    ],
)
def test_folders_of_parts_are_kept(tmp_path, train, val, test):
    for part in filter(None, (train, val, test)):
        write_class_folders(tmp_path / part, {"10": 10, "9": 5, "1": 2})
    dataset = build(tmp_path)
    assert counts(dataset) == ([17, 17, 17] if val else [14, 3, 17])
    assert dataset.classnames == ["1", "9", "10"]  # as numbers
    for items, folder in ((dataset.test, test), (dataset.val, val or train)):
        assert all(f"/{folder}/" in item.impath for item in items)
    assert not {i.impath for i in dataset.train_x} & {i.impath for i in dataset.val}


def test_known_name_wins_over_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_class_folders(tmp_path / "dtd", {"a": 4, "b": 4})
    with pytest.raises(ValueError, match="dtd: needs --root_path"):
        dataset_fingerprint("dtd", None)
    for name in ("./dtd", "dtd/", "~/dtd", f"{tmp_path}/dtd"):
        assert dataset_fingerprint(name, None)["split"] == "own" and dataset_name(name) == "dtd"
    (tmp_path / "dtd").rename(tmp_path / "my.set")
    get_dataset_info("my.set")
    with pytest.raises(ValueError, match="no folder, .csv or .json .*my.set/a/0.png"):
        get_dataset_info("my.set/a/0.png")
    assert dataset_name("my.set") == "my.set" and dataset_name("x/some.csv") == "some"


@pytest.mark.parametrize("sep, first", [(",", ""), (";", ""), ("\t", ""), (";", "sep=;\n")])
@pytest.mark.parametrize("absolute", [False, True])
def test_csv_is_divided_as_folder(photos, sep, first, absolute):
    lines = [(photos.parent / path if absolute else path, name) for path, name in rows(photos)]
    table = build(write_list(photos.parent, lines, f"{first}path,label", sep))
    folder = build(photos)
    assert table.name == "list" and (table.train_x, table.val) == (folder.train_x, folder.val)
    assert table.test == folder.test
    assert table.fingerprint["digest"] != folder.fingerprint["digest"]  # other paths


@pytest.mark.parametrize("words", [SPLITS, ("Train", "valid", "TEST")])
def test_csv_keeps_parts_and_numbers(photos, words):
    number = dict(zip(SIZES, (10, 9, -1), strict=True))
    table = [(words[n % 3], number[name], path) for n, (path, name) in enumerate(rows(photos))]
    dataset = build(write_list(photos.parent, table, "Split,label,path"))
    assert dataset.classnames == ["-1", "9", "10"] and counts(dataset) == [9, 9, 9]
    images = [f"{photos.parent}/{path}" for _, _, path in table[2::3]]
    assert [item.impath for item in dataset.test] == images


def test_classnames_rename_items_and_digest(photos):
    names = photos.parent / "names.yaml"
    names.write_text("zoo_bar: bar in a zoo\na.b: no\n0: cheese\n")  # by name or label
    plain, dataset = build(photos), build(photos, classnames=names)
    assert dataset.classnames == ["cheese", "no", "bar in a zoo"]
    assert [i.impath for i in dataset.train_x] == [i.impath for i in plain.train_x]
    assert {i.classname for i in dataset.test} == set(dataset.classnames)
    assert dataset.fingerprint["digest"] != plain.fingerprint["digest"]
    assert dataset_fingerprint(str(photos), None, classnames=names) == dataset.fingerprint


def test_templates_are_texts_or_words(photos):
    for template in (["{} here.", "a {}"], ["a {}"]):
        assert build(photos, template=template).template == template
    assert build(photos, template=["dataset"]).template == [DEFAULT_TEMPLATE]
    assert len(set(build(photos, template="clip").template)) == 7
    make_small_dataset("oxford_pets", photos.parent)
    pets = build("oxford_pets", root=photos.parent, template=["dataset"])
    assert pets.template == ["a photo of a {}, a type of pet."]


# Bad input: what it concerns (next to folders a and b of six images), its content, and what the
# error must say, with {} for the folder. "csv" and "parts" have the right header.
REFUSED = [
    ("folder", "", "{} has no class folders (list.csv): sort"),
    ("folder", "a:6", "{} has one class: a task takes two or more"),
    ("folder", "in/a:6 in/b:6", "has one class: a task takes two or more (are they in {}/in?)"),
    ("folder", "a:6 b:3", "no test images of the class 'b': add some, 4 if the class"),
    ("folder", "train/a:2 train/b:2 test/a:1 test/b:0", "no test images of the class 'b'"),
    ("folder", "train/a:2 train/b:2 test/a:1 test/c:1", "no training images of the class 'c'"),
    ("text", "file;label\na;b", "has the columns file, label: it needs path,label"),
    ("text", "path,label\nü,ü".encode("cp1252"), "save it as UTF-8"),
    ("text", "path,label\nü,ü".encode("utf-16"), "save it as UTF-8"),
    ("csv", "", "has no images: add them"),
    ("csv", "a/y.png,a\na/x.png,a\nb/0.png,b", "missing in {} (2 of 3 images)"),
    ("csv", "a/0.png", "line 2 of {}/list.csv needs a path, a label"),
    ("csv", "/x,a\nb/0.png,b", "names /x, outside"),
    ("csv", "https://a.b/c.jpg,a", "names the URL https://a.b/c.jpg: download"),
    ("csv", "a/0.png,0.0\nb/0.png,1.0", "labels 0.0, 1.0, as pandas writes numbers"),
    ("parts", "a/0.png,a,test\nb/0.png,b", "line 3 of {}/list.csv needs"),
    ("parts", "a/0.png,a,train\na/0.png,a,test", "a/0.png twice, in train as a and in test as a"),
    ("csv", "a/0.png,a\n./a/0.png,b", "a/0.png twice, in train as a and in train as b"),
    ("json", None, "there is no folder, .csv or .json {}/list.json: --dataset takes"),
    ("json", "[]", "list.json lacks a list named train: save it as UTF-8, in the form {{"),
    ("json", "ü".encode("cp1252"), "invalid start byte): save it as UTF-8"),
    ("json", '{"train": [["a/0.png", 0, "a"]], "val": [], "test": [["a/0.png", 0, "a"]]}', "twice"),
    ("classnames", None, "there is no file {}/list.csv: --classnames takes"),
    ("classnames", "A: x\nzzz: y", "names 'A' (did you mean 'a'?), 'zzz', no class of {}"),
    ("classnames", "a:", "is not made of lines like 'folder: name for the prompt': [('a', '')]"),
    ("classnames", "a: [", "is not YAML"),
    ("classnames", "a: ü".encode("cp1252"), "invalid start byte): save it as UTF-8"),
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
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, str):
        file.write_text(HEADERS.get(what, "") + content)
    assert message.format(tmp_path) in refusal(**options)


IGNORED = {
    "HEIC": (lambda f: f.with_suffix(".HEIC").write_bytes(b"\0\0\0\x18ftypheic"), "convert"),
    "DICOM": (lambda f: f.with_suffix("").write_bytes(b"\0" * 128 + b"DICM"), "convert to 16"),
    "links that lead nowhere": (lambda f: f.symlink_to("annex"), "`dvc pull` or `git annex get`"),
    "images in folders": (lambda f: write_image(f.parent / "2024/x.jpg", 0, 0), "move them up"),
    ".npy files": (lambda f: (f.parents[1] / "x.npy").write_bytes(b"\x93NUMPY"), "(x.npy)"),
    "images outside": (lambda f: write_image(f.parents[1] / "x.jpg", 0, 0), "into a class folder"),
}


@pytest.mark.parametrize("kind", IGNORED)
def test_ignored_files_are_named(tmp_path, capsys, kind):
    write, remedy = IGNORED[kind]
    write(write_folder(tmp_path) / "cat/extra.jpg")
    assert counts(build(tmp_path))[0] == 6
    err = capsys.readouterr().err
    assert "not taken: 1 " in err and kind in err and remedy in err
    assert check(["--dataset", str(tmp_path)]) == 0
    assert kind in capsys.readouterr().out
    for image in (tmp_path / "cat").glob("[0-9].jpg"):
        image.unlink()
    error = refusal(tmp_path)
    assert "no training images of the class 'cat'" in error and kind in error


def test_files_beside_parts_are_named(tmp_path, capsys):
    for part in ("train", "test"):
        write_folder(tmp_path / part)
    (tmp_path / "val").symlink_to("annex")
    write_image(tmp_path / "x.jpg", 0, 0)
    (tmp_path / "test/y.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert counts(build(tmp_path)) == [10, 2, 12]
    err = capsys.readouterr().err
    for message in ("nowhere (val): run", "class folders (x.jpg): move", "(test/y.heic): convert"):
        assert message in err


@pytest.mark.parametrize("extension", [".jfif", ".JPE", "", ".image"])
def test_images_are_taken_by_content(tmp_path, capsys, extension):
    write_folder(tmp_path, extension=extension)
    Image.new("RGB", (8, 8)).save(tmp_path / "cat/moving.gif")
    assert len(build_test_dataset(str(tmp_path), None).test) == 13
    assert "not taken" not in capsys.readouterr().err


def test_repeated_lines_are_dropped(photos, capsys):
    once = build(write_list(photos.parent, rows(photos)))
    twice = build(write_list(photos.parent, rows(photos) * 2))
    assert twice == once and "27 repeated lines of" in capsys.readouterr().err


def test_checker_lists_equal_images(tmp_path, capsys):
    write_folder(tmp_path)
    assert check(["--dataset", str(tmp_path), "--decode"]) == 0
    assert "cat: 3 train, 1 val, 2 test" in capsys.readouterr().out
    shutil.copy(tmp_path / "cat/0.jpg", tmp_path / "dog/copy.jpg")
    assert check(["--dataset", str(tmp_path), "--decode"]) == 1
    out = capsys.readouterr().out
    assert "equal images" in out and "cat/0.jpg (" in out and " = dog/copy.jpg (" in out


def test_target_has_all_images(tmp_path):
    assert len(build_test_dataset(str(write_folder(tmp_path / "a")), None).test) == 12
    only_test = tmp_path / "b"
    write_folder(only_test / "test")
    target = build_test_dataset(str(only_test), None)
    assert len(target.test) == 12 and not target.train_x
    assert target.fingerprint == dataset_fingerprint(str(only_test), None, test_only=True)
    assert "no training images of the class 'cat', 'dog'" in refusal(only_test)
    write_folder(only_test / "train")
    assert len(build_test_dataset(str(only_test), None).test) == 12


def test_half_of_one_class_is_refused(tmp_path):
    write_folder(tmp_path, "ape cat dog")
    assert "3 classes: --subsample takes four or more" in refusal(tmp_path, subsample="base")


def test_names_are_compared_in_nfc(tmp_path, capsys):
    nfd = unicodedata.normalize("NFD", "Grünfink Käuzchen")
    write_folder(tmp_path / "mac", nfd)
    write_folder(tmp_path / "linux", "Grünfink Käuzchen")
    names = tmp_path / "names.yaml"
    names.write_text(f"Grünfink: greenfinch\n{nfd.split()[1]}: owl")
    mac, linux = (build(tmp_path / name, classnames=names) for name in ("mac", "linux"))
    assert mac.classnames == linux.classnames == ["greenfinch", "owl"]
    assert mac.fingerprint == linux.fingerprint
    paths = [(f"{name}/{i}.jpg", name) for name in ("Grünfink", "Käuzchen") for i in range(6)]
    assert build(write_list(tmp_path / "mac", paths)).classnames == ["Grünfink", "Käuzchen"]
    (tmp_path / "few.json").write_text(dump_fewshot_split(build(tmp_path / "linux")))
    assert len(build(tmp_path / "mac", fewshot_split=tmp_path / "few.json").train_x) == 4
    write_folder(tmp_path / "mac", "Grünfink")
    capsys.readouterr()
    assert len(build_test_dataset(str(tmp_path / "mac"), None).test) == 18
    assert "there twice, in both of Unicode's forms" in capsys.readouterr().err


def test_gray_range_is_of_dataset(tmp_path, capsys):
    for label, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for index in range(6):
            values = np.full((8, 8), 600 * label + 500 * index, np.uint16)
            Image.fromarray(values).save(tmp_path / name / f"{index}.png")
    dataset = build(tmp_path)
    assert {item.gray_range for item in dataset.train_x + dataset.test} == {(0, 4095)}
    assert json.loads(dump_fewshot_split(dataset))["gray_range"] == [0, 4095]
    assert "values from 0 to 4095 are scaled" in capsys.readouterr().err
    check(["--dataset", str(tmp_path)])
    assert "values from 0 to 4095 are scaled" in capsys.readouterr().out


def test_one_more_file_moves_borders():
    def parts(images):
        split = split_trainvaltest("list", [(image, 0, "cat") for image in images], {0: "cat"})
        return [{path for path, _, _ in part} for part in (split.train, split.val, split.test)]

    images = [f"cat/{index}.jpg" for index in range(40)]
    before, after = parts(images), parts([*images, "cat/x.jpg"])
    assert before == parts(images[::-1])
    for old, new in zip(before, after, strict=True):
        assert len(old - new) <= 1 and len(new - old - {"cat/x.jpg"}) <= 1
