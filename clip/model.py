"""CLIP in the layout of OpenAI's checkpoints (Radford et al. 2021, arXiv 2103.00020).

Module and parameter names are those of the published state dicts, so that these load as they are.
Two towers end in one space of D dimensions:

    images (B, 3, R, R) -> VisionTransformer or ModifiedResNet -> (B, D)
    tokens (N, L)       -> Transformer, causal                 -> (N, D)
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clip.preprocess import OPENAI_MEAN, OPENAI_RESIZE, OPENAI_STD
from clip.resnet import TOTAL_STRIDE, ModifiedResNet
from clip.simple_tokenizer import SimpleTokenizer

HEAD_DIM = 64  # channels of an attention head in OpenAI's models
EXTRA_KEYS = ("input_resolution", "context_length", "vocab_size")  # in files, but not parameters


class CLIP(nn.Module):
    """Both towers and the logit scale; ViT and text tower are initialized as OpenAI published.

    Args:
        embed_dim: D, and so on as in OpenAI's code. A ResNet has no `vision_patch_size`; its
            `vision_layers` are the blocks of its four stages, `vision_width` is that of its stem.
        heads: Attention heads of the ViT, or of the ResNet's pool, and of the text tower; None is
            OpenAI's number, one for every 64 channels.
        vision_mlp, transformer_mlp: Channels inside the MLPs; None is four times the width.
        activation: Activation of the MLPs, a key of ACTIVATIONS.

    Raises:
        ValueError: A width cannot be shared evenly by its attention heads.
    """

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        vision_layers: int | Sequence[int],
        vision_width: int,
        vision_patch_size: int | None,
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_layers: int,
        *,
        heads: tuple[int, int] | None = None,
        vision_mlp: int | None = None,
        transformer_mlp: int | None = None,
        activation: str = "quickgelu",
    ) -> None:
        super().__init__()
        is_vit = isinstance(vision_layers, int)
        widths = vision_width if is_vit else TOTAL_STRIDE * vision_width, transformer_width
        self.heads = heads or tuple(max(width // HEAD_DIM, 1) for width in widths)
        if any(n < 1 or width % n for n, width in zip(self.heads, widths, strict=True)):
            raise ValueError(f"{self.heads} attention heads cannot share widths of {widths}")
        self.context_length, self.vocab_size = context_length, vocab_size
        self.activation = activation
        # arguments of `clip.preprocess.image_transform`
        self.image_mean, self.image_std, self.image_resize = OPENAI_MEAN, OPENAI_STD, OPENAI_RESIZE
        if is_vit:
            self.visual = VisionTransformer(
                image_resolution, vision_patch_size, embed_dim, vision_width, vision_layers,
                self.heads[0], vision_mlp or 4 * vision_width, activation, causal=False,
            )  # fmt: skip
        else:
            self.visual = ModifiedResNet(
                image_resolution, vision_width, vision_layers, embed_dim, self.heads[0]
            )
        self.transformer = Transformer(
            transformer_width, transformer_layers, self.heads[1],
            transformer_mlp or 4 * transformer_width, activation, causal=True,
        )  # fmt: skip
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # of section 2.5

        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=transformer_width**-0.5)

    @property
    def settings(self) -> list:
        """What the weights do not tell: two models with the same settings and weights are equal."""
        settings = [self.activation, self.heads, self.image_mean, self.image_std]
        return settings if self.image_resize == OPENAI_RESIZE else [*settings, self.image_resize]

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosine similarities, as (logits_per_image (B, N), logits_per_text (N, B))."""
        image_features = F.normalize(self.encode_image(images), dim=-1)  # (B, D)
        text_features = F.normalize(self.encode_text(tokens), dim=-1)  # (N, D)
        logits = self.logit_scale.exp() * image_features @ text_features.T  # (B, N)
        return logits, logits.T

    def tokenize(self, texts: str | Sequence[str], truncate: bool = False) -> Tensor:
        """Tokenize texts with this model's vocabulary and context length; see `clip.tokenize`."""
        tokenizer = SimpleTokenizer.from_vocab_size(self.vocab_size)
        return tokenizer(texts, self.context_length, truncate)

    def encode_image(self, images: Tensor) -> Tensor:
        """Features of images, not normalized: (B, 3, R, R) -> (B, D)."""
        return self.visual(images.to(self.visual.conv1.weight.dtype))

    def encode_text(
        self, tokens: Tensor, hidden: Tensor | None = None, start_block: int = 0
    ) -> Tensor:
        """Features of texts, not normalized: (N, L) -> (N, D), where L may be below the context.

        They are the output for the end-of-text token, which has the highest id. `hidden` (N, L, W)
        is what enters the block `start_block`, if `forward_text_prefix` has computed it.
        """
        if hidden is None:
            hidden = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        *blocks, last = self.transformer.resblocks[start_block:]
        for block in blocks:
            hidden = block(hidden)
        x = last(hidden, tokens.argmax(dim=-1)).squeeze(1)  # (N, W)
        return self.ln_final(x) @ self.text_projection  # (N, D)

    def forward_text_prefix(self, tokens: Tensor, num_blocks: int) -> Tensor:
        """Embed tokens and run the first blocks of the text tower: (N, L) -> (N, L, W)."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        return self.transformer.resblocks[:num_blocks](x)


class VisionTransformer(nn.Module):
    """A ViT whose class token, projected, is the image's feature."""

    def __init__(
        self, input_resolution: int, patch_size: int, embed_dim: int, width: int, *args, **kwargs
    ) -> None:
        super().__init__()
        self.input_resolution = input_resolution
        std = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        positions = (input_resolution // patch_size) ** 2 + 1
        self.positional_embedding = nn.Parameter(std * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, *args, **kwargs)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(std * torch.randn(width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, patches, W)
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1)  # (B, 1 + patches, W)
        x = self.ln_pre(x + self.positional_embedding)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x)
        pool_idx = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)  # the class token
        x = last(x, pool_idx).squeeze(1)  # (B, W): of the last block only what is read
        return self.ln_post(x) @ self.proj  # (B, D)


class Transformer(nn.Module):
    """The residual blocks of a tower, which runs them: one position of their output is read."""

    def __init__(
        self, width: int, layers: int, num_heads: int, mlp_width: int, activation: str, causal: bool
    ) -> None:
        super().__init__()
        args = width, num_heads, mlp_width, activation, causal
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(*args) for _ in range(layers)))

        # OpenAI's initialization: what each block adds shrinks with the depth of the stack.
        for block in self.resblocks:
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)


class ResidualAttentionBlock(nn.Module):
    """Attention and MLP, each on a normalized copy of what it is added to."""

    def __init__(
        self, width: int, num_heads: int, mlp_width: int, activation: str, causal: bool
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp_width))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(mlp_width, width))

    def forward(self, x: Tensor, pool_idx: Tensor | None = None) -> Tensor:
        """(B, L, W) -> (B, L, W), or (B, 1, W) for one position (B,) in each row."""
        attended = self.attn(self.ln_1(x), pool_idx)
        if pool_idx is not None:
            x = x.gather(1, pool_idx[:, None, None].expand(-1, 1, x.shape[-1]))
        x = x + attended
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width: int, num_heads: int, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor, pool_idx: Tensor | None = None) -> Tensor:
        """(B, L, W) -> (B, L, W), or (B, 1, W) for one position (B,) in each row."""
        if pool_idx is None:
            q, k, v = self.project_qkv(x, slice(0, 3))
            x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            pooled = x.gather(1, pool_idx[:, None, None].expand(-1, 1, x.shape[-1]))  # (B, 1, W)
            (q,) = self.project_qkv(pooled, slice(0, 1))
            k, v = self.project_qkv(x, slice(1, 3))
            mask = None
            if self.causal:
                mask = torch.arange(x.shape[1], device=x.device) <= pool_idx[:, None, None, None]
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def project_qkv(self, x: Tensor, parts: slice) -> tuple[Tensor, ...]:
        """A slice of (queries, keys, values), each of them (B, heads, L, W / heads)."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if parts != slice(0, 3):
            rows = slice(parts.start * x.shape[-1], parts.stop * x.shape[-1])
            weight, bias = weight[rows], bias[rows]
        head_dim = x.shape[-1] // self.num_heads
        x = F.linear(x, weight, bias).unflatten(-1, (-1, self.num_heads, head_dim))
        return x.permute(2, 0, 3, 1, 4).unbind()


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        # TorchScript cannot hold an autograd function, nor can torch.compile in old versions.
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return x * torch.sigmoid(1.702 * x)
        return _QuickGELU.apply(x)


class _QuickGELU(torch.autograd.Function):
    """silu(z) / 1.702 with z = 1.702 x: the backward pass is silu's kernel, and needs only z."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        z = 1.702 * x
        ctx.save_for_backward(z)
        return F.silu(z).div_(1.702)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(grad, *ctx.saved_tensors)


ACTIVATIONS = {"quickgelu": QuickGELU, "gelu": nn.GELU}
