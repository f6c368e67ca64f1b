"""Adaptation itself: what is trained, how, how far it is, and the loop.

Functions take what they use; none of them knows the command line or a run's folder.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip import CLIP
from clip.lora import merged
from clip.model import ResidualAttentionBlock
from clip.zero_shot import (
    autocast,
    before_training,
    image_features,
    scale_of,
    shared_rows,
    text_features,
)
from datasets.transforms import Batch, to_device
from optimizers.build import Method
from optimizers.delta import Base, Packed, pack, save_delta, scaled, unpack
from optimizers.SampledGradients import sum_gradients
from runs.distributed import ALONE, Processes, exchange
from runs.signals import Interrupted
from utils import Predictions, Progress

FINAL_LR = 1e-6  # where the cosine ends


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite."""


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


class Adapted(NamedTuple):
    """What is adapted: a model, which stays in evaluation mode, to classes, by a method."""

    model: CLIP
    prompts: Tensor  # tokens of the classes' prompts, by label: (P, C, L)
    method: Method
    base: Base | None = None  # read for checkpoints and deltas

    @contextmanager
    def scaled(self, alpha: float) -> Iterator[None]:
        """Merge LoRA's adapters, and scale what was learned, for a while."""
        with merged(self.model):
            if alpha == 1:
                yield
            else:
                with scaled(self.method.matrices, self.base.read(), alpha):
                    yield

    def report(self, course: "Course") -> dict[str, Tensor]:
        """Give the model the weights that the course reports; return those of the base."""
        base = self.base.read()
        if packed := course.best[2]:
            unpack(packed, self.method.trained, base)
        return base

    @torch.no_grad()
    def restore(self, base: dict[str, Tensor]) -> None:
        """Give the model the base's weights; adapters, which the base lacks, are 0 then."""
        for name, parameter in self.method.trained.items():
            parameter.copy_(base[name]) if name in base else parameter.zero_()

    def save(self, path: Path, course: "Course", wise: float = 1) -> None:
        """Write the delta of the weights that the course reports, scaled by `wise`."""
        base = self.report(course)
        told = {"backbone": self.base.name} | ({} if wise == 1 else {"wise": f"{wise:g}"})
        with self.scaled(wise):
            save_delta(path, self.method.matrices, base, self.base.digest, **told)


@dataclass
class Course:
    """How far training is: with weights, optimizer and generators, all that continues it."""

    iterations: int  # at most
    lr: float = math.nan  # of the first iteration
    count: int = 0  # iterations done
    epoch_start: int = 0  # iterations done before this epoch
    epoch_loss: float = math.nan  # mean of the last whole epoch
    ended: bool = False
    zero_shot: float = math.nan  # accuracy in percent
    new: dict[str, float] = field(default_factory=dict)  # on new classes, as in result.json
    accuracies: dict[int, float] = field(default_factory=dict)  # in percent, by iteration
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))  # (iterations,), on the device
    scaler: dict[str, Any] = field(default_factory=dict)  # GradScaler's state
    best: tuple[int, float, Packed] = (0, -math.inf, {})  # iteration, score, weights then
    predictions: Predictions | tuple = ()  # of the iterate that is reported, as far as is known
    began: float = field(default_factory=time.perf_counter)  # less the time of earlier processes

    @property
    def seconds(self) -> float:
        """Time that the run has taken so far."""
        return time.perf_counter() - self.began

    @property
    def reported(self) -> bool:
        """Whether the present weights are those to report, as far as is known."""
        return self.best[0] in (0, self.count)

    @property
    def measured(self) -> dict[str, float]:
        """What is reported of a run that has ended, as in result.json."""
        chosen = self.best[0] or self.count
        return {
            "zero_shot_accuracy": self.zero_shot,
            "final_accuracy": self.accuracies[chosen],
            "last_accuracy": self.accuracies[self.count],
            "selected_iteration": chosen,
            "iterations": self.count,
            "wall_seconds": round(self.seconds, 3),
            **self.new,
        }

    def curve(self) -> list[tuple]:
        """Rows (iteration, loss, lr, test accuracy, or "" where nothing was measured)."""
        return [
            (i, loss, cosine_lr(self.lr, i - 1, self.iterations), self.accuracies.get(i, ""))
            for i, loss in enumerate(self.losses[: self.count].tolist(), start=1)
        ]

    def offer(self, score: float, adapted: Adapted) -> None:
        """Keep the present weights, as what differs from the base, if none scored as high."""
        if score > self.best[1]:
            self.best = self.count, score, pack(adapted.method.trained, adapted.base.read())

    def record(self, predictions: Predictions) -> None:
        """Note the present weights' accuracy; keep their predictions if they would be reported."""
        self.accuracies[self.count] = predictions.accuracy
        if self.reported:
            self.predictions = predictions

    def state(self) -> dict[str, Any]:
        """Everything as plain values and CPU tensors."""
        losses, answers = self.losses[: self.count].cpu(), tuple(self.predictions)
        return {**vars(self), "losses": losses, "predictions": answers, "began": -self.seconds}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        vars(self).update(state, began=self.began + state["began"])
        self.predictions = Predictions(*self.predictions) if self.predictions else ()


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


def cosine_lr(lr: float, iteration: int, iterations: int) -> float:
    """The learning rate of an iteration, counted from 0: a cosine from lr down to 1e-6."""
    return FINAL_LR + (lr - FINAL_LR) * (1 + math.cos(math.pi * iteration / iterations)) / 2


def train(
    adapted: Adapted,
    batches: Iterator[tuple[Batch, bool]],
    course: Course,
    settings: Settings = Settings(),  # noqa: B008 # frozen
    measure: Callable[[], Predictions] | None = None,
    save: Callable[[], None] = lambda: None,
    interruption: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> None:
    """Adapt a model by cross-entropy over scaled cosines, with the paper's cosine schedule.

    Args:
        adapted: What is adapted.
        batches: Images and labels without end, and whether each batch ends an epoch; the course's
            next one first. Images are this process's (`own_images`), labels the whole batch's.
        course: How far it is: a new one, or an interrupted run's. It is kept up to date.
        settings: How it is trained.
        measure: Returns the predictions for the test images.
        save: Writes a checkpoint.
        interruption: Called after each iteration; raises Interrupted to end training.
        processes: Those that train together: each computes its share of a batch's images and of
            the classes, and all make the same step.

    Raises:
        NonFiniteLoss: A loss is NaN or infinite; the course ends with it.
        Interrupted: `interruption` or `measure` raised it; a checkpoint was saved.
    """
    model, optimizer = adapted.model, adapted.method.optimizer
    params = [p for group in optimizer.param_groups for p in group["params"]]
    device = model.text_projection.device
    scale = scale_of(model, settings.logit_scale)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # a resumed run's rate is that of its last step
    course.lr = optimizer.param_groups[0]["initial_lr"]
    with autocast(device, settings.precision):
        first, hidden = before_training(model, adapted.prompts, settings.text_chunk, processes)
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
            course.record(measure())

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
                    group["lr"] = cosine_lr(course.lr, course.count, course.iterations)
                optimizer.zero_grad()
                with autocast(device, settings.precision):
                    classes = hidden  # (C, D) where nothing of the text tower is trained
                    if first < len(model.transformer.resblocks):
                        classes = text_features(
                            model, adapted.prompts, settings.text_chunk, hidden, first, processes
                        )
                loss = add_gradients(
                    model, to_device(batch, device), classes, scale, scaler, settings, processes
                )
                if processes.size > 1:
                    with exchange():
                        sum_gradients(params, also=[loss])
                losses[course.count] = loss
                scaler.step(optimizer)
                scaler.update()
                course.count += 1
                note = ""
                if ends_epoch or course.count == course.iterations:
                    end_epoch(course, settings.early_stop_loss)
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
            f"mean loss, {course.epoch_loss:.4f}, is below {settings.early_stop_loss:g}",
            flush=True,
        )


def add_gradients(
    model: CLIP,
    batch: Batch,
    classes: Tensor,
    scale: float | Tensor,
    scaler: torch.amp.GradScaler,
    settings: Settings,
    processes: Processes = ALONE,
) -> Tensor:
    """Add this process's part of the gradients of a batch's mean loss; return its part of the loss.

    The batch, on the model's device, is computed in `settings.accumulate` parts, one after the
    other; the text, with classes' features (C, D), is encoded once all the same.
    """
    images, labels = batch
    at_once = part_size(len(labels), settings.accumulate)
    apart = at_once < len(labels) or processes.size > 1
    leaf = classes.detach().requires_grad_(classes.requires_grad) if apart else classes
    total, done = torch.zeros((), device=labels.device), 0
    for share in processes.shares(len(labels), at_once):
        mine = labels[share.mine]
        some, done = images[done : done + len(mine)], done + len(mine)
        with autocast(labels.device, settings.precision):
            with shared_rows(share, processes):
                features = image_features(model, some)
            logits = scale * features @ leaf.T  # (b, C)
            loss = F.cross_entropy(logits, mine, reduction="sum") / len(labels)
        scaler.scale(loss).backward()
        total = total + loss.detach()
    if leaf is not classes and leaf.requires_grad:
        classes.backward(leaf.grad)
    return total


def own_images(accumulate: int, processes: Processes, count: int) -> list[int]:
    """The numbers of the images of a batch of `count` that this process computes."""
    return processes.own(count, part_size(count, accumulate))


def part_size(count: int, accumulate: int) -> int:
    """The number of a batch's images that are computed at once, by all processes together."""
    return math.ceil(count / accumulate)


def end_epoch(course: Course, early_stop_loss: float) -> None:
    """Look at the losses of the epoch that ends here, and note whether training has ended.

    This is the one time in an epoch that the device is waited for.

    Raises:
        NonFiniteLoss: A loss is NaN or infinite.
    """
    losses = course.losses[course.epoch_start : course.count].tolist()
    for number, loss in enumerate(losses, start=course.epoch_start + 1):
        if not math.isfinite(loss):
            course.count = number
            raise NonFiniteLoss(
                f"the loss became {loss} at iteration {number} of {course.iterations}: lower "
                "--lr, or use --precision fp32 or bf16"
            )
    course.epoch_start, course.epoch_loss = course.count, fmean(losses)
    course.ended = course.count == course.iterations or course.epoch_loss < early_stop_loss
