"""What must not get in: links, hosts, names; and what odd machines must not break."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from clip_helpers import TINY_VIT, random_state_dict
from dataset_helpers import make_dataset, write_image
from scipy.io import savemat
from scipy.io.matlab import MatlabObject

import clip
import main
import run_utils
from datasets import DATASETS, build_dataset
from datasets.base import find_source

ROOT = Path(__file__).parents[2]


# The sources

FORBIDDEN = {  # what no line may hold: a line that does
    r"torch\.load\((?!.*weights_only=True)": "torch.load(path)",
    r"\byaml\.(?!safe_|YAMLError|SafeLoader|Alias|load\(.*=PlainLoader\))": "yaml.load(file)",
    r"shell=True|os\.(system|popen|spawn|exec)|getoutput": "subprocess.run(line, shell=True)",
    r"\beval\((?!\))|\bexec\(": "eval(text)",  # .eval() is a model's mode
    r"allow_pickle|np\.load\(|joblib|torch\.jit\.load\(": "np.load(path, allow_pickle=True)",
    r"pickle\.(?!_Unpickler|BUILD|BYTEARRAY8)|import (dill|marshal|shelve)": "pickle.loads(data)",
    r"urlopen|requests\.|_unverified_|verify=False|http://": "urllib.request.urlopen(url)",
    r"extractall|\.extract\(|unpack_archive": "archive.extractall(folder)",
    r"Image\.open\((?!path, formats=FORMATS)": "Image.open(path)",
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_the_sources_have_nothing_that_runs_what_it_reads(pattern):
    assert re.search(pattern, FORBIDDEN[pattern])
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT)
        if inside.parts[0] == "tests" or inside.parts[0].startswith("."):
            continue
        text = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        lines = [line.split("  #")[0] for line in text.splitlines()]
        found += [f"{inside}: {line.strip()}" for line in lines if re.search(pattern, line)]
    assert found == []


# Splits and folders


@pytest.fixture
def eurosat(tmp_path):
    make_dataset("eurosat", tmp_path, size=(8, 8))
    return tmp_path / "eurosat"


def name_in_split(folder, path):
    file = next(folder.glob("split_zhou_*.json"))
    split = json.loads(file.read_text())
    split["train"][0][0] = path
    file.write_text(json.dumps(split))


@pytest.mark.parametrize(
    "path",
    ["secret.jpg", "link/secret.jpg", "Forest/link.jpg", "Forest/../../../secret.jpg", "link"]
    + ["Forest/loop/../../secret.jpg", "{root}/secret.jpg", "Forest/..\\..\\..\\secret.jpg"],
)
def test_no_entry_of_a_split_leads_out_of_the_image_folder(eurosat, path):
    secret = eurosat.parent / "secret.jpg"
    write_image(secret, 0, 0, (8, 8))
    (eurosat / "2750/link").symlink_to(eurosat.parent)
    (eurosat / "2750/secret.jpg").symlink_to(secret)
    (eurosat / "2750/Forest/link.jpg").symlink_to("../../../secret.jpg")
    name_in_split(eurosat, path.format(root=eurosat.parent))
    with pytest.raises((ValueError, FileNotFoundError), match="outside of the image f|missing in"):
        build_dataset("eurosat", eurosat.parent, 1)


def test_links_within_the_image_folder_are_followed(eurosat):
    (eurosat / "2750/Wood").symlink_to("Forest")
    (eurosat / "2750/Wood/again.jpg").symlink_to("Forest_0000.jpg")
    name_in_split(eurosat, "Wood/again.jpg")
    label = json.loads((eurosat / "split_zhou_EuroSAT.json").read_text())["train"][0][1]
    dataset = build_dataset("eurosat", eurosat.parent, 4)
    assert any(i.impath.endswith("Wood/again.jpg") and i.label == label for i in dataset.train_x)


@pytest.mark.parametrize(("top", "refused"), [("cars_train", False), ("evil", True)])
def test_of_the_cars_folders_the_image_folders_alone_may_be_links(tmp_path, top, refused):
    make_dataset("stanford_cars", tmp_path, size=(8, 8))
    folder = tmp_path / "stanford_cars"
    (folder / "cars_train").rename(tmp_path / "elsewhere")
    (folder / "cars_train").symlink_to(tmp_path / "elsewhere")
    (folder / "evil").symlink_to(tmp_path / "elsewhere")
    name_in_split(folder, f"{top}/{sorted(os.listdir(folder / 'evil'))[0]}")
    if refused:
        with pytest.raises(ValueError, match="names evil/.* outside of the image folder"):
            build_dataset("stanford_cars", tmp_path, 1)
    else:
        build_dataset("stanford_cars", tmp_path, 1)


@pytest.mark.parametrize("link", ["train", "train/n01440764", "val/n01440764/image"])
def test_of_imagenet_the_parts_alone_may_be_links(tmp_path, link):
    make_dataset("imagenet", tmp_path, size=(8, 8))
    path = tmp_path / "imagenet/images" / link
    if path.name == "image":
        path = sorted(path.parent.iterdir())[0]
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    if link == "train":
        build_dataset("imagenet", tmp_path, 1)
    else:
        with pytest.raises(ValueError, match=f"names {link[:13]}.* outside of the image folder"):
            build_dataset("imagenet", tmp_path, 1)


@pytest.mark.parametrize("name", ["dtd", "oxford_pets", "fgvc"])
def test_lists_of_raw_downloads_do_not_lead_out_either(tmp_path, name):
    make_dataset(name, tmp_path, split=False, size=(8, 8))
    images = tmp_path / {"fgvc": "fgvc_aircraft"}.get(name, name) / "images"
    image = sorted(path for path in images.rglob("*.jpg"))[0]
    image.rename(tmp_path / "elsewhere.jpg")
    image.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(ValueError, match=f"{image.name}, outside of the image folder"):
        build_dataset(name, tmp_path, 1)


def test_a_split_file_that_is_a_pipe_is_not_waited_for(eurosat):
    (eurosat / "split_zhou_EuroSAT.json").unlink()
    os.mkfifo(eurosat / "split_zhou_EuroSAT.json")
    with pytest.raises(ValueError, match="split_zhou_EuroSAT.json cannot be read .*no file"):
        build_dataset("eurosat", eurosat.parent, 1)


def test_an_image_that_is_a_pipe_is_not_waited_for(eurosat):
    os.mkfifo(eurosat / "2750/Forest/pipe.jpg")
    name_in_split(eurosat, "Forest/pipe.jpg")
    with pytest.raises(FileNotFoundError, match="Forest/pipe.jpg: named in"):
        build_dataset("eurosat", eurosat.parent, 1)


ODD = [
    'it\'s a "field"',
    "line\nbreak",
    "\x1b[31mred",
    "\u68ee\u6797",
    "no\u00a0break",
    "$(touch x); `y` & *",
]


def test_odd_names_of_folders_make_a_split_that_is_read_again(tmp_path):
    for label, name in enumerate(ODD):
        for index in range(4):
            write_image(
                tmp_path / "dtd/images" / name / f"{name} {index}.jpg", label, index, (8, 8)
            )
    first = build_dataset("dtd", tmp_path, 1)
    assert first.classnames == sorted(ODD)
    assert (tmp_path / "dtd/split_so_DescribableTextures.json").exists()
    assert [i.impath for i in build_dataset("dtd", tmp_path, 1).test] == [
        i.impath for i in first.test
    ]
    (tmp_path / "dtd/images" / ODD[1] / f"{ODD[1]} 0.jpg").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        build_dataset("dtd", tmp_path, 1)
    assert "line\\nbreak 0.jpg" in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_that_is_no_text_is_named(tmp_path):
    for name in (b"Wald", "K\xe4se".encode("latin-1")):
        for index in range(4):
            folder = tmp_path / "dtd/images" / os.fsdecode(name)
            write_image(folder / f"{index}.jpg", 0, index, (8, 8))
    with pytest.raises(ValueError, match=r"has the class 'K\\udce4se', which is no UTF-8"):
        build_dataset("dtd", tmp_path, 1)


def test_objects_in_a_mat_file_are_data_or_refused(tmp_path):
    make_dataset("oxford_flowers", tmp_path, split=False, size=(8, 8))
    labels = tmp_path / "oxford_flowers/imagelabels.mat"
    for hostile in (
        MatlabObject(np.array([[(1,)]], dtype=[("labels", object)]), "python"),
        np.array([["__import__('os').abort()"]], dtype=object),
        np.array([[np.nan]]),
    ):
        savemat(labels, {"labels": hostile})
        with pytest.raises(ValueError, match="no readable 'labels'"):
            build_dataset("oxford_flowers", tmp_path, 1)


def test_a_label_as_large_as_it_says_does_not_take_the_memory(tmp_path):
    make_dataset("oxford_flowers", tmp_path, split=False, size=(8, 8))
    savemat(tmp_path / "oxford_flowers/imagelabels.mat", {"labels": [[1, 1, 10**11]]})
    (tmp_path / "oxford_flowers/cat_to_name.json").write_text('{"1": "a", "100000000000": "b"}')
    with pytest.raises(ValueError, match="has labels up to 100000000000"):
        build_dataset("oxford_flowers", tmp_path, 1)


@pytest.mark.parametrize("named", ["~nobody-of-this-name/data", "a" * 5000, "no\0where"])
def test_a_root_that_cannot_be_is_no_folder(named):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_source("eurosat", DATASETS["eurosat"], named)


def test_a_user_without_a_home_is_told_what_to_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match="no home folder: name a folder with --root_path"):
        find_source("digits", DATASETS["digits"], None)
    with pytest.raises(FileNotFoundError, match="no home folder: set the variable HOME"):
        clip.load("ViT-B/16", device="cpu")
    assert list(tmp_path.iterdir()) == []


# Clocks and locales


def tiny_run(folder):
    """A dataset and a checkpoint, both below an odd folder, and the arguments of a run on them."""
    odd = folder / 'it\'s "d\u00f6nn\u00e9es"  \u6570\u636e'
    for label, name in enumerate(["\u00c7am", "\u68ee\u6797", "Ilgaz I"]):
        for index in range(4):
            path = odd / "dtd/images" / name / f"{name} '{index}'.jpg"
            write_image(path, label, index, (16, 16))
    state = random_state_dict({**TINY_VIT, "context_length": 48})
    weights = odd / "weights/k\u00fc\u00e7\u00fck \u0130.pt"
    weights.parent.mkdir()
    torch.save(state, weights)
    return [
        "--root_path", odd, "--dataset", "dtd", "--backbone", weights, "--n_iters", 2,
        "--num_workers", 1, "--save_path", odd / "sonu\u00e7lar", "--save_weights",
        "--threads", 1,
    ]  # fmt: skip


def results(folder):
    """The result of the only run below a folder, and its weights."""
    (result,) = folder.rglob("result.json")
    content = json.loads(result.read_text(encoding="utf-8"))
    tensors = safetensors.torch.load_file(result.parent / "weights.safetensors")
    return content["final_accuracy"], {name: t.tolist() for name, t in tensors.items()}


def test_a_run_is_the_same_in_every_locale_whatever_its_paths(tmp_path):
    outcomes = []
    for locale in (None, "C", "tr_TR.UTF-8"):
        folder = tmp_path / str(locale)
        folder.mkdir()
        argv = [str(part) for part in tiny_run(folder)]
        if locale:
            python = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [os.fsencode(part) for part in (sys.executable, ROOT / "main.py", *argv)],
                env={**os.environ, "LC_ALL": locale, "LANG": locale, **python},
                capture_output=True, timeout=120,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert "sonu\u00e7lar".encode() in done.stdout
        else:
            assert run_utils.exit_status(lambda argv=argv: main.main(argv)) == 0
        split = next(folder.rglob("split_so_*.json")).read_text()
        outcomes.append((results(folder), split))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_clocks_that_are_wrong_change_nothing(tmp_path, monkeypatch, capsys):
    argv = [str(part) for part in tiny_run(tmp_path)]
    far = time.time() + 40 * 365 * 86400
    for path in tmp_path.rglob("*"):
        os.utime(path, (far, far))
    clock = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))  # backwards
    assert run_utils.exit_status(lambda: main.main(argv)) == 0, capsys.readouterr().err
    assert 0 <= results(tmp_path)[0] <= 100
