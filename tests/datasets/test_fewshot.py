"""Lists of images in place of a draw: a run's own, those of other code, those of the public."""

import json
import random
import re

import pytest
from dataset_helpers import change_split, make_small_dataset, write_image

from datasets import build_dataset, dump_fewshot_split

KEYS = ("impath", "label", "classname")


def build(root, seed=1, **options):
    random.seed(seed)
    return build_dataset("dtd", root, options.pop("shots", 2), **options)


@pytest.fixture
def root(tmp_path):
    """DTD of five classes, and its draw with another seed as a list."""
    make_small_dataset("dtd", tmp_path, classes=5, per_class=10)
    (tmp_path / "few.json").write_text(dump_fewshot_split(build(tmp_path, seed=3)))
    return tmp_path


@pytest.mark.parametrize("prefix, keys", [("", None), ("/their/", KEYS), ("D:\\images\\", None)])
def test_json_list_replaces_draw(root, capsys, prefix, keys):
    few = json.loads((root / "few.json").read_text())
    for part in few:
        entries = [[prefix + path, label, name] for path, label, name in few[part]]
        few[part] = [dict(zip(keys, e, strict=True)) for e in entries] if keys else entries
    (root / "few.json").write_text(json.dumps(few))
    expected = build(root, seed=3)
    capsys.readouterr()
    assert build(root, fewshot_split=root / "few.json") == expected
    assert random.getstate() == random.Random(1).getstate()
    assert "few.json" not in capsys.readouterr().err
    build(root, shots=1, fewshot_split=root / "few.json")
    assert "few.json has 10 training images for 5 classes, not 1 for" in capsys.readouterr().err


@pytest.fixture
def pair(root):
    """The same list as 2SFS has it: two files, one JSON object a line."""
    few = json.loads((root / "few.json").read_text())
    files = {}
    for part, entries in few.items():
        lines = [
            json.dumps(dict(zip(KEYS, (f"/them/dtd/images/{path}", label, name), strict=True)))
            for path, label, name in entries
        ]
        files[part] = root / f"shot_2-seed_3_{part}.jsonl"
        files[part].write_text("\n".join([*lines, ""]))
    return files


def test_jsonl_pair_replaces_draw(root, pair):
    expected = build(root, seed=3)
    for file in pair.values():
        assert build(root, fewshot_split=file) == expected
    for file in pair.values():
        file.unlink()
        with pytest.raises(ValueError, match="there is no file .*jsonl: --fewshot_split"):
            build(root, fewshot_split=pair["val"])


@pytest.mark.parametrize(
    "part, content, message",
    [
        ("train", "{", "line 1 of .*shot_2-seed_3_train.jsonl, '{', is not"),
        ("val", '\n{"impath": "x"}', r"entries in val that are not .*'x', None"),
        ("train", "", "no list of images named train"),
    ],
)
def test_broken_jsonl_is_named(root, pair, part, content, message):
    pair[part].write_text(content)
    with pytest.raises(ValueError, match=message):
        build(root, fewshot_split=pair["val"])


def test_path_may_lack_first_folders(root):
    image = json.loads((root / "few.json").read_text())["train"][0]
    entry = [image[0].split("/")[-1], *image[1:]]
    (root / "few.json").write_text(json.dumps({"train": [entry], "val": []}))
    (item,) = build(root, fewshot_split=root / "few.json").train_x
    assert item.impath.endswith(f"/images/{image[0]}")


def test_ambiguous_path_is_refused(root):
    (root / "dtd/images/banded/more").mkdir()
    write_image(root / "dtd/images/banded/more/banded_0000.jpg", 0, 0)
    entry = ["banded/more/banded_0000.jpg", 0, "banded"]
    change_split(root / "dtd", lambda split: split["train"].append(entry))
    (root / "few.json").write_text(
        json.dumps({"train": [["banded_0000.jpg", 0, "banded"]], "val": []})
    )
    with pytest.raises(ValueError, match="the image banded_0000.jpg, which several images have"):
        build(root, fewshot_split=root / "few.json")


@pytest.mark.parametrize("subsample", ["base", "new"])
def test_list_serves_a_half(root, subsample):
    everything, half = (build(root, seed=5, subsample=s) for s in ("all", subsample))
    for writer in (everything, half):
        (root / "few.json").write_text(dump_fewshot_split(writer))
        read = build(root, subsample=subsample, fewshot_split=root / "few.json")
        labels = range(3) if subsample == "base" else range(2)
        assert sorted(item.label for item in read.train_x) == [i for i in labels for _ in "ab"]
        images = {item.impath for item in writer.train_x}
        assert {item.impath for item in read.train_x} <= images
        assert read.classnames == half.classnames


def test_list_with_new_class_names(root):
    (root / "names.yaml").write_text("banded: with_bands\n")
    options = {"fewshot_split": root / "few.json", "classnames": root / "names.yaml"}
    renamed = build(root, **options)
    assert {i.classname for i in renamed.train_x if i.label == 0} == {"with_bands"}
    (root / "few.json").write_text(dump_fewshot_split(renamed))
    assert build(root, **options) == renamed


BANDED = "banded/banded_0000.jpg"
REFUSED = {
    "no file": (None, "there is no file {}: --fewshot_split takes"),
    "not JSON": ("path,label", "{} is not JSON"),
    "pickle": (b"\x80\x04", "{} is not UTF-8 text"),
    "no images": ({"train": [], "val": []}, "{} has no list of images named train"),
    "no val": ({"train": [[BANDED, 0, "banded"]]}, "{} has no list of images named val"),
    "label": ([BANDED, "0", "banded"], "{} has entries in train that are not"),
    "image": (["banded/7.jpg", 0, "banded"], "{} names the image banded/7.jpg, which is not"),
    "other class": ([BANDED, 0, "lined"], "gives {image} the label 0 and the class 'lined', which"),
    "other label": ([BANDED, 1, "banded"], "gives {image} the label 1 and the class 'banded'"),
    "test image": (["banded/banded_0009.jpg", 0, "banded"], "which is not a training image in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unfit_list_is_refused(root, case):
    content, message = REFUSED[case]
    path = root / "list.json"
    if isinstance(content, list):
        content = {"train": [content], "val": []}
    if isinstance(content, dict):
        content = json.dumps(content)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = message.replace("{image}", BANDED).replace("{}", str(path))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build(root, fewshot_split=path)
    assert "\n" not in str(caught.value)
