"""Where sparse gradients stop paying: k products against the dense matrix product, by density.

    python benchmarks/crossover.py [--threads 1] [--device cpu] [--tokens 2000]

One weight of ViT-B/16's image tower (3072 x 768) and one of its text tower (512 x 512), in float32
and bfloat16. Both ways of `SampledGradients._products` take turns; the least time of several is
printed. `SampledGradients.DENSE_MATMUL_DENSITY` and `DENSE_MATMUL_FACTOR` were set by it.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import synchronize
from optimizers import SampledGradients
from optimizers.SparseOptimizer import draw_support
from runs.environment import get_default_device

SHAPES = ((3072, 768), (512, 512))
DENSITIES = (1 / 1000, 1 / 500, 1 / 300, 1 / 200, 1 / 150, 1 / 100, 1 / 50)


def milliseconds(dy: Tensor, x: Tensor, density: float, repeats: int) -> list[float]:
    """Time of k products, and of the dense product of which k entries are taken."""
    rows, columns = dy.shape[1], x.shape[1]
    k, generator = int(rows * columns * density), torch.Generator().manual_seed(0)
    support = draw_support(rows * columns, k, generator).to(dy.device)
    weight = torch.empty(rows, columns, device="meta")
    plan = SampledGradients._make_plans({weight: support})[weight]
    x_columns = x if plan.columns is None else x[:, plan.columns]
    least = [float("inf"), float("inf")]
    for _ in range(repeats):
        for way, product_from in enumerate((1e9, 0)):
            with mock.patch.object(SampledGradients, "DENSE_MATMUL_DENSITY", product_from):
                synchronize(dy.device)
                start = time.perf_counter()
                SampledGradients._products(dy, x_columns, plan, 0)
                synchronize(dy.device)
            least[way] = min(least[way], 1e3 * (time.perf_counter() - start))
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default=get_default_device())
    parser.add_argument("--tokens", type=int, default=2000, help="rows of both factors")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| weight | density | k products, ms | dense, ms | ratio |\n|-|-|-|-|-|")
    for (rows, columns), dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
        dy, x = (torch.randn(args.tokens, n, device=args.device) for n in (rows, columns))
        for density in DENSITIES:
            sparse, dense = milliseconds(dy.to(dtype), x.to(dtype), density, args.repeats)
            name = f"{rows} x {columns}, {str(dtype).removeprefix('torch.')}"
            times = f"{sparse:.1f} | {dense:.1f} | {sparse / dense:.2f}"
            print(f"| {name} | 1/{1 / density:.0f} | {times} |")


if __name__ == "__main__":
    main()
