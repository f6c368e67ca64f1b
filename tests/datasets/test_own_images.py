"""Own images as people have them: what is left out, named twice, or written otherwise."""

import json
import random
import shutil
import unicodedata

import numpy as np
import pytest
from dataset_helpers import write_image
from PIL import Image

from datasets import build_dataset, build_test_dataset, dataset_fingerprint, dump_fewshot_split
from datasets.__main__ import main as check
from datasets.readers import split_trainvaltest


def write_folder(folder, names="cat dog", count=6, extension=".jpg"):
    for label, name in enumerate(names.split()):
        for index in range(count):
            write_image(folder / name / f"{index}{extension}", label, index)
    return folder


def build(path, **options):
    random.seed(1)
    return build_dataset(str(path), None, 2, **options)


def refusal(path, **options):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        build(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_list(folder, rows, header="path,label", sep=",", encoding="utf-8", name="list.csv"):
    lines = [header.replace(",", sep), *(sep.join(map(str, row)) for row in rows)]
    (folder / name).write_text("\n".join(lines), encoding=encoding)
    return folder / name


def rows(names="cat dog", count=6):
    return [(f"{name}/{i}.jpg", name) for name in names.split() for i in range(count)]


IGNORED = {
    "HEIC": (lambda f: f.with_suffix(".HEIC").write_bytes(b"\0\0\0\x18ftypheic"), "convert"),
    "DICOM": (lambda f: f.with_suffix("").write_bytes(b"\0" * 128 + b"DICM"), "convert to 16"),
    "links that lead nowhere": (lambda f: f.symlink_to("annex"), "`dvc pull` or `git annex get`"),
    "images in folders": (lambda f: write_image(f.parent / "2024/x.jpg", 0, 0), "move them up"),
    ".npy files": (lambda f: f.with_suffix(".npy").write_bytes(b"\x93NUMPY"), ""),
    "images beside": (lambda f: write_image(f.parents[1] / "x.jpg", 0, 0), "into a class folder"),
}


@pytest.mark.parametrize("kind", IGNORED)
def test_ignored_files_are_named(tmp_path, capsys, kind):
    write, remedy = IGNORED[kind]
    write(write_folder(tmp_path) / "cat/extra.jpg")
    assert build(tmp_path).fingerprint["train"] == 6
    err = capsys.readouterr().err
    assert "not taken: 1 " in err and kind in err and remedy in err
    assert check(["--dataset", str(tmp_path)]) == 0
    assert f"{kind}" in capsys.readouterr().out
    for image in (tmp_path / "cat").glob("[0-9].jpg"):
        image.unlink()
    assert "no training images of the class 'cat'" in refusal(tmp_path)
    assert kind in refusal(tmp_path)


@pytest.mark.parametrize("extension", [".jfif", ".jpe", ".JPE", "", ".image"])
def test_images_are_taken_by_content(tmp_path, capsys, extension):
    write_folder(tmp_path, extension=extension)
    for name in "cat", "dog":
        Image.new("RGB", (8, 8)).save(tmp_path / name / "moving.gif")
    assert len(build_test_dataset(str(tmp_path), None).test) == 14
    assert "not taken" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "part, path, name", [("test", "cat/0.jpg", "cat"), ("train", "./cat/0.jpg", "dog")]
)
def test_path_in_two_places_is_refused(tmp_path, part, path, name):
    entries = [(*row, "train") for row in rows()] + [(path, name, part)]
    file = write_list(write_folder(tmp_path), entries, "path,label,split")
    assert f"cat/0.jpg twice, in train as cat and in {part} as {name}" in refusal(file)
    cats = [[path, 0, "cat"] for path, _ in rows("cat")]
    (tmp_path / "split.json").write_text(json.dumps({"train": cats, "val": [], "test": cats}))
    assert "twice, in train as" in refusal(tmp_path / "split.json")


def test_repeated_lines_are_dropped(tmp_path, capsys):
    once = build(write_list(write_folder(tmp_path), rows()))
    twice = build(write_list(tmp_path, rows() * 2))
    assert twice == once and "12 repeated lines of" in capsys.readouterr().err


def test_list_shares_no_image(tmp_path):
    few = json.loads(dump_fewshot_split(build(write_folder(tmp_path))))
    few["val"] = few["train"]
    (tmp_path / "few.json").write_text(json.dumps(few))
    assert "in train and in val" in refusal(tmp_path, fewshot_split=tmp_path / "few.json")


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
    for subsample in "base", "new":
        assert "takes four or more" in refusal(tmp_path, subsample=subsample)


def test_names_are_compared_in_nfc(tmp_path, capsys):
    nfd = unicodedata.normalize("NFD", "Grünfink Käuzchen")
    write_folder(tmp_path / "mac", nfd)
    write_folder(tmp_path / "linux", "Grünfink Käuzchen")
    names = tmp_path / "names.yaml"
    names.write_text(f"Grünfink: greenfinch\n{nfd.split()[1]}: owl")
    mac, linux = (build(tmp_path / name, classnames=names) for name in ("mac", "linux"))
    assert mac.classnames == linux.classnames == ["greenfinch", "owl"]
    assert mac.fingerprint == linux.fingerprint
    table = build(write_list(tmp_path / "mac", rows("Grünfink Käuzchen")))
    assert table.classnames == ["Grünfink", "Käuzchen"]
    (tmp_path / "few.json").write_text(dump_fewshot_split(build(tmp_path / "linux")))
    assert len(build(tmp_path / "mac", fewshot_split=tmp_path / "few.json").train_x) == 4
    write_folder(tmp_path / "mac", "Grünfink")
    capsys.readouterr()
    assert len(build_test_dataset(str(tmp_path / "mac"), None).test) == 18
    assert "there twice, in both of Unicode's forms" in capsys.readouterr().err


def test_gray_range_is_of_dataset(tmp_path, capsys):
    for label, name in enumerate("ab"):
        for index in range(6):
            (tmp_path / name).mkdir(exist_ok=True)
            values = np.full((8, 8), 600 * label + 500 * index, np.uint16)
            Image.fromarray(values).save(tmp_path / name / f"{index}.png")
    dataset = build(tmp_path)
    assert {item.gray_range for item in dataset.train_x + dataset.test} == {(0, 4095)}
    assert json.loads(dump_fewshot_split(dataset))["gray_range"] == [0, 4095]
    assert "values from 0 to 4095 are scaled" in capsys.readouterr().err
    check(["--dataset", str(tmp_path)])
    assert "values from 0 to 4095 are scaled" in capsys.readouterr().err


@pytest.mark.parametrize("sep, first", [(";", ""), ("\t", ""), (";", "sep=;\n")])
def test_separators_are_read(tmp_path, sep, first):
    expected = build(write_list(write_folder(tmp_path), rows()))
    path = write_list(tmp_path, rows(), first + "path,label", sep)
    assert build(path) == expected
    assert build(path.rename(tmp_path / "list.tsv")).test == expected.test


def test_absolute_paths_are_accepted(tmp_path):
    expected = build(write_list(write_folder(tmp_path), rows()))
    absolute = [(tmp_path / path, name) for path, name in rows()]
    assert build(write_list(tmp_path, absolute)) == expected


DECIMALS = [(path, float(name == "cat")) for path, name in rows()]
REFUSED_LISTS = {
    "cp1252": ([("a/ü.jpg", "ü")], {"encoding": "cp1252"}, "save it as UTF-8"),
    "UTF-16": (rows(), {"encoding": "utf-16"}, "save it as UTF-8"),
    "URL": ([("https://a.b/c.jpg", "cat")], {}, "names the URL https://a.b/c.jpg: download"),
    "decimals": (DECIMALS, {}, "labels 0.0, 1.0, as pandas"),
    "jsonl": (rows(), {"name": "list.jsonl"}, "there is no folder, .csv or .json"),
    "pkl": (rows(), {"name": "list.pkl"}, "there is no folder, .csv or .json"),
}


@pytest.mark.parametrize("kind", REFUSED_LISTS)
def test_list_is_refused_with_remedy(tmp_path, kind):
    entries, options, message = REFUSED_LISTS[kind]
    assert message in refusal(write_list(write_folder(tmp_path), entries, **options))


@pytest.mark.parametrize(
    "train, test", [("Training", "Testing"), ("training_set", "test_set"), ("train", "val")]
)
def test_parts_have_other_names(tmp_path, train, test):
    write_folder(tmp_path / train)
    write_folder(tmp_path / test)
    dataset = build(tmp_path)
    assert [dataset.fingerprint[part] for part in ("train", "val", "test")] == [10, 2, 12]
    assert all(f"/{test}/" in item.impath for item in dataset.test)


def test_one_more_file_moves_borders():
    def parts(images):
        split = split_trainvaltest("list", [(image, 0, "cat") for image in images], {0: "cat"})
        return [{path for path, _, _ in part} for part in (split.train, split.val, split.test)]

    images = [f"cat/{index}.jpg" for index in range(40)]
    before, after = parts(images), parts([*images, "cat/x.jpg"])
    assert before == parts(images[::-1])
    for old, new in zip(before, after, strict=True):
        assert len(old - new) <= 1 and len(new - old - {"cat/x.jpg"}) <= 1
