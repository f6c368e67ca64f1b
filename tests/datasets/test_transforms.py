"""Image files of every kind, read as CLIP's own preprocessing would or refused; augmentation."""

import errno
import os
import random

import numpy as np
import pytest
import torch
from dataset_helpers import write_image
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from datasets import Datum, transforms
from datasets.__main__ import main as check
from datasets.loader import ImageLoader
from datasets.transforms import detect_gray_range, random_resized_crop_params, read_image

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


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture().save(path, "JPEG", exif=exif)


READ = {
    "CMYK": save("JPEG", "CMYK"),
    "gray": save("JPEG", "L"),
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


def half_jpeg(path):
    picture(size=(200, 200)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
REFUSED = {
    "PostScript": (lambda path: path.write_text(POSTSCRIPT), "none of JPEG"),  # or Ghostscript runs
    "half a JPEG": (half_jpeg, "truncated"),
    "page": (lambda path: path.write_text("<!DOCTYPE html>403"), "is a web page, not the file"),
    "HEIC": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic\0"), "AVIF.*: convert to JPEG"),
    "DICOM": (lambda path: path.write_bytes(b"\0" * 128 + b"DICM"), "DICOM.*: convert to 16-bit"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_read_image_refuses_by_name(tmp_path, kind):
    write, words = REFUSED[kind]
    path = tmp_path / "an image.jpg"
    write(path)
    with pytest.raises((ValueError, OSError), match=rf"the image {path} .*{words}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_augmentation_is_torchvisions_crop(tmp_path):
    image = Image.effect_noise((60, 45), 80).convert("RGB")
    image.save(tmp_path / "a.png")
    items, coins = [Datum(str(tmp_path / "a.png"), 0, "a")], []
    for seed in range(40):
        rng = random.Random(f"{seed} 0 0")
        left, top, right, bottom = random_resized_crop_params(60, 45, rng, *FULL)
        expected = resized_crop(
            image, top, left, bottom - top, right - left, [16, 16], InterpolationMode.BICUBIC
        )
        expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        coins.append(rng.random() < 0.5)
        for flip in (True, False):
            ((images, _), _) = next(ImageLoader(16).train_batches(items, 1, seed, flip=flip))
            assert torch.equal(images[0], expected.flip(-1) if flip and coins[-1] else expected)
    assert 10 < sum(coins) < 30


@pytest.mark.parametrize("size", [(60, 45), (300, 20)])
def test_crops_have_torchvisions_distribution(size):
    rng, image = random.Random(0), torch.empty(3, size[1], size[0])
    ours, theirs = [], []
    for _ in range(4000):
        left, top, right, bottom = random_resized_crop_params(*size, rng, *FULL)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        ours.append((top, left, bottom - top, right - left))
        theirs.append(RandomResizedCrop.get_params(image, *map(list, FULL)))
    for statistic in (np.mean, np.std):
        assert np.allclose(statistic(ours, 0), statistic(theirs, 0), atol=0.06 * max(size))


@pytest.mark.parametrize("size, ratio", [((1, 1), 1.0), ((1, 50), 9.0), ((2, 3), 0.1)])
def test_smallest_images_have_crops(size, ratio):
    for seed in range(5):
        box = random_resized_crop_params(*size, random.Random(seed), FULL[0], (ratio, ratio))
        assert 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]


# Disks that fail for a moment, gray pictures of many bits, large pictures


@pytest.fixture
def image(tmp_path):
    write_image(tmp_path / "a.png", 0, 0)
    return tmp_path / "a.png"


def fail(monkeypatch, code, times):
    """Let the next openings of images fail with an error of the system."""
    left, real = [times], Image.open

    def flaky(path, *args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Image, "open", flaky)


@pytest.mark.parametrize("code", transforms.DISK_ERRORS)
def test_disk_errors_are_retried(image, monkeypatch, code):
    expected, delays = read_image(image), []
    monkeypatch.setattr(transforms.time, "sleep", delays.append)
    fail(monkeypatch, code, 3)
    assert read_image(image) == expected
    assert delays == list(transforms.RETRY_DELAYS[:3])


def test_lasting_error_names_disk(tmp_path, monkeypatch, capsys):
    for name in "ab":
        for index in range(6):
            write_image(tmp_path / name / f"{index}.png", 0, index)
    monkeypatch.setattr(transforms, "RETRY_DELAYS", (0,))
    fail(monkeypatch, errno.ESTALE, -1)
    with pytest.raises(OSError, match="disk or network failed in reading") as caught:
        read_image(tmp_path / "a/0.png")
    assert "replace" not in str(caught.value)
    assert check(["--dataset", str(tmp_path), "--decode"]) == 1
    out = capsys.readouterr().out
    assert "the disk or network failed" in out and "cannot be decoded" not in out


# Kind of picture: its values, and the range that the files of such a data set have.
RAMP = np.linspace(0, 1, 64).reshape(8, 8)
GRAYS = {
    "10 bits": ((RAMP * 1000).astype(np.uint16), (0, 1023)),
    "12 bits": ((RAMP * 4095).astype(np.uint16), (0, 4095)),
    "16 bits": ((RAMP * 65535).astype(np.uint16), (0, 65535)),
    "Hounsfield": ((RAMP * 3000 - 1000).astype(np.int32), (-1000, 2000)),
    "Hounsfield in floats": ((RAMP * 3000 - 1000).astype(np.float32), (-1000, 2000)),
}


@pytest.mark.parametrize("kind", GRAYS)
def test_gray_range_becomes_eight_bits(tmp_path, kind):
    values, expected = GRAYS[kind]
    path = str(tmp_path / "a.tif")
    Image.fromarray(values).save(path)
    low, high = detect_gray_range([path, str(tmp_path / "missing.png")])
    assert (low, high) == expected
    pixels = np.asarray(read_image(path, (low, high)), float)[..., 0]
    assert np.abs(pixels - (values - low) / (high - low) * 255).max() <= 0.51
    ((batch, _),) = ImageLoader(8).test_batches([Datum(path, 0, "", (low, high))], 1)
    assert np.array_equal(batch[0, 0].numpy(), pixels)


def test_eight_bits_have_no_range(image):
    assert detect_gray_range([str(image)]) is None
    assert read_image(image, (0, 4095)) == read_image(image)


def test_large_image_names_limit(image, monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 63)
    with pytest.raises(ValueError, match="8x8 pixels.*scale it down to at most 63 pixels"):
        read_image(image)
