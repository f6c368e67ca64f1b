"""Image files of every kind, read as CLIP's own preprocessing would or refused; augmentation."""

import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from datasets.transforms import random_resized_crop_params, read_image, train_transform

FULL = (0.08, 1.0), (3 / 4, 4 / 3)  # torchvision's scale and ratio


def picture(mode="RGB", size=(30, 20), seed=0):
    """A picture of noise in some mode of Pillow's."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    if mode == "P":
        return image.quantize(16)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(noise[..., 1]))
    return image.convert(mode)


def save(form, mode="RGB", **options):
    """A writer of a picture."""
    return lambda path: picture(mode).save(path, form, **options)


def half_jpeg(path):
    picture(size=(200, 200)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture().save(path, "JPEG", exif=exif)


READ = {
    "CMYK": save("JPEG", "CMYK"),
    "gray": save("JPEG", "L"),
    "black and white": save("PNG", "1"),
    "gray with transparency": save("PNG", "LA"),
    "transparency": save("PNG", "RGBA"),
    "palette with transparency": save("PNG", "P", transparency=bytes(range(0, 256, 16))),
    "rotated": rotated,
    "animated GIF": save("GIF", save_all=True, append_images=[picture(seed=1)]),
    "one column": lambda path: picture(size=(1, 300)).save(path, "PNG"),
}


@pytest.mark.parametrize("kind", READ)
def test_read_image_equals_clips_reading(tmp_path, kind):
    path = tmp_path / "image.jpg"  # whatever its extension
    READ[kind](path)
    with Image.open(path) as image:
        image = image.convert("RGBA") if "transparency" in image.info else image
        assert np.array_equal(read_image(path), image.convert("RGB"))


POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
REFUSED = {
    "PostScript": (lambda path: path.write_text(POSTSCRIPT), "none of JPEG"),  # or Ghostscript runs
    "pipe": (os.mkfifo, "it is not a regular file"),
    "half a JPEG": (half_jpeg, "truncated"),
    "page": (lambda path: path.write_text("<!DOCTYPE html>403"), "is a web page, not the file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_read_image_refuses_by_name(tmp_path, kind):
    write, words = REFUSED[kind]
    path = tmp_path / "an image.jpg"
    write(path)
    with pytest.raises(ValueError, match=rf"the image {path} .*{words}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jpg is missing: put it back"):
        read_image(tmp_path / "gone.jpg")


def test_train_transform_is_torchvisions_crop():
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
        assert np.array_equal(plain, expected)
        assert np.array_equal(ours, np.asarray(plain)[:, ::-1] if coins[-1] else plain)
    assert 10 < sum(coins) < 30


@pytest.mark.parametrize("size", [(60, 45), (300, 20)])
def test_crops_have_torchvisions_distribution(size):
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
def test_smallest_images_have_crops(size, ratio):
    for seed in range(5):
        rng = random.Random(seed)
        left, top, right, bottom = random_resized_crop_params(*size, rng, (0.08, 1.0), ratio)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
