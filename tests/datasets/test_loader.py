"""Images to batches: order, test images, cache, and failures in the middle of a run."""

import gc
import random
import re
import threading
from pathlib import Path

import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import call_main
from dataset_helpers import make_dataset
from PIL import Image

import datasets.loader
from clip.preprocess import image_transform, normalize
from datasets import Datum
from datasets.loader import ImageLoader
from datasets.transforms import read_image


@pytest.fixture
def items(tmp_path):
    made = []
    for number in range(7):
        path = tmp_path / f"{number}.png"
        Image.effect_noise((40 + number, 30), 60).convert("RGB").save(path)
        made.append(Datum(str(path), number, str(number)))
    return made


def take(loader, items, count, **options):
    batches = loader.train_batches(items, 3, seed=5, **options)
    return [batch for _, batch in zip(range(count), batches, strict=False)]


def test_test_batches_are_clips_input(items):
    for (images, labels), start in zip(ImageLoader(16).test_batches(items, 4), (0, 4), strict=True):
        expected = [image_transform(16)(Image.open(i.impath)) for i in items[start:][:4]]
        torch.testing.assert_close(normalize(images), torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert labels.tolist() == list(range(start, min(start + 4, 7)))


def test_epochs_have_each_image_once(items):
    batches = take(ImageLoader(16), items, 6)
    assert [last for _, last in batches] == [False, False, True] * 2
    orders = []
    for epoch in (batches[:3], batches[3:]):
        orders.append([label for (_, labels), _ in epoch for label in labels.tolist()])
        assert sorted(orders[-1]) == list(range(7))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("cache_mb", [0, 0.01, 10])
@pytest.mark.parametrize("start", [0, 4])
def test_images_depend_on_position_only(items, num_workers, cache_mb, start):
    state = random.getstate(), torch.get_rng_state()
    expected = take(ImageLoader(16), items, 7)[start:]
    batches = take(ImageLoader(16, num_workers, cache_mb), items, 7 - start, start=start)
    for ((a, b), c), ((d, e), f) in zip(expected, batches, strict=True):
        assert torch.equal(a, d) and torch.equal(b, e) and c == f
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_local_slice_chooses_images(items):
    full = take(ImageLoader(16), items, 3)
    part = take(ImageLoader(16), items, 3, local_slice=lambda count: slice(1, count))
    for ((images, labels), _), ((local, all_labels), _) in zip(full, part, strict=True):
        assert torch.equal(local, images[1:]) and torch.equal(all_labels, labels)
    (empty,) = ImageLoader(16).test_batches([], 4)  # a process without test images
    assert empty[0].shape == (0, 3, 16, 16) and empty[1].shape == (0,)


def test_images_are_decoded_once(items, monkeypatch):
    opened = []
    monkeypatch.setattr(
        datasets.loader, "read_image", lambda path, _: opened.append(path) or read_image(path)
    )
    take(ImageLoader(16, cache_mb=10), items, 9)
    assert len(opened) == 7
    take(ImageLoader(16, cache_mb=0), items, 9)
    assert len(opened) == 7 + 21


def test_cache_stays_in_budget(items):
    loader = ImageLoader(16, cache_mb=0.016)  # an image has 4 * 30 * 40 bytes and more
    take(loader, items, 9)
    assert len(loader.images) == 3 and loader.bytes_left >= 0


# Failures in the middle of a run


@pytest.fixture
def command(tmp_path):
    """Arguments of a run whose images are decoded again each time, by threads."""
    make_dataset("eurosat", tmp_path)
    torch.save(random_state_dict({**TINY_VIT, "context_length": 48}), tmp_path / "tiny.pt")
    return [
        "--root_path", tmp_path, "--dataset", "eurosat", "--backbone", tmp_path / "tiny.pt",
        "--n_iters", 40, "--batch_size", 2, "--num_workers", 3, "--cache_mb", 0,
        "--save_path", tmp_path / "out",
    ]  # fmt: skip


def image_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("images")}


CUT = (lambda path: path.write_bytes(path.read_bytes()[:400]), "cannot be read .*: replace it")
DELETED = (Path.unlink, "is missing: put it back")


@pytest.mark.parametrize(("num_workers", "fault"), [(0, CUT), (3, DELETED)], ids=["cut", "deleted"])
def test_lost_training_image_is_named(command, monkeypatch, num_workers, fault):
    spoil, words = fault
    before = image_threads()
    seen, lock = {}, threading.Lock()

    def read(path, _):
        with lock:
            seen[path] = seen.get(path, 0) + 1
            if seen[path] == 5:  # long after the test images were read
                spoil(Path(path))
        return read_image(path)

    monkeypatch.setattr(datasets.loader, "read_image", read)
    status, _, err = call_main(*command, "--num_workers", num_workers)
    assert status == 2
    assert re.fullmatch(rf"main.py: error: the image .*jpg {words}", err.splitlines()[-1])
    gc.collect()
    for thread in image_threads() - before:
        thread.join(timeout=60)
        assert not thread.is_alive()
