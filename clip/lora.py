"""LoRA on the queries, keys and values of CLIP's attention, as CLIP-LoRA defines it.

Papers: E. Hu et al., LoRA, 2021, arXiv 2106.09685; M. Zanella and I. Ben Ayed, CLIP-LoRA, 2024,
arXiv 2405.18541. Each of q, k and v has its own adapter A (r, W), B (W, r), although the three
frozen matrices W0 are packed in one:

    y = W0 x + b + alpha / sqrt(r) * B A dropout(x),    B = 0 at the start

The factor is that of CLIP-LoRA's code and of rsLoRA (arXiv 2312.03732); LoRA's is alpha / r.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.model import Attention

QKV = "qkv"  # in the order in which Attention packs them


def apply_lora(
    model: nn.Module,
    layers: Iterable[str],
    rank: int = 2,
    alpha: float = 1.0,
    dropout: float = 0.25,
    generator: torch.Generator | None = None,
) -> dict[str, nn.Parameter]:
    """Freeze a model and add trainable adapters to attention layers of it.

    The adapters become parameters of the model, `<layer>.lora_q_a` and so on. Dropout is off until
    `set_dropout`.

    Args:
        layers: Full names of the layers to adapt, of `clip.model.Attention`.
        rank, alpha: The adapters' output is scaled by alpha / sqrt(rank).
        dropout: Probability of zeroing an adapter's input in training; drawn by torch's global
            generator, for q, k and v separately.
        generator: Draws A; None is torch's global one on the CPU, whatever the model's device.

    Returns:
        The adapters by full name: A (rank, W), uniform within 1 / sqrt(W); B (W, rank), zero.
    """
    model.requires_grad_(False)
    added = {}
    for name in layers:
        attn = model.get_submodule(name)
        weight, width = attn.in_proj_weight, attn.in_proj_weight.shape[1]
        attn.__class__ = LoRAAttention
        attn.lora_scaling, attn.lora_dropout = alpha / math.sqrt(rank), dropout
        for part in QKV:
            a = torch.empty(rank, width, device=generator.device if generator else "cpu")
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            for letter, value in (("a", a), ("b", torch.zeros(width, rank))):
                key = f"lora_{part}_{letter}"
                attn.register_parameter(key, nn.Parameter(value.to(weight)))
                added[f"{name}.{key}"] = attn.get_parameter(key)
    return added


class LoRAAttention(Attention):
    """An Attention with adapters; dropout is active where `training` is."""

    lora_merged = False  # whether in_proj_weight includes the adapters' products

    def project_qkv(self, x: Tensor, parts: slice) -> tuple[Tensor, ...]:
        projected = super().project_qkv(x, parts)
        if self.lora_merged:
            return projected
        return tuple(
            y + self._lora_output(x, part) for y, part in zip(projected, QKV[parts], strict=True)
        )

    def _lora_output(self, x: Tensor, part: str) -> Tensor:
        """(B, L, W) -> (B, heads, L, W / heads)."""
        a, b = self._adapter(part)
        x = F.linear(F.dropout(x, self.lora_dropout, self.training), a)  # (B, L, r)
        x = F.linear(self.lora_scaling * x, b)  # (B, L, W)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _adapter(self, part: str) -> tuple[nn.Parameter, nn.Parameter]:
        return getattr(self, f"lora_{part}_a"), getattr(self, f"lora_{part}_b")


def set_dropout(model: nn.Module, active: bool) -> None:
    """Switch the adapters' dropout on or off."""
    for attn in _lora_layers(model).values():
        attn.train(active)


@contextmanager
def merged_lora(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Add a model's adapters to its weights for a while, for evaluation without dropout.

    Yields the merged weights by name, (3 W, W) each; within another `merged_lora` none. They remain
    valid afterwards, when the model has its former weights bit for bit.
    """
    layers = {name: attn for name, attn in _lora_layers(model).items() if not attn.lora_merged}
    originals = {name: attn.in_proj_weight.data for name, attn in layers.items()}
    merged = {}
    try:
        for name, attn in layers.items():
            with torch.no_grad(), torch.autocast(attn.in_proj_weight.device.type, enabled=False):
                products = [b @ a for a, b in map(attn._adapter, QKV)]
                weight = attn.in_proj_weight + attn.lora_scaling * torch.cat(products)
            merged[f"{name}.in_proj_weight"] = attn.in_proj_weight.data = weight
            attn.lora_merged = True
        yield merged
    finally:
        for name, attn in layers.items():
            attn.in_proj_weight.data, attn.lora_merged = originals[name], False


def _lora_layers(model: nn.Module) -> dict[str, LoRAAttention]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRAAttention)}
