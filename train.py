"""The training loop, one step of it, the evaluation, and the state of a training.

Nothing here knows the command line or a run's files.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.zero_shot import ZeroShotClassifier
from datasets import Datum
from datasets.loader import ImageLoader
from datasets.transforms import Batch
from optimizers.delta import StateDiff
from optimizers.SampledGradients import sum_gradients
from runs.distributed import (
    all_gather_rows,
    comm_errors_as_peer_exit,
    get_rank,
    get_world_size,
    local_slice,
)
from runs.environment import RunClock
from utils import Predictions, Progress

MIN_LR = 1e-6  # at the end of the cosine
EVAL_BATCH_SIZE = 256


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop."""

    lr: float  # of the first iteration
    early_stop_loss: float = 0.0  # training ends after an epoch whose mean loss is below this
    grad_accum_steps: int = 1  # micro-batches that each batch is computed in
    seed: int = 0  # of LoRA's dropout
    rank: int = field(default_factory=get_rank)
    world_size: int = field(default_factory=get_world_size)


class BestCheckpoint(NamedTuple):
    """The weights with the best accuracy on the validation images so far."""

    iteration: int
    score: float  # accuracy in percent
    diff: StateDiff  # how the trained weights differ from the pretrained ones


@dataclass
class TrainState:
    """Progress of a training: all that resuming needs besides weights and optimizer."""

    total_iters: int
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"
    iteration: int = 0  # iterations done
    epoch_start: int = 0  # iterations done before this epoch
    epoch_loss: float = math.nan  # mean loss of the last epoch that ended
    done: bool = False
    losses: Tensor = field(init=False)  # (total_iters,), on the device so that it is not waited for
    scaler: torch.amp.GradScaler = field(init=False)  # active in fp16 only
    zero_shot: dict[str, float] = field(default_factory=dict)  # accuracies, as in result.json
    accuracies: dict[int, float] = field(default_factory=dict)  # in percent, by iteration
    new_accuracies: dict[int, float] = field(default_factory=dict)  # on new classes
    best: BestCheckpoint | None = None
    predictions: Predictions | None = None  # of the weights to report, as far as they are known
    mid_step: bool = False  # weights and optimizer are being changed
    clock: RunClock = field(default_factory=RunClock)  # goes on from that of the checkpoint

    def __post_init__(self) -> None:
        self.losses = torch.zeros(self.total_iters, device=self.device)
        enabled = self.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)

    @property
    def selected_iteration(self) -> int:
        """The iteration whose weights are reported, as far as is known."""
        return self.best.iteration if self.best else self.iteration

    def can_checkpoint(self) -> bool:
        """Whether there is something to save that a later run can continue from."""
        finite = self.losses[: self.iteration].isfinite().all()
        return self.iteration > 0 and not self.mid_step and bool(finite)

    def record_eval(self, predictions: Predictions) -> None:
        """Record the accuracy of the present weights."""
        self.accuracies[self.iteration] = predictions.accuracy
        if self.iteration == self.selected_iteration:
            self.predictions = predictions

    def curve_rows(self, lr: float) -> list[tuple]:
        """Rows (iteration, loss, lr, test accuracy, or "" where nothing was evaluated)."""
        losses, lrs = self.losses[: self.iteration].tolist(), cosine_lrs(lr, self.total_iters)
        pairs = enumerate(zip(losses, lrs, strict=False), start=1)
        return [(i, loss, lr, self.accuracies.get(i, "")) for i, (loss, lr) in pairs]

    def final_accuracies(self) -> dict[str, float]:
        """Accuracies of the weights to report, as in result.json."""
        final = {
            "final_accuracy": self.accuracies[self.selected_iteration],
            "balanced_accuracy": self.predictions.balanced_accuracy,
        }
        if self.new_accuracies:
            final["new_accuracy"] = self.new_accuracies[self.selected_iteration]
        return final

    def summary(self) -> dict[str, float]:
        """Results of a training that is done, as in result.json."""
        return {
            **self.zero_shot,
            **self.final_accuracies(),
            "last_accuracy": self.accuracies[self.iteration],
            "selected_iteration": self.selected_iteration,
            "iterations": self.iteration,
            "wall_seconds": round(self.clock.seconds(), 3),
        }

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values and CPU tensors."""
        objects = ("device", "scaler", "clock")
        plain = {key: value for key, value in vars(self).items() if key not in objects}
        return plain | {
            "losses": self.losses[: self.iteration].cpu(),
            "scaler": self.scaler.state_dict(),
            "seconds": self.clock.seconds(),
            "best": self.best and tuple(self.best),
            "predictions": self.predictions and tuple(self.predictions),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        state = dict(state)
        self.clock = RunClock(self.clock.seconds() + state.pop("seconds"))
        vars(self).update(state, losses=self.losses, scaler=self.scaler)
        self.losses[: self.iteration] = state["losses"].to(self.device)
        self.scaler.load_state_dict(state["scaler"])
        self.best = self.best and BestCheckpoint(*self.best)
        self.predictions = self.predictions and Predictions(*self.predictions)


def train(
    classifier: ZeroShotClassifier,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Batch, bool]],
    state: TrainState,
    config: TrainConfig,
) -> Iterator[None]:
    """Train, and yield after each step, so that the caller may evaluate, save, or stop.

    A resumed training first yields where it was interrupted.

    Args:
        classifier: The model, which stays in evaluation mode, and the class prompts.
        optimizer: Of the weights to train.
        batches: Endless batches, from the next one on, and whether each ends an epoch: images of
            this process's slice of the batch, labels of the whole batch.
        state: A new one, or an interrupted training's; it is kept up to date.
        config: Settings.

    Raises:
        FloatingPointError: A loss is NaN or infinite.
    """
    lrs = cosine_lrs(config.lr, state.total_iters)
    with classifier.autocast:
        classifier.precompute_frozen_text(local_slice(classifier.num_classes))
    with Progress(desc="Training", total=state.total_iters, initial=state.iteration) as bar:
        if state.iteration:
            yield
        while not state.done:
            batch, ends_epoch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = lrs[state.iteration]
            train_step(classifier, optimizer, batch, state, config)
            if ends_epoch or state.iteration == state.total_iters:
                # The only wait for the device in fp32 and bf16.
                losses = state.losses[state.epoch_start : state.iteration].tolist()
                for iteration, loss in enumerate(losses, start=state.epoch_start + 1):
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"the loss became {loss} at iteration {iteration} of "
                            f"{state.total_iters}: lower --lr, or use --precision fp32 or bf16"
                        )
                state.epoch_start, state.epoch_loss = state.iteration, fmean(losses)
                ends_early = state.epoch_loss < config.early_stop_loss
                state.done = ends_early or state.iteration == state.total_iters
                bar.set_postfix_str(f"loss {state.epoch_loss:.3f}", refresh=False)
            bar.update()
            yield
    if state.iteration < state.total_iters:
        print(
            f"\nStopped early, after iteration {state.iteration} of {state.total_iters}: the "
            f"epoch's mean loss, {state.epoch_loss:.4f}, is below {config.early_stop_loss:g}",
            flush=True,
        )


def cosine_lrs(lr: float, total_iters: int) -> list[float]:
    """The learning rate of each iteration: a cosine from lr down to 1e-6."""
    return [
        MIN_LR + (lr - MIN_LR) * (1 + math.cos(math.pi * i / total_iters)) / 2
        for i in range(total_iters)
    ]


def train_step(
    classifier: ZeroShotClassifier,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    state: TrainState,
    config: TrainConfig,
) -> None:
    """One optimizer step on one batch: images of this process's slice, labels of all of it."""
    # Seeded anew for each iteration, so that LoRA's dropout needs no generator state saved.
    seed = random.Random(f"{config.seed} {state.iteration} {config.rank}").getrandbits(62)
    torch.manual_seed(seed)
    optimizer.zero_grad()
    if state.device.type == "cuda":
        batch = [tensor.pin_memory() for tensor in batch]
    images, labels = (tensor.to(state.device, non_blocking=True) for tensor in batch)
    batch_size = len(labels)
    with classifier.autocast:
        if config.world_size == 1:
            text_features = classifier.encode_classes()  # (C, D)
        else:
            labels = labels[local_slice(batch_size)]  # (b,)
            local_features = classifier.encode_classes(local_slice(classifier.num_classes))
            text_features = all_gather_rows(local_features, classifier.num_classes)
    # The gradients of all micro-batches are summed here before they go through the text tower.
    text_leaf = text_features.detach().requires_grad_(text_features.requires_grad)
    micro_batch_size = max(math.ceil(len(labels) / config.grad_accum_steps), 1)
    total_loss = torch.zeros((), device=state.device)
    for micro_images, micro_labels in zip(
        images.split(micro_batch_size), labels.split(micro_batch_size), strict=True
    ):
        with classifier.autocast:
            image_features = classifier.encode_images(micro_images)  # (b, D)
            logits = classifier.logit_scale * image_features @ text_leaf.T  # (b, C)
            loss = F.cross_entropy(logits, micro_labels, reduction="sum") / batch_size
        state.scaler.scale(loss).backward()
        total_loss = total_loss + loss.detach()
    if text_leaf.requires_grad:
        text_features.backward(text_leaf.grad)
    if config.world_size > 1:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        with comm_errors_as_peer_exit():
            sum_gradients(params, extra=[total_loss])
    state.losses[state.iteration] = total_loss
    state.mid_step = True
    state.scaler.step(optimizer)
    state.scaler.update()
    state.iteration, state.mid_step = state.iteration + 1, False


@torch.no_grad()
def evaluate(
    classifier: ZeroShotClassifier,
    loader: ImageLoader,
    items: list[Datum],
    desc: str = "Evaluation",
) -> Predictions:
    """Classify images, which the loader reads; `desc` is shown by the progress bar."""
    outputs = []
    with classifier.autocast, Progress(desc=desc, total=len(items), unit="images") as bar:
        text_features = classifier.encode_classes()  # (C, D)
        for images, labels in loader.test_batches(items, EVAL_BATCH_SIZE):
            images = images.to(classifier.device)
            cosines = classifier.encode_images(images) @ text_features.T  # (b, C)
            preds = cosines.argmax(dim=-1)
            probs = (classifier.logit_scale * cosines.float()).softmax(dim=-1)
            outputs.append((labels, preds, probs.gather(1, preds[:, None])[:, 0]))
            bar.update(len(labels))
    return Predictions(*(torch.cat(parts).cpu() for parts in zip(*outputs, strict=True)))
