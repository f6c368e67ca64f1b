"""Finished runs, read from their folders: their JSON and CSV files."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import clip

LOG_COLUMNS = ["iteration", "loss", "lr", "test_accuracy"]  # of curve.csv
PREDICTION_COLUMNS = ["path", "label", "predicted", "probability"]  # of predictions.csv
RESULT_SCHEMA = {  # of result.json: type, then a number's range or a text's pattern
    "method": (str, r"\w[\w.+-]*"),
    "backbone": (str, r".*\w.*"),
    "dataset": (str, r"[^/\\|]*\w[^/\\|]*"),  # a folder's name, where the images are one's own
    "shots": (int, 1, 10**6),
    "seed": (int, 0, 10**18),
    "zero_shot_accuracy": (int | float, 0, 100),
    "final_accuracy": (int | float, 0, 100),
    "iterations": (int, 1, 10**9),
    "wall_seconds": (int | float, 0, 10**9),
    "peak_memory_mb": (int | float, 0, 10**9),
    "config": (dict,),
}
CLASS_SCHEMA = {  # of result.json, which older ones lack
    "classnames": (list,),
    "template": (list,),
    "per_class": (dict,),
    "ece": (int | float, 0, 100),
}
NEW_CLASS_SCHEMA = {  # of result.json, which only runs on base classes have
    "new_accuracy": (int | float, 0, 100),
    "zero_shot_new_accuracy": (int | float, 0, 100),
}
TRANSFER_SCHEMA = {  # of transfer.json, for each dataset
    "zero_shot_accuracy": (int | float, 0, 100),
    "final_accuracy": (int | float, 0, 100),
    "classes": (int, 1, 10**9),
    "images": (int, 1, 10**9),
    "data": (dict,),
}


class Run(NamedTuple):
    """A finished run."""

    method: str
    backbone: str
    dataset: str
    shots: int
    seed: int
    zero_shot: float  # accuracies in percent
    accuracy: float
    seconds: float
    memory: float  # MB
    loss: np.ndarray  # (iterations,)
    evaluated: np.ndarray  # (E, 2): iteration, test accuracy; zero-shot at iteration 0 first
    settings: dict[str, Any]
    made_by: tuple[str, str, str]  # commit, torch's version, device
    data: dict[str, Any]  # its images: split, digest and counts; {} in older results
    folder: Path
    classnames: list[str]  # by label; [] in older results, as the two that follow
    template: list[str]  # prompts with {} for the class's name
    per_class: dict[str, float | None]  # accuracy by class; None where no image is of it
    ece: float | None  # expected calibration error in percent; None in older results
    new: float | None  # accuracies of a run on base classes on the new ones; None of other runs
    zero_shot_new: float | None
    transfer: dict[str, dict[str, Any]]  # by dataset: ON_TARGET; {} where --test_on named none


def read_run(folder: Path) -> Run:
    """Read a run's files.

    Raises:
        ValueError: One of them is not what a finished run leaves; the sentence says why.
        OSError, csv.Error, RecursionError: It cannot be read at all.
    """
    path = folder / "result.json"
    if path.exists() and not path.is_file():  # reading a pipe would never end
        raise ValueError("result.json is not a file")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"result.json is not JSON ({error})") from error
    check_result(result)
    loss, evaluated = read_curve(folder / "curve.csv", result["iterations"])
    zero_shot, versions, data = map(result.get, ("zero_shot_accuracy", "versions", "data"))
    torch = versions.get("torch") if isinstance(versions, dict) else None
    made_by = (result.get("git_commit"), torch, result.get("device"))
    return Run(
        result["method"], canonical_backbone(result["backbone"]), result["dataset"], result["shots"],  # noqa: E501
        result["seed"], zero_shot, result["final_accuracy"], result["wall_seconds"],
        result["peak_memory_mb"], loss, np.array([(0, zero_shot), *evaluated], float),
        result["config"], tuple(str(value or "unknown") for value in made_by),
        data if isinstance(data, dict) else {}, folder, result.get("classnames", []),
        result.get("template", []), result.get("per_class", {}), result.get("ece"),
        *map(result.get, NEW_CLASS_SCHEMA), read_transfer(folder / "transfer.json"),
    )  # fmt: skip


def check_result(result: Any) -> None:
    """Raise a ValueError that says what is wrong with the contents of a result.json."""
    if not isinstance(result, dict):
        raise ValueError("result.json does not hold an object")
    check_fields("result.json", result, RESULT_SCHEMA)
    if any(key in result for key in NEW_CLASS_SCHEMA):
        check_fields("result.json", result, NEW_CLASS_SCHEMA)
    new = {key: kind for key, kind in CLASS_SCHEMA.items() if key in result}
    if new:
        check_fields("result.json", result, new)
        check_classes(*(result.get(key) for key in CLASS_SCHEMA))


def check_fields(file: str, values: dict[str, Any], fields: dict[str, tuple]) -> None:
    """Raise a ValueError that names the first field of a file that is missing or out of range."""
    for key, (kind, *limits) in fields.items():
        if key not in values:
            raise ValueError(f"{file} has no {key}")
        value = values[key]
        good = isinstance(value, kind) and not isinstance(value, bool)
        if good and kind is str:
            good = re.fullmatch(limits[0], value) is not None and value.isprintable()
        elif good and limits:
            good = limits[0] <= value <= limits[1]  # NaN is not
        if not good:
            raise ValueError(f"{file}: {key} cannot be {str(value)[:50]!r}")


def read_transfer(path: Path) -> dict[str, dict[str, Any]]:
    """What a run reached on other datasets, by their names; {} where it was tested on none.

    Raises:
        ValueError: The file is not what --test_on leaves; the sentence says why.
    """
    if not path.is_file():
        return {}
    try:
        targets = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"transfer.json is not JSON ({error})") from error
    if not isinstance(targets, dict) or not all(isinstance(v, dict) for v in targets.values()):
        raise ValueError("transfer.json does not hold an object for each dataset")
    for values in targets.values():
        check_fields("transfer.json", values, TRANSFER_SCHEMA)
    return targets


def check_classes(names: Any, template: Any, accuracies: Any, ece: Any) -> None:
    """Raise a ValueError that says what is wrong with what a result.json says of its classes."""
    if any(value is None for value in (names, template, accuracies, ece)):
        raise ValueError(f"result.json has some of {', '.join(CLASS_SCHEMA)}, and not all")
    if not all(isinstance(text, str) for text in [*names, *template]):
        raise ValueError("result.json: classnames and template must be texts")
    values = [value for value in accuracies.values() if value is not None]
    good = all(isinstance(value, int | float) and 0 <= value <= 100 for value in values)
    if not names or not template or len(accuracies) != len(names) or not good:
        raise ValueError("result.json: per_class must hold an accuracy for each of classnames")


def load_confusion_matrix(run: Run) -> np.ndarray:
    """How often each class of a run's was taken for each: (C, C) int64, true class first.

    Raises:
        ValueError, OSError, csv.Error: There is no predictions.csv, or it is malformed.
    """
    path, classes = run.folder / "predictions.csv", len(run.classnames)
    if not path.is_file():
        raise ValueError("there is no predictions.csv")
    counts = np.zeros((classes, classes), int)
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if next(reader, None) != PREDICTION_COLUMNS:
            raise ValueError(f"predictions.csv does not begin with {','.join(PREDICTION_COLUMNS)}")
        for row in reader:
            try:
                _, label, predicted, _ = row
                pair = int(label), int(predicted)
                good = min(pair) >= 0 and max(pair) < classes
            except ValueError:
                good = False
            if not good:
                raise ValueError(f"predictions.csv is malformed at line {reader.line_num}")
            counts[pair] += 1
    if not counts.any():
        raise ValueError("predictions.csv has 0 rows")
    return counts


def read_curve(path: Path, iterations: int) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """The loss of each iteration, and (iteration, test accuracy) where it was measured."""
    if not path.is_file():
        raise ValueError("there is no curve.csv")
    losses, evaluated = [], []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if next(reader, None) != LOG_COLUMNS:
            raise ValueError(f"curve.csv does not begin with the columns {','.join(LOG_COLUMNS)}")
        for count, row in enumerate(reader, start=1):
            try:
                iteration, loss, lr, accuracy = row
                numbers = [float(loss), float(lr), float(accuracy or 0)]
                good = int(iteration) == count and all(map(math.isfinite, numbers))
            except ValueError:
                good = False
            if not good or not 0 <= numbers[2] <= 100:
                raise ValueError(f"curve.csv is malformed at line {count + 1}")
            losses.append(numbers[0])
            if accuracy:
                evaluated.append((count, numbers[2]))
    if len(losses) != iterations:
        raise ValueError(f"curve.csv has {len(losses)} of {iterations} iterations")
    return np.array(losses), evaluated


def slugify(backbone: str) -> str:
    """A backbone's name as a folder's, as in a run's path."""
    return re.sub(r"[^\w.-]", "-", backbone).lstrip(".") or "-"


def canonical_backbone(name: str) -> str:
    """A model's name; for a checkpoint's path its stem, or the model that this stem stands for."""
    known = {slugify(model): model for model in clip.available_models()}
    stem = slugify(name if name in known.values() else Path(name).stem)
    return known.get(stem, stem)
