"""Which lr and density SO needs: accuracy by reach, steps x density x lr, on scikit-learn's digits.

    python benchmarks/settings.py [--steps 400 2000] [--seeds 1 2 3]

In `steps` steps an entry is read steps x density times on average, and moves by lr at most each
time, so reach bounds how far an average entry can go. Two tasks of one MLP (64-256-256-10, no
weight decay): "scratch" trains it from random weights; "shifted" starts from one that Adam has
trained on the digits and adapts it to images that are shifted by a pixel. Adam has one row a task
and number of steps.
"""

import argparse
import sys
import warnings
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import describe_machine, print_table
from optimizers import SO
from utils import Progress

TASKS = ("scratch", "shifted")
DENSITIES = (1e-3, 1e-2, 0.1)
LRS = (3e-4, 1e-3, 3e-3, 1e-2)
WIDTH, BATCH, TRAIN_IMAGES = 256, 64, 1347  # 450 images are for testing
ADAM_LR, ADAM_STEPS = 1e-3, 400  # of Adam's rows and of the model to adapt


def load_data() -> tuple[list[Tensor], list[Tensor]]:
    """Images and labels to train on and to test on: the digits, and the same shifted by a pixel."""
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order].float() / 16, labels[order]
    shifted = pixels.view(-1, 8, 8).roll((1, 1), (1, 2)).flatten(1)
    split = slice(None, TRAIN_IMAGES), slice(TRAIN_IMAGES, None)
    return tuple([t[part] for part in split for t in (x, labels)] for x in (pixels, shifted))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor], steps: int
) -> None:
    """Take steps on batches in random order."""
    images, labels = data[:2]
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(images))
        batch, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: list[Tensor]) -> float:
    """Accuracy on the test part, in percent."""
    images, labels = data[2:]
    return 100 * (model(images).argmax(1) == labels).double().mean().item()


def make_model(task: str, seed: int, digits: list[Tensor], steps: int) -> nn.Module:
    """An MLP of random weights, or one that Adam has trained on the digits."""
    torch.manual_seed(seed)
    layers = nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    if task == "shifted":
        train(model, torch.optim.Adam(model.parameters(), lr=ADAM_LR), digits, steps)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[400, 2000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--adam_steps", type=int, default=ADAM_STEPS, help="of the model to adapt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "SO keeps fewer than ten", UserWarning)

    digits, shifted = load_data()
    data = {"scratch": digits, "shifted": shifted}
    settings = [(None, ADAM_LR), *product(DENSITIES, LRS)]  # density None: Adam
    rows: list[dict[str, Any]] = []
    todo = [*product(TASKS, args.steps, settings)]
    for task, steps, (density, lr) in Progress(todo, desc="Settings", unit="row"):
        before, after = [], []
        for seed in args.seeds:
            model = make_model(task, seed, digits, args.adam_steps)
            before.append(accuracy(model, data[task]))
            if density is None:
                optimizer = torch.optim.Adam(model.parameters(), lr=lr)
            else:
                optimizer = SO(model.parameters(), lr=lr, density_ratio=density, seed=seed)
            train(model, optimizer, data[task], steps)
            after.append(accuracy(model, data[task]))
        reads = steps * (density or 1)
        rows.append({
            "task": task,
            "optimizer": "SO" if density else "Adam",
            "steps": steps,
            "density": density or "",
            "lr": lr,
            "reach": reads * lr,
            "reads": reads,
            "before, %": round(fmean(before), 1),
            "accuracy, %": round(fmean(after), 1),
            "seeds": f"{min(after):.1f} to {max(after):.1f}",
        })  # fmt: skip
    rows.sort(key=lambda row: (row["task"], row["reach"]))
    print(f"{describe_machine(torch.device('cpu'))}\n")
    print_table(rows)


if __name__ == "__main__":
    main()
