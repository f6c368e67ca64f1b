"""Which lr and density SO needs: accuracy by reach, steps x density x lr, on scikit-learn's digits.

    python benchmarks/settings.py [--steps 400 2000] [--seeds 1 2 3]

In `steps` steps an entry is read steps x density times on average, and moves by lr at most each
time, so reach bounds how far an average entry can go. Two tasks of one MLP (64-256-256-10, no
weight decay): "scratch" trains it from random weights; "shifted" starts from one that Adam has
trained on the digits and adapts it to images that are shifted by a pixel.
"""

import argparse
import sys
import warnings
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import print_table
from optimizers import SO
from utils import Progress

DENSITIES = (1e-3, 1e-2, 0.1)
LRS = (3e-4, 1e-3, 3e-3, 1e-2)
WIDTH, BATCH, TRAIN_IMAGES = 256, 64, 1347  # 450 images are for testing
ADAM_LR, ADAM_STEPS = 1e-3, 400  # of Adam's rows and of the model to adapt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[400, 2000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "SO keeps fewer than ten", UserWarning)
    rows = []
    for steps, density in Progress([*product(args.steps, DENSITIES)], desc="Settings", unit="row"):
        row = {"steps": steps, "density": density}
        row |= {f"lr {lr}": both_tasks(args.seeds, density, lr, steps) for lr in LRS}
        is_last = density == DENSITIES[-1]
        row["Adam, 0.001"] = both_tasks(args.seeds, None, ADAM_LR, steps) if is_last else ""
        rows.append(row)
    print_table(rows)


def both_tasks(seeds: list[int], *settings: float | None) -> str:
    """Mean accuracies of both tasks."""
    tasks = ([accuracy(task, seed, *settings) for seed in seeds] for task in ("scratch", "shifted"))
    return ", ".join(f"{fmean(values):.1f}" for values in tasks)


def accuracy(task: str, seed: int, density: float | None, lr: float, steps: int) -> float:
    """Test accuracy in percent after a training by SO, or by Adam where there is no density."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float() / 16, labels[order]
    torch.manual_seed(seed)
    layers = nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    if task == "shifted":
        train(model, torch.optim.Adam(model.parameters(), lr=ADAM_LR), images, labels, ADAM_STEPS)
        images = images.view(-1, 8, 8).roll((1, 1), (1, 2)).flatten(1)
    if density:
        optimizer = SO(model.parameters(), lr=lr, density_ratio=density, seed=seed)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    train(model, optimizer, images, labels, steps)
    preds = model(images[TRAIN_IMAGES:]).argmax(1)
    return 100 * (preds == labels[TRAIN_IMAGES:]).double().mean().item()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, steps: int
) -> None:
    """Take steps on batches of the training images in random order."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(TRAIN_IMAGES)
        batch, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
