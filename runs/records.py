"""Read finished runs from their folders: result.json, curve.csv, predictions.csv, transfer.json."""

import csv
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import clip
from optimizers.build import METHODS

LOG_COLUMNS = ["iteration", "loss", "lr", "test_accuracy"]  # of curve.csv
PREDICTION_COLUMNS = ["path", "label", "predicted", "probability"]  # of predictions.csv, then
PREDICTION_COLUMNS += ["classname", "predicted_classname"]
PERCENT = (int | float, 0, 100)
# The fields of the files: the type, then a number's range, a text's pattern or the type of a list's
# elements. Those of result.json are fields of Run.
RESULT_SCHEMA = {
    "method": (str, "|".join(METHODS)),
    "backbone": (str, r".*\w.*"),
    "dataset": (str, r"[^/\\|]*\w[^/\\|]*"),  # own images have their folder's name
    "shots": (int, 1, 10**6),
    "seed": (int, 0, 10**18),
    "zero_shot_accuracy": PERCENT,
    "final_accuracy": PERCENT,
    "iterations": (int, 1, 10**9),
    "wall_seconds": (int | float, 0, 10**9),
    "peak_memory_mb": (int | float, 0, 10**9),
    "config": (dict,),
    "data": (dict,),
    "classnames": (list, str),
    "template": (list, str),
    "ece": PERCENT,
    "device": (str, r".+"),
    "versions": (dict,),
}
OPTIONAL_FIELDS = (
    "git_commit", "new_accuracy", "zero_shot_new_accuracy", "inputs", "balanced_accuracy",
    "macro_f1",
)  # fmt: skip
DATA_SCHEMA = {"split": (str, r"\w+"), "digest": (str, r"\w+")}  # of `data`
TRANSFER_SCHEMA = {  # of transfer.json, for each dataset
    "zero_shot_accuracy": PERCENT,
    "final_accuracy": PERCENT,
    "classes": (int, 1, 10**9),
    "images": (int, 1, 10**9),
    "data": (dict,),
}


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run. Accuracies are in percent, on test images unless config says otherwise."""

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
    git_commit: str | None
    new_accuracy: float | None  # of a run on base classes, on the new ones
    zero_shot_new_accuracy: float | None
    inputs: dict[str, Any] | None  # content of its files, as runs.identity has it
    balanced_accuracy: float | None  # mean of the classes' accuracies
    macro_f1: float | None  # mean F1 score of the classes, in percent
    transfer: dict[str, dict[str, Any]]  # TRANSFER_SCHEMA by target dataset
    loss_curve: np.ndarray  # (iterations,)
    eval_curve: np.ndarray  # (E, 2): iteration, accuracy; begins with iteration 0, zero-shot
    folder: Path


def read_run(folder: Path) -> Run:
    """Read a run's files.

    Raises:
        ValueError: A file is missing or malformed; the sentence says which and why.
        OSError: A file cannot be read.
    """
    result = _read_json(folder / "result.json")
    _validate(result, RESULT_SCHEMA, "result.json")
    _validate(result["data"], DATA_SCHEMA, "data in result.json")
    losses, evaluated = _read_curve(folder / "curve.csv", result["iterations"])
    fields = {key: result[key] for key in RESULT_SCHEMA}
    fields |= {key: result.get(key) for key in OPTIONAL_FIELDS}
    fields["backbone"] = canonical_backbone(result["backbone"])
    return Run(
        **fields,
        transfer=read_transfer(folder / "transfer.json"),
        loss_curve=np.array(losses),
        eval_curve=np.array([(0, result["zero_shot_accuracy"]), *evaluated], float),
        folder=folder,
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
        _validate(values, TRANSFER_SCHEMA, path.name)
        _validate(values["data"], DATA_SCHEMA, f"data in {path.name}")
    return targets


def load_predictions(run: Run) -> list[tuple[str, int, int, float]]:
    """Return path, label, predicted label and its probability of each test image of a run.

    Raises:
        ValueError: predictions.csv is missing or malformed.
        OSError: It cannot be read.
    """
    labels, rows = range(len(run.classnames)), []

    def add(path: str, label: str, predicted: str, probability: str, *_: str) -> None:
        if int(label) not in labels or int(predicted) not in labels:
            raise ValueError
        rows.append((path, int(label), int(predicted), float(probability)))

    _read_csv(run.folder / "predictions.csv", PREDICTION_COLUMNS[:4], add)
    if not rows:
        raise ValueError("predictions.csv has 0 rows")
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
    known = {slugify(model): model for model in clip.available_models()}
    stem = slugify(name if name in known.values() else Path(name).stem)
    return known.get(stem, stem)


def _read_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error


def _validate(values: Any, schema: dict[str, tuple], file: str) -> None:
    """Raise a ValueError that names the first field that is missing or out of range."""
    if not isinstance(values, dict):
        raise ValueError(f"{file} does not hold an object where it should")
    for key, (kind, *limits) in schema.items():
        if key not in values:
            raise ValueError(
                f"{file} has no {key}: another version of this program wrote it, or it is damaged;"
                " main.py with --overwrite makes it again"
            )
        value = values[key]
        valid = isinstance(value, kind) and not isinstance(value, bool)
        if valid and kind is str:
            valid = re.fullmatch(limits[0], value) is not None and value.isprintable()
        elif valid and kind is list:
            valid = bool(value) and all(isinstance(element, limits[0]) for element in value)
        elif valid and limits:
            valid = limits[0] <= value <= limits[1]  # False for NaN
        if not valid:
            raise ValueError(f"{file}: {key} cannot be {str(value)[:50]!r}")


def _read_curve(path: Path, iterations: int) -> tuple[list[float], list[tuple[int, float]]]:
    """Return the loss of each iteration, and (iteration, accuracy) where it was evaluated."""
    losses, evaluated = [], []

    def add(iteration: str, loss: str, lr: str, accuracy: str) -> None:
        losses.append(float(loss))
        if int(iteration) != len(losses) or not math.isfinite(float(loss) + float(lr)):
            raise ValueError
        if accuracy:
            evaluated.append((int(iteration), float(accuracy)))
            if not 0 <= float(accuracy) <= 100:
                raise ValueError

    _read_csv(path, LOG_COLUMNS, add)
    if len(losses) != iterations:
        raise ValueError(f"curve.csv has {len(losses)} of {iterations} iterations")
    return losses, evaluated


def _read_csv(path: Path, columns: Sequence[str], add: Callable[..., None]) -> None:
    """Call add with the fields of each line; it raises an error where they are malformed."""
    if not path.is_file():
        raise ValueError(f"there is no {path.name}")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        try:
            if next(reader, [])[: len(columns)] != columns:
                raise ValueError
            for row in reader:
                add(*row)
        except (ValueError, TypeError, IndexError, csv.Error):
            raise ValueError(f"{path.name} is malformed at line {reader.line_num}") from None
