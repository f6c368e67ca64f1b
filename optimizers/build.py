"""What --method, --encoder and --position mean: the matrices to adapt, and the optimizer.

All methods adapt the same layers under one protocol (`train.train`): same images in the same
order, same schedule, same evaluation. All that differs between them stands here.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from clip import CLIP
from clip.lora import apply_lora, set_dropout
from optimizers.ablations import SOVariant
from optimizers.SampledGradients import sample_gradients
from optimizers.SparseOptimizer import SO

# Share of the stack of layers that each --position adapts, or how many of its last layers.
POSITIONS: dict[str, tuple[float, float] | int] = {
    "bottom": (0, 1 / 3),
    "mid": (1 / 3, 2 / 3),
    "up": (2 / 3, 1),
    "half-up": (1 / 2, 1),
    "half-bottom": (0, 1 / 2),
    "all": (0, 1),
    "top3": 3,
    "top": 1,
}
TRAINABLE_WEIGHTS = (
    "attn.in_proj_weight",
    "attn.out_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)
METHODS = ("so", "lora", "adam")
# How SO chooses its supports and keeps its moments: the paper's way. Others are ablations.
ABLATION_DEFAULTS = {"grad_support": "random", "moment_support": "magnitude", "moments": "adam"}
LORA_WEIGHT_DECAY = 1e-2  # CLIP-LoRA's
IN_PROJ_SUFFIX = ".in_proj_weight"  # of an attention layer: queries, keys and values


class Method(NamedTuple):
    """A way to adapt a model, ready to train."""

    optimizer: torch.optim.Optimizer
    trained: Mapping[str, nn.Parameter] = {}  # what the optimizer moves, by name in the model
    matrices: Mapping[str, nn.Parameter] = {}  # what then differs; LoRA's within `merged`
    summary: str = ""  # what is trained, in words


def layer_indices(position: str, depth: int) -> range:
    """The layers that a position means in a stack of `depth` layers; at least one.

    Twelve layers: bottom 0-3, mid 4-7, up 8-11, half-bottom 0-5, half-up 6-11, top3 9-11, top 11.
    """
    share = POSITIONS[position]
    if isinstance(share, int):
        return range(max(depth - share, 0), depth)
    start = min(round(share[0] * depth), depth - 1)
    return range(start, max(round(share[1] * depth), start + 1))


def mark_as_trainable(model: CLIP, encoder: str, position: str) -> dict[str, nn.Parameter]:
    """Freeze a CLIP, thaw the matrices to adapt, and return them by name.

    Args:
        model: The CLIP, of whose blocks the attention in_proj and out_proj and the MLP c_fc and
            c_proj weights are meant.
        encoder: "text", "vision" or "both". A ResNet has no such blocks: only text is adapted.
        position: A key of POSITIONS.

    Raises:
        ValueError: Nothing is left to adapt.
    """
    model.requires_grad_(False)
    towers = {"vision": "visual.transformer", "text": "transformer"}
    chosen = {}
    for name in towers.values() if encoder == "both" else [towers[encoder]]:
        if name == towers["vision"] and not hasattr(model.visual, "transformer"):
            continue
        blocks = model.get_submodule(name).resblocks
        for layer in layer_indices(position, len(blocks)):
            for matrix in TRAINABLE_WEIGHTS:
                full_name = f"{name}.resblocks.{layer}.{matrix}"
                chosen[full_name] = model.get_parameter(full_name).requires_grad_()
    if not chosen:
        raise ValueError(
            f"--encoder {encoder}: the image tower is a ResNet, without the transformer blocks "
            "that SO adapts; use --encoder text or both, or a ViT backbone"
        )
    return chosen


def build_optimizer(
    name: str,
    model: nn.Module,
    matrices: Mapping[str, nn.Parameter],
    *,
    lr: float,
    density: float,
    T: int,
    rank: int,
    seed: int,
    sampled: bool = True,
    grad_support: str = ABLATION_DEFAULTS["grad_support"],
    moment_support: str = ABLATION_DEFAULTS["moment_support"],
    moments: str = ABLATION_DEFAULTS["moments"],
) -> Method:
    """Make a method ready to train.

    Args:
        name: "so", "adam" (torch's, on the same matrices), or "lora" (adapters on q, k and v of
            the attention layers among them; Zanella, Ben Ayed 2024, arXiv 2405.18541).
        model: The model that has the matrices; everything else in it is frozen.
        matrices: The matrices that may be adapted, as `mark_as_trainable` returns it.
        lr: Learning rate at the start.
        density: Share of entries that SO keeps moments of.
        T: Steps between two draws of SO's gradient support.
        rank: Rank of LoRA's adapters.
        seed: Seed of SO's supports and LoRA's adapters.
        sampled: Whether SO's gradients are computed at its support alone.
        grad_support: How SO chooses S_g (`optimizers.ablations`); by magnitude it needs whole
            gradients.
        moment_support: How SO chooses S_m (there).
        moments: How SO keeps its moments, if any (there).
    """
    matrices = dict(matrices)
    entries = sum(p.numel() for p in matrices.values())
    of = f"{len(matrices)} matrices, {entries:,} entries"
    if name == "lora":
        matrices = {key: p for key, p in matrices.items() if key.endswith(IN_PROJ_SUFFIX)}
        layers = [key.removesuffix(IN_PROJ_SUFFIX) for key in matrices]
        adapters = apply_lora(model, layers, rank, generator=torch.Generator().manual_seed(seed))
        set_dropout(model, True)
        optimizer = torch.optim.AdamW(adapters.values(), lr=lr, weight_decay=LORA_WEIGHT_DECAY)
        trained = sum(p.numel() for p in adapters.values())
        summary = f"{len(layers)} layers with LoRA of rank {rank}, {trained:,} entries to train"
        return Method(optimizer, adapters, matrices, summary)
    if name == "adam":
        optimizer = torch.optim.Adam(matrices.values(), lr=lr)
        return Method(optimizer, matrices, matrices, f"{of}, all with Adam's moments")
    settings = dict(lr=lr, density_ratio=density, T=T, seed=seed)
    supports = dict(grad_support=grad_support, moment_support=moment_support, moments=moments)
    if supports == ABLATION_DEFAULTS:
        optimizer = SO(matrices.values(), **settings)
    else:
        optimizer = SOVariant(matrices.values(), **supports, **settings)
    if sampled and grad_support == "random":
        sample_gradients(model, optimizer)
    kept = sum(max(1, int(p.numel() * density)) for p in matrices.values())
    keeps = "reads" if moments == "none" else "keeps moments for"
    summary = f"{of}, of which SO {keeps} {kept:,} (density {density:.3g})"
    return Method(optimizer, matrices, matrices, summary)
