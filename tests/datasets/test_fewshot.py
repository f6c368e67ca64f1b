"""Lists of images in place of a draw: a run's own, those of other code, those of the public."""

import json
import random
import re

import pytest
from dataset_helpers import make_small_dataset

from datasets import build_dataset, dump_fewshot_split

KEYS = ("impath", "label", "classname")


def build(root, seed=1, **options):
    random.seed(seed)
    return build_dataset("dtd", root, 2, **options)


@pytest.fixture
def root(tmp_path):
    """DTD of five classes, and its draw with another seed as a list."""
    make_small_dataset("dtd", tmp_path, classes=5, per_class=10)
    (tmp_path / "few.json").write_text(dump_fewshot_split(build(tmp_path, seed=3)))
    return tmp_path


@pytest.mark.parametrize("prefix, keys", [("", None), ("/their/", KEYS), ("D:\\images\\", None)])
def test_json_list_replaces_draw(root, prefix, keys):
    few = json.loads((root / "few.json").read_text())
    for part in few:
        entries = [[prefix + path, label, name] for path, label, name in few[part]]
        few[part] = [dict(zip(keys, e, strict=True)) for e in entries] if keys else entries
    (root / "few.json").write_text(json.dumps(few))
    expected = build(root, seed=3)
    assert build(root, fewshot_split=root / "few.json") == expected
    assert random.getstate() == random.Random(1).getstate()


@pytest.fixture
def pair(root):
    """The same list as 2SFS has it: two files, one JSON object a line."""
    few, files = json.loads((root / "few.json").read_text()), {}
    for part, entries in few.items():
        rows = [(f"/them/dtd/images/{path}", *rest) for path, *rest in entries]
        lines = [json.dumps(dict(zip(KEYS, row, strict=True))) for row in rows]
        files[part] = root / f"shot_2-seed_3_{part}.jsonl"
        files[part].write_text("\n".join([*lines, ""]))
    return files


def test_jsonl_pair_replaces_draw(root, pair):
    for file in pair.values():
        assert build(root, fewshot_split=file) == build(root, seed=3)
    single = pair["train"].rename(root / "few.jsonl")
    with pytest.raises(ValueError, match="few.jsonl is not one of a pair"):
        build(root, fewshot_split=single)
    with pytest.raises(ValueError, match="no file .*shot_2-seed_3_train.jsonl: .* needs both"):
        build(root, fewshot_split=pair["val"])


@pytest.mark.parametrize(
    "part, content, message",
    [
        ("train", "{", "line 1 of .*shot_2-seed_3_train.jsonl, '{', is no"),
        ("val", '\n{"impath": "x"}', r"entries in val that are not .*'x', None"),
    ],
)
def test_broken_jsonl_is_named(root, pair, part, content, message):
    pair[part].write_text(content)
    with pytest.raises(ValueError, match=message):
        build(root, fewshot_split=pair["val"])


@pytest.mark.parametrize("subsample", ["base", "new"])
def test_list_serves_a_half(root, subsample):
    everything, half = (build(root, seed=5, subsample=s) for s in ("all", subsample))
    for writer in (everything, half):
        (root / "few.json").write_text(dump_fewshot_split(writer))
        read = build(root, subsample=subsample, fewshot_split=root / "few.json")
        labels = range(3) if subsample == "base" else range(2)
        assert sorted(item.label for item in read.train_x) == [i for i in labels for _ in "ab"]
        assert {item.impath for item in read.train_x} <= {item.impath for item in writer.train_x}
        assert read.classnames == half.classnames


FORM = '--fewshot_split takes UTF-8 text of the form {{"train": ['
IMAGE = ["banded/banded_0000.jpg", 0, "banded"]
REFUSED = {
    "no file": (None, "there is no file {}: " + FORM),
    "not JSON": (b"path,label", "line 1 column 1 (char 0)): " + FORM),
    "pickle": (b"\x80\x04", "invalid start byte): " + FORM),
    "no images": ({"train": [], "val": []}, "{} has no training images"),
    "no val": ({"train": [IMAGE]}, "{} lacks a list named val: " + FORM),
    "twice": ({"train": [IMAGE], "val": [IMAGE]}, "banded_0000.jpg in train and in val"),
    "image": (["banded/7.jpg", 0, "banded"], "{} names banded/7.jpg, no training image of"),
    "other label": ([IMAGE[0], 1, "banded"], "gives banded/banded_0000.jpg the label 1, which"),
    "test image": (["banded/banded_0009.jpg", 0, "banded"], "no training image of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unfit_list_is_refused(root, case):
    content, message = REFUSED[case]
    path = root / "list.json"
    if isinstance(content, list):
        content = {"train": [content], "val": []}
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=re.escape(message.format(path))) as caught:
        build(root, fewshot_split=path)
    assert "\n" not in str(caught.value)
