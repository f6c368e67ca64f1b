"""The runs of the digits study as two files, which collect.py writes and study.py reads.

docs/digits/runs.csv has a line for each run. docs/digits/curves.csv.gz has the loss and, where it
was measured, the test accuracy of each iteration, for the runs that were evaluated as they went.
Settings without a column are those of configs/digits.yaml. Accuracies are in percent.
"""

import csv
import gzip
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import atomic_write, to_csv

RUNS_FILE, CURVES_FILE = "runs.csv", "curves.csv.gz"
KEY = {"experiment": str, "method": str, "dataset": str, "shots": int, "seed": int}
SETTINGS = {  # that the study varies, and their types
    "lr": float, "s": float, "t": int, "grad_support": str, "moment_support": str, "moments": str,
    "bias_correction": str, "n_iters": int, "early_stop_loss": float, "eval_every": int,
    "eval_split": str,
}  # fmt: skip
OTHERS = {
    "zero_shot_accuracy": float, "final_accuracy": float, "iterations": int, "wall_seconds": float,
    "data_digest": str, "processor": str, "torch": str, "git_commit": str,
}  # fmt: skip
COLUMNS = (*KEY, *SETTINGS, *OTHERS, "glyphs_accuracy", "per_class", "interpolation")
CURVE_COLUMNS = (*KEY, "iteration", "loss", "test_accuracy")


@dataclass(frozen=True, eq=False)
class StudyRun:
    """A run of the study, with the fields of `runs.records.Run` that tables and figures read."""

    experiment: str  # the first that lists it
    method: str
    dataset: str
    shots: int
    seed: int
    config: dict[str, Any]  # SETTINGS
    zero_shot_accuracy: float
    final_accuracy: float
    per_class: list[float]  # accuracy of each class, by label
    # By alpha, of the weights base + alpha (trained - base): accuracies on the task and on the
    # glyphs of the pre-training. {} where the run saved no weights.
    interpolation: dict[float, tuple[float, float]]
    iterations: int
    wall_seconds: float
    data_digest: str
    processor: str
    torch: str
    git_commit: str
    loss_curve: np.ndarray  # (iterations,); (0,) without --eval_every
    eval_curve: np.ndarray  # (E, 2): iteration, accuracy; begins with iteration 0, zero-shot
    backbone: str = "ViT-Tiny/8"

    @property
    def glyphs_accuracy(self) -> float:
        """Accuracy on the glyphs of the pre-training after the run."""
        return self.interpolation[1.0][1]

    @property
    def data(self) -> dict[str, str]:
        """What images it had, as `Run` has it."""
        return {"split": "fixed", "digest": self.data_digest}


def write_runs(runs: Sequence[StudyRun], folder: Path) -> None:
    """Write both files; equal runs give equal bytes."""
    rows, curves = [], []
    for run in runs:
        points = [f"{a:g} {task} {glyphs}" for a, (task, glyphs) in run.interpolation.items()]
        row = vars(run) | run.config
        row["glyphs_accuracy"] = run.glyphs_accuracy if points else ""
        row["per_class"] = " ".join(map(str, run.per_class))
        row["interpolation"] = "; ".join(points)
        rows.append([row[column] for column in COLUMNS])
        accuracies = dict(run.eval_curve[1:].tolist())
        for iteration, loss in enumerate(run.loss_curve.tolist(), start=1):
            key = [row[column] for column in KEY]
            curves.append([*key, iteration, loss, accuracies.get(iteration, "")])
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / RUNS_FILE, to_csv(COLUMNS, rows))
    data = to_csv(CURVE_COLUMNS, curves).encode()
    atomic_write(folder / CURVES_FILE, gzip.compress(data, mtime=0))


def read_runs(folder: Path) -> list[StudyRun]:
    """Read both files."""
    losses, accuracies = defaultdict(list), defaultdict(list)
    with gzip.open(folder / CURVES_FILE, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[column] for column in KEY)
            losses[key].append(float(row["loss"]))
            if row["test_accuracy"]:
                accuracies[key].append((int(row["iteration"]), float(row["test_accuracy"])))
    runs = []
    with open(folder / RUNS_FILE, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[column] for column in KEY)
            values = {column: parse(row[column]) for column, parse in (KEY | OTHERS).items()}
            points = [map(float, text.split()) for text in row["interpolation"].split(";") if text]
            run = StudyRun(
                **values,
                config={column: parse(row[column]) for column, parse in SETTINGS.items()},
                per_class=list(map(float, row["per_class"].split())),
                interpolation={alpha: (task, glyphs) for alpha, task, glyphs in points},
                loss_curve=np.array(losses[key]),
                eval_curve=np.array([(0, values["zero_shot_accuracy"]), *accuracies[key]]),
            )
            runs.append(run)
    return runs
