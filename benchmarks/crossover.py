"""Where sparse gradients stop paying: k products against the dense matrix product, by density.

    python benchmarks/crossover.py [--threads 1] [--device cpu]

One weight of ViT-B/16's image tower (3072 x 768) and one of its text tower (512 x 512), in float32
and bfloat16. `SampledGradients.DENSE_MATMUL_DENSITY` and `DENSE_MATMUL_FACTOR` were set by it.
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import print_table
from optimizers import SampledGradients
from optimizers.SparseOptimizer import draw_support
from runs.environment import get_default_device

SHAPES = ((3072, 768), (512, 512))
TOKENS = 2000  # rows of both factors
DENSITIES = (1 / 1000, 1 / 500, 1 / 300, 1 / 200, 1 / 150, 1 / 100, 1 / 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default=get_default_device())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for shape, dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
        row = {"weight": f"{shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')}"}
        dy, x = (torch.randn(TOKENS, n, device=args.device).to(dtype) for n in shape)
        for density in DENSITIES:
            row[f"1/{1 / density:.0f}"] = f"{time_ratio(dy, x, density):.2f}"
        rows.append(row)
    print_table(rows)


def time_ratio(dy: Tensor, x: Tensor, density: float) -> float:
    """Time of k products over that of the dense product of which k entries are taken."""
    numel, generator = dy.shape[1] * x.shape[1], torch.Generator().manual_seed(0)
    support = draw_support(numel, int(numel * density), generator).to(dy.device)
    weight = torch.empty(dy.shape[1], x.shape[1], device="meta")
    plan = SampledGradients._make_plans({weight: support})[weight]
    columns = x if plan.columns is None else x[:, plan.columns]
    timer = Timer(
        "products(dy, columns, plan, 0)", num_threads=torch.get_num_threads(),
        globals=dict(products=SampledGradients._products, dy=dy, columns=columns, plan=plan),
    )  # fmt: skip
    seconds = []
    for dense_from in (1e9, 0):
        with mock.patch.object(SampledGradients, "DENSE_MATMUL_DENSITY", dense_from):
            seconds.append(timer.blocked_autorange(min_run_time=0.1).median)
    return seconds[0] / seconds[1]


if __name__ == "__main__":
    main()
