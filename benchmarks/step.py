"""Milliseconds and bytes of one optimizer step over a model's matrices, side by side.

    python benchmarks/step.py [--model ViT-B/16] [--density 5e-5 5e-4 1e-2 0.1] [--threads 1]

Compared: SO; SO one tensor at a time (`foreach=False`); SO without moments (`--moments none`); SO
as the authors' code computes it (a permutation of all entries for each draw, a k x k comparison of
the supports; our own re-statement); torch's AdamW foreach and fused, Adam as it is by default.
Rows take turns, each in a process of its own; medians are printed. On a CPU with one thread they
are of processor time, which other programs disturb less. Peaks are over weights and gradients.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import T, peak_mb, print_table, run_in_process
from benchmarks.plain import PlainSO
from optimizers import SO
from optimizers.ablations import SOVariant
from utils import Progress

PLAIN_LIMIT = 20_000  # the k x k comparison takes k^2 bytes
ADAM_ROWS = ("AdamW foreach", "AdamW fused", "Adam, as it is by default")  # the first two divide
SO_ROWS = ("SO", "SO, foreach=False", "SO without moments", "SO, as the authors compute it")


def block(width: int) -> list[tuple[int, int]]:
    """Shapes of the four matrices of a transformer's block."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


MODELS = {
    "ViT-B/16": 12 * block(768) + 12 * block(512),  # what SO adapts in both towers
    "GPT-2": [(50257, 768), (1024, 768), *12 * block(768)],
}


def make_params(shapes: Iterable[tuple[int, int]], device: str) -> list[nn.Parameter]:
    """Matrices with random gradients."""
    params = []
    for shape in shapes:
        params.append(nn.Parameter(0.02 * torch.randn(shape, device=device)))
        params[-1].grad = 1e-3 * torch.randn_like(params[-1])
    return params


def make_optimizer(name: str, params: list[nn.Parameter], density: float) -> Any:
    """The optimizer of a row."""
    so = dict(density_ratio=density, T=T, lr=1e-5)
    return {
        "AdamW foreach": lambda: AdamW(params, lr=1e-5, foreach=True),
        "AdamW fused": lambda: AdamW(params, lr=1e-5, fused=True),
        "Adam, as it is by default": lambda: Adam(params, lr=1e-5),
        "SO": lambda: SO(params, **so),
        "SO, foreach=False": lambda: SO(params, foreach=False, **so),
        "SO without moments": lambda: SOVariant(params, moments="none", **so),
        "SO, as the authors compute it": lambda: PlainSO(params, density),
    }[name]()


def milliseconds(step: Callable[[], object], device: str) -> float:
    """Time of one call, the device's work included."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    single_thread = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if single_thread else time.perf_counter
    synchronize()
    start = clock()
    step()
    synchronize()
    return 1e3 * (clock() - start)


def state_mb(optimizer: Any) -> float:
    """MB of all tensors of an optimizer's state."""
    states = optimizer.state if isinstance(optimizer, PlainSO) else optimizer.state.values()
    tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def measure(name: str, density: float, shapes: list, args: argparse.Namespace) -> dict[str, Any]:
    """One turn of a row."""
    torch.set_num_threads(args.threads)
    params = make_params(shapes, args.device)
    refs = Path("/proc/self/clear_refs")
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif refs.exists():
        refs.write_text("5")  # the peak is now what is in use
    before = peak_mb(torch.device(args.device))
    optimizer = make_optimizer(name, params, density)
    times = [milliseconds(optimizer.step, args.device) for _ in range(T * (args.windows + 1))]
    peak = peak_mb(torch.device(args.device)) - before
    return dict(times=times[T:], state_mb=state_mb(optimizer), peak_mb=peak)  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="ViT-B/16")
    parser.add_argument("--density", type=float, nargs="+", default=[5e-5, 5e-4, 1e-2, 0.1])
    parser.add_argument("--rounds", type=int, default=2, help="turns of each row")
    parser.add_argument("--windows", type=int, default=2, help=f"of T = {T} steps, in a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", choices=SO_ROWS, default=SO_ROWS)
    args = parser.parse_args()

    shapes = MODELS[args.model]
    entries = [rows * columns for rows, columns in shapes]
    todo = [(name, None) for name in ADAM_ROWS]
    for density, name in product(args.density, args.rows):
        if name != "SO, as the authors compute it" or max(entries) * density <= PLAIN_LIMIT:
            todo.append((name, density))
    turns: dict[tuple, list[dict]] = {row: [] for row in todo}
    for _, row in Progress([*product(range(args.rounds), todo)], desc="Steps", unit="turn"):
        turns[row].append(run_in_process(measure, *row, shapes, args))

    times = {
        row: [t for turn in measured for t in turn["times"]] for row, measured in turns.items()
    }
    usual = {
        row: statistics.median(t for i, t in enumerate(ms) if i % T) for row, ms in times.items()
    }
    foreach, fused, *_ = usual.values()
    rows = []
    for (name, density), measured in turns.items():
        ms = usual[name, density]
        rows.append({
            "density": density or "",
            "optimizer": name,
            "step, ms": f"{ms:.1f}",
            "of foreach's": f"{ms / foreach:.3f}",
            "of fused's": f"{ms / fused:.2f}",
            "step that draws, ms": f"{statistics.median(times[name, density][::T]):.1f}",
            "state, MB": f"{measured[0]['state_mb']:.2f}",
            "peak, MB": f"{max(turn['peak_mb'] for turn in measured):.0f}",
        })  # fmt: skip
    print(
        f"{args.model}: {len(shapes)} matrices, {sum(entries) / 1e6:.0f} M entries, torch "
        f"{torch.__version__}, {args.device}, {args.threads} threads\n"
    )
    print_table(rows)


if __name__ == "__main__":
    main()
