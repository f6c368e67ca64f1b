"""Images: decoding, the gray values of a dataset, and random crops."""

import errno
import math
import random
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from clip.preprocess import convert_image_to_rgb
from datasets.base import GrayRange
from datasets.files import PathLike
from utils import detect_placeholder_file

# By content, whatever a file is called. Pillow knows more; for EPS it would run Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**30 // 4 // 3  # of an image: Pillow's limit, at which it would warn and go on
# What disks and networks answer for a moment; the image itself may be good.
DISK_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
RETRY_DELAYS = (0.1, 0.4, 1.5, 4.0, 0.0)  # in seconds, after each attempt
# Formats of pictures that FORMATS lacks: where a file has which bytes, and what to do.
OTHER_FORMATS = {
    "HEIC or AVIF": (4, b"ftyp", "convert to JPEG"),
    "DICOM": (128, b"DICM", "convert to 16-bit PNG, for example with dcmtk's dcm2img"),
}
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
Range = tuple[float, float]  # least and largest
Batch = tuple[Tensor, Tensor]  # images (B, 3, R, R) uint8, labels (B,) int64
T = TypeVar("T")


def read_image(path: PathLike, gray_range: GrayRange | None = None) -> Image.Image:
    """Decode an image file completely, into RGB: the first picture if there are several.

    As in CLIP's own preprocessing, the rotation that a camera noted in EXIF data is not applied.
    `gray_range` becomes black to white in gray pictures of more than eight bits.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is not an image, or damaged.
        OSError: The disk or the network failed, for six seconds.
    """
    return retry_disk_errors(partial(_decode, path, gray_range), path)


def retry_disk_errors(read: Callable[[], T], path: PathLike) -> T:
    """Return what `read` returns; where the disk or network fails, try again for six seconds."""
    for delay in RETRY_DELAYS:
        try:
            return read()
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            reason = error.strerror
        time.sleep(delay)
    problem = f"the disk or network failed in reading {path} ({reason})"
    raise OSError(f"{problem}: the image may be good; check the connection, and start again")


def _decode(path: PathLike, gray_range: GrayRange | None) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            image.load()
            return convert_image_to_rgb(image, gray_range)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the image {path} is missing: put it back") from error
    except Exception as error:  # a damaged file makes Pillow fail in any way
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        reason, remedy = str(error) or type(error).__name__, "replace it"
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is {detect_placeholder_file(path) or 'none of ' + ', '.join(FORMATS)}"
            if other := detect_other_format(path):
                reason, remedy = f"it is {other}", OTHER_FORMATS[other][2]
        elif "pixels" in reason:  # from twice the limit on Pillow refuses
            remedy = f"scale it down to at most {MAX_PIXELS:,} pixels"
        raise ValueError(f"the image {path} cannot be read ({reason}): {remedy}") from error


def detect_other_format(path: PathLike) -> str | None:
    """Return which of OTHER_FORMATS a file has, if any."""
    with open(path, "rb") as file:
        start = file.read(132)
    for name, (offset, signature, _) in OTHER_FORMATS.items():
        if start[offset:].startswith(signature):
            return name
    return None


def detect_gray_range(paths: Sequence[str]) -> GrayRange | None:
    """Return the range of the gray pictures of more than eight bits among files, if there are any.

    It is [0, 2^bits - 1] for 8, 10, 12, 14 or 16 bits, or from the least to the largest value where
    some are negative or larger. Floating point from 0 on has each picture's own range.
    """
    low, high = 0.0, -1.0
    for path in paths:
        with suppress(Exception), Image.open(path, formats=FORMATS) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                values = np.asarray(image, dtype=np.float64)
                if image.mode != "F" or values.min() < 0:
                    low, high = min(low, values.min()), max(high, values.max())
    if high < 0 <= low or not math.isfinite(high - low):
        return None
    limits = [2**bits - 1 for bits in (8, 10, 12, 14, 16) if 2**bits > high]
    return (float(low), float(high)) if low < 0 or not limits else (0.0, float(limits[0]))


def random_resized_crop_params(
    width: int, height: int, rng: random.Random, scale: Range, ratio: Range
) -> tuple[int, int, int, int]:
    """Draw a crop of random area and shape: (left, top, right, bottom).

    As torchvision's RandomResizedCrop does: an area uniform in `scale`, a shape log-uniform in
    `ratio`, ten tries, then the largest centered box of an allowed shape.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    shape = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * shape) or 1), min(height, round(width / shape) or 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
