"""CLIP in the layout of OpenAI's checkpoints (Radford et al. 2021, arXiv 2103.00020).

Module and parameter names are those of the published state dicts, so that these load as they
are. Two towers end in one space of D dimensions:

    images (B, 3, H, W) -> VisionTransformer or ResNet -> (B, D)
    tokens (N, L)       -> Transformer, causal         -> (N, D)

    model, preprocess = clip.load("ViT-B/16")
    logits_per_image, logits_per_text = model(images, model.tokenize(["a photo of a cat."]))
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clip.preprocess import OPENAI_MEAN, OPENAI_STD
from clip.resnet import TOTAL_STRIDE, ModifiedResNet
from clip.simple_tokenizer import SimpleTokenizer

HEAD_DIM = 64
EXTRA_KEYS = ("input_resolution", "context_length", "vocab_size")  # in files, but not parameters
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # the paper's temperature, section 2.5


def default_num_heads(width: int) -> int:
    """OpenAI's number of attention heads: one for every 64 channels, at least one."""
    return max(width // HEAD_DIM, 1)


def validate_num_heads(width: int, heads: int) -> None:
    """Refuse a number of heads that cannot share the channels evenly."""
    if heads < 1 or width % heads:
        raise ValueError(
            f"a width of {width} cannot be shared by {heads} attention heads: name others"
        )


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        # TorchScript cannot hold an autograd function, nor can torch.compile in old versions.
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return x * torch.sigmoid(1.702 * x)
        return _QuickGELU.apply(x)


class _QuickGELU(torch.autograd.Function):
    """With z = 1.702 x it is silu(z) / 1.702, and its derivative is that of silu at z.

    So the backward pass is one of torch's own kernels, and needs z alone; autograd would keep
    both factors of x * sigmoid(1.702 x).
    """

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


def take_token(x: Tensor, read: Tensor) -> Tensor:
    """One position of each row: (B, L, W) at (B,) -> (B, 1, W)."""
    return x.gather(1, read[:, None, None].expand(-1, 1, x.shape[-1]))


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`.

    Args:
        width: channels of input and output.
        heads: number of heads, which share the width evenly.
        causal: whether a position sees itself and earlier ones only.
    """

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        validate_num_heads(width, heads)
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor, read: Tensor | None = None) -> Tensor:
        """Attend: (B, L, W) -> (B, L, W), or (B, 1, W) for one position `read` (B,) in each."""
        if read is None:
            q, k, v = self.project(x, slice(0, 3))
            x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            (q,), (k, v) = (
                self.project(take_token(x, read), slice(0, 1)),
                self.project(x, slice(1, 3)),
            )
            seen = None
            if self.causal:
                seen = torch.arange(x.shape[1], device=x.device) <= read[:, None, None, None]
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, parts: slice) -> tuple[Tensor, ...]:
        """Those of queries, keys and values (parts 0, 1, 2) asked for: (B, heads, L, W / heads)."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if parts != slice(0, 3):
            rows = slice(parts.start * x.shape[-1], parts.stop * x.shape[-1])
            weight, bias = weight[rows], bias[rows]
        x = F.linear(x, weight, bias).unflatten(-1, (-1, self.heads, x.shape[-1] // self.heads))
        return x.permute(2, 0, 3, 1, 4).unbind()


class MLP(nn.Module):
    """Two linear maps, wider in between."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """Attention and MLP, each on a normalised copy of what it is added to."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, causal: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden, activation)

    def forward(self, x: Tensor, read: Tensor | None = None) -> Tensor:
        """(B, L, W) -> (B, L, W), or (B, 1, W) for one position `read` (B,) in each."""
        attended = self.attn(self.ln_1(x), read)
        x = (x if read is None else take_token(x, read)) + attended
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of residual blocks, of whose output one position in each row is read.

    Args:
        width: channels.
        layers: blocks.
        causal: whether a position sees itself and earlier ones only.
        heads: attention heads; OpenAI's number when None.
        hidden: channels inside the MLPs; four times the width when None.
        activation: a key of ACTIVATIONS.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        causal: bool = False,
        heads: int | None = None,
        hidden: int | None = None,
        activation: str = "quickgelu",
    ):
        super().__init__()
        self.heads = default_num_heads(width) if heads is None else heads
        hidden = hidden or 4 * width
        blocks = [
            ResidualAttentionBlock(width, self.heads, hidden, activation, causal)
            for _ in range(layers)
        ]
        self.resblocks = nn.Sequential(*blocks)

        # OpenAI's initialisation: what each block adds shrinks with the depth of the stack.
        for block in blocks:
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, read: Tensor, first: int = 0) -> Tensor:
        """Output at one position of each row: (B, L, W) at (B,) -> (B, W).

        The last block computes that position alone; only its keys and values need the others.

        Args:
            x: what enters block `first`.
            read: the positions.
            first: the first block to run.
        """
        *blocks, last = self.resblocks[first:]
        for block in blocks:
            x = block(x)
        return last(x, read).squeeze(1)


class VisionTransformer(nn.Module):
    """A ViT whose class token, projected, is the image's feature."""

    def __init__(
        self, input_resolution: int, patch: int, width: int, layers: int, embed_dim: int, **blocks
    ):
        super().__init__()
        if input_resolution % patch:
            raise ValueError(f"patches of {patch} pixels do not tile {input_resolution} pixels")
        self.input_resolution = input_resolution
        std = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        positions = (input_resolution // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(std * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, **blocks)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(std * torch.randn(width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, patches, W)
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1)  # (B, 1 + patches, W)
        x = self.ln_pre(x + self.positional_embedding)
        read = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)  # the class token
        return self.ln_post(self.transformer(x, read)) @ self.proj  # (B, D)


class CLIP(nn.Module):
    """Both towers and the logit scale, initialised as CLIP's authors published.

    Args:
        embed_dim: dimensions D of the features that both towers end in.
        image_resolution: pixels of a side of the square input.
        vision_layers: blocks of the ViT, or blocks of each of the four stages of a ResNet.
        vision_width: channels of the ViT, or of the ResNet's stem.
        vision_patch_size: pixels of a side of a ViT's patch; None for a ResNet.
        context_length: tokens of the longest text.
        vocab_size: tokens known; the model's tokenizer follows from it.
        transformer_width: channels of the text tower.
        transformer_layers: blocks of the text tower.
        vision_heads: attention heads of the ViT, or of the ResNet's attention pool; OpenAI's
            number, one for every 64 channels, when None.
        transformer_heads: attention heads of the text tower; likewise.
        vision_mlp: channels inside the ViT's MLPs; four times its width when None.
        transformer_mlp: channels inside the text tower's MLPs; likewise.
        activation: that of the MLPs, a key of ACTIVATIONS.

    Attributes:
        activation: as above.
        image_mean, image_std: with which images are normalised, three floats each.

    Raises:
        ValueError: if sizes do not fit together.
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
        vision_heads: int | None = None,
        transformer_heads: int | None = None,
        vision_mlp: int | None = None,
        transformer_mlp: int | None = None,
        activation: str = "quickgelu",
    ):
        super().__init__()
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.activation = activation
        self.image_mean, self.image_std = OPENAI_MEAN, OPENAI_STD
        if isinstance(vision_layers, int):
            self.visual = VisionTransformer(
                image_resolution, vision_patch_size, vision_width, vision_layers, embed_dim,
                heads=vision_heads, hidden=vision_mlp, activation=activation,
            )  # fmt: skip
        else:
            vision_heads = vision_heads or default_num_heads(TOTAL_STRIDE * vision_width)
            validate_num_heads(TOTAL_STRIDE * vision_width, vision_heads)
            self.visual = ModifiedResNet(
                image_resolution, vision_width, vision_layers, embed_dim, vision_heads
            )
        self.transformer = Transformer(
            transformer_width, transformer_layers, causal=True,
            heads=transformer_heads, hidden=transformer_mlp, activation=activation,
        )  # fmt: skip
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))  # its logarithm

        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=transformer_width**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, to which images are cast."""
        return self.visual.conv1.weight.dtype

    @property
    def heads(self) -> tuple[int, int]:
        """Attention heads of the image tower (of a ResNet's pool) and of the text tower."""
        pool = getattr(self.visual, "attnpool", None)
        vision = self.visual.transformer.heads if pool is None else pool.heads
        return vision, self.transformer.heads

    def tokenize(self, texts: str | Sequence[str], truncate: bool = False) -> Tensor:
        """Tokens of one or more texts by this model's own vocabulary.

        Args:
            texts: a text or several.
            truncate: cut texts that are too long instead of refusing them.

        Returns:
            (N, context_length) int64, zero after the end-of-text token.

        Raises:
            ValueError: if a text is too long and `truncate` is not set.
        """
        return SimpleTokenizer.for_vocabulary(self.vocab_size)(texts, self.context_length, truncate)

    def encode_image(self, images: Tensor) -> Tensor:
        """Features of images, not normalised: (B, 3, H, W) -> (B, D).

        Raises:
            ValueError: if the images are not of the model's input size.
        """
        side = self.visual.input_resolution
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"this model takes images of shape (B, 3, {side}, {side}), not "
                f"{tuple(images.shape)}: pass them through the preprocess of clip.load"
            )
        return self.visual(images.to(self.dtype))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features of texts, not normalised: (N, L) -> (N, D), where L may be below the context.

        The end-of-text token has the highest id and, since attention is causal, has seen all of
        the text: its output is the text's feature.

        Raises:
            ValueError: if L is above the model's context length.
        """
        return self.forward_text_suffix(self.forward_text_prefix(tokens), tokens)

    def forward_text_prefix(self, tokens: Tensor, blocks: int = 0) -> Tensor:
        """What enters a block of the text tower, after so many blocks: (N, L) -> (N, L, W).

        Raises:
            ValueError: if L is above the model's context length.
        """
        if tokens.dim() != 2 or tokens.shape[1] > self.context_length:
            raise ValueError(
                f"this model takes tokens of shape (N, L) with L up to {self.context_length}, "
                f"not {tuple(tokens.shape)}: make them with model.tokenize"
            )
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        return self.transformer.resblocks[:blocks](x)

    def forward_text_suffix(self, x: Tensor, tokens: Tensor, blocks: int = 0) -> Tensor:
        """The rest of `encode_text`, from what `begin_text` returned: (N, L, W) -> (N, D)."""
        x = self.transformer(x, tokens.argmax(dim=-1), blocks)  # (N, W)
        return self.ln_final(x) @ self.text_projection  # (N, D)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosine similarities, as (logits_per_image (B, N), logits_per_text (N, B))."""
        image_features = F.normalize(self.encode_image(images), dim=-1)  # (B, D)
        text_features = F.normalize(self.encode_text(tokens), dim=-1)  # (N, D)
        logits = self.logit_scale.exp() * image_features @ text_features.T  # (B, N)
        return logits, logits.T
