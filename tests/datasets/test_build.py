"""`build_dataset`: the catalog, the few-shot draw, and what distinguishes one set of data."""

import json
import os
import random
import re
from dataclasses import replace

import pytest
from dataset_helpers import ELEVEN, LAYOUTS, ROOT, SPLITS, change_split, make_small_dataset

from datasets import DATASETS, build_dataset, dataset_fingerprint, get_dataset_info
from datasets.base import find_dataset_dir
from datasets.splits import read_split


@pytest.fixture(scope="module", params=["coop", "lora"])
def complete(request, tmp_path_factory):
    """Small copies of all datasets, in one of the two conventions: their root, and its name."""
    root = tmp_path_factory.mktemp(request.param)
    for name in LAYOUTS:
        make_small_dataset(name, root, request.param)
    return root, request.param


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_md_describes_each_row(name):
    assert tuple(DATASETS) == tuple(LAYOUTS)
    info, text = DATASETS[name], (ROOT / "DATASETS.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S))
    titles = [info.title for info in DATASETS.values()]
    assert [title for title in sections if title in titles] == titles
    section = sections[info.title]
    facts = [*info.dataset_dirs, info.split_file or "", f"`{name}`", "https://"]
    facts += [f"{count:,}" for count in (info.num_classes, *info.num_images) if count is not None]
    for fact in facts + ([f"{info.image_dir}/"] if info.image_dir != "." else []):
        assert fact in section, f"{fact} is not in the section {info.title}"


def test_imagenet_classnames_are_clips():
    lines = (ROOT / "datasets/imagenet_classnames.txt").read_text().splitlines()
    wnids, names = zip(*(line.split(maxsplit=1) for line in lines), strict=True)
    assert len(wnids) == 1000 and list(wnids) == sorted(set(wnids)) and wnids[0] == "n01440764"
    open_clip = pytest.importorskip("open_clip", reason="which has the list to compare with")
    assert list(names) == list(open_clip.IMAGENET_CLASSNAMES)


def restated_draw(entries, count, rng):
    """The specification's draw, written again: classes by first appearance, sample or choices."""
    drawn = []
    for label in dict.fromkeys(label for _, label, _ in entries):
        group = [entry for entry in entries if entry[1] == label]
        draw = rng.sample if len(group) >= count else rng.choices
        drawn.append(draw(group, k=count))
    return drawn


@pytest.mark.parametrize("shots", [1, 4, 6])
@pytest.mark.parametrize("name", [*ELEVEN, "digits"])
def test_draw_follows_the_specification(complete, name, shots):
    dataset_dir = find_dataset_dir(name, DATASETS[name], complete[0])
    parts = read_split(dataset_dir).parts
    if file := DATASETS[name].split_file:
        parts = json.loads((dataset_dir.path / file).read_text())
    rng, num_val = random.Random(7), min(shots, 4)
    if name == "imagenet":  # has eight training images of each class
        shots = min(shots, 4)
        drawn = restated_draw(parts["train"], shots + num_val, rng)
        val, train = [group[shots:] for group in drawn], [group[:shots] for group in drawn]
    else:
        val = restated_draw(parts["val"], num_val, rng)
        train = restated_draw(parts["train"], shots, rng)
    random.seed(7)
    dataset = build_dataset(name, complete[0], shots)
    for items, expected in (
        (dataset.val, sum(val, [])),
        (dataset.train_x, sum(train, [])),
        (dataset.test, parts["test"]),
    ):
        paths = [os.path.relpath(item.impath, dataset_dir.image_dir) for item in items]
        drawn = [(path, i.label, i.classname) for path, i in zip(paths, items, strict=True)]
        assert drawn == list(map(tuple, expected))
    assert random.getstate() == rng.getstate()


def test_imagenet_needs_enough_images(complete):
    with pytest.raises(ValueError, match="'tench' has 8 training images, but 5 shots take 9"):
        build_dataset("imagenet", complete[0], 5)


def test_base_and_new_share_draw(tmp_path):
    make_small_dataset("dtd", tmp_path, classes=5, per_class=10)
    halves = {}
    for subsample in ("all", "base", "new"):
        random.seed(3)
        halves[subsample] = build_dataset("dtd", tmp_path, 2, subsample=subsample)
    for subsample, labels in {"base": [0, 1, 2], "new": [3, 4]}.items():  # 5 / 2, rounded up
        half = halves[subsample]
        assert half.classnames == [halves["all"].classnames[label] for label in labels]
        for part in ("train_x", "val", "test"):
            assert getattr(half, part) == [
                replace(item, label=item.label - labels[0])
                for item in getattr(halves["all"], part)
                if item.label in labels
            ]
    assert halves["new"].new_classes is None and halves["base"].new_classes == halves["new"]


def test_base_and_new_fingerprints_differ(tmp_path):
    folder = make_small_dataset("dtd", tmp_path, classes=3, per_class=10)
    digests = {}
    for subsample, counts in {"all": (15, 6, 9), "base": (10, 4, 6), "new": (5, 2, 3)}.items():
        fingerprint = dataset_fingerprint("dtd", tmp_path, subsample=subsample)
        assert build_dataset("dtd", tmp_path, 1, subsample=subsample).fingerprint == fingerprint
        assert tuple(fingerprint[part] for part in SPLITS) == counts
        digests[subsample] = fingerprint["digest"]
    assert len(set(digests.values())) == 3
    change_split(folder, lambda s: s["test"].remove([e for e in s["test"] if e[1] == 2][0]))
    for subsample, digest in digests.items():  # base tests on new classes, too
        assert dataset_fingerprint("dtd", tmp_path, subsample=subsample)["digest"] != digest
    before = dataset_fingerprint("dtd", tmp_path, subsample="base")
    change_split(folder, lambda s: s["train"].remove([e for e in s["train"] if e[1] == 2][0]))
    assert dataset_fingerprint("dtd", tmp_path, subsample="base") == before


@pytest.mark.parametrize("name", LAYOUTS)
def test_fingerprint_ignores_place_and_draw(complete, tmp_path, capsys, name):
    root, convention = complete
    state = random.getstate()
    fingerprint = dataset_fingerprint(name, root)
    assert random.getstate() == state and capsys.readouterr().err == ""
    assert build_dataset(name, root, 1).fingerprint == fingerprint
    assert fingerprint["split"] == "published"
    assert re.fullmatch("[0-9a-f]{64}", fingerprint["digest"])
    counts = {"imagenet": (24, 0, 12)}.get(name, (12, 6, 6))
    counts = (0, 0, 12) if DATASETS[name].test_only else counts
    assert tuple(fingerprint[part] for part in SPLITS) == counts
    make_small_dataset(name, tmp_path, {"coop": "lora", "lora": "coop"}[convention])
    assert dataset_fingerprint(name, tmp_path) == fingerprint


def test_fingerprint_notices_changes(tmp_path):
    folder = make_small_dataset("eurosat", tmp_path)
    digests = {dataset_fingerprint("eurosat", tmp_path)["digest"]}
    change_split(folder, lambda split: split["train"].reverse())
    digests.add(dataset_fingerprint("eurosat", tmp_path)["digest"])
    change_split(folder, lambda split: split["val"].append(split["train"].pop()))
    digests.add(dataset_fingerprint("eurosat", tmp_path)["digest"])
    assert len(digests) == 3


def test_unpublished_counts_are_noted(tmp_path, capsys, monkeypatch):
    make_small_dataset("imagenet", tmp_path)
    build_dataset("imagenet", tmp_path, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "imagenet: " in line
    assert "3 of 1000 classes, 24 of 1281167 train, 12 of 50000 test;" in line
    info = replace(DATASETS["imagenet"], num_classes=3, num_images=(24, None, 12))
    monkeypatch.setitem(DATASETS, "imagenet", info)
    build_dataset("imagenet", tmp_path, 1)
    assert capsys.readouterr().err == ""


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"'EuroSat' \(did you mean 'eurosat'\?\); valid: .*dtd"):
        get_dataset_info("EuroSat")


@pytest.mark.parametrize("shots", [0, 1.5, "4"])
def test_shots_below_one_are_refused(tmp_path, shots):
    with pytest.raises(ValueError, match=f"at least 1, not {shots!r}"):
        build_dataset("eurosat", tmp_path, shots)
