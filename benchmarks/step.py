"""Milliseconds and bytes of one optimizer step over ViT-B/16's matrices, side by side.

    python benchmarks/step.py [--density 5e-5 5e-4 2e-3] [--threads 2] [--device cpu] [--json FILE]

Compared: SO; SO without moments (`--moments none`); SO one matrix at a time, as the authors' code
computes it (a permutation of all entries for each draw, a k x k comparison of the supports; our own
re-statement); torch's Adam on the same matrices. Steps of all take turns; medians are printed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.plain import PlainSO
from optimizers import SO
from optimizers.ablations import SOVariant

WIDTHS = {"vision": 768, "text": 512}  # of ViT-B/16's towers, twelve layers each
T = 5
PLAIN_LIMIT = 20_000  # the k x k comparison takes k^2 bytes


def matrices(device: str) -> list[nn.Parameter]:
    """The 96 matrices that SO adapts in ViT-B/16, with random gradients."""
    params = []
    for width in WIDTHS.values():
        for _ in range(12):
            for rows, columns in ((3, 1), (1, 1), (4, 1), (1, 4)):
                p = nn.Parameter(torch.randn(rows * width, columns * width, device=device) * 0.02)
                p.grad = torch.randn_like(p)
                params.append(p)
    return params


def milliseconds(step: Callable[[], object], device: str) -> float:
    """Time of one call, the device's work included."""
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronise()
    start = time.perf_counter()
    step()
    synchronise()
    return 1e3 * (time.perf_counter() - start)


def state_bytes(states: Iterable[dict]) -> int:
    """Bytes of all tensors of optimizer states."""
    tensors = (t for state in states for t in state.values() if isinstance(t, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, nargs="+", default=[5e-5, 5e-4, 2e-3])
    parser.add_argument("--windows", type=int, default=5, help=f"of T = {T} steps to time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the table to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    params = matrices(args.device)
    entries = sum(p.numel() for p in params)
    print(
        f"{len(params)} matrices, {entries / 1e6:.0f} M entries, torch {torch.__version__}, "
        f"{args.device}, {args.threads} threads\n"
    )
    print("| density | optimizer | step, ms | step that draws, ms | state, MB |\n|-|-|-|-|-|")
    rows = []
    for density in args.density:
        optimizers = {
            "SO": SO(params, density_ratio=density, T=T),
            "SO without moments": SOVariant(params, density_ratio=density, T=T, moments="none"),
            "SO, as the authors compute it": PlainSO(params, density),
            "Adam": torch.optim.Adam(params),
        }
        if max(p.numel() for p in params) * density > PLAIN_LIMIT:
            del optimizers["SO, as the authors compute it"]
        times: dict[str, list[float]] = {name: [] for name in optimizers}
        for _ in range(T * (args.windows + 1)):
            for name, optimizer in optimizers.items():
                times[name].append(milliseconds(optimizer.step, args.device))
        for name, optimizer in optimizers.items():
            states = optimizer.state if isinstance(optimizer, PlainSO) else optimizer.state.values()
            timed = times[name][T:]  # the first window warms up
            drawing = statistics.median(timed[::T])
            usual = statistics.median(t for i, t in enumerate(timed) if i % T)
            size = state_bytes(states) / 2**20
            print(f"| {density:g} | {name} | {usual:.1f} | {drawing:.1f} | {size:.2f} |")
            rows.append(
                dict(density=density, optimizer=name, ms=usual, drawing_ms=drawing, state_mb=size)
            )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
