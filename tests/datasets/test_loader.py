"""Images to batches: what is read, how it is cropped, what is kept, what is refused."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import resized_crop

import clip
from datasets import Item
from datasets.images import augment, normalise, random_box, read_image
from datasets.loader import ImageCache, Loader

FULL = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.fixture
def items(tmp_path):
    made = []
    for number in range(7):
        path = tmp_path / f"{number}.png"
        Image.effect_noise((40 + number, 30), 60).convert("RGB").save(path)
        made.append(Item(str(path), number, str(number)))
    return made


def take(loader, items, count, **options):
    batches = loader.train_batches(items, 3, seed=5, **options)
    return [batch for _, batch in zip(range(count), batches, strict=False)]


def test_test_images_are_clips_own_input(items):
    for (images, labels), start in zip(Loader(16).test_batches(items, 4), (0, 4), strict=True):
        expected = [clip.make_preprocess(16)(Image.open(i.impath)) for i in items[start:][:4]]
        torch.testing.assert_close(normalise(images), torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert labels.tolist() == list(range(start, min(start + 4, 7)))


def test_an_epoch_has_each_image_once_and_says_where_it_ends(items):
    batches = take(Loader(16), items, 6)
    assert [ends for _, ends in batches] == [False, False, True] * 2
    orders = []
    for epoch in (batches[:3], batches[3:]):
        orders.append([label for (_, labels), _ in epoch for label in labels.tolist()])
        assert sorted(orders[-1]) == list(range(7))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("cache_mb", [0, 0.01, 10])
def test_images_depend_on_neither_workers_nor_cache(items, workers, cache_mb):
    state = random.getstate(), torch.get_rng_state()
    expected = take(Loader(16), items, 7)
    for ((a, b), _), ((c, d), _) in zip(
        expected, take(Loader(16, workers, cache_mb), items, 7), strict=True
    ):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_an_image_is_decoded_once_while_the_budget_lasts(items, monkeypatch):
    import datasets.loader

    opened = []
    monkeypatch.setattr(
        datasets.loader, "read_image", lambda path: opened.append(path) or read_image(path)
    )
    take(Loader(16, cache_mb=10), items, 9)
    assert len(opened) == 7
    take(Loader(16, cache_mb=0), items, 9)
    assert len(opened) == 7 + 21


def test_the_cache_never_exceeds_its_budget():
    cache = ImageCache(1)
    for number in range(10):
        cache.get(number, lambda: np.zeros(300_000, np.uint8), lambda array: array.nbytes)
    assert len(cache.kept) == 3 and cache.left >= 0


def test_augmentation_is_torchvisions_crop_of_the_box_drawn():
    image = Image.effect_noise((60, 45), 80).convert("RGB")
    for seed in range(20):
        rng = random.Random(seed)
        left, top, right, bottom = random_box(60, 45, rng, *FULL)
        expected = resized_crop(
            image, top, left, bottom - top, right - left, [16, 16], InterpolationMode.BICUBIC
        )
        mirrored = rng.random() < 0.5
        ours = augment(image, 16, random.Random(seed), *FULL, flip=True)
        plain = augment(image, 16, random.Random(seed), *FULL, flip=False)
        assert np.array_equal(plain, np.asarray(expected))
        assert np.array_equal(ours, plain[:, ::-1] if mirrored else plain)


@pytest.mark.parametrize("size", [(60, 45), (300, 20)])
def test_boxes_have_torchvisions_distribution(size):
    rng = random.Random(0)
    torch.manual_seed(0)
    image = torch.empty(3, size[1], size[0])
    ours, theirs = [], []
    for _ in range(4000):
        left, top, right, bottom = random_box(*size, rng, *FULL)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        ours.append((top, left, bottom - top, right - left))
        theirs.append(RandomResizedCrop.get_params(image, *map(list, FULL)))
    ours, theirs = np.array(ours, float), np.array(theirs, float)
    assert np.allclose(ours.mean(0), theirs.mean(0), atol=0.06 * max(size))
    assert np.allclose(ours.std(0), theirs.std(0), atol=0.06 * max(size))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_an_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "broken image.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken image.png cannot be read"):
        read_image(path)
    with pytest.raises(ValueError, match="broken image.png cannot be read"):
        take(Loader(16, workers=2), [Item(str(path), 0, "x")], 1)


def test_truncated_and_missing_images_are_named(items, tmp_path):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((60, 60), 80).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="cut.jpg cannot be read"):
        read_image(path)
    with pytest.raises(FileNotFoundError, match="gone.jpg is missing"):
        read_image(tmp_path / "gone.jpg")
