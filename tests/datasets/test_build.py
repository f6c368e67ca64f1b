"""`build_dataset`: the few-shot draw, both folder conventions, and what broken data gets."""

import ast
import json
import os
import random
import re
from dataclasses import FrozenInstanceError
from importlib.util import find_spec as find_module
from pathlib import Path

import pytest
from dataset_helpers import ELEVEN, LAYOUTS, ROOT, WITH_SPLIT, make_dataset

from datasets import DATASETS, Item, build_dataset, find_spec


@pytest.fixture(scope="module", params=["coop", "lora"])
def complete(request, tmp_path_factory):
    """A root with small copies of all datasets, in one of the two conventions."""
    root = tmp_path_factory.mktemp(request.param)
    for name in LAYOUTS:
        make_dataset(name, root, request.param, size=(8, 8))
    return root, request.param


@pytest.fixture
def eurosat(tmp_path):
    """EuroSAT's folder in a root of its own."""
    make_dataset("eurosat", tmp_path, size=(8, 8))
    return tmp_path / "eurosat"


def rewrite(folder, change):
    """Apply a function to a folder's split file."""
    path = folder / "split_zhou_EuroSAT.json"
    split = json.loads(path.read_text())
    changed = change(split)
    path.write_text(json.dumps(split if changed is None else changed))


def restated_draw(entries, count, rng):
    """The specification's draw, said again: classes by first appearance, sample or choices."""
    drawn = []
    for label in dict.fromkeys(label for _, label, _ in entries):
        group = [entry for entry in entries if entry[1] == label]
        drawn += rng.sample(group, count) if len(group) >= count else rng.choices(group, k=count)
    return drawn


def triples(items, folder):
    return [[os.path.relpath(i.impath, folder), i.label, i.classname] for i in items]


# The table


def test_the_table_knows_the_eleven_and_the_digits():
    assert tuple(DATASETS) == tuple(LAYOUTS)


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_md_has_a_section_for_each_row_in_the_table_s_order(name):
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
        Item("a.jpg", 0, "a").label = 1


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
@pytest.mark.parametrize("name", WITH_SPLIT)
def test_shots_are_drawn_as_the_specification_says(complete, name, shots):
    root, convention = complete
    folder = root / LAYOUTS[name][("coop", "lora").index(convention)]
    split = json.loads((folder / LAYOUTS[name][2]).read_text())
    random.seed(7)
    dataset = build_dataset(name, root, shots)
    rng = random.Random(7)
    images = folder / DATASETS[name].images
    assert triples(dataset.val, images) == restated_draw(split["val"], min(shots, 4), rng)
    assert triples(dataset.train_x, images) == restated_draw(split["train"], shots, rng)
    assert triples(dataset.test, images) == split["test"]
    assert random.getstate() == rng.getstate()


@pytest.mark.parametrize("shots", [1, 3, 6])
def test_fgvc_is_drawn_from_its_own_lists_like_the_rest(complete, shots):
    folder = complete[0] / "fgvc_aircraft"
    names = (folder / "variants.txt").read_text().splitlines()
    lists = {}
    for part in ("train", "val", "test"):
        lines = (folder / f"images_variant_{part}.txt").read_text().splitlines()
        pairs = [line.split(" ", 1) for line in lines]
        lists[part] = [[f"{image}.jpg", names.index(name), name] for image, name in pairs]
    random.seed(3)
    dataset = build_dataset("fgvc", str(complete[0]), shots)
    rng = random.Random(3)
    images = folder / "images"
    assert triples(dataset.val, images) == restated_draw(lists["val"], min(shots, 4), rng)
    assert triples(dataset.train_x, images) == restated_draw(lists["train"], shots, rng)
    assert triples(dataset.test, images) == lists["test"]
    assert dataset.classnames == names


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
    assert len(dataset.classnames) == 3 and len(dataset.train_x) == len(dataset.val) == 6
    for item in dataset.train_x + dataset.val + dataset.test:
        assert item.classname == dataset.classnames[item.label]
        assert item.impath.startswith(str(complete[0])) and Path(item.impath).is_file()
    assert dataset.published


# Folders


def test_the_coop_folder_is_preferred_and_an_empty_one_is_not(tmp_path):
    make_dataset("dtd", tmp_path, "lora", size=(8, 8))
    (tmp_path / "dtd").mkdir(exist_ok=True)
    assert "/DTD/" in build_dataset("dtd", tmp_path, 1).test[0].impath
    make_dataset("dtd", tmp_path, "coop", size=(8, 8))
    assert "/dtd/" in build_dataset("dtd", tmp_path, 1).test[0].impath


def test_the_aircraft_archive_may_lie_as_it_was_unpacked(tmp_path):
    make_dataset("fgvc", tmp_path, size=(8, 8))
    (tmp_path / "fgvc-aircraft-2013b").mkdir()
    (tmp_path / "fgvc_aircraft").rename(tmp_path / "fgvc-aircraft-2013b/data")
    assert len(build_dataset("fgvc", tmp_path, 1).train_x) == 3


def test_a_dataset_may_be_a_link_and_so_may_its_image_folder(tmp_path, eurosat):
    (tmp_path / "other").mkdir()
    (eurosat / "2750").rename(tmp_path / "images")
    (eurosat / "2750").symlink_to(tmp_path / "images")
    (tmp_path / "other/eurosat").symlink_to(eurosat)
    assert len(build_dataset("eurosat", tmp_path / "other", 1).train_x) == 3


def test_the_image_folders_of_the_cars_may_be_links(tmp_path):
    make_dataset("stanford_cars", tmp_path, size=(8, 8))
    (tmp_path / "stanford_cars/cars_train").rename(tmp_path / "elsewhere")
    (tmp_path / "stanford_cars/cars_train").symlink_to(tmp_path / "elsewhere")
    assert len(build_dataset("stanford_cars", tmp_path, 1).train_x) == 3


def test_digits_are_made_on_first_use_and_need_no_root(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = []

    def prepare(folder):
        if not folder.exists():
            made.append(folder)
            make_dataset("digits", folder.parent, size=(8, 8))

    spec = DATASETS["digits"]
    fields = {**vars(spec), "prepare": prepare}
    monkeypatch.setitem(DATASETS, "digits", type(spec)(**fields))
    for _ in range(2):
        assert build_dataset("digits", None, 1).classnames == ["zero", "one", "two"]
    assert made == [tmp_path / ".cache/so/digits"]


def test_digits_that_cannot_be_made_say_so(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="digits: .*--root_path; see DATASETS.md, section Digits"):
        build_dataset("digits", tmp_path, 1)


# Refusals


def test_an_unknown_name_gets_the_nearest_and_all_others():
    with pytest.raises(ValueError, match="unknown dataset 'EuroSat': did you mean 'eurosat'.*dtd"):
        find_spec("EuroSat")
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
    folders = set(LAYOUTS[name][:2])
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}; .*{section}") as caught:
        build_dataset(name, tmp_path, 1)
    assert all(folder in str(caught.value) for folder in folders)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", [n for n in ELEVEN if DATASETS[n].images != "."])
def test_a_missing_image_folder_is_named(tmp_path, name, split):
    make_dataset(name, tmp_path, split=split, size=(8, 8))
    folder = tmp_path / LAYOUTS[name][0]
    (folder / DATASETS[name].images).rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=f"the image folder {folder}/.* is missing"):
        build_dataset(name, tmp_path, 1)


def set_entry(value):
    def change(split):
        split["train"][0] = value

    return change


BROKEN = {  # how the split file is spoilt: what the error must say
    "part": (lambda s: {"train": s["train"], "test": s["test"]}, "lacks the part val"),
    "shape": (lambda s: s["train"], "lacks the part train, val, test"),
    "pair": (set_entry(["a.jpg", 0]), "not .path, label, class name.: train: .'a.jpg', 0"),
    "text label": (set_entry(["a.jpg", "0", "a"]), "not .path, label, class name."),
    "true label": (set_entry(["a.jpg", True, "a"]), "not .path, label, class name."),
    "no name": (set_entry(["a.jpg", 0, " "]), "not .path, label, class name."),
    "zero byte": (set_entry(["a\0/b.jpg", 0, "a"]), "not .path, label, class name."),
    "surrogate": (set_entry(["\ud800/b.jpg", 0, "a"]), "not .path, label, class name."),
    "two names": (set_entry(["a.jpg", 1, "Wood"]), "label 1 stands for '(Wood|Forest)' and"),
    "negative": (set_entry(["a.jpg", -1, "a"]), "must run from 0 to 3.*-1, 3 breaks"),
    "gap": (set_entry(["a.jpg", 9, "a"]), "must run from 0 to 3.*3, 9 breaks"),
    "absolute": (set_entry(["/etc/passwd", 1, "Forest"]), "names /etc/passwd, outside"),
    "upwards": (set_entry(["../../x.jpg", 1, "Forest"]), "names ../../x.jpg, outside"),
    "windows": (set_entry(["..\\x\\..\\..\\x.jpg", 1, "Forest"]), "missing|outside"),
    "missing": (set_entry(["Forest/x.jpg", 1, "Forest"]), "Forest/x.jpg: named in .*, missing"),
    "no folder": (set_entry(["Wood/x.jpg", 1, "Forest"]), "Wood/x.jpg: named in .*, missing"),
    "folder": (set_entry(["Forest", 1, "Forest"]), "Forest: named in .*, missing"),
    "no test": (lambda s: s.update(test=[]), "has no test images of the class 'Annual Crop Land'"),
    "empty": (lambda s: s.update(train=[], val=[], test=[]), "has no images at all"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_split_file_is_named_with_what_is_wrong(eurosat, case):
    change, message = BROKEN[case]
    rewrite(eurosat, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        build_dataset("eurosat", eurosat.parent, 1)
    assert "split_zhou_EuroSAT.json" in str(caught.value)
    assert "see DATASETS.md, section EuroSAT" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_without_training_images_is_named(eurosat):
    rewrite(eurosat, lambda s: s.update(train=[e for e in s["train"] if e[1] != 1]))
    with pytest.raises(ValueError, match="no training images of the class 'Forest'"):
        build_dataset("eurosat", eurosat.parent, 1)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"", b"[" * 100_000], ids=range(4))
def test_a_split_file_that_is_not_json_is_named(eurosat, content):
    (eurosat / "split_zhou_EuroSAT.json").write_bytes(content)
    with pytest.raises(ValueError, match="split_zhou_EuroSAT.json cannot be read as JSON"):
        build_dataset("eurosat", eurosat.parent, 1)


def test_a_split_file_that_is_a_dangling_link_is_not_passed_over(eurosat):
    (eurosat / "split_zhou_EuroSAT.json").unlink()
    (eurosat / "split_zhou_EuroSAT.json").symlink_to("nowhere.json")
    with pytest.raises(ValueError, match="split_zhou_EuroSAT.json cannot be read"):
        build_dataset("eurosat", eurosat.parent, 1)


def test_a_folder_that_links_out_of_the_image_folder_is_refused(eurosat):
    (eurosat / "2750/Forest").rename(eurosat.parent / "outside")
    (eurosat / "2750/Forest").symlink_to(eurosat.parent / "outside")
    with pytest.raises(ValueError, match="outside of the image folder .*eurosat/2750"):
        build_dataset("eurosat", eurosat.parent, 1)


def test_many_problems_are_counted_and_the_doctor_is_named(eurosat):
    rewrite(eurosat, set_entry(["/x.jpg", 9, "a"]))
    with pytest.raises(ValueError, match="--dataset eurosat` lists this and 2 more"):
        build_dataset("eurosat", eurosat.parent, 1)


def test_a_name_that_only_the_file_system_knows_is_no_missing_image(eurosat, monkeypatch):
    """As on a file system that ignores case: not in the folder's list, but there when asked."""
    path = eurosat / "2750/Forest/forest.JPG"
    rewrite(eurosat, set_entry(["Forest/forest.JPG", 1, "Forest"]))
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda p: os.fspath(p) == str(path) or isfile(p))
    assert len(build_dataset("eurosat", eurosat.parent, 1).train_x) == 3


# ImageNet and FGVC


def test_imagenet_with_too_few_images_in_a_class_names_the_class(complete):
    with pytest.raises(ValueError, match="'tench' has 8 training images, but 5 shots take 9"):
        build_dataset("imagenet", complete[0], 5)


@pytest.mark.parametrize("convention", ["coop", "lora"])
def test_imagenet_without_a_part_or_class_folders_says_so(tmp_path, convention):
    make_dataset("imagenet", tmp_path, convention, size=(8, 8))
    folder = tmp_path / LAYOUTS["imagenet"][("coop", "lora").index(convention)]
    (folder / "val").rename(tmp_path / "val")
    with pytest.raises(FileNotFoundError, match=f"the image folder {folder}/val is missing"):
        build_dataset("imagenet", tmp_path, 1)
    (folder / "val").mkdir()
    (folder / "val/ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(ValueError, match=f"{folder}/val has no class folders"):
        build_dataset("imagenet", tmp_path, 1)


def test_imagenet_names_come_from_classnames_txt_when_it_is_there(tmp_path):
    make_dataset("imagenet", tmp_path, classes=2, size=(8, 8))
    names = tmp_path / "imagenet/classnames.txt"
    names.write_text("n01440764 a fish\nn01443537 gold fish\nn99999999 nothing\n")
    assert build_dataset("imagenet", tmp_path, 1).classnames == ["a fish", "gold fish"]
    names.write_text("n01440764\n")
    with pytest.raises(ValueError, match="classnames.txt is not made of lines like"):
        build_dataset("imagenet", tmp_path, 1)
    names.write_text("n01440764 tench\n")
    with pytest.raises(ValueError, match="no class name for n01443537.*classnames.txt"):
        build_dataset("imagenet", tmp_path, 1)


def test_imagenet_classes_without_images_are_named(tmp_path):
    make_dataset("imagenet", tmp_path, "lora", classes=2, size=(8, 8))
    folder = tmp_path / "imagenet"
    (folder / "val/n01440764").rename(folder / "val/n01484850")
    with pytest.raises(ValueError, match="lacks the folders n01484850 of val.*1 more"):
        build_dataset("imagenet", tmp_path, 1)
    (folder / "val/n01484850").rename(tmp_path / "aside")
    with pytest.raises(ValueError, match="no test images of the class 'tench'"):
        build_dataset("imagenet", tmp_path, 1)


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("images_variant_train.txt", "0000001\n", "lines that are not 'image variant"),
        ("images_variant_train.txt", "0000001 Concorde\n", r"line 1 \('0000001 Concorde'\)"),
        ("images_variant_val.txt", "7777777 A300B4\n", "7777777.jpg: named in .*, missing"),
        ("variants.txt", "707-320\nA300B4\nBoeing 717\nConcorde\n", "the class 'Concorde'"),
        ("variants.txt", None, "the download lacks .*variants.txt; see"),
    ],
)
def test_broken_aircraft_lists_are_named(tmp_path, file, text, message):
    make_dataset("fgvc", tmp_path, size=(8, 8))
    path = tmp_path / "fgvc_aircraft" / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_dataset("fgvc", tmp_path, 1)
