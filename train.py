"""Adaptation itself: the zero-shot classifier, training, evaluation.

Functions take what they use; none of them knows the command line or a run's folder.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip import CLIP
from clip.model import ResidualAttentionBlock
from datasets.loader import Batch, normalise, to_device
from optimizers.delta import Packed, pack, unpack
from utils import Interrupted, Progress

FINAL_LR = 1e-6  # where the cosine ends
TEXT_BATCH = 256  # prompts encoded at once where no gradient is needed


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; `rows` is the curve up to there."""

    def __init__(self, message: str, rows: list[tuple]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Args:
        logit_scale: Factor of the cosines, or "checkpoint" for the model's own.
        early_stop_loss: Training ends after an epoch whose mean loss is below this.
        precision: Precision of the matrix products: "fp32", "bf16", or "fp16" with scaled
            gradients.
        text_chunk: Classes whose text is encoded at once; 0 for all (`text_features`).
        accumulate: Parts that each batch is computed in.
        eval_every: Iterations between two measurements; 0 for the last one alone.
        checkpoint_every: Iterations between two checkpoints; 0 for none.
    """

    logit_scale: float | str = 100.0
    early_stop_loss: float = 0.0
    precision: str = "fp32"
    text_chunk: int = 0
    accumulate: int = 1
    eval_every: int = 0
    checkpoint_every: int = 0


@dataclass(frozen=True)
class Adapted:
    """What is adapted.

    Args:
        model: The model; it stays in evaluation mode, and what is trained requires gradients.
        prompts: Tokens of the classes' prompts, by label: (P, C, L).
        optimizer: Trains it; its learning rate is the schedule's start.
        trained: The tensors that the optimizer moves, by name in the model.
        matrices: The matrices that the model differs in afterwards.
    """

    model: CLIP
    prompts: Tensor
    optimizer: torch.optim.Optimizer
    trained: Mapping[str, nn.Parameter] = field(default_factory=dict)
    matrices: Mapping[str, nn.Parameter] = field(default_factory=dict)


@dataclass
class Course:
    """How far training is: with weights, optimizer and generators, all that continues it."""

    iterations: int  # at most
    count: int = 0  # iterations done
    epoch_start: int = 0  # iterations done before this epoch
    epoch_loss: float = math.nan  # mean of the last whole epoch
    ended: bool = False
    zero_shot: float = math.nan  # accuracy in percent
    accuracies: dict[int, float] = field(default_factory=dict)  # in percent, by iteration
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))  # (iterations,), on the device
    scaler: dict[str, Any] = field(default_factory=dict)  # GradScaler's state
    best: tuple[int, float, Packed] = (0, -math.inf, {})  # iteration, score, weights then
    began: float = field(default_factory=time.perf_counter)  # less the time of earlier processes

    @property
    def seconds(self) -> float:
        """Time that the run has taken so far."""
        return time.perf_counter() - self.began

    def curve(self, start_lr: float, count: int | None = None) -> list[tuple]:
        """Rows (iteration, loss, lr, test accuracy, or "" where nothing was measured)."""
        losses = self.losses[: self.count if count is None else count].tolist()
        return [
            (i, loss, cosine_lr(start_lr, i - 1, self.iterations), self.accuracies.get(i, ""))
            for i, loss in enumerate(losses, start=1)
        ]

    def offer(self, score: float, trained: Mapping[str, Tensor], base: Callable) -> None:
        """Keep the present weights, as their difference from the base, if none scored as high."""
        if score > self.best[1]:
            self.best = self.count, score, pack(trained, base())

    def restore_best(self, trained: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        """Give the trained tensors the weights of the best score."""
        unpack(self.best[2], trained, base)

    def state(self) -> dict[str, Any]:
        """Everything as plain values and CPU tensors."""
        return {**vars(self), "losses": self.losses[: self.count].cpu(), "began": -self.seconds}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        vars(self).update(state, began=self.began + state["began"])


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


def cosine_lr(lr: float, iteration: int, iterations: int) -> float:
    """The learning rate of an iteration, counted from 0: a cosine from lr down to 1e-6."""
    return FINAL_LR + (lr - FINAL_LR) * (1 + math.cos(math.pi * iteration / iterations)) / 2


def train(
    adapted: Adapted,
    batches: Iterator[tuple[Batch, bool]],
    course: Course,
    settings: Settings = Settings(),  # noqa: B008 # frozen
    *,
    measure: Callable[[], float] | None = None,
    save: Callable[[], None] = lambda: None,
    interruption: Callable[[], None] = lambda: None,
) -> list[tuple]:
    """Adapt a model by cross-entropy over scaled cosines, with the paper's cosine schedule.

    Args:
        adapted: What is adapted.
        batches: Images and labels without end, and whether each batch ends an epoch; the course's
            next one first.
        course: How far it is: a new one, or an interrupted run's. It is kept up to date.
        settings: How it is trained.
        measure: Returns the test accuracy in percent.
        save: Writes a checkpoint.
        interruption: Called after each iteration; raises Interrupted to end training.

    Returns:
        The curve: rows (iteration, loss, lr, test accuracy), iterations counted from 1; the
        accuracy is "" where nothing was measured.

    Raises:
        NonFiniteLoss: A loss is NaN or infinite.
        Interrupted: `interruption` or `measure` raised it; a checkpoint was saved.
    """
    model, optimizer = adapted.model, adapted.optimizer
    device = model.text_projection.device
    scale: float | Tensor = settings.logit_scale
    if scale == "checkpoint":
        scale = model.logit_scale.detach().exp()
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # a resumed run's rate is that of its last step
    start_lr = optimizer.param_groups[0]["initial_lr"]
    with autocast(device, settings.precision):
        first, hidden = before_training(model, adapted.prompts)
    losses = torch.zeros(course.iterations, device=device)  # there: a GPU is not waited for
    losses[: course.count] = course.losses.to(device)
    course.losses = losses
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    if course.scaler:
        scaler.load_state_dict(course.scaler)

    def measure_where_due() -> None:
        count, every = course.count, settings.eval_every
        due = course.ended or (every and count and count % every == 0)
        if measure is not None and due and count not in course.accuracies:
            course.accuracies[count] = measure()

    def save_if_sound() -> None:
        if course.count and losses[: course.count].isfinite().all():
            course.scaler = scaler.state_dict()
            save()

    try:
        with Progress(course.iterations, "Training", "it", course.count) as bar:
            measure_where_due()  # what the interrupted run had no time for
            while not course.ended:
                batch, ends_epoch = next(batches)
                for group in optimizer.param_groups:
                    group["lr"] = cosine_lr(start_lr, course.count, course.iterations)
                optimizer.zero_grad()
                with autocast(device, settings.precision):
                    classes = hidden  # (C, D) where nothing of the text tower is trained
                    if first < len(model.transformer.resblocks):
                        classes = text_features(
                            model, adapted.prompts, settings.text_chunk, hidden, first
                        )
                losses[course.count] = add_gradients(
                    model, to_device(batch, device), classes, scale, scaler, settings
                )
                scaler.step(optimizer)
                scaler.update()
                course.count += 1
                note = ""
                if ends_epoch or course.count == course.iterations:
                    end_epoch(course, settings.early_stop_loss, start_lr)
                    note = f"loss {course.epoch_loss:.3f}"
                if course.ended:
                    bar.total = course.count
                bar.update(note=note)
                interruption()
                measure_where_due()
                every = settings.checkpoint_every
                if every and course.count % every == 0 and not course.ended:
                    save_if_sound()
    except Interrupted:
        save_if_sound()
        raise
    if course.count < course.iterations:
        print(
            f"\nStopped early, after iteration {course.count} of {course.iterations}: the epoch's "
            f"mean loss, {course.epoch_loss:.4g}, is below {settings.early_stop_loss:g}",
            flush=True,
        )
    return course.curve(start_lr)


def add_gradients(
    model: CLIP,
    batch: Batch,
    classes: Tensor,
    scale: float | Tensor,
    scaler: torch.amp.GradScaler,
    settings: Settings,
) -> Tensor:
    """Add the gradients of a batch's mean loss, which is returned.

    The batch, on the model's device, is computed in `settings.accumulate` parts, one after the
    other; the text, with classes' features (C, D), is encoded once all the same.
    """
    images, labels = batch
    parts = settings.accumulate
    leaf = classes.detach().requires_grad_(classes.requires_grad) if parts > 1 else classes
    total = torch.zeros((), device=labels.device)
    for some_images, some_labels in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        with autocast(labels.device, settings.precision):
            logits = scale * image_features(model, some_images) @ leaf.T  # (b, C)
            loss = F.cross_entropy(logits, some_labels) * (len(some_labels) / len(labels))
        scaler.scale(loss).backward()
        total += loss.detach()
    if leaf is not classes and leaf.grad is not None:
        classes.backward(leaf.grad)
    return total


def end_epoch(course: Course, early_stop_loss: float, start_lr: float) -> None:
    """Look at the losses of the epoch that ends here, and note whether training has ended.

    This is the one time in an epoch that the device is waited for.

    Raises:
        NonFiniteLoss: A loss is NaN or infinite.
    """
    losses = course.losses[course.epoch_start : course.count].tolist()
    for number, loss in enumerate(losses, start=course.epoch_start + 1):
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss became {loss} at iteration {number} of {course.iterations}: lower "
                "--lr, or use --precision fp32 or bf16",
                course.curve(start_lr, number),
            )
    course.epoch_start, course.epoch_loss = course.count, fmean(losses)
    course.ended = course.count == course.iterations or course.epoch_loss < early_stop_loss
