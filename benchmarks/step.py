"""Milliseconds and bytes of one optimizer step over a model's matrices, side by side.

    python benchmarks/step.py [--model ViT-B/16] [--density 5e-5 5e-4 1e-2 0.1] [--threads 1]

Rows are those of ADAMS and SOS, each in a process of its own; medians are printed. On a CPU with
one thread they are of processor time. Peaks are over weights and gradients.
"""

import argparse
import math
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import T, print_table, run_in_process
from benchmarks.plain import PlainSO
from optimizers import SO
from optimizers.ablations import SOVariant
from runs.environment import get_default_device, peak_memory_mb
from utils import Progress

PLAIN_LIMIT = 20_000  # the k x k comparison takes k^2 bytes
ADAMS = {  # by parameters; ratios are to the first two
    "AdamW foreach": lambda params: AdamW(params, foreach=True),
    "AdamW fused": lambda params: AdamW(params, fused=True),
    "Adam, as it is by default": lambda params: Adam(params),
}
SOS = {  # by parameters and density
    "SO": lambda params, density: SO(params, density_ratio=density, T=T),
    "SO, foreach=False": lambda params, d: SO(params, density_ratio=d, T=T, foreach=False),
    "SO without moments": lambda params, d: SOVariant(params, density_ratio=d, T=T, moments="none"),
    "SO, as the authors compute it": PlainSO,
}


def block(width: int) -> list[tuple[int, int]]:
    """Shapes of the four matrices of a transformer's block."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


MODELS = {
    "ViT-B/16": 12 * block(768) + 12 * block(512),  # what SO adapts in both towers
    "GPT-2": [(50257, 768), (1024, 768), *12 * block(768)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="ViT-B/16")
    parser.add_argument("--density", type=float, nargs="+", default=[5e-5, 5e-4, 1e-2, 0.1])
    parser.add_argument("--windows", type=int, default=4, help=f"of T = {T} steps each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default=get_default_device())
    args = parser.parse_args()
    entries = [math.prod(shape) for shape in MODELS[args.model]]
    rows = [(name, None) for name in ADAMS]
    for density, name in product(args.density, SOS):
        if SOS[name] is not PlainSO or max(entries) * density <= PLAIN_LIMIT:
            rows.append((name, density))
    measured = [run_in_process(measure, *row, args) for row in Progress(rows, desc="Optimizers")]
    foreach, fused = (turn["ms"] for turn in measured[:2])
    print(f"{args.model}: {len(entries)} matrices, {sum(entries) / 1e6:.0f} M entries\n")
    print_table([
        {
            "density": density or "",
            "optimizer": name,
            "step, ms": f"{turn['ms']:.1f}",
            "of foreach's": f"{turn['ms'] / foreach:.3f}",
            "of fused's": f"{turn['ms'] / fused:.2f}",
            "step that draws, ms": f"{turn['draw_ms']:.1f}",
            "state, MB": f"{turn['state_mb']:.2f}",
            "peak, MB": f"{turn['peak_mb']:.0f}",
        }
        for (name, density), turn in zip(rows, measured, strict=True)
    ])  # fmt: skip


def measure(name: str, density: float | None, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step and of one that draws, MB of the state, peak MB of the steps."""
    torch.set_num_threads(args.threads)
    device, clock = torch.device(args.device), time.perf_counter
    if device.type == "cpu" and args.threads == 1:
        clock = time.process_time  # which other programs disturb less
    params = []
    for shape in MODELS[args.model]:  # nothing is freed, so the peak is what is in use
        params.append(nn.Parameter(torch.normal(0, 0.02, shape, device=device)))
        params[-1].grad = torch.normal(0, 1e-3, shape, device=device)
    before, times = peak_memory_mb(device), []
    optimizer = SOS[name](params, density) if density else ADAMS[name](params)
    for _ in range(T * (args.windows + 1)):
        start = clock()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (clock() - start))
    states = optimizer.state if isinstance(optimizer, PlainSO) else optimizer.state.values()
    tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    return {  # the first window warms up
        "ms": median(ms for i, ms in enumerate(times) if i > T and i % T),
        "draw_ms": median(times[T::T]),
        "state_mb": sum(t.nbytes for t in tensors) / 2**20,
        "peak_mb": peak_memory_mb(device) - before,
    }


if __name__ == "__main__":
    main()
