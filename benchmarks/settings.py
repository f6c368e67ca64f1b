"""SO's settings by the size of the matrices: test accuracy of two MLPs on scikit-learn's digits.

    python benchmarks/settings.py [--epochs 20] [--json FILE]

SO moves floor(n * density) entries of a matrix of n, one at least: settings for matrices of
millions of entries barely train one of thousands. The head may be in a dense group.
"""

import argparse
import sys
import warnings
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import machine, print_table, write_json
from optimizers import SO
from utils import progress

WIDTHS = (256, 1024)  # of two hidden layers
BATCH, TRAINED = 64, 1347  # images of a step, and of the training part; 450 are for testing
FEW, ADAM_LR = 10, 1e-3  # entries of a tensor below which SO warns


class Setting(NamedTuple):
    """A row of the table."""

    name: str
    lr: float
    density: float | None = None  # None: Adam


SETTINGS = (
    Setting("Adam", ADAM_LR),
    Setting("SO, its defaults", 2e-4, 5e-5),
    Setting("SO", 3e-4, 5e-4),
    Setting("SO", 1e-2, 1e-3),
    Setting("SO, head dense", 1e-2, 1e-3),
    Setting("SO", 1e-2, 1e-2),
    Setting("SO, head dense", 1e-2, 1e-2),
    Setting("SO", 3e-3, 0.1),
)


def make_optimizer(model: nn.Sequential, setting: Setting, seed: int) -> torch.optim.Optimizer:
    """Adam, or SO with the head among the others or in a dense group at Adam's rate."""
    if setting.density is None:
        return torch.optim.Adam(model.parameters(), lr=setting.lr)
    groups = [{"params": model[:-1].parameters()}, {"params": model[-1].parameters()}]
    if setting.name.endswith("head dense"):
        groups[1] |= {"dense": True, "lr": ADAM_LR}
    return SO(groups, lr=setting.lr, density_ratio=setting.density, seed=seed)


def accuracy_of(setting: Setting, width: int, seed: int, epochs: int, data: list[Tensor]) -> float:
    """Train from a seed, and return the accuracy on the test part in percent."""
    torch.manual_seed(seed)
    images, labels, test_images, test_labels = data
    first, second, head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head)
    optimizer = make_optimizer(model, setting, seed)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    with torch.no_grad():
        return 100 * (model(test_images).argmax(1) == test_labels).double().mean().item()


def few_entries(setting: Setting, width: int) -> tuple[int, int]:
    """How many of the matrices that SO moves keep fewer than FEW entries, and of how many."""
    sizes = [64 * width, width * width, 10 * width][: 2 if "head" in setting.name else 3]
    return sum(max(1, int(size * setting.density)) < FEW for size in sizes), len(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--json", help="write the figures to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)  # SO's, of too few entries

    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order].float() / 16, labels[order]
    data = [pixels[:TRAINED], labels[:TRAINED], pixels[TRAINED:], labels[TRAINED:]]
    rows: list[dict[str, Any]] = []
    for width, setting in progress([*product(args.widths, SETTINGS)], desc="Settings", unit="row"):
        found = [accuracy_of(setting, width, seed, args.epochs, data) for seed in args.seeds]
        rows.append({"width": width, **setting._asdict(), "accuracies": found})
        if setting.density is not None:
            rows[-1]["few"] = few_entries(setting, width)
    columns = {
        "MLP": lambda row: f"64-{row['width']}-{row['width']}-10",
        "optimizer": lambda row: row["name"],
        "lr": lambda row: f"{row['lr']:g}",
        "density": lambda row: f"{row['density']:g}" if row["density"] else "",
        f"matrices that keep fewer than {FEW} entries": lambda row: "{} of {}".format(*row["few"]),
        "accuracy, %": lambda row: f"{fmean(row['accuracies']):.1f}",
        "seeds": lambda row: f"{min(row['accuracies']):.1f} to {max(row['accuracies']):.1f}",
    }
    about = machine(torch.device("cpu"))
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}\n")
    print_table(columns, rows)
    write_json(args, machine=about, rows=rows)


if __name__ == "__main__":
    main()
