"""Draw the second task of the digits study: printed Greek letters, as a folder of class folders.

    python scripts/digits/greek.py --out data/greek
    python main.py --config configs/digits.yaml --dataset data/greek

60 images of each of the 24 lower-case letters, of 32x32 pixels: in the DejaVu and STIX fonts that
matplotlib ships, distorted half as much as in the pre-training of the tiny CLIP, which had these
fonts, but no Greek letter and none of their names. All randomness comes from SEED.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from digits.glyphs import FONTS, draw_characters, render_glyphs

from run_utils import path_arg

CLASSNAMES = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa",
    "lambda", "mu", "nu", "xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi",
    "psi", "omega",
)  # fmt: skip
LETTERS = "αβγδεζηθικλμνξοπρστυφχψω"
GREEK_FONTS = [name for name in FONTS if name.startswith(("DejaVu", "STIX"))]  # others lack Greek
PER_CLASS, STRENGTH, SEED = 60, 0.5, 0


def write_greek(out: Path) -> None:
    """Write the images to out/<letter>/<number>.png."""
    generator = torch.Generator().manual_seed(SEED)
    distances, labels = draw_characters(LETTERS, GREEK_FONTS)
    for label, name in enumerate(CLASSNAMES):
        letter = distances[labels == label]
        fonts = torch.randint(len(letter), (PER_CLASS,), generator=generator)
        images, _ = render_glyphs(letter[fonts], STRENGTH, generator)
        pixels = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()  # (60, 32, 32, 3)
        (out / name).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(out / name / f"{number:02}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=path_arg, default=Path("data/greek"), help="folder to make")
    write_greek(parser.parse_args().out)


if __name__ == "__main__":
    main()
