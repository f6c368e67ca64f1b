"""Reading images: disks that fail for a moment, gray pictures of many bits, pictures to convert."""

import errno
import os

import numpy as np
import pytest
from dataset_helpers import write_image
from PIL import Image

from datasets import transforms
from datasets.__main__ import main as check
from datasets.base import Datum
from datasets.loader import ImageLoader
from datasets.transforms import DISK_ERRORS, detect_gray_range, read_image


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


@pytest.mark.parametrize("code", DISK_ERRORS)
def test_disk_errors_are_retried(image, monkeypatch, code):
    expected, delays = read_image(image), []
    monkeypatch.setattr(transforms.time, "sleep", delays.append)
    fail(monkeypatch, code, 3)
    assert read_image(image) == expected
    assert delays == list(transforms.RETRY_DELAYS[:3])


def test_lasting_error_names_disk(image, monkeypatch):
    monkeypatch.setattr(transforms.time, "sleep", lambda _: None)
    fail(monkeypatch, errno.ESTALE, -1)
    with pytest.raises(OSError, match=f"disk or network failed in reading {image}") as caught:
        read_image(image)
    assert "replace" not in str(caught.value)


def test_checker_blames_the_disk(tmp_path, monkeypatch, capsys):
    for name in "ab":
        for index in range(6):
            write_image(tmp_path / name / f"{index}.png", 0, index)
    monkeypatch.setattr(transforms, "RETRY_DELAYS", (0,))
    fail(monkeypatch, errno.EIO, -1)
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


@pytest.mark.parametrize(
    "content, remedy",
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "it is HEIC or AVIF.*: convert to JPEG"),
        (b"\0" * 128 + b"DICM", "it is DICOM.*: convert to 16-bit PNG"),
    ],
)
def test_other_formats_are_named(tmp_path, content, remedy):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=remedy):
        read_image(tmp_path / "a.jpg")


def test_large_image_names_limit(image, monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 63)
    with pytest.raises(ValueError, match="8x8 pixels.*scale it down to at most 63 pixels"):
        read_image(image)
