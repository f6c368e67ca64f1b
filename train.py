"""Adaptation itself: which matrices, the zero-shot classifier, training, evaluation.

Functions take what they use; none of them knows the command line or a run's folder.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip import CLIP
from clip.model import ResidualAttentionBlock
from datasets.loader import Batch, normalise, to_device
from utils import Progress

# Share of the stack of layers that each --position adapts, or how many of its last layers.
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
MATRICES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
FINAL_LR = 1e-6  # where the cosine ends
TEXT_BATCH = 256  # prompts encoded at once where no gradient is needed
LOOK_EVERY = 50  # iterations between two looks at the loss on a GPU, each of which waits for it


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; `rows` is the curve up to there."""

    def __init__(self, message: str, rows: list[tuple]) -> None:
        super().__init__(message)
        self.rows = rows


def layers_at(position: str, depth: int) -> range:
    """The layers that a position means in a stack of `depth` layers; never none.

    Twelve layers: bottom 0-3, mid 4-7, up 8-11, half-bottom 0-5, half-up 6-11, top3 9-11, top 11.
    """
    share = POSITIONS[position]
    if isinstance(share, int):
        return range(max(depth - share, 0), depth)
    start = min(round(share[0] * depth), depth - 1)
    return range(start, max(round(share[1] * depth), start + 1))


def select_matrices(model: CLIP, encoder: str, position: str) -> dict[str, nn.Parameter]:
    """Freeze the model, thaw the matrices that are to be adapted, and return them by name.

    Args:
        model: Its attention in_proj and out_proj and MLP c_fc and c_proj weights are meant.
        encoder: "text", "vision" or "both". A ResNet has no such blocks: only text is adapted.
        position: A key of POSITIONS.

    Raises:
        ValueError: Nothing is left to adapt.
    """
    model.requires_grad_(False)
    towers = {"vision": "visual.transformer", "text": "transformer"}
    chosen = {}
    for name in towers.values() if encoder == "both" else [towers[encoder]]:
        if name == towers["vision"] and not hasattr(model.visual, "transformer"):
            continue
        blocks = model.get_submodule(name).resblocks
        for layer in layers_at(position, len(blocks)):
            for matrix in MATRICES:
                full_name = f"{name}.resblocks.{layer}.{matrix}"
                chosen[full_name] = model.get_parameter(full_name).requires_grad_()
    if not chosen:
        raise ValueError(
            f"--encoder {encoder}: the image tower is a ResNet, without the transformer blocks "
            "that SO adapts; use --encoder text or both, or a ViT backbone"
        )
    lay_back_to_back(sorted(chosen.values(), key=Tensor.numel))
    return chosen


@torch.no_grad()
def lay_back_to_back(tensors: Sequence[Tensor]) -> None:
    """Move tensors into one piece of memory; SO then reads and writes all of them at once."""
    row = torch.cat([tensor.flatten() for tensor in tensors])
    for tensor, part in zip(tensors, row.split([t.numel() for t in tensors]), strict=True):
        tensor.data = part.view(tensor.shape)


def compile_blocks(model: CLIP, backend: str = "inductor") -> None:
    """Have torch.compile translate the transformer blocks of both towers, on their first use.

    Compiled code computes whole weight gradients, never sampled ones.
    """
    # One piece of code for each tower, with gradients and without, first and last blocks apart,
    # batches of several sizes: more than torch keeps by default.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for module in model.modules():
        if isinstance(module, ResidualAttentionBlock):
            module.compile(backend=backend)


def tokenize_prompts(model: CLIP, classnames: Sequence[str], template: Sequence[str]) -> Tensor:
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


def text_features(
    model: CLIP,
    prompts: Tensor,
    chunk: int = 0,
    hidden: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Features of classes from their prompts' tokens: (P, C, L) -> (C, D), each of length 1.

    Those of several prompts are averaged. Gradients flow where they are asked for.

    Args:
        model: Whose text tower it is.
        prompts: The tokens.
        chunk: Classes encoded at once; where gradients are wanted, each chunk is encoded again
            when its gradient comes, so that activations of one chunk alone are held. 0 takes all,
            or TEXT_BATCH prompts where no gradients are wanted.
        hidden: What enters block `first` of the text tower, (P, C, L, W); None begins with tokens.
        first: The first block to run.
    """

    def features(tokens: Tensor, x: Tensor | None) -> Tensor:
        flat = tokens.flatten(0, 1)  # (P c, L)
        x = model.begin_text(flat) if x is None else x.flatten(0, 1)
        each = unit(model.finish_text(x, flat, first))  # (P c, D)
        return each.unflatten(0, tokens.shape[:2]).sum(dim=0)

    encode = features
    if torch.is_grad_enabled() and chunk:
        encode = partial(checkpoint, features, use_reentrant=False)
    size = chunk or prompts.shape[1]
    if not torch.is_grad_enabled():
        size = min(size, max(TEXT_BATCH // len(prompts), 1))
    parts = prompts.split(size, dim=1)
    inputs = [None] * len(parts) if hidden is None else hidden.split(size, dim=1)
    return unit(torch.cat([encode(*pair) for pair in zip(parts, inputs, strict=True)]))


@torch.no_grad()
def before_training(model: CLIP, prompts: Tensor) -> tuple[int, Tensor]:
    """Run the text tower up to the first block that is trained: once is enough.

    Returns:
        That block's number and what enters it, (P, C, L, W); where nothing is trained the number
        of blocks, and the classes' features (C, D).
    """
    blocks = model.transformer.resblocks
    trained = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    if not any(trained):
        return len(blocks), text_features(model, prompts)
    first = trained.index(True)
    parts = [model.begin_text(part, first) for part in prompts.flatten(0, 1).split(TEXT_BATCH)]
    return first, torch.cat(parts).unflatten(0, prompts.shape[:2])


def image_features(model: CLIP, images: Tensor) -> Tensor:
    """Features of uint8 images (B, 3, R, R), of length 1: (B, D)."""
    return unit(model.encode_image(normalise(images)))


def unit(features: Tensor) -> Tensor:
    """Scale each row (N, D) to length 1, in float32 at least."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext:
    """The context in which matrix products run at this precision; weights stay as they are."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


@torch.no_grad()
def evaluate(
    model: CLIP,
    batches: Iterable[Batch],
    total: int,
    prompts: Tensor,
    precision: str = "fp32",
    desc: str = "Evaluation",
) -> float:
    """Top-1 accuracy in percent of the model as a classifier of `total` images by prompts."""
    device = model.text_projection.device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with autocast(device, precision), Progress(total, desc, "images") as bar:
        classes = text_features(model, prompts)  # (C, D)
        for batch in batches:
            images, labels = to_device(batch, device)
            predicted = (image_features(model, images) @ classes.T).argmax(dim=-1)
            correct += (predicted == labels).sum()
            bar.update(len(labels))
    return 100.0 * correct.item() / total


class BestIterate:
    """Keeps what an optimizer trains as it was at its best, the earliest of equals."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.iteration, self.score = 0, -math.inf
        self.kept: list[Tensor] = []

    def offer(self, iteration: int, score: float) -> None:
        """Keep the present values if their score is above all before."""
        if score > self.score:
            self.iteration, self.score = iteration, score
            self.kept = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def restore(self) -> int:
        """Put the kept values back, and return their iteration."""
        for p, value in zip(self.params, self.kept, strict=True):
            p.copy_(value)
        return self.iteration


def cosine_lr(lr: float, iteration: int, iterations: int) -> float:
    """The learning rate of an iteration, counted from 0: a cosine from lr down to 1e-6."""
    return FINAL_LR + (lr - FINAL_LR) * (1 + math.cos(math.pi * iteration / iterations)) / 2


def train(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Batch, bool]],
    prompts: Tensor,
    *,
    iterations: int,
    logit_scale: float | str = 100.0,
    early_stop_loss: float = 0.0,
    precision: str = "fp32",
    text_chunk: int = 0,
    eval_every: int = 0,
    measure: Callable[[int], float] | None = None,
) -> list[tuple]:
    """Adapt the model by cross-entropy over scaled cosines, with the paper's cosine schedule.

    Args:
        model: What is to be trained in it requires gradients; it stays in evaluation mode.
        optimizer: Of what is trained; its learning rate is the schedule's start.
        batches: Images and labels for ever, and whether each batch ends an epoch.
        prompts: Tokens of the classes' prompts, by label: (P, C, L).
        iterations: How many batches to take at most.
        logit_scale: Factor of the cosines, or "checkpoint" for the model's own.
        early_stop_loss: End after an epoch whose mean loss is below this. On a GPU epochs of
            less than LOOK_EVERY iterations are looked at now and then, not each.
        precision: Of matrix products: "fp32", "bf16", or "fp16" with scaled gradients.
        text_chunk: Classes whose text is encoded at once; 0 for all (`text_features`).
        eval_every: Iterations between two calls of `measure`; 0 for the last one alone.
        measure: Told how many iterations are done, it returns the test accuracy in percent.

    Returns:
        The curve: rows (iteration, loss, lr, test accuracy), iterations counted from 1; the
        accuracy is "" where nothing was measured.

    Raises:
        NonFiniteLoss: A loss is NaN or infinite.
    """
    device = model.text_projection.device
    scale = model.logit_scale.detach().exp() if logit_scale == "checkpoint" else logit_scale
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    start_lr = optimizer.param_groups[0]["lr"]
    with autocast(device, precision):
        first, hidden = before_training(model, prompts)

    losses = torch.zeros(iterations, device=device)  # there, so that a GPU is not waited for
    looked = epoch_start = 0  # iterations before the last look, and before this epoch
    accuracies: dict[int, float] = {}  # by iteration

    def curve(count: int) -> list[tuple]:
        return [
            (i, loss, cosine_lr(start_lr, i - 1, iterations), accuracies.get(i, ""))
            for i, loss in enumerate(losses[:count].tolist(), start=1)
        ]

    with Progress(iterations, "Training", "it") as bar:
        for count, (batch, ends_epoch) in enumerate(islice(batches, iterations), start=1):
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(start_lr, count - 1, iterations)
            images, labels = to_device(batch, device)
            with autocast(device, precision):
                classes = hidden  # (C, D) where nothing of the text tower is trained
                if first < len(model.transformer.resblocks):
                    classes = text_features(model, prompts, text_chunk, hidden, first)
                logits = scale * image_features(model, images) @ classes.T  # (B, C)
                loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[count - 1] = loss.detach()

            unseen, epoch = count - looked, count - epoch_start
            note = ""
            if (
                device.type == "cpu"
                or (ends_epoch and max(unseen, epoch) >= LOOK_EVERY)
                or unseen >= 2 * LOOK_EVERY
                or count == iterations
            ):
                fresh = losses[looked:count]
                if not fresh.isfinite().all():
                    bad = looked + int(fresh.isfinite().logical_not().nonzero()[0]) + 1
                    raise NonFiniteLoss(
                        f"the loss became {losses[bad - 1].item()} at iteration {bad} of "
                        f"{iterations}: lower --lr, or use --precision fp32 or bf16",
                        curve(bad),
                    )
                looked, note = count, f"loss {losses[count - 1].item():.3f}"
            bar.update(note=note)
            stop = count == iterations
            if ends_epoch:
                if looked == count and losses[epoch_start:count].mean() < early_stop_loss:
                    stop = True
                epoch_start = count
            if stop:
                break
            if eval_every and count % eval_every == 0:
                accuracies[count] = measure(count)
    if measure is not None:
        accuracies[count] = measure(count)
    return curve(count)
