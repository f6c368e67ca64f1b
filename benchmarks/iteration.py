"""One training iteration, side by side: milliseconds, shares of its parts, peak memory.

    python benchmarks/iteration.py [--classes 10] [--batch 32] [--backbone ViT-B/16] [--json FILE]

Rows: `plain`, SO as the authors compute it (plain.py); `short`, `last` and `sampled`, the same with
one of our savings: short texts, one token in the last block, sparse weight gradients; `lora`, rank
2 on q, k and v of both towers; `adam`, torch's on SO's matrices; `so`, what main.py does;
`roofline`, the matrix products of `so` at the rate that products reach beside it. `so:bf16` is
`so` in bf16. Each row is a process of its own. They take turns; medians are printed. Weights,
images and prompts are random.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import plain
from benchmarks.common import (
    BACKBONES,
    T,
    amortized_step_time,
    machine,
    peak_mb,
    print_table,
    random_tokens,
    release_memory,
    synchronize,
    trim_padding,
    write_json,
)
from clip import CLIP
from clip.preprocess import normalize
from clip.zero_shot import ZeroShotClassifier
from datasets.transforms import to_device
from optimizers import SO
from optimizers.build import POSITIONS, build_optimizer, mark_as_trainable
from runs.environment import get_default_device, set_up_device
from train import TrainConfig, TrainState, train_step

Mark = Callable[[str], None]  # called with a part's name where it ends

PARTS = ("input", "text", "image", "backward", "step")
METHODS = {
    "plain": "SO, as the authors compute it",
    "short": "the same with short texts",
    "last": "the same with one token in the last block",
    "sampled": "the same with sparse gradients",
    "lora": "LoRA",
    "adam": "Adam",
    "so": "SO",
    "roofline": "roofline",
}
ROWS = [*METHODS, *(f"{name}:{p}" for name in ("lora", "adam", "so") for p in ("bf16", "fp16"))]
LR, RANK = 2e-4, 2
MAX_ITERATIONS = 10**6  # of a training, of which a row is the start


# Rows


def prepare(name: str, args: argparse.Namespace, device: torch.device) -> "Plain | Ours":
    """Make a row's model, batch and optimizer."""
    method, _, precision = name.partition(":")
    model = CLIP(**BACKBONES[args.backbone]).eval().to(device)
    kind = method if method in ("lora", "adam") else "so"
    weights = mark_as_trainable(model, args.encoder, args.position, kind)
    tokens = random_tokens(args.classes, model.vocab_size, model.context_length).to(device)
    side = model.visual.input_resolution
    images = torch.randint(256, (args.batch, side, side, 3), dtype=torch.uint8)
    batch = images.permute(0, 3, 1, 2), torch.randint(args.classes, (args.batch,))
    if method in ("plain", "short", "last"):
        optimizer = plain.PlainSO(list(weights.values()), args.density, LR, T)
    else:
        settings = dict(lr=LR, density=args.density, T=T, rank=RANK, seed=0)
        optimizer = build_optimizer(kind, model, weights, **settings)
    if method == kind:
        settings = dict(precision=precision or "fp32", class_batch_size=args.class_batch_size)
        return Ours(batch, optimizer, model, trim_padding(tokens), **settings)
    tokens = trim_padding(tokens)[0] if method == "short" else tokens
    return Plain(batch, optimizer, model, tokens, one_token=method == "last")


@dataclass
class Plain:
    """Iterations as in the authors' code, or with `one_token` in the last blocks."""

    batch: tuple[Tensor, Tensor]
    optimizer: plain.PlainSO | SO
    model: CLIP
    tokens: Tensor
    one_token: bool

    def iterate(self, mark: Mark) -> None:
        model = self.model
        images, labels = to_device(self.batch, self.tokens.device)
        images = normalize(images, model.image_mean, model.image_std)
        mark("input")
        text_features = plain.encode_text(model, self.tokens, self.one_token)
        mark("text")
        image_features = plain.encode_image(model, images, self.one_token)
        mark("image")
        model.zero_grad()
        plain.cosine_loss(image_features, text_features, labels).backward()
        mark("backward")
        self.optimizer.step()
        mark("step")


class Ours(ZeroShotClassifier):
    """Iterations of main.py, `train.train_step`; it ends parts where that calls this classifier."""

    mark: Mark = staticmethod(lambda part: None)

    def __init__(self, batch: tuple[Tensor, Tensor], optimizer: Any, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.batch, self.optimizer = batch, optimizer
        self.state = TrainState(MAX_ITERATIONS, self.device, self.precision)
        with self.autocast():
            self.precompute_frozen_text()
        step = self.state.scaler.step  # called after the backward pass, in all precisions
        self.state.scaler.step = lambda optimizer: (self.mark("backward"), step(optimizer))

    def iterate(self, mark: Mark) -> None:
        self.mark = mark
        train_step(self, self.optimizer, self.batch, self.state, TrainConfig(LR))
        mark("step")

    def encode_classes(self, classes: slice = slice(None)) -> Tensor:
        self.mark("input")
        text_features = super().encode_classes(classes)
        self.mark("text")
        return text_features

    def encode_images(self, images: Tensor) -> Tensor:
        image_features = super().encode_images(images)
        self.mark("image")
        return image_features


Row = Plain | Ours


def timed(row: Row, device: torch.device) -> dict[str, float]:
    """Seconds of one iteration, `all`, and of each of its parts."""
    cuda, marks = device.type == "cuda", []

    def mark(part: str) -> None:
        if cuda:  # on the GPU's clock, which nothing waits for
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append((part, event))
        else:
            marks.append((part, time.perf_counter()))

    synchronize(device)
    start = time.perf_counter()
    mark("start")
    row.iterate(mark)
    synchronize(device)
    seconds = {"all": time.perf_counter() - start}
    for (_, before), (part, after) in pairwise(marks):
        seconds[part] = before.elapsed_time(after) / 1e3 if cuda else after - before
    return seconds


# The roofline


def count_flops(row: Row) -> int:
    """Operations of all matrix products of an iteration, causal attention counted in full."""
    # The fused kernels of attention are not all counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        row.iterate(lambda part: None)
    return counter.get_total_flops()


def product_rate(model: CLIP, batch: int, device: torch.device) -> float:
    """Operations a second of matrix products as large as those of the image tower's MLPs."""
    positions, width = model.visual.positional_embedding.shape
    weight, bias = torch.randn(4 * width, width, device=device), torch.randn(4 * width).to(device)
    x = torch.randn(batch * positions, width, device=device)
    dy = torch.randn(batch * positions, 4 * width, device=device)
    seconds = 0.0
    for product in (lambda: F.linear(x, weight, bias), lambda: dy.mm(weight)):
        product()  # warms up
        synchronize(device)
        start = time.perf_counter()
        product()
        synchronize(device)
        seconds += time.perf_counter() - start
    return 2 * 2 * len(x) * weight.numel() / seconds


# A process for each row


class Worker:
    """A process that runs one row and answers questions."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        spawn, self.name = multiprocessing.get_context("spawn"), name
        self.pipe, pipe = spawn.Pipe()
        spawn.Process(target=serve, args=(name, args, pipe), daemon=True).start()
        pipe.close()

    def ask(self, question: str) -> Any:
        """The answer, or None if the process has ended, as when it runs out of memory."""
        try:
            self.pipe.send(question)
            return self.pipe.recv()
        except (EOFError, OSError):
            return None


def serve(name: str, args: argparse.Namespace, pipe: Any) -> None:
    """Answer a parent's questions about a row."""
    device = set_up_device(args.device, args.threads)
    torch.manual_seed(0)
    row, steps = prepare(name, args, device), 0

    def turn() -> list[dict[str, float]]:
        """Time T iterations on a GPU, else one, after as many that allocate memory again."""
        nonlocal steps
        records = []
        count = T if device.type == "cuda" else 1
        for _ in range(2 * count):
            steps += 1
            records.append({"number": steps, **timed(row, device)})
        release_memory(device)  # the other rows need it
        return records[-count:]

    answers = {
        "turn": turn,
        "memory": lambda: peak_mb(device),
        "flops": lambda: count_flops(row),
        "rate": lambda: product_rate(row.model, args.batch, device),
    }
    while (question := pipe.recv()) != "end":
        pipe.send(answers[question]())


def interleave(
    workers: dict[str, Worker], repeats: int, reference: Worker | None
) -> tuple[dict[str, list[dict[str, float]]], list[float]]:
    """Let rows take turns until each has `repeats` iterations, after a turn that warms up.

    Returns:
        The records of each row's iterations, and the rate of products beside the reference, once
        a round.
    """
    records: dict[str, list] = {name: [] for name in workers}
    rates = []
    running = {name: worker for name, worker in workers.items() if worker.ask("turn")}
    while any(len(records[name]) < repeats for name in running):
        for name, worker in [*running.items()]:
            records[name] += (answer := worker.ask("turn")) or []
            if not answer:
                del running[name]
        if reference and (rate := reference.ask("rate")):
            rates.append(rate)
    return records, rates


# The table


def summarize(name: str, worker: Worker, records: list[dict[str, float]]) -> dict[str, Any]:
    """A row of the table, from the records of its iterations."""
    method, _, precision = name.partition(":")
    row: dict[str, Any] = {"row": METHODS[method] + (precision and f", {precision}"), "name": name}
    if memory := worker.ask("memory"):
        steps = [record["number"] for record in records]
        mean = {
            part: amortized_step_time([record.get(part, 0.0) for record in records], steps)
            for part in ("all", *PARTS)
        }
        parts = sum(mean[part] for part in PARTS)
        row |= {"ms": 1e3 * mean["all"], "peak_mb": memory}
        row["shares"] = {part: mean[part] / parts for part in PARTS}
    return row


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    usual = ["plain", "lora", "adam", "so", "so:bf16", "roofline"]
    add("--rows", nargs="+", choices=ROWS, default=usual, metavar="ROW", help=", ".join(ROWS))
    add("--backbone", choices=list(BACKBONES), default="ViT-B/16")
    add("--encoder", choices=["text", "vision", "both"], default="both")
    add("--position", choices=list(POSITIONS), default="all")
    add("--classes", type=int, default=10)
    add("--batch", type=int, default=32, help="number of images")
    add("--density", type=float, default=5e-5)
    add("--class_batch_size", type=int, default=0, help="as main.py's")
    add("--repeats", type=int, default=2 * T, help="iterations to time in each row")
    add("--threads", type=int, help="torch's threads on the CPU")
    add("--device", default=get_default_device())
    add("--json", help="write the figures to this file, too")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    about = machine(set_up_device(args.device, args.threads))
    workers = {name: Worker(name, args) for name in args.rows if name != "roofline"}
    reference = workers.get("so") if "roofline" in args.rows else None
    records, rates = interleave(workers, args.repeats, reference)
    rows = [summarize(name, worker, records[name]) for name, worker in workers.items()]
    if rates:
        flops, rate = reference.ask("flops"), statistics.median(rates)
        label = f"roofline: {flops / 1e9:.1f} GFLOP at {rate / 1e9:.0f} GFLOP/s"
        rows.append({"row": label, "name": "roofline", "ms": 1e3 * flops / rate})
    for worker in workers.values():
        worker.ask("end")
    for row in rows:
        if "ms" in row and "ms" in rows[0]:
            row["speedup"] = rows[0]["ms"] / row["ms"]
        if "peak_mb" in row and "peak_mb" in rows[0]:
            row["memory_ratio"] = row["peak_mb"] / rows[0]["peak_mb"]
        if rates and "ms" in row and ":" not in row["name"]:
            row["roofline_ratio"] = row["ms"] / rows[-1]["ms"]
    print(
        f"{args.backbone}, {args.classes} classes, batches of {args.batch}, encoder "
        f"{args.encoder}, position {args.position}, density {args.density:g}; {about['device']}, "
        f"{about['threads']} threads, torch {about['torch']}\n"
    )
    columns: dict[str, Callable[[dict], str]] = {
        "": lambda row: row["row"],
        "ms": lambda row: f"{row['ms']:.1f}" if "ms" in row else "failed",
        "times as fast": lambda row: f"{row['speedup']:.2f}",
        "of the roofline": lambda row: f"{row['roofline_ratio']:.2f}",
        **{
            f"{part}, %": lambda row, part=part: f"{100 * row['shares'][part]:.1f}"
            for part in PARTS
        },
        "peak, MB": lambda row: f"{row['peak_mb']:.0f}",
        "of the first": lambda row: f"{row['memory_ratio']:.2f}",
    }
    print_table(columns, rows)
    write_json(args, machine=about, rows=rows)


if __name__ == "__main__":
    main()
