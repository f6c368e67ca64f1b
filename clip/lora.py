"""LoRA on the queries, keys and values of CLIP's attention, as CLIP-LoRA defines it.

Papers: E. Hu et al., LoRA, 2021, arXiv 2106.09685; M. Zanella and I. Ben Ayed, CLIP-LoRA, 2024,
arXiv 2405.18541. Each of q, k and v has an adapter A (r, W), B (W, r) of its own, although the
three frozen matrices W0 are packed in one:

    y = W0 x + b + alpha / sqrt(r) * B A dropout(x),    B = 0 at the start

The factor is that of CLIP-LoRA's code (its loralib/layers.py) and of rsLoRA (arXiv 2312.03732); the
LoRA paper has alpha / r. In use:

    params = add_lora(model, ["transformer.resblocks.0.attn"])
    optimizer = torch.optim.AdamW(params.values(), lr=2e-4, weight_decay=1e-2)
    set_dropout(model, True)
    ...  # train
    with merged(model) as matrices:  # what is evaluated, and saved
        ...
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.model import Attention

__all__ = ["apply_lora", "merged_lora", "rows_of", "set_dropout"]

PARTS = "qkv"  # in the order in which Attention packs them
_batch: tuple[int, Tensor | slice] | None = None  # see `rows_of`


class _AdaptedAttention(Attention):
    """What `apply_lora` makes of an Attention; its own `training` says whether dropout is active."""  # noqa: E501

    lora_scaling: float
    lora_dropout: float
    lora_merged = False  # whether in_proj_weight holds the adapters' products

    def project(self, x: Tensor, parts: slice) -> tuple[Tensor, ...]:
        """`Attention.project`, with its adapter's output added to each part."""
        projected = super().project(x, parts)
        if self.lora_merged:
            return projected
        return tuple(y + self._adapt(x, p) for y, p in zip(projected, PARTS[parts], strict=True))

    def _adapt(self, x: Tensor, part: str) -> Tensor:
        """The output of a part's adapter: (B, L, W) -> (B, heads, L, W / heads)."""
        a, b = self.adapter(part)
        x = F.linear(self._drop(x), a)  # (B, L, r)
        x = F.linear(self.lora_scaling * x, b)  # (B, L, W)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout of x (B, L, W); of rows of a shared batch, what one process would have drawn."""
        if not self.training or _batch is None:
            return F.dropout(x, self.lora_dropout, self.training)
        count, rows = _batch
        return x * F.dropout(x.new_ones(count, *x.shape[1:]), self.lora_dropout)[rows]

    def adapter(self, part: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of "q", "k" or "v"."""
        return getattr(self, f"lora_{part}_a"), getattr(self, f"lora_{part}_b")

    def merged_weight(self) -> Tensor:
        """The packed matrix with the adapters' products added, a new tensor: (3 W, W)."""
        products = [b @ a for a, b in map(self.adapter, PARTS)]
        return self.in_proj_weight + self.lora_scaling * torch.cat(products)


def apply_lora(
    model: nn.Module,
    layers: Iterable[str],
    rank: int = 2,
    alpha: float = 1.0,
    dropout: float = 0.25,
    generator: torch.Generator | None = None,
) -> dict[str, nn.Parameter]:
    """Freeze a model and give attention layers of it adapters, which alone are trained.

    They become parameters of the model, `<layer>.lora_q_a` and so on. B is zero, so that the
    output is still exactly the model's own. Dropout is off until `set_dropout`.

    Args:
        model: Anything with `clip.model.Attention` in it.
        layers: Full names of the attention layers to adapt.
        rank: r, of each adapter.
        alpha: Scales what is added, by alpha / sqrt(rank).
        dropout: Share of an adapter's inputs that is zeroed in training; drawn by torch's global
            generator, for q, k and v separately.
        generator: Draws A; None is torch's global one on the CPU, whatever the model's device.

    Returns:
        The adapters by full name: A (rank, W), uniform within 1 / sqrt(W); B (W, rank).

    Raises:
        ValueError: rank, alpha or dropout is out of range; there are no layers; one of them is no
            Attention, or has adapters already.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, not {rank!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, not {alpha!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout!r}")
    attentions = {name: model.get_submodule(name) for name in layers}
    if not attentions:
        raise ValueError("there is no attention layer to adapt: layers is empty")
    for name, attn in attentions.items():
        if type(attn) is not Attention:
            raise ValueError(f"{name} must be an Attention without adapters, not {type(attn)}")

    model.requires_grad_(False)
    added = {}
    for name, attn in attentions.items():
        weight = attn.in_proj_weight
        width = weight.shape[1]
        attn.__class__ = _AdaptedAttention
        attn.lora_scaling, attn.lora_dropout = alpha / math.sqrt(rank), dropout
        for part in PARTS:
            a = torch.empty(rank, width, device=generator.device if generator else "cpu")
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            for kind, value in (("a", a), ("b", torch.zeros(width, rank))):
                key = f"lora_{part}_{kind}"
                attn.register_parameter(key, nn.Parameter(value.to(weight)))
                added[f"{name}.{key}"] = attn.get_parameter(key)
    return added


def set_dropout(model: nn.Module, active: bool) -> None:
    """Switch dropout before a model's adapters on or off; all else in it keeps its mode."""
    for attn in _adapted(model).values():
        attn.train(active)


@contextmanager
def rows_of(count: int, rows: Tensor | slice) -> Iterator[None]:
    """For a while, inputs are some rows of a batch of `count` that several processes share.

    Each of them then draws the dropout of the whole batch, and all generators stay equal.
    """
    global _batch
    before, _batch = _batch, (count, rows)
    try:
        yield
    finally:
        _batch = before


@contextmanager
def merged_lora(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Add a model's adapters to its matrices for a while, for evaluation; not to be trained in.

    Dropout plays no part then, and a forward pass costs what it costs without adapters. Nothing
    is done to a model without adapters, nor within another `merged`.

    Yields:
        The adapted matrices by name, (3 W, W) each; they remain valid afterwards, when the model
        has its own back bit for bit.
    """
    layers = {name: attn for name, attn in _adapted(model).items() if not attn.lora_merged}
    matrices, originals = {}, {}
    try:
        for name, attn in layers.items():
            weight = attn.in_proj_weight
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                matrices[f"{name}.in_proj_weight"] = product = attn.merged_weight()
            originals[name] = weight.data
            weight.data, attn.lora_merged = product, True
        yield matrices
    finally:
        for name, original in originals.items():
            layers[name].in_proj_weight.data, layers[name].lora_merged = original, False


def _adapted(model: nn.Module) -> dict[str, _AdaptedAttention]:
    """The layers of a model that have adapters, by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _AdaptedAttention)}
