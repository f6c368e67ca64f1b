"""One training iteration, side by side: seconds, shares of its parts, peak memory.

    python benchmarks/iteration.py [--classes 10] [--batch 32] [--backbone ViT-B/16] [--json FILE]

Rows: `plain`, SO as the authors compute it (plain.py); `short`, `last` and `sampled`, the same with
one of our savings: short texts, one token in the last block, sampled gradients; `lora`, rank 2 on
q, k and v of both towers; `adam`, torch's on SO's matrices; `so`, what main.py does; `floor`, how
long the matrix products of forward pass and input gradients alone would take at the rate measured
beside `so`. `so:bf16` is a row at another precision than --precision. Each row is a process of its
own, which take turns; medians are printed. Weights, images and prompts are random.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import plain
from benchmarks.common import (
    BACKBONES,
    T,
    cut,
    give_back_memory,
    machine,
    peak_mb,
    per_step,
    print_table,
    random_tokens,
    synchronise,
    write_json,
)
from benchmarks.floor import floor_flops, product_rate
from benchmarks.workers import Worker, take_turns
from clip import CLIP
from clip.lora import apply_lora, set_dropout
from clip.model import Attention
from clip.preprocess import normalize
from clip.zero_shot import ZeroShotClassifier
from datasets.transforms import to_device
from optimizers import SO
from optimizers.build import POSITIONS, mark_as_trainable
from optimizers.SampledGradients import sample_gradients
from runs.environment import get_default_device, set_up_device
from train import TrainConfig, TrainState, train

Mark = Callable[[str], None]  # called with a part's name where it ends

PARTS = ("input", "text", "image", "backward", "step")
METHODS = {
    "plain": "SO, as the authors compute it",
    "short": "the same with short texts",
    "last": "the same with one token in the last block",
    "sampled": "the same with sampled gradients",
    "lora": "LoRA",
    "adam": "Adam",
    "so": "SO",
    "floor": "floor",
}
PRECISIONS = ("fp32", "bf16", "fp16")
LR = 2e-4
PROFILED = 3 * T  # iterations in which kernels are counted


# What a row runs


def prepare(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Make a row's model, batch and optimizer, and `iterate`, which runs one iteration."""
    method, _, precision = name.partition(":")
    model = CLIP(**BACKBONES[args.backbone]).eval().to(device)
    params = list(mark_as_trainable(model, args.encoder, args.position).values())
    tokens = random_tokens(args.classes, model.vocab_size, model.context_length).to(device)
    side = model.visual.input_resolution
    images = torch.randint(256, (args.batch, side, side, 3), dtype=torch.uint8)
    batch = images.permute(0, 3, 1, 2), torch.randint(args.classes, (args.batch,))
    row = dict(model=model, batch=batch, prompts=cut(tokens))
    if method in ("plain", "short", "last"):
        optimizer = plain.PlainSO(params, args.density, LR, T)
        tokens = row["prompts"][0] if method == "short" else tokens
        one_token = method == "last"
        row["iterate"] = partial(plain_iteration, model, batch, tokens, optimizer, one_token)
        return row

    if method == "lora":
        layers = [name for name, m in model.named_modules() if isinstance(m, Attention)]
        adapters = apply_lora(model, layers)
        set_dropout(model, True)
        optimizer = torch.optim.AdamW(adapters.values(), lr=LR, weight_decay=1e-2)
    elif method == "adam":
        optimizer = torch.optim.Adam(params, lr=LR)
    else:
        optimizer = SO(params, lr=LR, density_ratio=args.density, T=T, seed=0)
        sample_gradients(model, optimizer)
        if method == "sampled":
            row["iterate"] = partial(plain_iteration, model, batch, tokens, optimizer, False)
            return row
    classifier = ZeroShotClassifier(
        model, row["prompts"], precision=precision, class_batch_size=args.class_batch_size
    )
    row |= dict(optimizer=optimizer, classifier=classifier)
    with classifier.autocast():
        classifier.precompute_frozen_text()
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    row["iterate"] = partial(iteration, row, scaler)
    return row


def plain_iteration(
    model: CLIP,
    batch: tuple[Tensor, Tensor],
    tokens: Tensor,
    optimizer: plain.PlainSO | SO,
    one_token: bool,
    mark: Mark,
) -> None:
    """One iteration of the authors' code, or with `one_token` in its last blocks."""
    images, labels = to_device(batch, tokens.device)
    images = normalize(images, model.image_mean, model.image_std)
    mark("input")
    texts = plain.encode_text(model, tokens, one_token)
    mark("text")
    features = plain.encode_image(model, images, one_token)
    mark("image")
    model.zero_grad()
    plain.cosine_loss(features, texts, labels).backward()
    mark("backward")
    optimizer.step()
    mark("step")


def iteration(row: dict[str, Any], scaler: torch.amp.GradScaler, mark: Mark) -> None:
    """One iteration of `train.train`, whatever is trained by whatever optimizer."""
    classifier, optimizer = row["classifier"], row["optimizer"]
    images, labels = to_device(row["batch"], classifier.device)
    mark("input")
    with classifier.autocast():
        text_features = classifier.encode_classes()
        mark("text")
        image_features = classifier.encode_images(images)
        mark("image")
        loss = F.cross_entropy(100.0 * image_features @ text_features.T, labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    mark("backward")
    scaler.step(optimizer)
    scaler.update()
    mark("step")


# Kernels between two synchronisations


def count_kernels(row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Profile a short training, and count the kernels that are launched without a wait."""
    from torch.profiler import ProfilerActivity, profile

    batches = ((row["batch"], False) for _ in range(PROFILED))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        state = TrainState(PROFILED, device, row["classifier"].precision)
        for _ in train(row["classifier"], row["optimizer"], batches, state, TrainConfig(LR)):
            pass
        synchronise(device)
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    kernels, longest = launches(event.name for event in events)
    return {"iterations": PROFILED, "kernels": kernels, "longest_run": longest}


def launches(names: Iterable[str]) -> tuple[int, int]:
    """Count CUDA's calls that launch kernels: all of them, and the most between two waits.

    Args:
        names: Of what was called, in order.
    """
    total = run = longest = 0
    for name in names:
        if name.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
            total, run = total + 1, run + 1
            longest = max(longest, run)
        elif name.startswith("cuda") and (name.endswith("Synchronize") or name == "cudaMemcpy"):
            run = 0
    return total, longest


# A process for each row


def timed(iterate: Callable[[Mark], None], device: torch.device) -> dict[str, float]:
    """Seconds of one iteration, and of each of its parts."""
    marks: list[tuple[str, Any]] = []

    def mark(part: str) -> None:
        if device.type == "cuda":  # on the GPU's own clock, which need not be waited for
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append((part, event))
        else:
            marks.append((part, time.perf_counter()))

    synchronise(device)
    start = time.perf_counter()
    mark("start")
    iterate(mark)
    synchronise(device)
    seconds = {"all": time.perf_counter() - start}
    for (_, before), (part, after) in pairwise(marks):
        cuda = device.type == "cuda"
        seconds[part] = before.elapsed_time(after) / 1e3 if cuda else after - before
    return seconds


def work(name: str, args: argparse.Namespace) -> None:
    """Do what the parent asks for on standard input, a word at a time; answer in lines of JSON."""
    device = set_up_device(args.device, args.threads)
    cuda = device.type == "cuda"
    row = prepare(name, args, device)
    shape = row["model"], args.batch, row["prompts"]
    steps = 0

    def turn() -> list[dict[str, float]]:
        """Timed iterations, a window on a GPU, after as many that get back the memory given up."""
        nonlocal steps
        records = []
        count = T if cuda else 1
        for _ in range(2 * count):
            steps += 1
            records.append({"step": steps, **timed(row["iterate"], device)})
        give_back_memory(device)  # the other rows need it
        return records[-count:]

    answers = {
        "turn": turn,
        "memory": lambda: peak_mb(device),
        "flops": lambda: floor_flops(*shape),
        "rate": lambda: product_rate(*shape),
        "kernels": lambda: count_kernels(row, device),
    }
    for question in sys.stdin:
        try:
            print(json.dumps({"answer": answers[question.strip()]()}), flush=True)
        except torch.cuda.OutOfMemoryError:
            print(json.dumps({"error": "out of memory"}), flush=True)


def measure(name: str, worker: Worker, records: list[dict[str, float]]) -> dict[str, Any]:
    """A row of the table, from the records of its iterations."""
    method, _, precision = name.partition(":")
    row = {"row": METHODS[method] + ("" if precision == "fp32" else f", {precision}")}
    row |= {"method": method, "precision": precision}
    memory = worker.ask("memory")
    if worker.error:
        return row | {"error": worker.error}
    steps = [record["step"] for record in records]
    typical = {
        part: per_step([record.get(part, 0.0) for record in records], steps)
        for part in ("all", *PARTS)
    }
    parts = sum(typical[part] for part in PARTS)
    row |= {"ms": 1e3 * typical["all"], "peak_mb": memory}
    return row | {"shares": {part: typical[part] / parts for part in PARTS}}


def arguments() -> argparse.Namespace:
    """The command line's; rows get their precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--rows",
        nargs="+",
        default=["plain", "lora", "adam", "so", "so:bf16", "floor"],
        help=f"of {', '.join(METHODS)}; all but plain and floor may have a precision, as so:bf16",
    )
    add("--precision", choices=PRECISIONS, default="fp32", help="of rows that name none")
    add("--backbone", choices=list(BACKBONES), default="ViT-B/16")
    add("--encoder", choices=["text", "vision", "both"], default="both")
    add("--position", choices=list(POSITIONS), default="all")
    add("--classes", type=int, default=10)
    add("--batch", type=int, default=32, help="images")
    add("--density", type=float, default=5e-5)
    add("--class_batch_size", type=int, default=0, help="as main.py's")
    add("--repeats", type=int, default=2 * T, help="iterations to time in each row")
    add("--threads", type=int, help="of torch on the CPU")
    add("--device", default=get_default_device())
    add("--json", help="write the figures to this file, too")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = []
    for name in args.rows:
        method, _, precision = name.partition(":")
        fixed = "fp32" if method in ("plain", "floor") else ""
        precision = precision or fixed or args.precision
        if method not in METHODS or precision not in ((fixed,) if fixed else PRECISIONS):
            parser.error(f"unknown row {name!r}")
        names.append(f"{method}:{precision}")
    args.rows = list(dict.fromkeys(names))
    if args.rows == ["floor:fp32"]:
        parser.error("--rows: the floor is measured beside another row")
    return args


def main() -> None:
    args = arguments()
    if args.worker:
        return work(args.worker, args)
    about = machine(set_up_device(args.device, args.threads))
    floor = "floor:fp32" in args.rows
    names = [name for name in args.rows if name != "floor:fp32"]
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    workers = {name: Worker([*command, name]) for name in names}
    reference = "so:fp32" if "so:fp32" in workers else names[0]
    records, rates = take_turns(workers, args.repeats, workers[reference] if floor else None)
    rows = [measure(name, worker, records[name]) for name, worker in workers.items()]
    result = {"machine": about, "rows": rows}
    if rates:
        flops = workers[reference].ask("flops")
        rate = statistics.median(rates)
        row = dict(row=METHODS["floor"], method="floor", precision="fp32", ms=1e3 * flops / rate)
        rows.append(row | {"gflop": flops / 1e9, "gflop_per_second": rate / 1e9})
    if args.device.startswith("cuda") and "so:fp32" in workers:
        result["kernels"] = workers["so:fp32"].ask("kernels")
    for worker in workers.values():
        worker.end()
    compare(rows)
    report(args, result)
    write_json(args, **result)


def compare(rows: list[dict[str, Any]]) -> None:
    """Set rows against the first, and those of float32 against the floor."""
    first, last = rows[0], rows[-1]
    for row in rows:
        if "ms" in first and "ms" in row:
            row["speedup"] = first["ms"] / row["ms"]
        if "peak_mb" in first and "peak_mb" in row:
            row["memory_ratio"] = row["peak_mb"] / first["peak_mb"]
        if last["method"] == "floor" and row["precision"] == "fp32" and "ms" in row:
            row["floor_ratio"] = row["ms"] / last["ms"]


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print what was measured, on what."""
    about, rows = result["machine"], result["rows"]
    print(
        f"{args.backbone}, {args.classes} classes, batches of {args.batch}, encoder "
        f"{args.encoder}, position {args.position}, density {args.density:g}; {about['device']}, "
        f"{about['threads']} threads, torch {about['torch']}\n"
    )
    columns: dict[str, Callable[[dict], str]] = {
        "": lambda row: row["row"],
        "ms": lambda row: f"{row['ms']:.1f}" if "ms" in row else row["error"],
        "times as fast": lambda row: f"{row['speedup']:.2f}",
        "of the floor": lambda row: f"{row['floor_ratio']:.2f}",
        **{
            f"{part}, %": lambda row, part=part: f"{100 * row['shares'][part]:.1f}"
            for part in PARTS
        },
        "peak, MB": lambda row: f"{row['peak_mb']:.0f}",
        "of the first": lambda row: f"{row['memory_ratio']:.2f}",
    }
    print_table(columns, rows)
    if rows[-1]["method"] == "floor":
        print(
            f"\nfloor: {rows[-1]['gflop']:.1f} GFLOP at {rows[-1]['gflop_per_second']:.0f} "
            "GFLOP/s in float32"
        )
    if kernels := result.get("kernels"):
        print(
            f"\nSO, {kernels['iterations']} iterations of training: {kernels['kernels']} kernels, "
            f"{kernels['longest_run']} in a row without a synchronisation"
        )


if __name__ == "__main__":
    main()
