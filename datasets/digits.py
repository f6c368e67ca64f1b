"""Digits: real handwriting that scikit-learn ships, as an image folder with a split file.

The source is `sklearn.datasets.load_digits`: 1,797 gray images of 8x8 pixels, the test part of
"Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998), UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49, license CC BY 4.0.

There the digits are centered and of one size: the nearest neighbor on raw pixels recognizes 64 % at
one shot, 95 % at sixteen. So each is drawn on a black canvas of 32x32 pixels, with a size, a shift
and a rotation of its own, which leaves 25 and 60 % (test images, mean of ten draws).
"""

import json
import math
import os
import random
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSNAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLIT_FILE = "split_zhou_Digits.json"
CANVAS_SIZE = 32
RENDER_SEED, SPLIT_SEED = 0, 1
MIN_SIZE, MAX_SIZE, MAX_SHIFT, MAX_ANGLE = 18.0, 28.0, 3.0, 15.0  # pixels and degrees


def build_digits(folder: Path) -> None:
    """Make the dataset's folder: images/<class>/<index>.png and the split file.

    It is written under another name, then renamed, so that several processes may do this at once:
    the first one's stays. A folder that cannot be written, or has other content, is an OSError.
    """
    if (folder / SPLIT_FILE).is_file():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            draft = Path(scratch) / folder.name  # has the umask's permissions, unlike the scratch
            _write(draft, *render())
            os.rename(draft, folder)
    except OSError as error:
        if not (folder / SPLIT_FILE).is_file():  # else another process was faster
            remedy = "name another folder, which can be written, with --root_path"
            raise OSError(f"cannot make {folder} ({error.strerror}): {remedy}") from error


def render() -> tuple[np.ndarray, np.ndarray]:
    """Draw the digits of the source, in its order: (1797, 32, 32) uint8; and their labels (1797,).

    Each takes the next four draws of a generator of their own, all uniform.
    """
    from sklearn.datasets import load_digits  # takes a second, and only this dataset needs it

    source, rng = load_digits(), np.random.RandomState(RENDER_SEED)
    images = []
    for digit in source.images:
        size = rng.uniform(MIN_SIZE, MAX_SIZE)
        dx, dy = rng.uniform(-MAX_SHIFT, MAX_SHIFT), rng.uniform(-MAX_SHIFT, MAX_SHIFT)
        angle = rng.uniform(-MAX_ANGLE, MAX_ANGLE)
        images.append(render_digit(digit / 16.0, size, dx, dy, angle))
    return np.stack(images), source.target


def render_digit(digit: np.ndarray, size: float, dx: float, dy: float, angle: float) -> np.ndarray:
    """Draw an image (n, n) of values from 0 to 1 on the black canvas: (32, 32) uint8.

    `size` is its side there, dx and dy are the shift of its center to the right and down from the
    canvas's, in pixels; it is turned counter-clockwise by `angle` degrees.
    """
    n, step = len(digit), len(digit) / size
    cos, sin = math.cos(math.radians(angle)) * step, math.sin(math.radians(angle)) * step
    axis = np.arange(CANVAS_SIZE) - (CANVAS_SIZE - 1) / 2
    x, y = axis[None, :] - dx, axis[:, None] - dy  # (1, 32), (32, 1)
    # Where each canvas pixel's center is in the digit, which gets a black frame of one pixel; what
    # is outside is moved onto the frame.
    framed = np.pad(digit, 1)  # (n + 2, n + 2)
    column = np.clip(cos * x - sin * y + (n + 1) / 2, 0, n + 1)  # (32, 32)
    row = np.clip(sin * x + cos * y + (n + 1) / 2, 0, n + 1)
    left = np.minimum(column.astype(np.int64), n)
    top = np.minimum(row.astype(np.int64), n)
    across, along = column - left, row - top
    upper = framed[top, left] * (1 - across) + framed[top, left + 1] * across
    lower = framed[top + 1, left] * (1 - across) + framed[top + 1, left + 1] * across
    return np.rint(255 * (upper * (1 - along) + lower * along)).astype(np.uint8)


def split_indices(labels: np.ndarray) -> dict[str, list[int]]:
    """Divide images with labels (N,) 50 / 20 / 30 by class; return the indices of each part."""
    rng = random.Random(SPLIT_SEED)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for label in range(len(CLASSNAMES)):
        indices = np.flatnonzero(labels == label).tolist()
        rng.shuffle(indices)
        train, val = round(0.5 * len(indices)), round(0.2 * len(indices))
        parts["train"] += indices[:train]
        parts["val"] += indices[train : train + val]
        parts["test"] += indices[train + val :]
    return parts


def _write(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    split = {}
    for part, indices in split_indices(labels).items():
        split[part] = []
        for index, label in zip(indices, labels[indices].tolist(), strict=True):
            name = CLASSNAMES[label]
            path = folder / "images" / name / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(path)
            split[part].append((f"{name}/{path.name}", label, name))
    (folder / SPLIT_FILE).write_text(json.dumps(split), encoding="utf-8")
