"""The digits: placed the same everywhere, split once and for all, made whole or not at all."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import digits

ROOT = Path(__file__).parents[2]

PIXELS = "a2eacdbf2f9a2aa75bd0dc1f9a20c9a18daa11f8673558b3a50ecb585ef27f67"
SPLIT = "063ab6403028c8602eb77eb4c7f8a9683d2e14b0e157576b69d70aa1e6cf0d3b"


@pytest.fixture(scope="module")
def rendered():
    return digits.render()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    digits.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def split(folder):
    return json.loads((folder / digits.SPLIT_FILE).read_text(encoding="utf-8"))


def test_the_pixels_are_the_same_on_every_machine_and_numpy(rendered):
    images, labels = rendered
    assert images.shape == (1797, 32, 32) and images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest() == PIXELS
    assert Counter(labels.tolist()) == dict(
        enumerate((178, 182, 177, 183, 181, 182, 181, 179, 174, 180))
    )


def test_rendering_leaves_the_global_generator_alone(rendered):
    before = np.random.get_state()[1].copy()
    digits.render()
    assert (np.random.get_state()[1] == before).all()


def test_the_files_hold_the_rendered_pixels(folder, rendered):
    images, labels = rendered
    files = sorted((folder / "images").glob("*/*.png"), key=lambda path: int(path.stem))
    assert [int(path.stem) for path in files] == list(range(1797))
    assert [path.parent.name for path in files] == [digits.CLASSNAMES[n] for n in labels]
    for path, image in list(zip(files, images, strict=True))[::100]:
        with Image.open(path) as opened:
            assert (np.asarray(opened) == image).all()


def test_placing_upright_and_centred_at_a_whole_factor_is_plain_enlargement():
    digit = np.zeros((8, 8))
    digit[2, 5] = 1
    canvas = digits.place(digit, 32, 0, 0, 0)
    row, column = np.unravel_index(canvas.argmax(), canvas.shape)
    assert (row // 4, column // 4) == (2, 5)
    assert int(canvas.sum()) == pytest.approx(16 * 255, rel=0.01)


def test_placing_shifts_right_and_down_and_turns_counter_clockwise():
    digit = np.zeros((8, 8))
    digit[3:5, 3:5] = 1
    weights = np.arange(32) - 15.5

    def centre(canvas):
        return np.array([canvas.sum(0) @ weights, canvas.sum(1) @ weights]) / canvas.sum()

    assert centre(digits.place(digit, 20, 3, -2, 0)) == pytest.approx([3, -2], abs=0.05)
    digit = np.zeros((8, 8))
    digit[3:5, 6:] = 1  # to the right of the centre; counter-clockwise takes it up
    x, y = centre(digits.place(digit, 20, 0, 0, 15))
    assert x > 5 and y < -1


def test_the_split_has_its_sizes_and_every_image_once(split, folder):
    assert {part: len(items) for part, items in split.items()} == {
        "train": 898,
        "val": 359,
        "test": 540,
    }
    paths = [path for items in split.values() for path, _, _ in items]
    assert len(set(paths)) == 1797
    assert all((folder / "images" / path).is_file() for path in paths)


def test_the_split_is_stratified_and_names_the_classes(split):
    shares = {"train": 0.5, "val": 0.2, "test": 0.3}
    for part, items in split.items():
        for path, label, name in items:
            assert name == digits.CLASSNAMES[label] == Path(path).parent.name
        counts = Counter(label for _, label, _ in items)
        for label, total in enumerate((178, 182, 177, 183, 181, 182, 181, 179, 174, 180)):
            assert abs(counts[label] - shares[part] * total) <= 1


def test_the_split_never_changes(folder):
    assert hashlib.sha256((folder / digits.SPLIT_FILE).read_bytes()).hexdigest() == SPLIT


def test_a_folder_that_is_whole_stays_untouched(folder, monkeypatch):
    monkeypatch.setattr(digits, "render", lambda: pytest.fail("rendered again"))
    digits.prepare(folder)


def test_nothing_but_the_folder_is_left_behind(folder):
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_an_empty_folder_and_missing_parents_will_do(tmp_path):
    folder = tmp_path / "data" / "digits"
    folder.mkdir(parents=True)
    digits.prepare(folder)
    assert (folder / digits.SPLIT_FILE).is_file()


def test_who_comes_second_keeps_the_first_ones_folder(tmp_path, monkeypatch):
    write, folder = digits._write, tmp_path / "digits"

    def overtaken(draft, images, labels):
        write(draft, images, labels)
        write(folder, images, labels)
        (folder / "first").touch()

    monkeypatch.setattr(digits, "_write", overtaken)
    digits.prepare(folder)
    assert (folder / "first").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_several_may_prepare_at_once(tmp_path):
    folder = tmp_path / "digits"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(digits.prepare, [folder] * 4))
    assert len(list((folder / "images").glob("*/*.png"))) == 1797
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(draft, images, labels):
        (draft / "images").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits.prepare(tmp_path / "digits")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "digits"
    with pytest.raises(OSError, match="--root_path") as caught:
        digits.prepare(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_with_other_content_is_left_alone_and_named(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="--root_path") as caught:
        digits.prepare(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_scikit_learn_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        digits.prepare(tmp_path / "digits")
    assert not list(tmp_path.iterdir())


def test_the_few_shots_are_the_same_whether_or_not_the_folder_was_there(tmp_path):
    """In a process of its own each, since importing scikit-learn draws from Python's generator."""
    code = (
        "import random, sys; from datasets import build_dataset; random.seed(3); "
        "print([i.impath for i in build_dataset('digits', sys.argv[1], 1).train_x])"
    )
    draws = [
        subprocess.run(
            [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert draws[0] == draws[1] and draws[0].count(".png") == 10
