"""The weights to train (--encoder, --position) and the optimizer (--method).

All methods adapt the same layers under one protocol (`train.train`): same images in the same
order, same schedule, same evaluation. All that differs between them is here.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

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
# The blocks of each tower: of our own CLIP and open_clip's, of timm's and of transformers' models.
BLOCKS = {
    "vision": ("visual.transformer.resblocks", "visual.trunk.blocks"),
    "text": (
        "transformer.resblocks", "text.transformer.resblocks", "text.transformer.encoder.layer",
    ),
}  # fmt: skip
# The matrices of each role in a block: of CLIP's and open_clip's, timm's (ViT and EVA), and BERT's.
ROLES = {
    "query, key and value": (
        "attn.in_proj_weight",
        "attn.qkv.weight", "attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight",
        "attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight",
    ),
    "attention output": (
        "attn.out_proj.weight", "attn.proj.weight", "attention.output.dense.weight",
    ),
    "MLP input": (
        "mlp.c_fc.weight", "mlp.fc1.weight", "mlp.fc1_g.weight", "mlp.fc1_x.weight",
        "intermediate.dense.weight",
    ),
    "MLP output": ("mlp.c_proj.weight", "mlp.fc2.weight", "output.dense.weight"),
}  # fmt: skip
METHODS = ("so", "lora", "adam")
# How the paper's SO chooses its supports and keeps its moments; other values are ablations.
ABLATION_DEFAULTS = dict(
    grad_support="random", moment_support="magnitude", moments="adam", bias_correction="tensor"
)
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
    model: CLIP | nn.Module, encoder: str, position: str, method: str = "so"
) -> dict[str, nn.Parameter]:
    """Freeze a CLIP except for the matrices to adapt, and return these by name.

    In each block these are the matrices of all ROLES; with LoRA, as in CLIP-LoRA, only queries,
    keys and values. Of a ResNet, which has no such blocks, "both" adapts only the text tower.

    Args:
        model: The CLIP.
        encoder: "text", "vision" or "both".
        position, method: A key of POSITIONS, and one of METHODS.

    Raises:
        ValueError: A tower has no such blocks, or LoRA does not know the attention.
    """
    if method == "lora" and not isinstance(model, CLIP):
        raise ValueError(
            "--method lora needs the attention of a CLIP of OpenAI's kind, and open_clip's "
            f"{type(model).__name__} has another: use --method so or adam"
        )
    model.requires_grad_(False)
    modules, weights = dict(model.named_modules()), {}
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    for tower in BLOCKS if encoder == "both" else [encoder]:
        if encoder == "both" and tower == "vision" and hasattr(model.visual, "attnpool"):
            continue  # a ResNet
        stack = next((name for name in BLOCKS[tower] if name in modules), None)
        layers = layer_indices(position, len(modules.get(stack, ())))
        suffixes = [suffix for role in ROLES.values() for suffix in role]
        names = [f"{stack}.{layer}.{suffix}" for layer in layers for suffix in suffixes]
        names = [name for name in names if name in matrices]
        if missing := ROLES.keys() - count_roles(names).keys():
            raise ValueError(
                f"no matrix of {' or '.join(sorted(missing))} is found in the {tower} tower's "
                "blocks (a ResNet has none): use the other --encoder, or another backbone"
            )
        if method == "lora":
            names = [name for name in names if name.endswith(IN_PROJ_SUFFIX)]
        weights.update((name, matrices[name].requires_grad_()) for name in names)
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
        method: "so", "adam" (torch's, on the same matrices), or "lora" (Zanella and Ben Ayed 2024,
            arXiv 2405.18541), which freezes the matrices and gives the model adapters.
        model, weights: As `mark_as_trainable` takes and returns them.
        lr: Learning rate at the start.
        density, T: SO's `density_ratio` and refresh interval.
        rank: Of LoRA's adapters.
        seed: Of SO's supports and of LoRA's adapters.
        sparse_grad: Compute SO's gradients at its support only, where that is drawn at random.
        ablation: Settings of `optimizers.ablations.SOVariant`.
    """
    if method == "lora":
        layers = [name.removesuffix(IN_PROJ_SUFFIX) for name in weights]
        adapters = apply_lora(model, layers, rank, generator=torch.Generator().manual_seed(seed))
        set_dropout(model, True)
        return torch.optim.AdamW(adapters.values(), lr=lr, weight_decay=1e-2)  # as CLIP-LoRA
    if method == "adam":
        return torch.optim.Adam(weights.values(), lr=lr)
    if method != "so":
        raise ValueError(f"method {method!r} has no optimizer; valid: {', '.join(METHODS)}")
    settings = dict(lr=lr, density_ratio=density, T=T, seed=seed)
    if ablation == ABLATION_DEFAULTS:
        optimizer = SO(weights.values(), **settings)
    else:
        optimizer = SOVariant(weights.values(), **settings, **ablation)
    if sparse_grad and ablation["grad_support"] == "random":
        optimizer.sampled_gradients = sample_gradients(model, optimizer)
    return optimizer


def describe_optimizer(
    method: str, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> str:
    """What is trained, in words."""
    (group,) = optimizer.param_groups
    if method == "lora":
        entries = sum(p.numel() for p in group["params"])
        return f"{len(weights)} layers with LoRA adapters, {entries:,} entries to train"
    sizes = [p.numel() for p in weights.values()]
    roles = ", ".join(f"{count} of {role}" for role, count in count_roles(weights).items())
    matrices = f"{len(weights)} matrices ({roles}),\n{sum(sizes):,} entries"
    if method != "so":
        return f"{matrices}, all with Adam's moments"
    density = group["density_ratio"]
    k = sum(max(1, int(size * density)) for size in sizes)
    verb = "reads" if getattr(optimizer, "moments", "") == "none" else "keeps moments for"
    lines = [f"{matrices}, of which SO {verb} {k:,} (density {density:.3g})"]
    if few := sum(size * density < 10 <= size for size in sizes):
        lines.append(f"note: {few} of them keep fewer than ten entries and barely train: lower --s")
    if dense := getattr(getattr(optimizer, "sampled_gradients", None), "dense", None):
        lines.append(f"{len(dense)} gradients stay dense ({next(iter(dense.values()))})")
    return "\n".join(lines)


def count_roles(names: Iterable[str]) -> Counter[str]:
    """How many of the named matrices have each role."""
    return Counter(
        next(role for role, suffixes in ROLES.items() if name.endswith(suffixes)) for name in names
    )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by name; LoRA's adapters, or matrices."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
