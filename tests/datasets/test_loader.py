"""Images to batches: the order, the crop, the cache, and failures while a run goes on."""

import gc
import random
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import call_main
from dataset_helpers import make_dataset
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import resized_crop

import clip
import datasets.loader
from clip.preprocess import normalize
from datasets import Datum
from datasets.loader import ImageCache, ImageLoader
from datasets.transforms import (
    MAX_PIXELS,
    random_resized_crop_params,
    read_image,
    train_transform,
)

FULL = (0.08, 1.0), (3 / 4, 4 / 3)


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


def test_test_images_are_clips_own_input(items):
    for (images, labels), start in zip(ImageLoader(16).test_batches(items, 4), (0, 4), strict=True):
        expected = [clip.image_transform(16)(Image.open(i.impath)) for i in items[start:][:4]]
        torch.testing.assert_close(normalize(images), torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert labels.tolist() == list(range(start, min(start + 4, 7)))


def test_images_are_normalised_by_the_mean_and_deviation_given():
    images = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    normal = normalize(images, mean=(0.2, 0.1, 0.0), std=(1.0, 0.5, 0.1))
    torch.testing.assert_close(normal[0, :, 0, 0], torch.tensor([0.0, 0.2, 2.0]))


def test_an_epoch_has_each_image_once_and_says_where_it_ends(items):
    batches = take(ImageLoader(16), items, 6)
    assert [ends for _, ends in batches] == [False, False, True] * 2
    orders = []
    for epoch in (batches[:3], batches[3:]):
        orders.append([label for (_, labels), _ in epoch for label in labels.tolist()])
        assert sorted(orders[-1]) == list(range(7))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("cache_mb", [0, 0.01, 10])
@pytest.mark.parametrize("start", [0, 4])
def test_images_depend_on_neither_workers_nor_cache_nor_where_one_begins(
    items, workers, cache_mb, start
):
    state = random.getstate(), torch.get_rng_state()
    expected = take(ImageLoader(16), items, 7)[start:]
    found = take(ImageLoader(16, workers, cache_mb), items, 7 - start, start=start)
    for ((a, b), c), ((d, e), f) in zip(expected, found, strict=True):
        assert torch.equal(a, d) and torch.equal(b, e) and c == f
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_an_image_is_decoded_once_while_the_budget_lasts(items, monkeypatch):
    opened = []
    monkeypatch.setattr(
        datasets.loader, "read_image", lambda path: opened.append(path) or read_image(path)
    )
    take(ImageLoader(16, cache_mb=10), items, 9)
    assert len(opened) == 7
    take(ImageLoader(16, cache_mb=0), items, 9)
    assert len(opened) == 7 + 21


def test_the_cache_never_exceeds_its_budget():
    cache = ImageCache(1)
    for number in range(10):
        cache.get(number, lambda: np.zeros(300_000, np.uint8), lambda array: array.nbytes)
    assert len(cache.kept) == 3 and cache.left >= 0


def test_augmentation_is_torchvisions_crop_of_the_box_drawn_mirrored_by_a_coin():
    image = Image.effect_noise((60, 45), 80).convert("RGB")
    coins = []
    for seed in range(40):
        rng = random.Random(seed)
        left, top, right, bottom = random_resized_crop_params(60, 45, rng, *FULL)
        expected = resized_crop(
            image, top, left, bottom - top, right - left, [16, 16], InterpolationMode.BICUBIC
        )
        coins.append(rng.random() < 0.5)
        ours = train_transform(image, 16, random.Random(seed), *FULL, flip=True)
        plain = train_transform(image, 16, random.Random(seed), *FULL, flip=False)
        assert np.array_equal(plain, np.asarray(expected))
        assert np.array_equal(ours, plain[:, ::-1] if coins[-1] else plain)
    assert 10 < sum(coins) < 30


@pytest.mark.parametrize("size", [(60, 45), (300, 20)])
def test_boxes_have_torchvisions_distribution(size):
    rng = random.Random(0)
    image = torch.empty(3, size[1], size[0])
    ours, theirs = [], []
    for _ in range(4000):
        left, top, right, bottom = random_resized_crop_params(*size, rng, *FULL)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        ours.append((top, left, bottom - top, right - left))
        theirs.append(RandomResizedCrop.get_params(image, *map(list, FULL)))
    ours, theirs = np.array(ours, float), np.array(theirs, float)
    assert np.allclose(ours.mean(0), theirs.mean(0), atol=0.06 * max(size))
    assert np.allclose(ours.std(0), theirs.std(0), atol=0.06 * max(size))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (9.0, 9.0), (0.1, 0.1)])
def test_the_smallest_images_have_crops(size, ratio):
    for seed in range(5):
        left, top, right, bottom = random_resized_crop_params(
            *size, random.Random(seed), (0.08, 1.0), ratio
        )
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        image = Image.new("RGB", size)
        cropped = train_transform(image, 8, random.Random(seed), (0.08, 1.0), ratio, True)
        assert cropped.shape == (8, 8, 3)


def test_an_image_too_thin_to_be_enlarged_is_named(tmp_path):
    path = tmp_path / "thread.png"
    Image.new("L", (1, 20_000)).save(path)
    with pytest.raises(ValueError, match="thread.png is too thin .1x20000 pixels."):
        next(ImageLoader(100).test_batches([Datum(str(path), 0, "x")], 1))
    assert 20_000 * 100**2 > MAX_PIXELS


# Failures while a run goes on


@pytest.fixture
def command(tmp_path):
    """Arguments of a run whose images are read anew each time, by threads."""
    make_dataset("eurosat", tmp_path)
    torch.save(random_state_dict({**TINY_VIT, "context_length": 48}), tmp_path / "tiny.pt")
    return [
        "--root_path", tmp_path, "--dataset", "eurosat", "--backbone", tmp_path / "tiny.pt",
        "--n_iters", 40, "--batch_size", 2, "--num_workers", 3, "--cache_mb", 0,
        "--save_path", tmp_path / "out",
    ]  # fmt: skip


def image_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("images")]


@pytest.mark.parametrize(
    ("workers", "spoil", "words"),
    [
        (
            0,
            lambda path: path.write_bytes(path.read_bytes()[:400]),
            "cannot be read .*: replace it",
        ),
        (3, Path.unlink, "is missing: put it back"),
    ],
    ids=["cut", "deleted"],
)
def test_an_image_spoilt_while_training_ends_the_run_with_its_name(
    command, monkeypatch, workers, spoil, words
):
    before = image_threads()
    seen, lock = {}, threading.Lock()

    def read(path):
        with lock:
            seen[path] = seen.get(path, 0) + 1
            if seen[path] == 5:  # long after the test images were read
                spoil(Path(path))
        return read_image(path)

    monkeypatch.setattr(datasets.loader, "read_image", read)
    status, _, err = call_main(*command, "--num_workers", workers)
    assert status == 2
    assert re.fullmatch(rf"main.py: error: the image .*jpg {words}", err.splitlines()[-1])
    gc.collect()
    deadline = time.monotonic() + 20
    while len(image_threads()) > len(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(image_threads()) == len(before)


def test_a_thread_that_runs_out_of_memory_names_the_image(command, monkeypatch):
    def no_memory(_):
        raise MemoryError

    monkeypatch.setattr("datasets.transforms.convert_image_to_rgb", no_memory)
    status, _, err = call_main(*command)
    assert status == 2 and re.search(r"the image .*jpg cannot be read \(MemoryError\)", err)


def test_threads_that_cannot_be_started_are_said_to_be_too_many(command, monkeypatch):
    start = threading.Thread.start

    def refuse(thread):
        if thread.name.startswith("images"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    status, _, err = call_main(*command)
    assert status == 2 and "cannot be started (can't start new thread): lower --num_workers" in err
