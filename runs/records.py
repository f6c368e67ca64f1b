"""Read finished runs from their folders: result.json, curve.csv, predictions.csv, transfer.json."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_origin

import numpy as np

import clip

CURVE_COLUMNS = ["iteration", "loss", "lr", "test_accuracy"]  # of curve.csv
PREDICTION_COLUMNS = [  # of predictions.csv
    "path", "label", "predicted", "probability", "classname", "predicted_classname",
]  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """A finished run. Accuracies are in percent, on test images unless config says otherwise."""

    folder: Path
    transfer: dict[str, dict[str, Any]]  # entries of transfer.json by dataset
    loss_curve: np.ndarray  # (iterations,)
    eval_curve: np.ndarray  # (E, 2): iteration, accuracy; begins with iteration 0, zero-shot
    # Entries of result.json; those with a default may be missing there.
    method: str
    backbone: str
    dataset: str
    shots: int
    seed: int
    zero_shot_accuracy: float
    final_accuracy: float
    iterations: int
    wall_seconds: float
    peak_memory_mb: float
    config: dict[str, Any]
    data: dict[str, Any]  # split, digest and numbers of the images
    classnames: list[str]  # by label
    template: list[str]  # prompts with {} for the class name
    ece: float  # expected calibration error in percent
    device: str
    versions: dict[str, str]  # of packages
    git_commit: str | None = None
    new_accuracy: float | None = None  # of a run on base classes, on the new ones
    zero_shot_new_accuracy: float | None = None
    inputs: dict[str, Any] | None = None  # content of its files, as runs.identity has it
    balanced_accuracy: float | None = None  # mean of the classes' accuracies
    macro_f1: float | None = None  # mean F1 score of the classes, in percent


RESULT_FIELDS = fields(Run)[4:]
RESULT_TYPES = {
    field.name: get_origin(field.type) or field.type
    for field in RESULT_FIELDS
    if field.default is MISSING
}


def read_run(folder: Path) -> Run:
    """Read a run's files: a malformed one is a ValueError, a missing one an OSError."""
    result = _read_json(folder / "result.json")
    _check_types(result, RESULT_TYPES, "result.json")
    columns = {"iteration": int, "loss": float, "test_accuracy": lambda x: float(x or "nan")}
    curve = _read_csv(folder / "curve.csv", columns)
    losses = np.array([loss for _, loss, _ in curve])
    if len(losses) != result["iterations"] or not np.isfinite(losses).all():
        found = f"{len(losses)} of {result['iterations']} iterations"
        raise _malformed("curve.csv", f"{found}, or a loss that is not finite")
    evaluated = [(iteration, accuracy) for iteration, _, accuracy in curve if accuracy >= 0]
    entries = {field.name: result.get(field.name) for field in RESULT_FIELDS}
    entries["backbone"] = canonical_backbone(result["backbone"])
    return Run(
        **entries,
        folder=folder,
        transfer=read_transfer(folder / "transfer.json"),
        loss_curve=losses,
        eval_curve=np.array([(0, result["zero_shot_accuracy"]), *evaluated], float),
    )


def read_transfer(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of transfer.json by dataset; {} where there is no such file."""
    entries = _read_json(path) if path.is_file() else {}
    for entry in entries.values():
        _check_types(entry, ("data", "zero_shot_accuracy", "final_accuracy"), path.name)
    return entries


def load_predictions(run: Run) -> list[tuple[str, int, int, float]]:
    """Return path, label, predicted label and its probability of each test image of a run."""
    columns = {"path": str, "label": int, "predicted": int, "probability": float}
    rows = _read_csv(run.folder / "predictions.csv", columns)
    labels = range(len(run.classnames))
    if not rows or not all(row[1] in labels and row[2] in labels for row in rows):
        raise _malformed("predictions.csv", "no rows, or labels of other classes")
    return rows


def load_confusion_matrix(run: Run) -> np.ndarray:
    """Count how often each class of a run was predicted as each: (C, C) int64, true class first."""
    counts = np.zeros((len(run.classnames), len(run.classnames)), int)
    for _, label, predicted, _ in load_predictions(run):
        counts[label, predicted] += 1
    return counts


def slugify(backbone: str) -> str:
    """Return a backbone's name as a run's path has it."""
    return re.sub(r"[^\w.-]", "-", backbone).lstrip(".") or "-"


def canonical_backbone(name: str) -> str:
    """Return a model's name; of a checkpoint's path the stem, or the model with that stem."""
    models = {slugify(model): model for model in clip.available_models()}
    stem = slugify(name if name in models.values() else Path(name).stem)
    return models.get(stem, stem)


def _malformed(filename: str, problem: object) -> ValueError:
    """Return the error of a file in a run's folder that is not as main.py wrote it."""
    return ValueError(
        f"{filename} is malformed ({problem}): main.py with --overwrite makes it again"
    )


def _check_types(entry: Any, keys: Iterable[str], filename: str) -> None:
    """Raise a ValueError unless an entry of a file has valid values of these RESULT_TYPES."""
    for key in keys:
        value, kind = entry.get(key) if isinstance(entry, dict) else None, RESULT_TYPES[key]
        valid = isinstance(value, int | float if kind is float else kind)
        if not valid or (kind is float and not math.isfinite(value)):
            raise _malformed(filename, f"no valid {key}; did another version write it?")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise _malformed(path.name, error) from error


def _read_csv(path: Path, columns: Mapping[str, Callable[[str], Any]]) -> list[tuple]:
    """Return the values of these columns in each row of a CSV file, converted."""
    with open(path, newline="", encoding="utf-8") as file:
        try:
            return [
                tuple(convert(row[name]) for name, convert in columns.items())
                for row in csv.DictReader(file)
            ]
        except (csv.Error, KeyError, ValueError, TypeError) as error:
            raise _malformed(path.name, repr(error)) from error
