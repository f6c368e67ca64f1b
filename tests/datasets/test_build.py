"""`build_dataset`: the table, the few-shot draw, and what tells one set of data from another."""

import ast
import json
import os
import random
import re
from dataclasses import FrozenInstanceError, replace
from importlib.util import find_spec as find_module
from pathlib import Path

import pytest
from dataset_helpers import (
    ELEVEN,
    LAYOUTS,
    ROOT,
    VARIANTS,
    WITH_SPLIT,
    change_split,
    make_dataset,
)

from datasets import (
    DATASETS,
    Datum,
    build_dataset,
    dataset_fingerprint,
    dump_fewshot_split,
    get_dataset_info,
)


@pytest.fixture(scope="module", params=["coop", "lora"])
def complete(request, tmp_path_factory):
    """A root with small copies of all datasets, in one of the two conventions."""
    root = tmp_path_factory.mktemp(request.param)
    for name in LAYOUTS:
        make_dataset(name, root, request.param, size=(8, 8))
    return root, request.param


def restated_draw(entries, count, rng):
    """The specification's draw, said again: classes by first appearance, sample or choices."""
    drawn = []
    for label in dict.fromkeys(label for _, label, _ in entries):
        group = [entry for entry in entries if entry[1] == label]
        drawn += rng.sample(group, count) if len(group) >= count else rng.choices(group, k=count)
    return drawn


def triples(items, folder):
    return [[os.path.relpath(i.impath, folder), i.label, i.classname] for i in items]


def published_parts(name, folder):
    """All entries as the published split or FGVC's own lists have them."""
    if name != "fgvc":
        return json.loads((folder / LAYOUTS[name][2]).read_text())
    names = (folder / "variants.txt").read_text().splitlines()
    parts = {}
    for part in ("train", "val", "test"):
        lines = (folder / f"images_variant_{part}.txt").read_text().splitlines()
        pairs = [line.split(" ", 1) for line in lines]
        parts[part] = [[f"{image}.jpg", names.index(name), name] for image, name in pairs]
    return parts


# The table


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_md_has_a_section_for_each_row_in_the_table_s_order(name):
    assert tuple(DATASETS) == tuple(LAYOUTS)
    spec, text = DATASETS[name], (ROOT / "DATASETS.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S))
    titles = [spec.title for spec in DATASETS.values()]
    assert [title for title in sections if title in titles] == titles
    section = sections[spec.title]
    named = [*spec.folders, spec.split or "", spec.url, f"--dataset {name}"]
    for text in named + ([f"{spec.images}/"] if spec.images != "." else []):
        assert text in section, f"{text} is not in the section {spec.title}"
    for count in (spec.classes, *spec.counts):
        assert count is None or f"{count:,}" in section


def test_a_row_and_an_item_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        DATASETS["dtd"].classes = 1
    with pytest.raises(FrozenInstanceError):
        Datum("a.jpg", 0, "a").label = 1


def test_the_shipped_imagenet_names_are_clip_s_in_the_order_of_the_wordnet_ids():
    lines = (ROOT / "datasets/imagenet_classnames.txt").read_text().splitlines()
    ids, names = zip(*(line.split(maxsplit=1) for line in lines), strict=True)
    assert len(ids) == 1000 and list(ids) == sorted(set(ids))
    assert (ids[0], names[0]) == ("n01440764", "tench")
    assert (ids[-1], names[-1]) == ("n15075141", "toilet paper")
    package = find_module("open_clip")
    if package is None:
        pytest.skip("open_clip, which holds the list to compare with, is not installed")
    code = Path(package.origin).with_name("zero_shot_metadata.py").read_text(encoding="utf-8")
    lists = [node for node in ast.parse(code).body if isinstance(node, ast.Assign)]
    of = {node.targets[0].id: node.value for node in lists}
    assert names == ast.literal_eval(of["IMAGENET_CLASSNAMES"])


# The draw


@pytest.mark.parametrize("shots", [1, 3, 6])
@pytest.mark.parametrize("name", [*WITH_SPLIT, "fgvc"])
def test_shots_are_drawn_as_the_specification_says(complete, name, shots):
    root, convention = complete
    folder = root / LAYOUTS[name][("coop", "lora").index(convention)]
    split = published_parts(name, folder)
    random.seed(7)
    dataset = build_dataset(name, str(root), shots)
    rng = random.Random(7)
    images = folder / DATASETS[name].images
    assert triples(dataset.val, images) == restated_draw(split["val"], min(shots, 4), rng)
    assert triples(dataset.train_x, images) == restated_draw(split["train"], shots, rng)
    assert triples(dataset.test, images) == split["test"]
    assert random.getstate() == rng.getstate()


@pytest.mark.parametrize("shots", [1, 3, 4])
def test_imagenet_draws_training_and_validation_images_at_once(complete, shots):
    folder = complete[0] / LAYOUTS["imagenet"][("coop", "lora").index(complete[1])]
    random.seed(5)
    dataset = build_dataset("imagenet", complete[0], shots)
    rng = random.Random(5)
    train, val, test = [], [], []
    for label, wnid in enumerate(sorted(os.listdir(folder / "train"))):
        drawn = rng.sample(sorted(os.listdir(folder / "train" / wnid)), shots + min(4, shots))
        train += [(f"train/{wnid}/{name}", label) for name in drawn[:shots]]
        val += [(f"train/{wnid}/{name}", label) for name in drawn[shots:]]
        names = sorted(os.listdir(folder / "val" / wnid))
        test += [(f"val/{wnid}/{name}", label) for name in names]
    for items, expected in ((dataset.train_x, train), (dataset.val, val), (dataset.test, test)):
        assert [(os.path.relpath(i.impath, folder), i.label) for i in items] == expected
    assert dataset.classnames == ["tench", "goldfish", "great white shark"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_row_gives_existing_images_whole_classes_and_one_prompt(complete, name):
    dataset = build_dataset(name, complete[0], 2)
    assert dataset.template == ["a photo of a {}."]
    few = 0 if name in VARIANTS else 6
    assert len(dataset.classnames) == 3 and len(dataset.train_x) == len(dataset.val) == few
    assert len(dataset.test) == (12 if name.startswith("imagenet") else 6)
    for item in dataset.train_x + dataset.val + dataset.test:
        assert item.classname == dataset.classnames[item.label]
        assert item.impath.startswith(str(complete[0])) and Path(item.impath).is_file()


# Base and new classes


def test_base_and_new_classes_share_one_draw_and_are_labelled_from_0(tmp_path):
    make_dataset("dtd", tmp_path, classes=5, per_class=10, size=(8, 8))
    random.seed(3)
    whole = build_dataset("dtd", tmp_path, 2)
    halves = {}
    for subsample in ("base", "new"):
        random.seed(3)
        halves[subsample] = build_dataset("dtd", tmp_path, 2, subsample=subsample)
    for subsample, labels in {"base": [0, 1, 2], "new": [3, 4]}.items():  # 5 / 2, rounded up
        half = halves[subsample]
        assert half.classnames == [whole.classnames[label] for label in labels]
        for part in ("train_x", "val", "test"):
            expected = [
                (item.impath, item.label - labels[0], item.classname)
                for item in getattr(whole, part)
                if item.label in labels
            ]
            assert [tuple(vars(item).values()) for item in getattr(half, part)] == expected
    assert halves["new"].new_classes is None and halves["base"].new_classes == halves["new"]


def test_each_half_tells_its_data_apart(tmp_path):
    make_dataset("dtd", tmp_path, classes=3, per_class=10, size=(8, 8))
    images = {"all": (15, 6, 9), "base": (10, 4, 6), "new": (5, 2, 3)}
    found = {}
    for subsample, counts in images.items():
        data = dataset_fingerprint("dtd", tmp_path, subsample=subsample)
        assert data == build_dataset("dtd", tmp_path, 1, subsample=subsample).fingerprint
        assert (data["train"], data["val"], data["test"]) == counts
        found[subsample] = data["digest"]
    assert len(set(found.values())) == 3

    def lose(part, label):
        def change(split):
            split[part].remove(next(entry for entry in split[part] if entry[1] == label))

        change_split(tmp_path / "dtd", change)
        return [s for s in found if dataset_fingerprint("dtd", tmp_path, subsample=s)["digest"]
                != found[s]]  # fmt: skip

    assert lose("train", 2) == ["all", "new"]
    assert lose("test", 2) == ["all", "base", "new"]  # a run on base classes tests on new ones


@pytest.mark.parametrize("subsample", ["base", "new"])
def test_a_list_of_images_serves_a_half_whichever_run_wrote_it(tmp_path, subsample):
    make_dataset("dtd", tmp_path, classes=5, per_class=10, size=(8, 8))
    whole, half = (build_dataset("dtd", tmp_path, 2, subsample=s) for s in ("all", subsample))
    for writer in (whole, half):
        (tmp_path / "few.json").write_text(dump_fewshot_split(writer))
        chosen = {"subsample": subsample, "fewshot_split": tmp_path / "few.json"}
        read = build_dataset("dtd", tmp_path, 2, **chosen)
        labels = range(3) if subsample == "base" else range(2)
        assert sorted(item.label for item in read.train_x) == [i for i in labels for _ in "ab"]
        images = {item.impath for item in writer.train_x}
        assert {item.impath for item in read.train_x} <= images
        assert read.classnames == half.classnames


# The data that results are told apart by


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_data_has_the_same_digest_on_every_disk(complete, tmp_path, capsys, name):
    root, convention = complete
    state = random.getstate()
    data = dataset_fingerprint(name, root)
    assert random.getstate() == state and capsys.readouterr().err == ""
    assert (
        data == build_dataset(name, root, 1).fingerprint == build_dataset(name, root, 4).fingerprint
    )
    assert data["split"] == "published" and re.fullmatch("[0-9a-f]{64}", data["digest"])
    counts = (0, 0, 12) if name in VARIANTS else (24, 0, 12) if name == "imagenet" else (12, 6, 6)
    assert (data["train"], data["val"], data["test"]) == counts
    make_dataset(name, tmp_path, {"coop": "lora", "lora": "coop"}[convention], size=(8, 8))
    assert dataset_fingerprint(name, tmp_path) == data


CHANGES = {
    "image removed": lambda split: split["train"].pop(),
    "image added": lambda split: split["test"].append(split["train"][0]),
    "order": lambda split: split["train"].reverse(),
    "part": lambda split: split["val"].append(split["train"].pop()),
    "class removed": lambda split: split.update(
        {part: [e for e in split[part] if e[1] != 2] for part in split}
    ),
    "class name": lambda split: split.update(
        {p: [[e[0], e[1], e[2].replace("Forest", "Wood")] for e in split[p]] for p in split}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_has_another_digest(tmp_path, change):
    make_dataset("eurosat", tmp_path, size=(8, 8))
    before = dataset_fingerprint("eurosat", tmp_path)
    change_split(tmp_path / "eurosat", CHANGES[change])
    assert dataset_fingerprint("eurosat", tmp_path)["digest"] != before["digest"]


def test_numbers_that_were_published_and_are_not_there_are_said_once(tmp_path, capsys, monkeypatch):
    make_dataset("imagenet", tmp_path, size=(8, 8))
    build_dataset("imagenet", tmp_path, 1)
    (line,) = capsys.readouterr().err.splitlines()
    for text in ("imagenet", "3 of 1000 classes", "24 of 1281167 training images"):
        assert text in line
    assert "12 of 50000 test images" in line and "section ImageNet" in line
    spec = replace(DATASETS["imagenet"], classes=3, counts=(24, None, 12))
    monkeypatch.setitem(DATASETS, "imagenet", spec)
    build_dataset("imagenet", tmp_path, 1)
    assert capsys.readouterr().err == ""
    next((tmp_path / "imagenet/images/val").rglob("*.JPEG")).unlink()
    build_dataset("imagenet", tmp_path, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert ": 11 of 12 test images;" in line


# Refusals


def test_an_unknown_name_gets_the_nearest_and_all_others():
    with pytest.raises(ValueError, match=r"'EuroSat' \(did you mean 'eurosat'\?\); valid: .*dtd"):
        get_dataset_info("EuroSat")
    with pytest.raises(ValueError, match="did you mean 'oxford_flowers'"):
        build_dataset("flowers", "/nowhere", 1)


@pytest.mark.parametrize("shots", [0, -1, 1.5, "4"])
def test_shots_below_one_are_refused(complete, shots):
    with pytest.raises(ValueError, match=f"at least 1, not {shots!r}"):
        build_dataset("eurosat", complete[0], shots)


@pytest.mark.parametrize("name", ELEVEN)
def test_a_missing_root_or_folder_says_what_was_looked_for_and_where(tmp_path, name):
    section = f"see DATASETS.md, section {DATASETS[name].title}"
    with pytest.raises(ValueError, match=f"{name} needs --root_path.*{section}"):
        build_dataset(name, None, 1)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/no is not a folder.*{section}"):
        build_dataset(name, tmp_path / "no", 1)
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}; .*{section}") as caught:
        build_dataset(name, tmp_path, 1)
    assert all(folder in str(caught.value) for folder in LAYOUTS[name][:2])


def test_imagenet_with_too_few_images_in_a_class_names_the_class(complete):
    with pytest.raises(ValueError, match="'tench' has 8 training images, but 5 shots take 9"):
        build_dataset("imagenet", complete[0], 5)


def test_many_problems_are_counted_and_the_doctor_is_named(tmp_path):
    make_dataset("eurosat", tmp_path, size=(8, 8))
    change_split(tmp_path / "eurosat", lambda s: s["train"].append(["/x.jpg", 9, "a"]))
    with pytest.raises(ValueError, match="--dataset eurosat` lists this and 3 more"):
        build_dataset("eurosat", tmp_path, 1)
