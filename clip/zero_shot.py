"""CLIP as a zero-shot classifier: the most similar class is predicted, the mean of its prompts."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip.model import CLIP

TEXT_BATCH_SIZE = 256  # prompts encoded at once where no gradient is needed
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ZeroShotClassifier:
    """A CLIP and the prompts of C classes.

    Args:
        model: The CLIP. Shortcuts that only our own has are not taken for others'.
        text_tokens: From `tokenize_class_prompts`.
        logit_scale: Factor of the cosines; "checkpoint" is the one that the weights carry.
        precision: Of the matrix products, "fp32", "bf16" or "fp16"; weights stay as they are.
        class_batch_size: Classes encoded at once where gradients are needed; each batch is encoded
            again when its gradient comes, so that activations of one batch are held. 0 for all.
    """

    def __init__(
        self,
        model: CLIP | nn.Module,
        text_tokens: Tensor,
        *,
        logit_scale: float | str = 100.0,
        precision: str = "fp32",
        class_batch_size: int = 0,
    ) -> None:
        self.model, self.precision, self.class_batch_size = model, precision, class_batch_size
        self.text_tokens, self.num_classes = text_tokens, text_tokens.shape[1]
        self.device = text_tokens.device
        self.autocast: AbstractContextManager = nullcontext()
        if precision != "fp32":
            self.autocast = torch.autocast(self.device.type, AUTOCAST_DTYPES[precision])
        scale = model.logit_scale.detach().exp() if logit_scale == "checkpoint" else logit_scale
        self.logit_scale = scale
        self.dtype = torch.promote_types(model.logit_scale.dtype, torch.float32)  # of features
        self.image_mean = torch.tensor(model.image_mean).view(3, 1, 1).to(self.device)
        self.image_std = torch.tensor(model.image_std).view(3, 1, 1).to(self.device)
        self._frozen_text: tuple[int, Tensor | None] = 0, None  # of `precompute_frozen_text`
        self._frozen_features: Tensor | None = None

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit features (B, D) of uint8 images (B, 3, R, R)."""
        images = (images.float() / 255 - self.image_mean) / self.image_std
        return F.normalize(self.model.encode_image(images).to(self.dtype), dim=-1)

    def encode_classes(self, classes: slice = slice(None)) -> Tensor:
        """Unit text features (c, D) of some classes, averaged over the prompts.

        With gradients, after `precompute_frozen_text`, they are the classes that were given there.
        """
        if self._frozen_features is not None:
            return self._frozen_features[classes]
        start_block, hidden = self._frozen_text
        tokens = self.text_tokens[:, classes]  # (P, c, L)
        size = self.class_batch_size or max(tokens.shape[1], 1)
        encode_text = self.model.encode_text
        if not torch.is_grad_enabled():  # with the weights as they are now
            hidden, size = None, min(size, max(TEXT_BATCH_SIZE // len(tokens), 1))
        elif self.class_batch_size:
            encode_text = partial(checkpoint, encode_text, use_reentrant=False)
        sums = []
        for i, chunk in enumerate(tokens.split(size, dim=1)):
            args = [chunk.flatten(0, 1)]  # (P c, L)
            if hidden is not None:
                args += [hidden[:, i * size : (i + 1) * size].flatten(0, 1), start_block]
            features = F.normalize(encode_text(*args).to(self.dtype), dim=-1)
            sums.append(features.unflatten(0, chunk.shape[:2]).sum(dim=0))
        return F.normalize(torch.cat(sums), dim=-1)

    @torch.no_grad()
    def precompute_frozen_text(self, classes: slice = slice(None)) -> None:
        """Keep what enters the first trained text block, (P, c, L, W), for `encode_classes`.

        Where nothing is trained, the features of all classes are kept.
        """
        named = self.model.named_parameters()
        if not any(p.requires_grad for name, p in named if not name.startswith("visual.")):
            self._frozen_features = self.encode_classes()
        elif isinstance(self.model, CLIP):
            blocks = self.model.transformer.resblocks
            trained = [any(p.requires_grad for p in block.parameters()) for block in blocks]
            start_block, tokens = trained.index(True), self.text_tokens[:, classes]
            parts = tokens.flatten(0, 1).split(TEXT_BATCH_SIZE)
            hidden = [self.model.forward_text_prefix(part, start_block) for part in parts]
            self._frozen_text = start_block, torch.cat(hidden).unflatten(0, tokens.shape[:2])


def tokenize_class_prompts(
    model: CLIP | nn.Module, classnames: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Tokens of P prompts of each of C classes, (P, C, L) int64, for our own CLIP without padding.

    A prompt that is too long for the model is truncated, with a note on standard error.
    """
    texts = [t.format(name.replace("_", " ")) for t in templates for name in classnames]
    try:
        tokens = model.tokenize(texts)
    except ValueError:
        tokens = model.tokenize(texts, truncate=True)
        limit = f"{model.context_length} tokens, the most that this backbone reads"
        print(f"note: prompts of more than {limit}, are truncated", file=sys.stderr)
        by_prompt: dict[tuple, str] = {}
        for name, prompt in zip(classnames, tokens[: len(classnames)].tolist(), strict=True):
            if (other := by_prompt.setdefault(tuple(prompt), name)) != name:
                print(f"note: {other!r} and {name!r} have the same prompt now", file=sys.stderr)
    if isinstance(model, CLIP):
        length = int(tokens.argmax(dim=-1).max()) + 1  # the end-of-text token has the highest id
        tokens = tokens[:, :length]
    tokens = tokens.unflatten(0, (len(templates), len(classnames)))
    return tokens.to(model.logit_scale.device)
