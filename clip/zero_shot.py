"""CLIP as a classifier: features of prompts and of images, and its predictions.

A class is the mean of its prompts' features, an image belongs to the class of the largest cosine.
"""

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clip import CLIP
from clip.lora import rows_of
from clip.preprocess import normalize
from datasets.transforms import Batch, to_device
from runs.distributed import SINGLE_PROCESS, DistInfo, Shard
from utils import Predictions, Progress

TEXT_BATCH = 256  # prompts encoded at once where no gradient is needed


def tokenize_class_prompts(
    model: CLIP, classnames: Sequence[str], template: Sequence[str]
) -> Tensor:
    """Tokens of each class's prompts, as long as the longest of them: (P, C, L) int64.

    Attention is causal, so that nothing behind a prompt's last token changes its feature. A prompt
    that the model has no room for is cut, with a note on standard error.
    """
    texts = [prompt.format(name.replace("_", " ")) for prompt in template for name in classnames]
    try:
        tokens = model.tokenize(texts)
    except ValueError:
        tokens = model.tokenize(texts, truncate=True)
        print(
            f"note: prompts of more than {model.context_length} tokens are cut to that many, "
            "which is all that this backbone reads",
            file=sys.stderr,
        )
    longest = int(tokens.argmax(dim=-1).max()) + 1  # the token that ends a text has the highest id
    tokens = tokens[:, :longest].reshape(len(template), len(classnames), longest)
    return tokens.to(model.text_projection.device)


def encode_classes(
    model: CLIP,
    prompts: Tensor,
    chunk: int = 0,
    hidden: Tensor | None = None,
    first: int = 0,
    processes: DistInfo = SINGLE_PROCESS,
) -> Tensor:
    """Features of classes from their prompts' tokens: (P, C, L) -> (C, D), each of length 1.

    Those of several prompts are averaged. Gradients flow where they are asked for.

    Args:
        model: Whose text tower it is.
        prompts: The tokens.
        chunk: Classes encoded at once; where gradients are wanted, each chunk is encoded again
            when its gradient comes, so that activations of one chunk alone are held. 0 takes all,
            or TEXT_BATCH prompts where no gradients are wanted.
        hidden: What enters block `first` of the text tower, (P, own C, L, W), as `precompute_frozen_text`
            returns it for this chunk; None begins with tokens.
        first: The first block to run.
        processes: Those that share the classes of each chunk; all get all features.
    """  # noqa: E501

    def features(tokens: Tensor, x: Tensor | None, share: Shard) -> Tensor:
        flat = tokens.flatten(0, 1)  # (P c, L)
        x = model.forward_text_prefix(flat) if x is None else x.flatten(0, 1)
        with shared_rows(share, processes, len(prompts)):
            each = unit(model.forward_text_suffix(x, flat, first))  # (P c, D)
        return each.unflatten(0, tokens.shape[:2]).sum(dim=0)

    encode = features
    if torch.is_grad_enabled() and chunk:
        encode = partial(checkpoint, features, use_reentrant=False)
    count = prompts.shape[1]
    size = chunk or count
    if not torch.is_grad_enabled():
        size = min(size, max(TEXT_BATCH // len(prompts), 1))
    shares = processes.shares(count, size)
    parts = [prompts[:, share.mine] for share in shares]
    inputs = [None] * len(parts)
    if hidden is not None:
        inputs = hidden.split([part.shape[1] for part in parts], dim=1)
    own = unit(torch.cat([encode(*each) for each in zip(parts, inputs, shares, strict=True)]))
    return processes.gather(own, processes.own(count, size), count)


def shared_rows(share: Shard, processes: DistInfo, repeats: int = 1) -> AbstractContextManager:
    """The context in which inputs are a share of a batch, which is laid out `repeats` times."""
    if processes.size == 1:
        return nullcontext()
    count, mine = share.rows
    rows = torch.arange(repeats * count, device="cpu").view(repeats, count)[:, mine].flatten()
    return rows_of(repeats * count, rows)


@torch.no_grad()
def precompute_frozen_text(
    model: CLIP, prompts: Tensor, chunk: int = 0, processes: DistInfo = SINGLE_PROCESS
) -> tuple[int, Tensor]:
    """Run the text tower up to the first block that is trained: once is enough.

    Arguments are those of `encode_classes`.

    Returns:
        That block's number and what enters it, (P, own C, L, W), of the classes that are this
        process's in each chunk; where nothing is trained the number of blocks, and the features
        (C, D) of all classes.
    """
    blocks = model.transformer.resblocks
    trained = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    if not any(trained):
        return len(blocks), encode_classes(model, prompts, processes=processes)
    first = trained.index(True)
    prompts = prompts[:, processes.own(prompts.shape[1], chunk)]
    parts = [
        model.forward_text_prefix(part, first) for part in prompts.flatten(0, 1).split(TEXT_BATCH)
    ]
    return first, torch.cat(parts).unflatten(0, prompts.shape[:2])


def encode_images(model: CLIP, images: Tensor) -> Tensor:
    """Features of uint8 images (B, 3, R, R), of length 1: (B, D)."""
    return unit(model.encode_image(normalize(images, model.image_mean, model.image_std)))


def unit(features: Tensor) -> Tensor:
    """Scale each row (N, D) to length 1, in float32 at least."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def get_autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which matrix products run at this precision; weights stay as they are."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def get_logit_scale(model: CLIP, logit_scale: float | str) -> float | Tensor:
    """The factor of the cosines: a number, or with "checkpoint" the one that the weights carry."""
    return model.logit_scale.detach().exp() if logit_scale == "checkpoint" else logit_scale


@torch.no_grad()
def evaluate(
    model: CLIP,
    batches: Iterable[Batch],
    total: int,
    prompts: Tensor,
    desc: str = "Evaluation",
    precision: str = "fp32",
    logit_scale: float | str = 100.0,
    processes: DistInfo = SINGLE_PROCESS,
) -> Predictions:
    """Classify `total` images by prompts.

    Args:
        model: The classifier.
        batches: Images and labels of this process's share.
        total: Number of all images.
        prompts: Tokens of the classes' prompts: (P, C, L).
        desc: What the progress bar says.
        precision: Precision of the matrix products.
        logit_scale: Factor of the cosines, on which probabilities depend; or "checkpoint".
        processes: Those that share the images and the classes; all get all predictions.

    Returns:
        Labels, predicted labels and their probabilities, in the images' order.
    """
    device, answers, own = model.text_projection.device, [], processes.own(total)
    with get_autocast(device, precision), Progress(len(own), desc, "images") as bar:
        classes = encode_classes(model, prompts, processes=processes)  # (C, D)
        for batch in batches:
            images, labels = to_device(batch, device)
            cosines = encode_images(model, images) @ classes.T  # (b, C)
            predicted = cosines.argmax(dim=-1)
            logits = get_logit_scale(model, logit_scale) * cosines.float()
            probabilities = logits.softmax(dim=-1).gather(1, predicted[:, None])[:, 0]
            answers.append((labels, predicted, probabilities))
            bar.update(len(labels))
    mine = (torch.cat(parts) for parts in zip(*answers, strict=True))
    return Predictions(*(processes.gather(each, own, total).cpu() for each in mine))
