"""What --method names: what is trained of a frozen CLIP, and by which optimizer.

All methods adapt the same layers under one protocol (`train.train`): same images in the same
order, same schedule, same evaluation. What differs stands here.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from optimizers.ablations import AblatedSO
from optimizers.lora import add_lora, set_dropout
from optimizers.sampled import sample_gradients
from optimizers.SparseOptimizer import SO

METHODS = ("so", "lora", "adam")
SUPPORTS = {"grad_support": "random", "moment_support": "magnitude"}  # the paper's
LORA_WEIGHT_DECAY = 1e-2  # CLIP-LoRA's
PACKED = ".in_proj_weight"  # of an attention layer: queries, keys and values


class Method(NamedTuple):
    """A way to adapt a model, ready to train."""

    optimizer: torch.optim.Optimizer
    matrices: dict[str, nn.Parameter]  # the weights it changes, by name; LoRA's within `merged`
    summary: str  # what is trained, in words


def make_method(
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
    grad_support: str = SUPPORTS["grad_support"],
    moment_support: str = SUPPORTS["moment_support"],
) -> Method:
    """Make a method ready to train.

    Args:
        name: "so", "adam" (torch's, on the same matrices), or "lora" (adapters on q, k and v of
            the attention layers among them; Zanella, Ben Ayed 2024, arXiv 2405.18541).
        model: Whose matrices they are; all else in it is frozen.
        matrices: What may be adapted, as `train.select_matrices` returns it.
        lr: Learning rate at the start.
        density: Share of entries that SO keeps moments of.
        T: Steps between two draws of SO's gradient support.
        rank: Of LoRA's adapters.
        seed: Of SO's supports.
        sampled: Whether SO's gradients are computed at its support alone.
        grad_support: How SO chooses S_g (`optimizers.ablations`); by magnitude it needs whole
            gradients.
        moment_support: How SO chooses S_m (there).
    """
    matrices = dict(matrices)
    entries = sum(p.numel() for p in matrices.values())
    of = f"{len(matrices)} matrices, {entries:,} entries"
    if name == "lora":
        matrices = {key: p for key, p in matrices.items() if key.endswith(PACKED)}
        layers = [key.removesuffix(PACKED) for key in matrices]
        adapters = add_lora(model, layers, rank, generator=torch.Generator().manual_seed(seed))
        set_dropout(model, True)
        optimizer = torch.optim.AdamW(adapters.values(), lr=lr, weight_decay=LORA_WEIGHT_DECAY)
        trained = sum(p.numel() for p in adapters.values())
        summary = f"{len(layers)} layers with LoRA of rank {rank}, {trained:,} entries to train"
        return Method(optimizer, matrices, summary)
    if name == "adam":
        optimizer = torch.optim.Adam(matrices.values(), lr=lr)
        return Method(optimizer, matrices, f"{of}, all with Adam's moments")
    settings = dict(lr=lr, density_ratio=density, T=T, seed=seed)
    supports = dict(grad_support=grad_support, moment_support=moment_support)
    if supports == SUPPORTS:
        optimizer = SO(matrices.values(), **settings)
    else:
        optimizer = AblatedSO(matrices.values(), **supports, **settings)
    if sampled and grad_support == "random":
        sample_gradients(model, optimizer)
    kept = sum(max(1, int(p.numel() * density)) for p in matrices.values())
    summary = f"{of}, of which SO keeps moments for {kept:,} (density {density:.3g})"
    return Method(optimizer, matrices, summary)
