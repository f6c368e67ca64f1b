"""The 70 classes of glyphs that the tiny CLIP is pre-trained on, drawn and distorted.

The ten digits, 52 letters and 8 shapes, in the fonts that matplotlib ships. pretrain.py trains on
them, collect.py measures what is forgotten of them, greek.py draws other letters. `strength` is
that of all distortions, from 0 for none to 1; all randomness comes from a torch generator.
"""

import math
import string
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import reporting  # noqa: F401  (puts the repository on the path)
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Generator, Tensor
from torchvision.transforms import Normalize

from clip import CLIP, OPENAI_MEAN, OPENAI_STD
from datasets.digits import CLASSNAMES as DIGITS

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "arrow")
CHARACTERS = {  # by class name
    **dict(zip(DIGITS, string.digits, strict=True)),
    **{f"capital {letter.lower()}": letter for letter in string.ascii_uppercase},
    **{f"lowercase {letter}": letter for letter in string.ascii_lowercase},
}
CLASSNAMES = (*CHARACTERS, *SHAPES)
COLORS = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.95, 0.9, 0.1),
    "orange": (1.0, 0.55, 0.05),
    "purple": (0.55, 0.1, 0.7),
}
CANVAS = 64  # pixels of a side of a drawn glyph
CAPITAL = 40  # pixels that a capital H is high

normalize = Normalize(OPENAI_MEAN, OPENAI_STD)


def render_glyphs(
    distances: Tensor, strength: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Distort and color glyphs, given as `draw_glyphs` returns them (B, 64, 64).

    Returns:
        Images (B, 3, 32, 32) from 0 to 1, and the index in COLORS of each one's ink (B,).
    """
    ink = random_warp(distances, strength, generator)
    ink = random_affine(random_downsample(ink, strength, generator), strength, generator)
    colors = torch.randint(len(COLORS), (len(ink),), generator=generator)
    return colorize(ink, colors, strength, generator), colors


@torch.no_grad()
def zero_shot_accuracy(
    model: CLIP, images: Tensor, labels: Tensor, classnames: Sequence[str]
) -> float:
    """Return the percent of normalized images that are nearest to their own class's prompt."""
    tokens = model.tokenize([f"a photo of a {name}." for name in classnames])
    texts = F.normalize(model.encode_text(tokens), dim=-1)  # (C, D)
    features = torch.cat([model.encode_image(part) for part in images.split(256)])
    return 100 * ((features @ texts.T).argmax(dim=1) == labels).double().mean().item()


def draw_glyphs() -> tuple[Tensor, Tensor]:
    """Draw every class in every font, the shapes once, class by class.

    Returns:
        Distances to the outline in pixels, positive inside the ink (N, 64, 64): adding to them
        makes a stroke wider. And the labels (N,).
    """
    shapes = torch.stack([to_distances(draw_shape(name)) for name in SHAPES])
    characters, labels = draw_characters("".join(CHARACTERS.values()), FONTS)
    shape_labels = torch.arange(len(CHARACTERS), len(CLASSNAMES))
    return torch.cat([characters, shapes]), torch.cat([labels, shape_labels])


def draw_characters(characters: str, fonts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Draw every character in every font, character by character, as `draw_glyphs` does."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [folder / f"{name}.ttf" for name in fonts]
    distances = []
    for path in filter(Path.is_file, paths):  # cmti10 is missing in older versions of matplotlib
        font = ImageFont.truetype(str(path), 160)
        _, top, _, bottom = font.getbbox("H")
        scale = CAPITAL / (bottom - top)
        inks = [draw_character(character, font, scale) for character in characters]
        distances.append(torch.stack([to_distances(ink) for ink in inks]))
    labels = torch.arange(len(characters)).repeat_interleave(len(distances))
    return torch.stack(distances, dim=1).flatten(0, 1), labels


def to_distances(ink: np.ndarray) -> Tensor:
    """Return the signed distances of all pixels to the outline of ink (64, 64)."""
    return torch.from_numpy(distance_transform_edt(ink) - distance_transform_edt(~ink)).float()


def draw_character(character: str, font: ImageFont.FreeTypeFont, scale: float) -> np.ndarray:
    """Return the ink of a character (64, 64), bool."""
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), character, font=font, fill=255)
    size = [min(max(round(side * scale), 1), CANVAS - 4) for side in image.size]
    canvas = Image.new("L", (CANVAS, CANVAS))
    corner = ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2)
    canvas.paste(image.resize(size, Image.Resampling.BOX), corner)
    return np.asarray(canvas) >= 128


def draw_shape(name: str) -> np.ndarray:
    """Return the ink of one of SHAPES (64, 64), bool, from a formula over the square [-1, 1]²."""
    axis = (np.arange(CANVAS) - (CANVAS - 1) / 2) / (CAPITAL / 2)
    x, y = axis[None, :], axis[:, None]  # y points down
    angle = (np.arctan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
    star = np.hypot(x, y) * (np.cos(angle) + 1.3 * abs(np.sin(angle)))
    heart = (1.2 * x) ** 2 + (1.1 * -y + 0.1 - 0.6 * np.sqrt(abs(x))) ** 2
    shaft, head = (abs(y) <= 0.25) & (x > -1) & (x < 0.2), (x >= 0.1) & (x < 1)
    return {
        "circle": x**2 + y**2 <= 1,
        "square": np.maximum(abs(x), abs(y)) <= 0.9,
        "triangle": (abs(x) <= (y + 1) / 2) & (y <= 0.9),
        "diamond": abs(x) * 1.3 + abs(y) <= 1,
        "star": star <= 1 - 0.55 * abs(angle),
        "heart": heart <= 1,
        "cross": (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
        "arrow": shaft | (head & (abs(y) <= 1 - x)),
    }[name]


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def random_warp(distances: Tensor, strength: float, generator: Generator) -> Tensor:
    """Draw glyphs sheared, wavy, thick or thin, capitals as high as the image: (B, 1, 32, 32)."""
    count = len(distances)
    zoom = 0.76 + strength * uniform(generator, -0.14, 0.14, count)
    aspect = (strength * uniform(generator, -0.3, 0.3, count)).exp()
    slant = strength * uniform(generator, -0.4, 0.4, count)
    turn = strength * uniform(generator, -0.2, 0.2, count)
    zero = torch.zeros(count)
    grid = affine_grid([zoom * aspect, slant * zoom, zero], [turn * zoom, zoom, zero])
    waves = torch.randn(count, 2, 4, 4, generator=generator)
    waves = waves * uniform(generator, 0.0, 0.12 * strength, count, 1, 1, 1)
    waves = F.interpolate(waves, size=32, mode="bicubic", align_corners=False)
    grid = grid + waves.permute(0, 2, 3, 1)
    distances = distances[:, None]  # (B, 1, 64, 64)
    warped = F.grid_sample(distances, grid, padding_mode="border", align_corners=False)
    deepest = warped.amax(dim=(2, 3), keepdim=True)
    wider = (strength * uniform(generator, -2.5, 3.0, count, 1, 1, 1)).maximum(1.0 - deepest)
    return torch.sigmoid((warped + wider) / uniform(generator, 0.4, 1.2, count, 1, 1, 1))


def random_downsample(ink: Tensor, strength: float, generator: Generator) -> Tensor:
    """Pass half of the images (B, 1, 32, 32) through 8x8 pixels, a quarter through 16x16."""
    draw = torch.rand(len(ink), 1, 1, 1, generator=generator) / max(strength, 1e-6)
    for side, low, high in ((8, 0.0, 0.5), (16, 0.5, 0.75)):
        small = F.avg_pool2d(ink, 32 // side)
        coarse = F.interpolate(small, size=32, mode="bilinear", align_corners=False)
        ink = torch.where((draw >= low) & (draw < high), coarse, ink)
    return ink / ink.amax(dim=(2, 3), keepdim=True).clamp(min=0.2)  # thin strokes had faded


def random_affine(ink: Tensor, strength: float, generator: Generator) -> Tensor:
    """Scale, shift and turn images (B, 1, 32, 32) on an empty canvas of the same size."""
    count = len(ink)
    scale = 32 / (24 + strength * uniform(generator, -7, 7, count))
    angle = strength * uniform(generator, -0.3, 0.3, count)
    shift = strength * uniform(generator, -0.2, 0.2, count, 2) * scale[:, None]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    grid = affine_grid([cos, -sin, shift[:, 0]], [sin, cos, shift[:, 1]])
    return F.grid_sample(ink, grid, align_corners=False)


def affine_grid(*rows: list[Tensor]) -> Tensor:
    """Return the sampling grid (B, 32, 32, 2) of 2 x 3 matrices whose entries are given (B,)."""
    matrices = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)  # (B, 2, 3)
    return F.affine_grid(matrices, [len(matrices), 1, 32, 32], align_corners=False)


def colorize(ink: Tensor, colors: Tensor, strength: float, generator: Generator) -> Tensor:
    """Color ink and background with a minimum contrast, and add noise: (B, 3, 32, 32).

    At strength 0 backgrounds are black or white.
    """
    count = len(ink)
    front = torch.tensor(list(COLORS.values()))[colors] + uniform(generator, -0.1, 0.1, count, 3)
    back = uniform(generator, 0.0, 1.0, count, 3)
    plain = (front.mean(dim=1, keepdim=True) < 0.5).float().expand(-1, 3)
    back = torch.where(torch.rand(count, 1, generator=generator) < 1 - strength / 2, plain, back)
    close = (front - back).norm(dim=1, keepdim=True) < 0.6
    back = torch.where(close, (front + 0.5) % 1.0, back)
    front, back = front.clamp(0, 1)[:, :, None, None], back.clamp(0, 1)[:, :, None, None]
    ink = ink * uniform(generator, 1 - 0.3 * strength, 1.0, count, 1, 1, 1)
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    noise = noise * uniform(generator, 0.0, 0.05 * strength, count, 1, 1, 1)
    return (back + (front - back) * ink + noise).clamp(0, 1)
