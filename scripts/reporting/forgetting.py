"""Forgetting: what adaptation leaves of the tiny CLIP's pre-training.

It is measured on the printed signs of the pre-training (signs.py), distorted anew from a seed that
pre-training did not use.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from signs import CLASSNAMES, COLOURS, bend, coarsen, draw_signs, normalise, paint, place
from torch import Tensor

import clip
from optimizers.delta import apply_delta, read_delta
from reporting.experiments import Cells, Planned, variant

PER_CLASS, SEED = 20, 0  # images of each printed sign, and the seed of their distortions


def printed_signs() -> tuple[Tensor, Tensor]:
    """Draw a test set of the pre-training classes: images (N, 3, 32, 32) normalised, labels (N,).

    Distorted as in pre-training, from a seed that it did not use.
    """
    generator = torch.Generator().manual_seed(SEED)
    distances, labels = draw_signs()
    chosen = []
    for label in range(len(CLASSNAMES)):
        rows = (labels == label).nonzero().flatten()
        chosen.append(rows[torch.randint(len(rows), (PER_CLASS,), generator=generator)])
    rows = torch.cat(chosen)
    ink = place(coarsen(bend(distances[rows], 1.0, generator), 1.0, generator), 1.0, generator)
    colours = torch.randint(len(COLOURS), (len(rows),), generator=generator)
    return normalise(paint(ink, colours, 1.0, generator)), labels[rows]


@torch.no_grad()
def remembered(model: clip.CLIP, images: Tensor, labels: Tensor) -> float:
    """Percent of images of printed signs that are nearest to their own prompt."""
    tokens = model.tokenize([f"a photo of a {name}." for name in CLASSNAMES])
    texts = F.normalize(model.encode_text(tokens), dim=-1)  # (70, D)
    features = torch.cat([model.encode_image(part) for part in images.split(256)])
    return 100 * ((features @ texts.T).argmax(dim=1) == labels).double().mean().item()


def forgetting(planned: Iterable[Planned]) -> tuple[float, Cells]:
    """Accuracy on the printed signs before adaptation, and after it by finished run."""
    images, labels = printed_signs()
    model, _ = clip.load("ViT-Tiny/8", "cpu")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = remembered(model, images, labels)
    after: Cells = {}
    for run in planned:
        if not run.is_done:
            continue
        model.load_state_dict(base)
        apply_delta(model, read_delta(run.folder / "weights.safetensors"))
        key = run.config.shots, variant(run.config.method, vars(run.config))
        after.setdefault(key, {})[run.config.seed] = remembered(model, images, labels)
    return before, dict(sorted(after.items()))
