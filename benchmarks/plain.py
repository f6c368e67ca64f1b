"""One training iteration as the authors' code computes it, in our own words, with no shortcut.

Baseline of the benchmarks, reference of the tests. Every token passes through every block, text
on all the positions it is given, attention as in torch's `nn.MultiheadAttention`, gradients dense.
Parameters are those of a `clip.CLIP`, in any dtype; its own forward passes are not used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import T
from clip import CLIP
from clip.model import Attention


class PlainSO:
    """SO as the authors compute it, less its faults: by matrix, O(n) draws, O(k^2) overlap."""

    def __init__(self, params: list[Tensor], density: float, lr: float = 1e-4) -> None:
        self.params, self.density, self.lr, self.t = params, density, lr, 0
        self.state: list[dict[str, Tensor]] = [{} for _ in params]

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        b1, b2 = 0.9, 0.999
        for p, s in zip(self.params, self.state, strict=True):
            weight, grad = p.view(-1), p.grad.view(-1)
            k = max(1, int(weight.numel() * self.density))
            if (self.t - 1) % T == 0:
                s["S_g"] = torch.randperm(weight.numel(), device=p.device)[:k]
            S_g, g = s["S_g"], grad[s["S_g"]]
            if self.t == 1:
                s["S_m"], s["m"], s["v"] = S_g, torch.zeros_like(g), torch.zeros_like(g)
            equal = s["S_m"][:, None] == S_g[None, :]  # (k, k)
            in_both, is_new = equal.any(dim=1), ~equal.any(dim=0)
            g_both = torch.where(in_both, g[equal.long().argmax(dim=1)], 0)
            U = torch.cat([s["S_m"], S_g[is_new]])
            m = torch.cat([b1 * s["m"] + (1 - b1) * g_both, (1 - b1) * g[is_new]])
            v = torch.cat([b2 * s["v"] + (1 - b2) * g_both**2, (1 - b2) * g[is_new] ** 2])
            m_hat, v_hat = m / (1 - b1**self.t), v / (1 - b2**self.t)
            weight[U] -= self.lr * m_hat / (v_hat.sqrt() + 1e-8)
            top = m.abs().argsort(descending=True)[:k]
            s["S_m"], s["m"], s["v"] = U[top], m[top], v[top]


def encode_image(model: CLIP, images: Tensor) -> Tensor:
    """Features of images, not normalized: (B, 3, R, R) -> (B, D)."""
    visual = model.visual
    if not hasattr(visual, "transformer"):  # a ResNet, which has no shortcuts
        return visual(images)
    x = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, patches, W)
    class_token = visual.class_embedding.expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([class_token, x], dim=1) + visual.positional_embedding)
    x = _transformer(visual.transformer.resblocks, x)
    return visual.ln_post(x[:, 0]) @ visual.proj


def encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """Features of texts, not normalized: (N, L) -> (N, D); L is the context in the authors' code.

    The end-of-text token, whose output is the feature, has the highest id.
    """
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    mask = x.new_full((length, length), float("-inf")).triu(1)
    x = model.ln_final(_transformer(model.transformer.resblocks, x, mask))  # (N, L, W)
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
    return x @ model.text_projection


def cosine_loss(image_features: Tensor, text_features: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over 100 times the cosines of features (B, D) and (C, D)."""
    cosines = F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T
    return F.cross_entropy(100.0 * cosines, labels)


def _transformer(blocks: nn.Sequential, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """All positions through all blocks, (N, L, W)."""
    for block in blocks:
        x = x + _attention(block.attn, block.ln_1(x), mask)
        hidden = F.linear(block.ln_2(x), block.mlp.c_fc.weight, block.mlp.c_fc.bias)
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + F.linear(hidden, block.mlp.c_proj.weight, block.mlp.c_proj.bias)
    return x


def _attention(attn: Attention, x: Tensor, mask: Tensor | None) -> Tensor:
    """`F.multi_head_attention_forward` without attention weights."""
    x = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in x.chunk(3, dim=-1))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (N, heads, L, W / heads)
    return F.linear(x.transpose(1, 2).flatten(2), attn.out_proj.weight, attn.out_proj.bias)
