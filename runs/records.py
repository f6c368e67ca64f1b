"""Read finished runs from their folders: result.json, curve.csv, predictions.csv, transfer.json."""

import csv
import json
import math
import re
from collections.abc import Mapping
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


RESULT_TYPES = {
    field.name: get_origin(field.type) or field.type
    for field in fields(Run)[4:]
    if field.default is MISSING
}
OPTIONAL_FIELDS = [field.name for field in fields(Run) if field.default is None]
DATA_TYPES = {"split": str, "digest": str}  # of `data`
TRANSFER_TYPES = {  # of transfer.json, for each dataset
    "zero_shot_accuracy": float, "final_accuracy": float, "classes": int, "images": int,
    "data": dict,
}  # fmt: skip


def read_run(folder: Path) -> Run:
    """Read a run's files.

    Raises:
        ValueError: A file is missing or malformed; the sentence says which and why.
        OSError: A file cannot be read.
    """
    result = _read_json(folder / "result.json")
    _validate(result, RESULT_TYPES, "result.json")
    _validate(result["data"], DATA_TYPES, "data in result.json")
    losses, evaluated = _read_curve(folder / "curve.csv", result["iterations"])
    evaluated = np.array([(0, result["zero_shot_accuracy"]), *evaluated], float)
    entries = {key: result[key] for key in RESULT_TYPES}
    entries |= {key: result.get(key) for key in OPTIONAL_FIELDS}
    entries["backbone"] = canonical_backbone(result["backbone"])
    return Run(
        **entries,
        folder=folder,
        transfer=read_transfer(folder / "transfer.json"),
        loss_curve=np.array(losses),
        eval_curve=evaluated,
    )


def read_transfer(path: Path) -> dict[str, dict[str, Any]]:
    """Return the accuracies on other datasets by dataset; {} where there is no such file.

    Raises:
        ValueError: The file is not what --test_on writes; the sentence says why.
    """
    if not path.is_file():
        return {}
    targets = _read_json(path)
    _validate(targets, {}, path.name)
    for values in targets.values():
        _validate(values, TRANSFER_TYPES, path.name)
        _validate(values["data"], DATA_TYPES, f"data in {path.name}")
    return targets


def load_predictions(run: Run) -> list[tuple[str, int, int, float]]:
    """Return path, label, predicted label and its probability of each test image of a run.

    Raises:
        ValueError: predictions.csv is missing or malformed.
        OSError: It cannot be read.
    """
    try:
        rows = [
            (path, int(label), int(predicted), float(probability))
            for path, label, predicted, probability, *_ in _read_csv(
                run.folder / "predictions.csv", PREDICTION_COLUMNS[:4]
            )
        ]
    except ValueError as error:
        raise ValueError(f"predictions.csv is malformed ({error})") from None
    labels = range(len(run.classnames))
    if not rows or not all(row[1] in labels and row[2] in labels for row in rows):
        raise ValueError("predictions.csv has no rows, or labels of other classes")
    return rows


def load_confusion_matrix(run: Run) -> np.ndarray:
    """Count how often each class of a run was predicted as each: (C, C) int64, true class first.

    Errors are those of `load_predictions`.
    """
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


def _read_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error


def _validate(values: Any, types: Mapping[str, type], file: str) -> None:
    """Raise a ValueError that names the first value that is missing or of another type."""
    if not isinstance(values, dict):
        raise ValueError(f"{file} does not hold an object where it should")
    for key, kind in types.items():
        if key not in values:
            raise ValueError(
                f"{file} has no {key}: another version of this program wrote it, or it is damaged;"
                " main.py with --overwrite makes it again"
            )
        value = values[key]
        valid = isinstance(value, int | float if kind is float else kind)
        if not valid or (kind is float and not math.isfinite(value)):
            raise ValueError(f"{file}: {key} cannot be {str(value)[:50]!r}")


def _read_curve(path: Path, iterations: int) -> tuple[list[float], list[tuple[int, float]]]:
    """Return the loss of each iteration, and (iteration, accuracy) where it was evaluated."""
    try:
        rows = _read_csv(path, CURVE_COLUMNS)
        losses = [float(loss) for _, loss, _, _ in rows]
        evaluated = [(int(i), float(accuracy)) for i, _, _, accuracy in rows if accuracy]
    except ValueError as error:
        raise ValueError(f"curve.csv is malformed ({error})") from None
    if len(losses) != iterations or not all(map(math.isfinite, losses)):
        raise ValueError(f"curve.csv has {len(losses)} of {iterations} iterations, or is damaged")
    return losses, evaluated


def _read_csv(path: Path, columns: list[str]) -> list[list[str]]:
    """Return the lines of a CSV file after its header, which begins with these columns."""
    if not path.is_file():
        raise ValueError(f"there is no {path.name}")
    with open(path, newline="", encoding="utf-8") as file:
        try:
            header, *rows = csv.reader(file)
        except csv.Error as error:
            raise ValueError(str(error)) from None
    if header[: len(columns)] != columns:
        raise ValueError(f"its columns are {', '.join(header)}")
    return rows
