"""Digits: real handwriting that scikit-learn ships, as an image folder with a split file.

The source is `sklearn.datasets.load_digits`: 1,797 grey images of 8x8 pixels, the test part of
"Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998), UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0. Changes made here: the
placing below.

As they lie in the file the digits are centred and of one size, and the nearest neighbour on raw
pixels solves them from a few examples: 64 % at one shot, 95 % at sixteen. So each is placed, once
and for all, on a black canvas of 32x32 pixels. Digit i of the file takes the i-th four draws of
`np.random.RandomState(0)`, each uniform, in this order:

    size      18 to 28     side of the 8x8 image on the canvas, in pixels
    right     -3 to 3      shift of its centre from the canvas's centre, in pixels
    down      -3 to 3
    turn     -15 to 15     degrees, counter-clockwise

Pixels are interpolated bilinearly, ink is bright, and grey 16 of the file becomes 255. The nearest
neighbour on raw pixels then has 25 / 34 / 39 / 50 / 60 % at 1 / 2 / 4 / 8 / 16 shots (of the test
part, mean of ten draws).

The split is stratified, with a seed of its own: within each class the images are shuffled by
`random.Random(1)`, 50 % train, 20 % validation, the rest test, rounded per class: 898 / 359 / 540.
"""

import json
import math
import os
import random
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.base import DatasetDir, RawSample, Split

CLASSNAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLIT_FILE = "split_zhou_Digits.json"
CANVAS = 32
PLACING_SEED, SPLIT_SEED = 0, 1
SIZES, SHIFT, TURN = (18.0, 28.0), 3.0, 15.0


def build_digits(folder: str | os.PathLike) -> None:
    """Make the data set's folder: images/<class>/<index>.png and the split file.

    Everything is written to a scratch folder beside it, which takes the name when it is whole, so
    that any number of processes may do this at once: the first one's folder stays. A folder that
    already holds the split file is left as it is.

    Args:
        folder: The folder to make; its parents are made too.

    Raises:
        OSError: The folder cannot be written, or holds something else already.
        ValueError: scikit-learn is not installed.
    """
    folder = Path(folder)
    if (folder / SPLIT_FILE).is_file():
        return
    _refuse_other_content(folder)
    images, labels = render()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            draft = Path(scratch) / folder.name  # has the umask's permissions, unlike the scratch
            _write(draft, images, labels)
            with suppress(OSError):
                folder.rmdir()  # an empty one, which Windows would not replace
            try:
                os.rename(draft, folder)
            except OSError:
                if not (folder / SPLIT_FILE).is_file():  # else another process was faster
                    raise
    except OSError as error:
        raise OSError(
            f"cannot write the digits to {folder} ({error.strerror or error}): "
            "name a folder that can be written with --root_path"
        ) from error


def read_digits(source: DatasetDir) -> Split:
    """The split that `prepare` will write, for whoever asks before it did.

    Raises:
        ValueError: scikit-learn is not installed, or the folder holds something else already.
    """
    try:
        _refuse_other_content(source.folder)
    except OSError as error:
        raise source.error(str(error)) from error
    labels = _load().target
    return Split("the digits", **_entries(labels), names=dict(enumerate(CLASSNAMES)))


def render() -> tuple[np.ndarray, np.ndarray]:
    """Place every digit of the source on its canvas.

    Returns:
        Images (1797, 32, 32) uint8 in the source's order, and their labels (1797,).

    Raises:
        ValueError: scikit-learn is not installed.
    """
    source = _load()
    draws = np.random.RandomState(PLACING_SEED)
    canvases = []
    for digit in source.images:
        size = draws.uniform(*SIZES)
        right, down = draws.uniform(-SHIFT, SHIFT), draws.uniform(-SHIFT, SHIFT)
        canvases.append(render_digit(digit / 16.0, size, right, down, draws.uniform(-TURN, TURN)))
    return np.stack(canvases), source.target


def split_indices(labels: np.ndarray) -> dict[str, list[int]]:
    """Which images are in which part of the fixed, stratified split.

    Args:
        labels: Label of each image, in the source's order (N,).

    Returns:
        Indices of the images, by class and shuffled within it, under "train", "val" and "test".
    """
    rng = random.Random(SPLIT_SEED)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for label in range(len(CLASSNAMES)):
        indices = [index for index, of in enumerate(labels) if of == label]
        rng.shuffle(indices)
        train, val = round(0.5 * len(indices)), round(0.2 * len(indices))
        parts["train"] += indices[:train]
        parts["val"] += indices[train : train + val]
        parts["test"] += indices[train + val :]
    return parts


def render_digit(
    digit: np.ndarray, size: float, right: float, down: float, turn: float
) -> np.ndarray:
    """Draw a small image on the black canvas, scaled, shifted and turned.

    Args:
        digit: Square image (n, n) of values from 0 to 1.
        size: Its side on the canvas, in pixels.
        right: Shift of its centre from the canvas's centre, in pixels.
        down: The same, downwards.
        turn: Degrees, counter-clockwise.

    Returns:
        The canvas (32, 32), uint8.
    """
    n, step = len(digit), len(digit) / size
    cos, sin = math.cos(math.radians(turn)) * step, math.sin(math.radians(turn)) * step
    axis = np.arange(CANVAS) - (CANVAS - 1) / 2
    x, y = axis[None, :] - right, axis[:, None] - down  # (1, 32), (32, 1)
    # Where each canvas pixel's centre falls in the digit, which gets a black frame of one pixel;
    # what falls outside is moved onto the frame.
    framed = np.pad(digit, 1)  # (n + 2, n + 2)
    column = np.clip(cos * x - sin * y + (n + 1) / 2, 0, n + 1)  # (32, 32)
    row = np.clip(sin * x + cos * y + (n + 1) / 2, 0, n + 1)
    left = np.minimum(column.astype(np.int64), n)
    top = np.minimum(row.astype(np.int64), n)
    across, along = column - left, row - top
    upper = framed[top, left] * (1 - across) + framed[top, left + 1] * across
    lower = framed[top + 1, left] * (1 - across) + framed[top + 1, left + 1] * across
    return np.rint(255 * (upper * (1 - along) + lower * along)).astype(np.uint8)


def _load() -> Any:
    """The source, as scikit-learn gives it."""
    try:
        from sklearn.datasets import load_digits  # takes a second, and only this data set needs it
    except ImportError as error:
        raise ValueError(
            f"the digits come from scikit-learn, which cannot be imported ({error}): "
            "pip install scikit-learn, or name another --dataset"
        ) from error
    return load_digits()


def _entries(labels: np.ndarray) -> dict[str, list[RawSample]]:
    """The entries of each part."""
    entries = [
        (f"{CLASSNAMES[n]}/{i:04d}.png", int(n), CLASSNAMES[n]) for i, n in enumerate(labels)
    ]
    return {part: [entries[i] for i in chosen] for part, chosen in split_indices(labels).items()}


def _refuse_other_content(folder: Path) -> None:
    """Raise OSError where a folder holds something that is not ours."""
    if folder.is_dir() and any(folder.iterdir()):
        raise OSError(
            f"{folder} exists but holds no {SPLIT_FILE}: move it away to have the digits made "
            "there, or name another folder with --root_path"
        )


def _write(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images and split file into a new folder."""
    for name in CLASSNAMES:
        (folder / "images" / name).mkdir(parents=True)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(folder / "images" / CLASSNAMES[label] / f"{index:04d}.png")
    (folder / SPLIT_FILE).write_text(json.dumps(_entries(labels)), encoding="utf-8")
