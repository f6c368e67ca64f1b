"""Adaptation itself: which matrices, the zero-shot classifier, training, evaluation.

Functions take what they use; none of them knows the command line or a run's folder.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip import CLIP
from clip.model import ResidualAttentionBlock
from datasets.loader import Batch, normalise, to_device
from optimizers.snapshot import Snapshot
from utils import Interrupted, Progress

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
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
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
    return unit(model.encode_image(normalise(images, model.image_mean, model.image_std)))


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

    def state(self, snapshot: Snapshot) -> dict[str, Any]:
        """Everything as plain values and CPU tensors, for a checkpoint."""
        kept = snapshot.take(self.kept) if self.kept else None
        return {"iteration": self.iteration, "score": self.score, "kept": kept}

    def load(self, state: dict[str, Any], snapshot: Snapshot) -> None:
        """Restore what `state` returned; what is trained must be as it was before training."""
        self.iteration, self.score = int(state["iteration"]), float(state["score"])
        if state["kept"] is not None:
            self.kept = [p.detach().clone() for p in self.params]
            snapshot.put(state["kept"], self.kept)


def cosine_lr(lr: float, iteration: int, iterations: int) -> float:
    """The learning rate of an iteration, counted from 0: a cosine from lr down to 1e-6."""
    return FINAL_LR + (lr - FINAL_LR) * (1 + math.cos(math.pi * iteration / iterations)) / 2


@dataclass
class Course:
    """How far training has come: with weights, optimizer and generators, all that continues it."""

    iterations: int  # at most
    count: int = 0  # iterations done
    looked: int = 0  # done before the last look at the losses
    epoch_start: int = 0  # done before this epoch
    ended: bool = False
    accuracies: dict[int, float] = field(default_factory=dict)  # in percent, by iteration
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))  # (iterations,), on the device
    scaler: dict[str, Any] = field(default_factory=dict)  # GradScaler's state

    def curve(self, start_lr: float, count: int | None = None) -> list[tuple]:
        """Rows (iteration, loss, lr, test accuracy, or "" where nothing was measured)."""
        losses = self.losses[: self.count if count is None else count].tolist()
        return [
            (i, loss, cosine_lr(start_lr, i - 1, self.iterations), self.accuracies.get(i, ""))
            for i, loss in enumerate(losses, start=1)
        ]

    def state(self) -> dict[str, Any]:
        """Everything as plain values and a CPU tensor, for a checkpoint."""
        return {**vars(self), "losses": self.losses[: self.count].cpu()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            ValueError: It is of another number of iterations, or contradicts itself.
        """
        other = Course(**state)
        counts = other.iterations, other.count, other.looked, other.epoch_start
        kinds = [type(other.ended) is bool, *(type(count) is int for count in counts)]
        kinds += [isinstance(part, dict) for part in (other.accuracies, other.scaler)]
        kinds += [type(i) is int and type(a) is float for i, a in other.accuracies.items()]
        kinds += [isinstance(value, int | float) for value in other.scaler.values()]
        if not all(kinds) or other.scaler.keys() not in (set(), SCALER):
            raise ValueError("an entry is of another kind")
        if other.iterations != self.iterations or not 0 < other.count <= self.iterations:
            raise ValueError(f"{other.count} of {other.iterations} iterations")
        orderly = 0 <= other.epoch_start <= other.count and 0 <= other.looked <= other.count
        if not orderly or other.losses.shape != (other.count,):
            raise ValueError("its numbers of iterations contradict each other")
        self.__dict__.update(vars(other))


def train(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Batch, bool]],
    prompts: Tensor,
    course: Course,
    *,
    logit_scale: float | str = 100.0,
    early_stop_loss: float = 0.0,
    precision: str = "fp32",
    text_chunk: int = 0,
    accumulate: int = 1,
    eval_every: int = 0,
    measure: Callable[[int], float] | None = None,
    checkpoint_every: int = 0,
    save: Callable[[Course], None] | None = None,
    interruption: Callable[[], None] = lambda: None,
) -> list[tuple]:
    """Adapt the model by cross-entropy over scaled cosines, with the paper's cosine schedule.

    Args:
        model: What is to be trained in it requires gradients; it stays in evaluation mode.
        optimizer: Of what is trained; its learning rate is the schedule's start.
        batches: Images and labels for ever, and whether each batch ends an epoch; from the
            course's count on.
        prompts: Tokens of the classes' prompts, by label: (P, C, L).
        course: How far it is, and how far it may go: a new one, or an interrupted run's.
        logit_scale: Factor of the cosines, or "checkpoint" for the model's own.
        early_stop_loss: End after an epoch whose mean loss is below this. On a GPU epochs of
            less than LOOK_EVERY iterations are looked at now and then, not each.
        precision: Of matrix products: "fp32", "bf16", or "fp16" with scaled gradients.
        text_chunk: Classes whose text is encoded at once; 0 for all (`text_features`).
        accumulate: Parts that each batch is computed in.
        eval_every: Iterations between two calls of `measure`; 0 for the last one alone.
        measure: Told how many iterations are done, it returns the test accuracy in percent.
        checkpoint_every: Iterations between two calls of `save`; 0 for none.
        save: Keeps a course, and what else it takes to continue from there.
        interruption: Called after each iteration; raises Interrupted to have the course saved and
            training ended.

    Returns:
        The curve: rows (iteration, loss, lr, test accuracy), iterations counted from 1; the
        accuracy is "" where nothing was measured.

    Raises:
        NonFiniteLoss: A loss is NaN or infinite.
        Interrupted: `interruption` or `measure` raised it; the course is saved.
    """
    device = model.text_projection.device
    scale = model.logit_scale.detach().exp() if logit_scale == "checkpoint" else logit_scale
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # a resumed run's rate is that of its last step
    start_lr = optimizer.param_groups[0]["initial_lr"]
    with autocast(device, precision):
        first, hidden = before_training(model, prompts)

    losses = torch.zeros(course.iterations, device=device)  # there: a GPU is not waited for
    losses[: course.count] = course.losses.to(device)
    course.losses = losses
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if course.scaler:
        scaler.load_state_dict(course.scaler)

    def measure_where_due() -> None:
        count = course.count
        due = course.ended or (eval_every and count and count % eval_every == 0)
        if measure is not None and due and count not in course.accuracies:
            course.accuracies[count] = measure(count)

    def keep() -> None:
        if save is not None and course.count and losses[: course.count].isfinite().all():
            course.scaler = scaler.state_dict()
            save(course)

    try:
        with Progress(course.iterations, "Training", "it", course.count) as bar:
            measure_where_due()  # what the interrupted run had no time for
            while not course.ended:
                batch, ends_epoch = next(batches)
                for group in optimizer.param_groups:
                    group["lr"] = cosine_lr(start_lr, course.count, course.iterations)
                optimizer.zero_grad()
                with autocast(device, precision):
                    classes = hidden  # (C, D) where nothing of the text tower is trained
                    if first < len(model.transformer.resblocks):
                        classes = text_features(model, prompts, text_chunk, hidden, first)
                loss = add_gradients(
                    model, to_device(batch, device), classes, scale, scaler, precision, accumulate
                )
                scaler.step(optimizer)
                scaler.update()
                losses[course.count] = loss
                course.count += 1
                note = check(course, ends_epoch, early_stop_loss, start_lr)
                bar.update(note=note)
                interruption()
                measure_where_due()
                if checkpoint_every and course.count % checkpoint_every == 0 and not course.ended:
                    keep()
    except Interrupted:
        keep()
        raise
    return course.curve(start_lr)


def add_gradients(
    model: CLIP,
    batch: Batch,
    classes: Tensor,
    scale: float | Tensor,
    scaler: torch.amp.GradScaler,
    precision: str,
    parts: int,
) -> Tensor:
    """Add the gradients of a batch's mean loss, which is returned.

    Args:
        model: The model.
        batch: Images and labels, on its device.
        classes: Features of the classes (C, D).
        scale: Factor of the cosines.
        scaler: Scales the loss for the backward pass.
        precision: Of matrix products.
        parts: How many parts the batch is computed in, one after the other, which takes less
            memory; the text is encoded once all the same.
    """
    images, labels = batch
    leaf = classes.detach().requires_grad_(classes.requires_grad) if parts > 1 else classes
    total = torch.zeros((), device=labels.device)
    for some_images, some_labels in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        with autocast(labels.device, precision):
            logits = scale * image_features(model, some_images) @ leaf.T  # (b, C)
            loss = F.cross_entropy(logits, some_labels) * (len(some_labels) / len(labels))
        scaler.scale(loss).backward()
        total += loss.detach()
    if leaf is not classes and leaf.grad is not None:
        classes.backward(leaf.grad)
    return total


def check(course: Course, ends_epoch: bool, early_stop_loss: float, start_lr: float) -> str:
    """Look at the losses where it is time, and note whether training has ended.

    Returns:
        What to show beside the progress; "" where nothing was looked at.

    Raises:
        NonFiniteLoss: A loss is NaN or infinite.
    """
    count, losses = course.count, course.losses
    unseen, epoch = count - course.looked, count - course.epoch_start
    last = count == course.iterations
    note = ""
    if (
        losses.device.type == "cpu"
        or (ends_epoch and max(unseen, epoch) >= LOOK_EVERY)
        or unseen >= 2 * LOOK_EVERY
        or last
    ):
        fresh = losses[course.looked : count]
        if not fresh.isfinite().all():
            bad = course.looked + int(fresh.isfinite().logical_not().nonzero()[0]) + 1
            raise NonFiniteLoss(
                f"the loss became {losses[bad - 1].item()} at iteration {bad} of "
                f"{course.iterations}: lower --lr, or use --precision fp32 or bf16",
                course.curve(start_lr, bad),
            )
        course.looked, note = count, f"loss {losses[count - 1].item():.3f}"
    low = ends_epoch and course.looked == count
    course.ended = last or bool(low and losses[course.epoch_start : count].mean() < early_stop_loss)
    if ends_epoch:
        course.epoch_start = count
    return note
