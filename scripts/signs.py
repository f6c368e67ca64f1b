"""Printed signs: the 70 classes that the tiny CLIP is pre-trained on, drawn and distorted.

The ten digits, 52 letters and 8 shapes, in the fonts that matplotlib ships. pretrain_tiny.py trains
on them, digits_study.py measures what is forgotten of them.
"""

import math
import string
from pathlib import Path

import matplotlib
import numpy as np
import reporting  # noqa: F401  (which puts the repository on the path)
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from clip import OPENAI_MEAN, OPENAI_STD
from datasets import digits

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "arrow")
SIGNS = {  # class name to the character that draws it
    **dict(zip(digits.CLASSNAMES, string.digits, strict=True)),
    **{f"capital {letter.lower()}": letter for letter in string.ascii_uppercase},
    **{f"lowercase {letter}": letter for letter in string.ascii_lowercase},
}
CLASSNAMES = (*SIGNS, *SHAPES)
COLOURS = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.95, 0.9, 0.1),
    "orange": (1.0, 0.55, 0.05),
    "purple": (0.55, 0.1, 0.7),
}
GLYPH = 64  # pixels of a side of a drawn sign
CAPITAL = 40  # pixels that a capital H is high


def draw_signs() -> tuple[Tensor, Tensor]:
    """Draw every class in every font, the shapes once, class by class.

    Returns:
        Distances to the outline in pixels, positive inside the ink (N, 64, 64), and the labels
        (N,). Distances, because a stroke gets wider or thinner by adding to them.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, labels = [], []
    paths = [folder / f"{name}.ttf" for name in FONTS]
    for path in filter(Path.is_file, paths):  # cmti10 is missing in older versions of matplotlib
        font = ImageFont.truetype(str(path), 160)
        _, top, _, bottom = font.getbbox("H")
        factor = CAPITAL / (bottom - top)
        for label, sign in enumerate(SIGNS.values()):
            left, top, right, bottom = font.getbbox(sign)
            image = Image.new("L", (right - left, bottom - top))
            ImageDraw.Draw(image).text((-left, -top), sign, font=font, fill=255)
            size = [min(max(round(side * factor), 1), GLYPH - 4) for side in image.size]
            canvas = Image.new("L", (GLYPH, GLYPH))
            corner = ((GLYPH - size[0]) // 2, (GLYPH - size[1]) // 2)
            canvas.paste(image.resize(size, Image.Resampling.BOX), corner)
            images.append(np.asarray(canvas) >= 128)
            labels.append(label)
    for label, name in enumerate(SHAPES, start=len(SIGNS)):
        images.append(draw_shape(name))
        labels.append(label)
    inked = np.stack(images)
    distances = [distance_transform_edt(ink) - distance_transform_edt(~ink) for ink in inked]
    order = torch.tensor(labels).argsort(stable=True)
    return torch.from_numpy(np.stack(distances)).float()[order], torch.tensor(labels)[order]


def draw_shape(name: str) -> np.ndarray:
    """Ink (64, 64), bool, of one of the shapes, from a formula over the square [-1, 1]²."""
    axis = (np.arange(GLYPH) - (GLYPH - 1) / 2) / (CAPITAL / 2)
    x, y = axis[None, :], axis[:, None]  # y points down
    if name == "circle":
        return x**2 + y**2 <= 1
    if name == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9
    if name == "triangle":
        return (abs(x) <= (y + 1) / 2) & (y <= 0.9)
    if name == "diamond":
        return abs(x) * 1.3 + abs(y) <= 1
    if name == "star":
        angle = (np.arctan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
        return np.hypot(x, y) * (np.cos(angle) + 1.3 * abs(np.sin(angle))) <= 1 - 0.55 * abs(angle)
    if name == "heart":
        return (1.2 * x) ** 2 + (1.1 * -y + 0.1 - 0.6 * np.sqrt(abs(x))) ** 2 <= 1
    if name == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1)
    if name == "arrow":
        return ((abs(y) <= 0.25) & (x > -1) & (x < 0.2)) | (
            (x >= 0.1) & (abs(y) <= 1 - x) & (x < 1)
        )
    raise ValueError(f"no shape {name!r}: there are {', '.join(SHAPES)}")


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Uniform draws from [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def bend(distances: Tensor, hard: float, generator: torch.Generator) -> Tensor:
    """Ink of signs as a restless hand might draw them: sheared, wavy, thick or thin.

    Args:
        distances: Signed distances to the outline (B, 64, 64).
        hard: From 0 for none of it to 1 for all.
        generator: Source of all draws.

    Returns:
        Ink (B, 1, 32, 32) from 0 to 1; a capital about fills the height.
    """
    count = len(distances)
    zoom = 0.76 + hard * uniform(generator, -0.14, 0.14, count)
    aspect = (hard * uniform(generator, -0.3, 0.3, count)).exp()
    slant = hard * uniform(generator, -0.4, 0.4, count)
    turn = hard * uniform(generator, -0.2, 0.2, count)
    zero = torch.zeros(count)
    affine = torch.stack(
        [
            torch.stack([zoom * aspect, slant * zoom, zero], dim=1),
            torch.stack([turn * zoom, zoom, zero], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    grid = F.affine_grid(affine, (count, 1, 32, 32), align_corners=False)
    waves = torch.randn(count, 2, 4, 4, generator=generator)
    waves = waves * uniform(generator, 0.0, 0.12 * hard, count, 1, 1, 1)
    waves = F.interpolate(waves, size=32, mode="bicubic", align_corners=False)
    grid = grid + waves.permute(0, 2, 3, 1)
    drawn = F.grid_sample(
        distances[:, None], grid, padding_mode="border", align_corners=False
    )  # (B, 1, 32, 32)
    deepest = drawn.amax(dim=(2, 3), keepdim=True)
    wider = (hard * uniform(generator, -2.5, 3.0, count, 1, 1, 1)).maximum(1.0 - deepest)
    return torch.sigmoid((drawn + wider) / uniform(generator, 0.4, 1.2, count, 1, 1, 1))


def coarsen(ink: Tensor, hard: float, generator: torch.Generator) -> Tensor:
    """Pass half of the images through 8x8 pixels and a quarter through 16x16 when `hard` is 1."""
    draw = torch.rand(len(ink), 1, 1, 1, generator=generator) / max(hard, 1e-6)
    for side, low, high in ((8, 0.0, 0.5), (16, 0.5, 0.75)):
        small = F.avg_pool2d(ink, 32 // side)
        coarse = F.interpolate(small, size=32, mode="bilinear", align_corners=False)
        ink = torch.where((draw >= low) & (draw < high), coarse, ink)
    return ink / ink.amax(dim=(2, 3), keepdim=True).clamp(min=0.2)  # thin strokes had faded


def place(ink: Tensor, hard: float, generator: torch.Generator) -> Tensor:
    """Scale, shift and turn images (B, 1, 32, 32) on an empty canvas of the same size."""
    count = len(ink)
    scale = 32 / (24 + hard * uniform(generator, -7, 7, count))
    turn = hard * uniform(generator, -0.3, 0.3, count)
    shift = hard * uniform(generator, -0.2, 0.2, count, 2) * scale[:, None]
    cos, sin = turn.cos() * scale, turn.sin() * scale
    affine = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], dim=1
    )
    grid = F.affine_grid(affine, ink.shape, align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)


def paint(ink: Tensor, colours: Tensor, hard: float, generator: torch.Generator) -> Tensor:
    """Colour the ink and the ground, with a minimum contrast, and add noise.

    Args:
        ink: Images (B, 1, 32, 32).
        colours: Index into COLOURS of each image's ink (B,).
        hard: From 0, for grounds that are black or white, to 1.
        generator: Source of all draws.

    Returns:
        Images (B, 3, 32, 32) from 0 to 1.
    """
    count = len(ink)
    table = torch.tensor(list(COLOURS.values()))
    front = table[colours] + uniform(generator, -0.1, 0.1, count, 3)
    back = uniform(generator, 0.0, 1.0, count, 3)
    plain = (front.mean(dim=1, keepdim=True) < 0.5).float().expand(-1, 3)
    back = torch.where(torch.rand(count, 1, generator=generator) < 1 - hard / 2, plain, back)
    close = (front - back).norm(dim=1, keepdim=True) < 0.6
    back = torch.where(close, (front + 0.5) % 1.0, back)
    front, back = front.clamp(0, 1)[:, :, None, None], back[:, :, None, None]
    ink = ink * uniform(generator, 1 - 0.3 * hard, 1.0, count, 1, 1, 1)
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    noise = noise * uniform(generator, 0.0, 0.05 * hard, count, 1, 1, 1)
    return (back + (front - back) * ink + noise).clamp(0, 1)


def normalise(images: Tensor) -> Tensor:
    """CLIP's normalisation of images (B, 3, 32, 32) from 0 to 1."""
    return (images - torch.tensor(OPENAI_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_STD).view(
        3, 1, 1
    )
