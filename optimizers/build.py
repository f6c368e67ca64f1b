"""The weights to train (--encoder, --position) and the optimizer (--method).

All methods adapt the same layers under one protocol (`train.train`): same images in the same
order, same schedule, same evaluation. All that differs between them is here.
"""

from collections.abc import Mapping

import torch
from torch import nn

from clip import CLIP
from clip.lora import apply_lora, set_dropout
from optimizers.ablations import SOVariant
from optimizers.SampledGradients import sample_gradients
from optimizers.SparseOptimizer import SO

# The part of the stack of layers that each --position adapts, or how many of its last layers.
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
# How the paper's SO chooses its supports and keeps its moments; other values are ablations.
ABLATION_DEFAULTS = {"grad_support": "random", "moment_support": "magnitude", "moments": "adam"}
LORA_WEIGHT_DECAY = 1e-2  # CLIP-LoRA's
IN_PROJ_SUFFIX = ".in_proj_weight"  # queries, keys and values of an attention layer


def layer_indices(position: str, depth: int) -> range:
    """The layers of a stack of `depth` layers that a position names; at least one.

    Twelve layers: bottom 0-3, mid 4-7, up 8-11, half-bottom 0-5, half-up 6-11, top3 9-11, top 11.
    """
    part = POSITIONS[position]
    if isinstance(part, int):
        return range(max(depth - part, 0), depth)
    start = min(round(part[0] * depth), depth - 1)
    return range(start, max(round(part[1] * depth), start + 1))


def mark_as_trainable(
    model: CLIP, encoder: str, position: str, method: str = "so"
) -> dict[str, nn.Parameter]:
    """Freeze a CLIP except for the weight matrices to adapt, and return these by name.

    Args:
        model: The CLIP. In each block the attention's in_proj and out_proj and the MLP's c_fc and
            c_proj weights are adapted; with LoRA, as in CLIP-LoRA, only queries, keys and values.
        encoder: "text", "vision" or "both". A ResNet has no such blocks: only its text tower is
            adapted.
        position: A key of POSITIONS.
        method: One of METHODS.

    Raises:
        ValueError: Nothing is left to adapt.
    """
    model.requires_grad_(False)
    towers = {"vision": "visual.transformer", "text": "transformer"}
    weights = {}
    for tower in towers.values() if encoder == "both" else [towers[encoder]]:
        if tower == towers["vision"] and not hasattr(model.visual, "transformer"):
            continue
        blocks = model.get_submodule(tower).resblocks
        for layer in layer_indices(position, len(blocks)):
            for suffix in TRAINABLE_WEIGHTS:
                if method != "lora" or suffix.endswith(IN_PROJ_SUFFIX):
                    name = f"{tower}.resblocks.{layer}.{suffix}"
                    weights[name] = model.get_parameter(name).requires_grad_()
    if not weights:
        raise ValueError(
            f"--encoder {encoder}: the image tower is a ResNet, without the transformer blocks "
            "that SO adapts; use --encoder text or both, or a ViT backbone"
        )
    return weights


def build_optimizer(
    method: str,
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    *,
    lr: float,
    density: float,
    T: int,
    rank: int,
    seed: int,
    sparse_grad: bool = True,
    ablation: Mapping[str, str] = ABLATION_DEFAULTS,
) -> torch.optim.Optimizer:
    """Build the optimizer of a method.

    Args:
        method: "so", "adam" (torch's, on the same matrices), or "lora" (adapters on queries, keys
            and values; Zanella and Ben Ayed 2024, arXiv 2405.18541), which freezes the matrices
            and gives the model the adapters as parameters.
        model: The model that has the weights.
        weights: As `mark_as_trainable` returns them.
        lr: Learning rate at the start.
        density: Density of SO, the fraction of entries whose moments are kept.
        T: Refresh interval of SO's gradient support, in steps.
        rank: Rank of LoRA's adapters.
        seed: Seed of SO's supports and LoRA's adapters.
        sparse_grad: Compute SO's gradients at its gradient support only.
        ablation: Settings of `optimizers.ablations.SOVariant`. A gradient support by magnitude
            needs whole gradients.
    """
    if method == "lora":
        layers = [name.removesuffix(IN_PROJ_SUFFIX) for name in weights]
        adapters = apply_lora(model, layers, rank, generator=torch.Generator().manual_seed(seed))
        set_dropout(model, True)
        return torch.optim.AdamW(adapters.values(), lr=lr, weight_decay=LORA_WEIGHT_DECAY)
    if method == "adam":
        return torch.optim.Adam(weights.values(), lr=lr)
    settings = dict(lr=lr, density_ratio=density, T=T, seed=seed)
    if ablation == ABLATION_DEFAULTS:
        optimizer = SO(weights.values(), **settings)
    else:
        optimizer = SOVariant(weights.values(), **settings, **ablation)
    if sparse_grad and ablation["grad_support"] == "random":
        sample_gradients(model, optimizer)
    return optimizer


def describe_optimizer(
    method: str, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> str:
    """What is trained, in words."""
    groups = optimizer.param_groups
    if method == "lora":
        entries = sum(p.numel() for group in groups for p in group["params"])
        return f"{len(weights)} layers with LoRA adapters, {entries:,} entries to train"
    matrices = f"{len(weights)} matrices, {sum(p.numel() for p in weights.values()):,} entries"
    if method == "adam":
        return f"{matrices}, all with Adam's moments"
    density = groups[0]["density_ratio"]
    k = sum(max(1, int(p.numel() * density)) for p in weights.values())
    verb = "reads" if getattr(optimizer, "moments", "") == "none" else "keeps moments for"
    few = sum(p.numel() * density < 10 <= p.numel() for p in weights.values())
    note = (
        f"\nnote: {few} of them keep fewer than ten entries and barely train: lower --s"
        if few
        else ""
    )
    return f"{matrices}, of which SO {verb} {k:,} (density {density:.3g}){note}"


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by name; LoRA's adapters, or matrices."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
