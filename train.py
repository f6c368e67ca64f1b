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
from clip.lora import merged_lora
from clip.model import ResidualAttentionBlock
from clip.zero_shot import (
    encode_classes,
    encode_images,
    get_autocast,
    get_logit_scale,
    precompute_frozen_text,
    shared_rows,
)
from datasets.transforms import Batch, to_device
from optimizers.build import Method
from optimizers.delta import (
    StateDiff,
    apply_state_diff,
    diff_state_dict,
    interpolated_weights,
    save_delta,
)
from optimizers.SampledGradients import sum_gradients
from runs.distributed import SINGLE_PROCESS, DistInfo, comm_errors_as_peer_exit
from runs.signals import Preempted
from runs.weights import PretrainedModel
from utils import Predictions, Progress

MIN_LR = 1e-6  # where the cosine ends


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Args:
        logit_scale: Factor of the cosines, or "checkpoint" for the model's own.
        early_stop_loss: Training ends after an epoch whose mean loss is below this.
        precision: Precision of the matrix products: "fp32", "bf16", or "fp16" with scaled
            gradients.
        class_batch_size: Classes whose text is encoded at once; 0 for all (`encode_classes`).
        grad_accum_steps: Parts that each batch is computed in.
        eval_every: Iterations between two measurements; 0 for the last one alone.
        checkpoint_every: Iterations between two checkpoints; 0 for none.
    """

    logit_scale: float | str = 100.0
    early_stop_loss: float = 0.0
    precision: str = "fp32"
    class_batch_size: int = 0
    grad_accum_steps: int = 1
    eval_every: int = 0
    checkpoint_every: int = 0


class Adapted(NamedTuple):
    """What is adapted: a model, which stays in evaluation mode, to classes, by a method."""

    model: CLIP
    prompts: Tensor  # tokens of the classes' prompts, by label: (P, C, L)
    method: Method
    base: PretrainedModel | None = None  # read for checkpoints and deltas

    @contextmanager
    def scaled(self, alpha: float) -> Iterator[None]:
        """Merge LoRA's adapters, and scale what was learned, for a while."""
        with merged_lora(self.model):
            if alpha == 1:
                yield
            else:
                with interpolated_weights(
                    self.method.matrices, self.base.reload_state_dict(), alpha
                ):
                    yield

    def report(self, course: "TrainState") -> dict[str, Tensor]:
        """Give the model the weights that the course reports; return those of the base."""
        base = self.base.reload_state_dict()
        if packed := course.best[2]:
            apply_state_diff(packed, self.method.trained, base)
        return base

    @torch.no_grad()
    def restore(self, base: dict[str, Tensor]) -> None:
        """Give the model the base's weights; adapters, which the base lacks, are 0 then."""
        for name, parameter in self.method.trained.items():
            parameter.copy_(base[name]) if name in base else parameter.zero_()

    def save(self, path: Path, course: "TrainState", wise: float = 1) -> None:
        """Write the delta of the weights that the course reports, scaled by `wise`."""
        base = self.report(course)
        told = {"backbone": self.base.name} | ({} if wise == 1 else {"wise": f"{wise:g}"})
        with self.scaled(wise):
            save_delta(path, self.method.matrices, base, self.base.sha256, **told)


@dataclass
class TrainState:
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
    best: tuple[int, float, StateDiff] = (0, -math.inf, {})  # iteration, score, weights then
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
            (i, loss, get_lr(self.lr, i - 1, self.iterations), self.accuracies.get(i, ""))
            for i, loss in enumerate(self.losses[: self.count].tolist(), start=1)
        ]

    def offer(self, score: float, adapted: Adapted) -> None:
        """Keep the present weights, as what differs from the base, if none scored as high."""
        if score > self.best[1]:
            self.best = (
                self.count,
                score,
                diff_state_dict(adapted.method.trained, adapted.base.reload_state_dict()),
            )

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


def get_lr(lr: float, iteration: int, iterations: int) -> float:
    """The learning rate of an iteration, counted from 0: a cosine from lr down to 1e-6."""
    return MIN_LR + (lr - MIN_LR) * (1 + math.cos(math.pi * iteration / iterations)) / 2


def train(
    adapted: Adapted,
    batches: Iterator[tuple[Batch, bool]],
    course: TrainState,
    settings: TrainConfig = TrainConfig(),  # noqa: B008 # frozen
    measure: Callable[[], Predictions] | None = None,
    save: Callable[[], None] = lambda: None,
    interruption: Callable[[], None] = lambda: None,
    processes: DistInfo = SINGLE_PROCESS,
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
    scale = get_logit_scale(model, settings.logit_scale)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # a resumed run's rate is that of its last step
    course.lr = optimizer.param_groups[0]["initial_lr"]
    with get_autocast(device, settings.precision):
        first, hidden = precompute_frozen_text(
            model, adapted.prompts, settings.class_batch_size, processes
        )
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
                    group["lr"] = get_lr(course.lr, course.count, course.iterations)
                optimizer.zero_grad()
                with get_autocast(device, settings.precision):
                    classes = hidden  # (C, D) where nothing of the text tower is trained
                    if first < len(model.transformer.resblocks):
                        classes = encode_classes(
                            model,
                            adapted.prompts,
                            settings.class_batch_size,
                            hidden,
                            first,
                            processes,
                        )
                loss = forward_backward(
                    model, to_device(batch, device), classes, scale, scaler, settings, processes
                )
                if processes.size > 1:
                    with comm_errors_as_peer_exit():
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
    except Preempted:
        save_if_sound()
        raise
    if course.count < course.iterations:
        print(
            f"\nStopped early, after iteration {course.count} of {course.iterations}: the epoch's "
            f"mean loss, {course.epoch_loss:.4f}, is below {settings.early_stop_loss:g}",
            flush=True,
        )


def forward_backward(
    model: CLIP,
    batch: Batch,
    classes: Tensor,
    scale: float | Tensor,
    scaler: torch.amp.GradScaler,
    settings: TrainConfig,
    processes: DistInfo = SINGLE_PROCESS,
) -> Tensor:
    """Add this process's part of the gradients of a batch's mean loss; return its part of the loss.

    The batch, on the model's device, is computed in `settings.grad_accum_steps` parts, one after the
    other; the text, with classes' features (C, D), is encoded once all the same.
    """  # noqa: E501
    images, labels = batch
    at_once = part_size(len(labels), settings.grad_accum_steps)
    apart = at_once < len(labels) or processes.size > 1
    leaf = classes.detach().requires_grad_(classes.requires_grad) if apart else classes
    total, done = torch.zeros((), device=labels.device), 0
    for share in processes.shares(len(labels), at_once):
        mine = labels[share.mine]
        some, done = images[done : done + len(mine)], done + len(mine)
        with get_autocast(labels.device, settings.precision):
            with shared_rows(share, processes):
                features = encode_images(model, some)
            logits = scale * features @ leaf.T  # (b, C)
            loss = F.cross_entropy(logits, mine, reduction="sum") / len(labels)
        scaler.scale(loss).backward()
        total = total + loss.detach()
    if leaf is not classes and leaf.requires_grad:
        classes.backward(leaf.grad)
    return total


def own_images(grad_accum_steps: int, processes: DistInfo, count: int) -> list[int]:
    """The numbers of the images of a batch of `count` that this process computes."""
    return processes.own(count, part_size(count, grad_accum_steps))


def part_size(count: int, grad_accum_steps: int) -> int:
    """The number of a batch's images that are computed at once, by all processes together."""
    return math.ceil(count / grad_accum_steps)


def end_epoch(course: TrainState, early_stop_loss: float) -> None:
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
