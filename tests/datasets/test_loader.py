"""Images to batches: order, test images, cache, and images that are lost in the middle of a run."""

import random
from pathlib import Path

import pytest
import torch
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


@pytest.mark.parametrize("num_workers, cache_mb, start", [(1, 0.01, 0), (4, 0, 4), (4, 10, 4)])
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
    for cache_mb, count in ((10, 7), (0, 21)):
        opened.clear()
        take(ImageLoader(16, cache_mb=cache_mb), items, 9)
        assert len(opened) == count


def test_cache_stays_in_budget(items):
    loader = ImageLoader(16, cache_mb=0.016)  # an image has 4 * 30 * 40 bytes and more
    take(loader, items, 9)
    assert len(loader.images) == 3 and loader.bytes_left >= 0


@pytest.mark.parametrize("num_workers", [0, 3])
def test_lost_training_image_is_named(items, num_workers):
    batches = ImageLoader(16, num_workers).train_batches(items, 3, seed=5)
    next(batches)
    for item in items:
        Path(item.impath).unlink()
    with pytest.raises(FileNotFoundError, match=r"the image .*\.png is missing: put it back"):
        list(zip(range(20), batches, strict=False))
