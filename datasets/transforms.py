"""Images: decoding, augmentation, batches.

Batches are uint8, a quarter of the size of float images on their way to a GPU, where
`clip.preprocess.normalize` makes them a model's input.
"""

import math
import os
import random
import stat
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from clip.preprocess import convert_image_to_rgb
from utils import detect_placeholder_file

# By content, whatever a file is called. Pillow knows more; for EPS it would run Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**30 // 4 // 3  # of an image, and of what it is resized to before the crop
# At this size Pillow would warn and go on.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

Batch = tuple[Tensor, Tensor]  # images (B, 3, R, R) uint8, labels (B,) int64


def read_image(path: str | os.PathLike) -> Image.Image:
    """Decode an image file completely, into RGB: the first picture if there are several.

    As in CLIP's own preprocessing, the rotation that a camera noted in EXIF data is not applied.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")  # opening a pipe would wait for ever
        with Image.open(path, formats=FORMATS) as image:
            if not 0 < image.width * image.height <= MAX_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            image.load()
            return convert_image_to_rgb(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the image {path} is missing: put it back") from error
    except Exception as error:  # a damaged file makes Pillow fail in any way
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            if placeholder := detect_placeholder_file(path):
                raise ValueError(f"the image {path} is {placeholder}") from error
            reason = f"none of {', '.join(FORMATS)}"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise ValueError(f"the image {path} cannot be read ({reason}): replace it") from error


def train_transform(
    image: Image.Image,
    resolution: int,
    rng: random.Random,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> Image.Image:
    """Crop at random, resize bicubically to (R, R), mirror with probability 1/2."""
    image = image.crop(random_resized_crop_params(image.width, image.height, rng, scale, ratio))
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def random_resized_crop_params(
    width: int,
    height: int,
    rng: random.Random,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw a crop of random area and shape: (left, top, right, bottom).

    The distribution is the one of torchvision's RandomResizedCrop: an area uniform in `scale`, a
    shape log-uniform in `ratio`, ten tries, then the largest centered box of an allowed shape.
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


def collate(images: Sequence[Image.Image], labels: Sequence[int], resolution: int) -> Batch:
    """Stack images (R, R) to (B, 3, R, R), channels last in memory, and labels to (N,)."""
    pixels = np.empty((len(images), resolution, resolution, 3), np.uint8)
    for row, image in zip(pixels, images, strict=True):
        row[:] = np.asarray(image)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(labels, dtype=torch.int64)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device, asynchronously if that is possible."""
    if device.type == "cuda":
        batch = batch[0].pin_memory(), batch[1].pin_memory()
    return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)
