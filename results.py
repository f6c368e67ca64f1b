"""A run's folder, written and read: path, lock, config.yaml, curve.csv, result.json."""

import argparse
import csv
import io
import json
import math
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import numpy as np
import torch
import torchvision
import yaml

import clip
from datasets import FewShotDataset
from optimizers.methods import SUPPORTS
from run_utils import DEMO, HERE, SPLITS, make_parser
from utils import atomic_write, lock

# Where and how a run goes, as opposed to what it computes.
CIRCUMSTANCES = {
    "config", "root_path", "save_path", "filename", "save_weights", "overwrite", "eval_only",
    "device", "num_workers", "threads", "cache_mb", "resume", "checkpoint_every",
}  # fmt: skip
COLUMNS = ["iteration", "loss", "lr", "test_accuracy"]  # of curve.csv
FIELDS = {  # of result.json: type, then a number's range or a text's pattern
    "method": (str, r"\w[\w.+-]*"),
    "backbone": (str, r".*\w.*"),
    "dataset": (str, r"\w[\w.+-]*"),
    "shots": (int, 1, 10**6),
    "seed": (int, 0, 10**18),
    "zero_shot_accuracy": (int | float, 0, 100),
    "final_accuracy": (int | float, 0, 100),
    "iterations": (int, 1, 10**9),
    "wall_seconds": (int | float, 0, 10**9),
    "peak_memory_mb": (int | float, 0, 10**9),
    "config": (dict,),
}
RESULT_LINES = {
    "zero_shot_accuracy": "**** Zero-shot CLIP's {} accuracy: {:.2f}. ****",
    "final_accuracy": "**** Final {} accuracy: {:.2f}. ****",
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


def run_folder(config: argparse.Namespace) -> Path:
    """Where a run's files lie: save_path/method/backbone/dataset/<N>shots/seed<N>.

    An ablation's method says what is other than usual, as in so-grad_magnitude.
    """
    name = config.backbone
    if name not in clip.available_models():
        name = Path(name).stem
    name = name.replace("/", "-").replace("@", "-")
    shots, seed = f"{config.shots}shots", f"seed{config.seed}"
    method = config.method
    for key, usual in SUPPORTS.items():
        if (value := getattr(config, key)) != usual:
            method += f"-{key.removesuffix('_support')}_{value}"
    return Path(config.save_path) / method / name / config.dataset / shots / seed


def finished(folder: Path, config: argparse.Namespace) -> dict[str, Any] | None:
    """The result of this very configuration, if the folder holds it.

    Raises:
        ValueError: The folder holds another configuration's result, or one that is damaged, and
            `overwrite` is not set.
    """
    path = folder / "result.json"
    if config.overwrite or config.eval_only or not path.exists():
        return None
    remedies = "give another --save_path, or --overwrite to replace it"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        there = vars(make_parser().parse_args([])) | result["config"]  # older than some flag
        for key in RESULT_LINES:
            float(result[key])
        changes = differences(there, computed(config))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a run's result ({error!r}); {remedies}") from error
    if changes:
        raise ValueError(f"{folder} holds another run's result ({changes}); {remedies}")
    weights = folder / f"{config.filename}.safetensors"
    if config.save_weights and not weights.exists():
        raise ValueError(f"{folder} holds this run's result, but not {weights.name}; {remedies}")
    return result


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Which settings that numbers depend on differ, in words; "" for none."""
    keys = sorted((there.keys() | here.keys()) - CIRCUMSTANCES)
    return "; ".join(
        f"{key} {there.get(key)} there, {here.get(key)} here"
        for key in keys
        if there.get(key) != here.get(key)
    )


def computed(config: argparse.Namespace) -> dict[str, Any]:
    """The settings that a run's numbers depend on."""
    return {key: value for key, value in vars(config).items() if key not in CIRCUMSTANCES}


def tidy(folder: Path) -> None:
    """Remove what a run that was killed at its very end has left, unless one is at work there."""
    if any(folder.glob("checkpoint.pt")) or any(folder.glob(".*")):
        with suppress(OSError, ValueError), lock(folder):
            for path in (folder / "checkpoint.pt", *folder.glob(".*.tmp")):
                path.unlink(missing_ok=True)


@contextmanager
def open_folder(folder: Path, config: argparse.Namespace) -> Iterator[None]:
    """Make the folder, keep other processes out of it, and write config.yaml.

    What cannot be written shows before the training.

    Raises:
        ValueError: The folder cannot be made or written, or another process is at work in it.
    """
    settings = {key: value for key, value in vars(config).items() if key != "config"}
    settings.update(overwrite=False, eval_only=False, resume=False)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder))
            for left in folder.glob(".*.tmp"):  # of processes that were killed
                left.unlink()
            atomic_write(folder / "config.yaml", text)
        except OSError as error:
            raise ValueError(
                f"cannot write to {folder} ({error.strerror}); give another --save_path"
            ) from error
        yield


def write_curve(folder: Path, rows: Sequence[tuple]) -> None:
    """Write curve.csv: iteration, loss, lr, test_accuracy (empty where nothing was evaluated)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["iteration", "loss", "lr", "test_accuracy"])
    writer.writerows(rows)
    atomic_write(folder / "curve.csv", text.getvalue())


def write_result(
    folder: Path, config: argparse.Namespace, device: torch.device, **measured: Any
) -> dict[str, Any]:
    """Write result.json, the last of a run's files, and return what it says."""
    result = {
        **{key: getattr(config, key) for key in ("method", "backbone", "dataset", "shots", "seed")},
        **measured,
        "peak_memory_mb": round(peak_memory(device), 1),
        "device": device_name(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
        },
        "git_commit": git_commit(),
        "config": computed(config),
    }
    atomic_write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return result


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, in MB: torch's on a CUDA device, else the whole process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def device_name(device: torch.device) -> str:
    """The device as its maker calls it, where that can be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def git_commit() -> str | None:
    """The commit of this repository, with + where files differ from it; None outside git."""
    try:
        git = ["git", "-C", str(HERE)]
        options = dict(capture_output=True, text=True, check=True, timeout=10)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        return commit + ("+" if subprocess.run(status, **options).stdout else "")
    except (OSError, subprocess.SubprocessError):
        return None


def print_results(result: dict[str, Any], *keys: str, split: str = "test") -> None:
    """Print accuracies in the form that users of few-shot CLIP code parse."""
    for key in keys or RESULT_LINES:
        print("\n" + RESULT_LINES[key].format(SPLITS[split], result[key]), flush=True)


def describe(
    config: argparse.Namespace,
    dataset: FewShotDataset,
    method: str,
    device: torch.device,
) -> None:
    """Print what is about to happen."""
    evaluated = f"{len(dataset.test)} to test"
    if config.eval_split == "val":
        evaluated = f"{len(dataset.val)} to validate"
    print(
        f"{config.dataset}: {len(dataset.classnames)} classes, {len(dataset.train_x)} images to "
        f"adapt with ({config.shots} per class, seed {config.seed}), {evaluated}\n"
        f"{config.backbone} on {device_name(device)}, {config.precision}: {method}",
        flush=True,
    )


def whats_next(config: argparse.Namespace, folder: Path) -> None:
    """Print where the results lie, and after the embedded default how to go on from it."""
    print(f"\nResults: {folder}")
    if all(getattr(config, key) == value for key, value in DEMO.items()):
        print(
            "The same with OpenAI's ViT-B/16 (downloaded once) on EuroSAT (see DATASETS.md):\n"
            "    python main.py --root_path $DATA --dataset eurosat --shots 16"
        )


# Read again


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
    method, dataset, shots, seed = (result[k] for k in ("method", "dataset", "shots", "seed"))
    if folder.parts[-3:] == (dataset, f"{shots}shots", f"seed{seed}") and len(folder.parts) > 5:
        method = folder.parts[-5]  # the folder tells an ablation from its method
    loss, evaluated = read_curve(folder / "curve.csv", result["iterations"])
    zero_shot = result["zero_shot_accuracy"]
    versions = result.get("versions")
    torch = versions.get("torch") if isinstance(versions, dict) else None
    made_by = (result.get("git_commit"), torch, result.get("device"))
    return Run(
        method, backbone_name(result["backbone"]), dataset, shots, seed, zero_shot,
        result["final_accuracy"], result["wall_seconds"], result["peak_memory_mb"], loss,
        np.array([(0, zero_shot), *evaluated], float), result["config"],
        tuple(str(value or "unknown") for value in made_by),
    )  # fmt: skip


def check_result(result: Any) -> None:
    """Raise a ValueError that says what is wrong with the contents of a result.json."""
    if not isinstance(result, dict):
        raise ValueError("result.json does not hold an object")
    for key, (kind, *limits) in FIELDS.items():
        if key not in result:
            raise ValueError(f"result.json has no {key}")
        value = result[key]
        good = isinstance(value, kind) and not isinstance(value, bool)
        if good and kind is str:
            good = re.fullmatch(limits[0], value, re.ASCII) is not None
        elif good and limits:
            good = limits[0] <= value <= limits[1]  # NaN is not
        if not good:
            raise ValueError(f"result.json: {key} cannot be {str(value)[:50]!r}")


def read_curve(path: Path, iterations: int) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """The loss of each iteration, and (iteration, test accuracy) where it was measured."""
    if not path.is_file():
        raise ValueError("there is no curve.csv")
    losses, evaluated = [], []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if next(reader, None) != COLUMNS:
            raise ValueError(f"curve.csv does not begin with the columns {','.join(COLUMNS)}")
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


def slug(backbone: str) -> str:
    """A backbone's name as a folder's, as in a run's path."""
    return re.sub(r"[^\w.-]", "-", backbone).lstrip(".") or "-"


def backbone_name(name: str) -> str:
    """A model's name; for a checkpoint's path its stem, or the model that this stem stands for."""
    known = {slug(model): model for model in clip.available_models()}
    stem = slug(name if name in known.values() else Path(name).stem)
    return known.get(stem, stem)
