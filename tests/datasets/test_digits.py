"""The digits: drawn the same everywhere, split once and for all, made completely or not at all."""

import hashlib
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import build_dataset, dataset_fingerprint, digits

PIXELS = "a2eacdbf2f9a2aa75bd0dc1f9a20c9a18daa11f8673558b3a50ecb585ef27f67"
SPLIT = "063ab6403028c8602eb77eb4c7f8a9683d2e14b0e157576b69d70aa1e6cf0d3b"


@pytest.fixture(scope="module")
def rendered():
    before = np.random.get_state()[1].copy()
    images = digits.render()
    assert (np.random.get_state()[1] == before).all()  # the global generator is not used
    return images


@pytest.fixture
def quick(monkeypatch, rendered):
    """Render once for all tests, and write a tenth of the images."""
    monkeypatch.setattr(digits, "render", lambda: [values[::10] for values in rendered])


def test_pixels_are_the_same_everywhere(rendered):
    images, _ = rendered
    assert images.shape == (1797, 32, 32) and images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest() == PIXELS


def test_split_is_fixed_and_stratified(tmp_path, rendered):
    folder = tmp_path / "digits"
    digits.build_digits(folder)
    content = (folder / digits.SPLIT_FILE).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SPLIT
    split, totals = json.loads(content), Counter(rendered[1].tolist())
    for part, share in {"train": 0.5, "val": 0.2, "test": 0.3}.items():
        counts = Counter(label for _, label, _ in split[part])
        assert all(abs(counts[label] - share * totals[label]) <= 1 for label in range(10))
        for path, _, _ in split[part]:
            pixels = rendered[0][int(Path(path).stem)]
            assert np.array_equal(Image.open(folder / "images" / path), pixels)


def test_build_digits_by_several_processes(tmp_path, quick):
    folder = tmp_path / "data/digits"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(digits.build_digits, [folder] * 4))
    assert len(list((folder / "images").glob("*/*.png"))) == 180
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_unusable_folder_is_named(tmp_path, quick):
    (tmp_path / "notes.txt").touch()
    for folder in (tmp_path, tmp_path / "notes.txt/digits"):  # other content, not writable
        with pytest.raises(OSError, match=f"{folder} .*--root_path"):
            digits.build_digits(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_first_use_draws_the_same(tmp_path, monkeypatch, rendered):
    """Importing scikit-learn draws from Python's generator, in the process that makes them."""
    monkeypatch.setattr(digits, "render", lambda: random.random() and rendered)
    monkeypatch.setenv("HOME", str(tmp_path))
    draws = []
    for _ in range(2):
        random.seed(3)
        draws.append(build_dataset("digits", None, 1))
    assert draws[0] == draws[1] and len(draws[0].train_x) == 10
    assert (tmp_path / ".cache/so/digits" / digits.SPLIT_FILE).is_file()
    assert draws[0].fingerprint == dataset_fingerprint("digits", None)
