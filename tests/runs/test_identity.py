"""A run is what it computes: settings and content, however its paths are written."""

import json
import shutil

import export
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import output_of, refused, result_of, run, run_folder
from dataset_helpers import write_image

NAMES = ("cat", "dog", "owl")
SHORT = ["--shots", 2, "--n_iters", 1, "--s", 0.9, "--num_workers", 0, "--threads", 1]


def save_weights(path, seed=0):
    torch.save(random_state_dict({**TINY_VIT, "context_length": 48}, seed), path)


def save_few(path, indices):
    """Write a list of few training images."""
    few = [(f"{name}/{i:02d}.png", NAMES.index(name), name) for name in NAMES for i in indices]
    path.write_text(json.dumps({"train": few, "val": []}))


def add_photos(home, name, label, indices):
    for i in indices:
        write_image(home / "photos" / name / f"{i:02d}.png", label, i)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder with 36 own photos, a checkpoint, names, and a list of few images."""
    for label, name in enumerate(NAMES):
        add_photos(tmp_path, name, label, range(12))
    save_weights(tmp_path / "tiny.pt")
    save_few(tmp_path / "few.json", (0, 1))
    (tmp_path / "names.yaml").write_text("cat: kitten\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(dataset="photos", backbone="tiny.pt", *flags):
    return ["--dataset", dataset, "--backbone", backbone, *SHORT, *flags]


def test_identity_ignores_spelling(home):
    run(*train("photos", "tiny.pt", "--classnames", "names.yaml"))
    shutil.copytree(home / "photos", home / "moved" / "photos")
    shutil.copy(home / "tiny.pt", home / "moved" / "tiny.pt")
    for dataset in ("photos/", "./photos", home / "photos", home / "moved" / "photos"):
        flags = ["--classnames", "./names.yaml"]
        assert "is finished" in run(*train(dataset, home / "moved" / "tiny.pt", *flags))


def test_identity_notices_other_content(home):
    argv = train("photos", "tiny.pt", "--classnames", "names.yaml", "--fewshot_split", "few.json")
    run(*argv, "--save_weights")
    message = ""
    for words, change in (
        ("the backbone's weights", lambda: save_weights(home / "tiny.pt", seed=1)),
        ("the class names differ", lambda: (home / "names.yaml").write_text("cat: tom cat\n")),
        ("few training images differ", lambda: save_few(home / "few.json", (0, 2))),
        ("the test images differ", lambda: add_photos(home, "owl", 9, range(12))),
    ):
        assert words not in message
        change()
        message = refused(*argv)
        assert words in message and "--overwrite" in message, message
    assert message == refused(*argv, "--eval_only")


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
    run(*train("~/photos", "~/tiny.pt"), "--save_path=~/x")
    output_of(export.main, run_folder(home / "x"), "--to", "openai", "--out=~/full.pt")
    assert (home / "full.pt").exists() and not (home / "~").exists()


def test_long_directory_names_are_cut(home):
    name = (home / "names.yaml").rename(home / f"{'n' * 200}.yaml")
    run(*train(), "--template", "a {}.", "my {}.", "--classnames", name)
    assert result_of(home)["classnames"][0] == "kitten"
