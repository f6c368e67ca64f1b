"""A run is what it computes: settings and content, however its paths are written."""

import json
import shutil

import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import call_main, refused, result_of, run
from dataset_helpers import write_image

NAMES = ("cat", "dog", "owl")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder with 36 own photos, a checkpoint and names."""
    for label, name in enumerate(NAMES):
        for i in range(12):
            write_image(tmp_path / "photos" / name / f"{i:02d}.png", label, i)
    torch.save(random_state_dict({**TINY_VIT, "context_length": 48}), tmp_path / "tiny.pt")
    (tmp_path / "names.yaml").write_text("cat: kitten\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = ["--shots", 2, "--n_iters", 1, "--s", 0.9, "--num_workers", 0, "--threads", 1]


def train(dataset="photos", backbone="tiny.pt", *flags):
    return ["--dataset", dataset, "--backbone", backbone, *SHORT, *flags]


def test_identity_ignores_spelling(home):
    run(*train("photos", "tiny.pt", "--classnames", "names.yaml"))
    shutil.copytree(home / "photos", home / "moved" / "photos")
    (home / "copy").mkdir()
    shutil.copy(home / "tiny.pt", home / "copy" / "tiny.pt")
    for dataset in ("photos/", "./photos", home / "photos", home / "moved" / "photos"):
        flags = ["--classnames", "./names.yaml"]
        assert "is finished" in run(*train(dataset, home / "copy" / "tiny.pt", *flags))


@pytest.mark.parametrize(
    "change, words",
    [
        ("weights", "the backbone's weights, activation, heads or normalization differ"),
        ("names", "the class names differ"),
        ("images", "images differ"),
        ("list", "images differ"),
        ("more images", "test images differ"),
    ],
)
def test_identity_notices_other_content(home, change, words):
    flags = ["--classnames", "names.yaml"]
    if change == "list":
        run(*train("photos", "tiny.pt", *flags))
        split = json.loads(next(home.rglob("fewshot.json")).read_text())["train"]
        shutil.rmtree(home / "results")
        (home / "few.json").write_text(json.dumps({"train": split, "val": []}))
        flags += ["--fewshot_split", "few.json"]
    run(*train("photos", "tiny.pt", *flags))
    if change == "weights":
        torch.save(random_state_dict({**TINY_VIT, "context_length": 48}, seed=1), home / "tiny.pt")
    elif change == "names":
        (home / "names.yaml").write_text("cat: tom cat\n")
    elif change == "images":
        for path in (home / "photos" / "cat").iterdir():
            write_image(path, 9, 9)
    elif change == "list":
        (home / "few.json").write_text(json.dumps({"train": split[::-1], "val": []}))
    else:
        for i in range(12):
            write_image(home / "photos" / "cat" / f"new{i}.png", 0, 50 + i)
    message = refused(*train("photos", "tiny.pt", *flags))
    assert words in message and "--overwrite" in message, message


def test_identity_guards_eval_only(home):
    run(*train(), "--save_weights")
    for i in range(12):
        write_image(home / "photos" / "cat" / f"new{i}.png", 0, 50 + i)
    message = refused(*train(), "--eval_only")
    assert "the test images differ" in message


def test_config_entries_overridden_are_unchecked(home):
    run(*train(home / "photos"))
    config = next(home.rglob("config.yaml")).rename(home / "mine.yaml")
    (home / "tiny.pt").rename(home / "new.pt")
    assert "check the path" in refused("--config", config)
    assert "Final test accuracy" in run("--config", config, "--backbone", "new.pt")


def test_fewer_images_are_reported(home):
    for path in sorted((home / "photos" / "owl").iterdir())[4:]:
        path.unlink()
    out = run(*train(), "--shots", 5)
    assert "images are repeated where a class has too few (owl: 2 different of 5)" in out
    assert result_of(home)["fewer_images"] == {"owl": 2}


def test_home_directory_is_expanded(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    status, _, err = call_main(*train("~/photos", "~/tiny.pt"), "--save_path=~/x")
    assert status == 0 and any((home / "x").rglob("result.json")), err
    assert not (home / "~").exists()


def test_long_directory_names_are_cut(home):
    flags = ["--template", *(f"{'long ' * 20}{i} {{}}." for i in range(9)), "--classnames"]
    name = home / f"{'n' * 150}.yaml"
    name.write_text("cat: kitten\n")
    (home / f"{'f' * 150}.yaml").write_text("early_stop_loss: -1\n")
    run(*train(), *flags, name, "--config", home / f"{'f' * 150}.yaml")
    assert result_of(home)["classnames"][0] == "kitten"
