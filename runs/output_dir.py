"""A run's folder: its path and lock, what is written into it, and whose result it holds."""

import argparse
import errno
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import yaml
from filelock import FileLock, SoftFileLock, Timeout

import clip
from datasets import DATASETS, Datum, FewShotDataset, dataset_name, dump_fewshot_split
from run_utils import DEMO, SPLIT_TITLES, Config, default_settings
from runs.environment import device_name, get_git_sha, peak_memory_mb
from runs.records import LOG_COLUMNS, PREDICTION_COLUMNS
from train import TrainState
from utils import (
    atomic_write,
    expected_calibration_error,
    per_class_accuracy,
    to_csv,
    unique_classnames,
)

# Where and how a run goes, as opposed to what it computes.
NON_HPARAMS = {
    "config", "root_path", "save_path", "filename", "save_weights", "overwrite", "eval_only",
    "device", "num_workers", "threads", "cache_mb", "resume", "checkpoint_every", "test_on",
}  # fmt: skip
PATH_KEYS = {"method", "backbone", "dataset", "shots", "seed"}
RESULT_LINES = {
    "zero_shot_accuracy": "Zero-shot CLIP's {} accuracy",
    "final_accuracy": "Final {} accuracy",
    "accuracy": "{} accuracy",
    "zero_shot_new_accuracy": "Zero-shot CLIP's {} accuracy on new classes",
    "new_accuracy": "Final {} accuracy on new classes",
}
ZERO_SHOT_KEYS = (
    "zero_shot_accuracy",
    "zero_shot_new_accuracy",
)  # the latter of runs on base classes
FINAL_KEYS = ("final_accuracy", "new_accuracy")
OVERWRITE_HINT = "give another --save_path, or --overwrite to replace it"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # said by some network file systems


# Its place


def get_output_dir(config: Config) -> Path:
    """Where a run's files lie.

    That is save_path/method/backbone/dataset/<N>shots/seed<N>[-<setting>...], with the stem of a
    named configuration file, then each setting that numbers depend on and that the command line
    gave another value than the one it would have without.
    """
    leaf = [f"seed{config.seed}"]
    if config.config != config.baseline["config"]:
        leaf.append(Path(config.config).stem)
    for key, value in sorted(get_hparams(config).items()):
        if key in PATH_KEYS or value == config.baseline[key]:
            continue
        if isinstance(value, bool):
            leaf.append(key if value else f"no-{key}")
        elif key == "template":
            leaf.append(f"{key}_{slugify_templates(value)}")
        else:
            values = value if isinstance(value, list) else [value]
            leaf.append("_".join([key, *map(format_for_path, values)]))
    data = re.sub("[/@:]", "-", dataset_name(config.dataset))
    names = [config.method, format_for_path(config.backbone), data]
    return Path(config.save_path, *names, f"{config.shots}shots", "-".join(leaf))


def format_for_path(value: float | str) -> str:
    """A setting's value as part of a folder's name; a path gives its file's stem."""
    if not isinstance(value, str):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    known = value in DATASETS or value in clip.available_models() or value.startswith("open_clip:")
    if not known and ("/" in value or os.path.isfile(value)):
        value = Path(value).name if os.path.isdir(value) else Path(value).stem
    return re.sub("[/@:]", "-", value)


def slugify_templates(prompts: Sequence[str]) -> str:
    """Prompts as part of a folder's name: letters, digits and dashes, at most 40 of them.

    What such a name leaves out is in the digest behind it.
    """
    if prompts in (["dataset"], ["clip"]):
        return prompts[0]
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    words = re.sub(r"[\W_]+", "-", " ".join(prompts)).strip("-")[:33].rstrip("-")
    return f"{words}-{digest[:6]}"


def get_hparams(config: argparse.Namespace) -> dict[str, Any]:
    """The settings that a run's numbers depend on."""
    return {key: value for key, value in vars(config).items() if key not in NON_HPARAMS}


def weights_path(folder: Path, config: Config) -> Path:
    """Where a run in this folder keeps its weights, if it does."""
    return folder / f"{config.filename}.safetensors"


@contextmanager
def lock_output_dir(folder: Path) -> Iterator[None]:
    """Make a folder and keep other processes out of it; a dead process's lock does not last.

    Raises:
        ValueError: Another process is at work in it, or it cannot be made or written.
    """
    path = folder / ".lock"
    lock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.1)
    except Timeout:
        holder = ""
        with suppress(OSError):  # Windows lets nobody else read it
            holder = " ".join(path.read_text(errors="replace").split())
        raise ValueError(
            f"{folder} is in use by {holder or 'another process'}: wait for its end, or give "
            "another --save_path"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise not_writable_error(folder, error) from error
    try:
        if not isinstance(lock, SoftFileLock):  # which writes a record of its own
            with suppress(OSError):
                path.write_text(f"process {os.getpid()} on {platform.node()}\n")
        for left in folder.glob(".*.tmp"):  # by processes that were killed
            left.unlink()
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


def not_writable_error(folder: Path, error: OSError) -> ValueError:
    """What to raise where a run's folder cannot be written."""
    return ValueError(f"cannot write to {folder} ({error.strerror}); give another --save_path")


# Written


def save_run_inputs(folder: Path, config: Config, dataset: FewShotDataset) -> None:
    """Write what a run begins with: config.yaml, and its few images as fewshot.json."""
    save_config(folder, config)
    atomic_write(folder / "fewshot.json", dump_fewshot_split(dataset))


def save_config(folder: Path, config: Config) -> None:
    """Write config.yaml, from which --config repeats the run."""
    settings = {key: value for key, value in vars(config).items() if key != "config"}
    settings.update(overwrite=False, eval_only=False, resume=False)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    try:
        atomic_write(folder / "config.yaml", text)
    except OSError as error:
        raise not_writable_error(folder, error) from error


def save_log(folder: Path, rows: Sequence[tuple]) -> None:
    """Write curve.csv: iteration, loss, lr, test_accuracy (empty where nothing was evaluated)."""
    atomic_write(folder / "curve.csv", to_csv(LOG_COLUMNS, rows))


def get_split(dataset: FewShotDataset, split: str) -> list[Datum]:
    """The images of a dataset that accuracies are measured on.

    Raises:
        ValueError: It has none in this split.
    """
    items = dataset.val if split == "val" else dataset.test
    if not items:
        raise ValueError(
            f"{dataset.name} has no {SPLIT_TITLES[split]} images to measure accuracy on"
        )
    return items


def save_result(
    folder: Path,
    config: Config,
    dataset: FewShotDataset,
    device: torch.device,
    course: TrainState,
    processes: int = 1,
) -> None:
    """Write predictions.csv and, as the last of a run's files, result.json.

    Then remove its checkpoint.
    """
    items = get_split(dataset, config.eval_split)
    labels, predicted, probabilities = course.predictions
    names = unique_classnames(dataset.classnames)
    accuracies = per_class_accuracy(labels, predicted, len(names))
    result = {
        **{key: getattr(config, key) for key in ("method", "backbone", "dataset", "shots", "seed")},
        "dataset": dataset_name(config.dataset),
        **course.measured,
        "ece": expected_calibration_error(predicted == labels, probabilities),
        "per_class": dict(zip(names, accuracies, strict=True)),
        "classnames": dataset.classnames,
        "template": dataset.template,
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        "device": device_name(device),
        "processes": processes,
        "versions": {"python": platform.python_version()}
        | {package.__name__: package.__version__ for package in (torch, torchvision, np)},
        "git_commit": get_git_sha(),
        "config": get_hparams(config),
        "data": dataset.fingerprint,
    }
    columns = labels.tolist(), predicted.tolist(), probabilities.tolist()
    paths = [Path(os.path.relpath(item.impath, dataset.image_dir)).as_posix() for item in items]
    rows = zip(paths, *columns, strict=True)
    atomic_write(folder / "predictions.csv", to_csv(PREDICTION_COLUMNS, rows))
    (folder / "transfer.json").unlink(missing_ok=True)  # of an earlier run, as its weights
    if not config.save_weights:
        weights_path(folder, config).unlink(missing_ok=True)
    atomic_write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    (folder / "checkpoint.pt").unlink(missing_ok=True)


# Told


def print_accuracy(kind: str, value: float, split: str, where: str = "") -> None:
    """Print an accuracy in the form that users of few-shot CLIP code parse.

    Args:
        kind: A key of RESULT_LINES.
        value: The accuracy in percent.
        split: A key of SPLITS.
        where: Other images than the task's own.
    """
    line = RESULT_LINES[kind].format(SPLIT_TITLES[split]) + (f" on {where}" if where else "")
    print(f"\n**** {line[0].upper()}{line[1:]}: {value:.2f}. ****", flush=True)


def print_accuracies(kinds: Sequence[str], measured: Mapping[str, float], split: str) -> None:
    """Print those of some accuracies that were measured."""
    for kind in kinds:
        if kind in measured:
            print_accuracy(kind, measured[kind], split)


def print_finished_run(result: dict[str, Any], folder: Path, config: Config) -> None:
    """Print a finished run's accuracies, and remove what it may have left behind."""
    remove_stale_files(folder)
    print(f"This run is finished: {folder}")
    print_accuracies(ZERO_SHOT_KEYS + FINAL_KEYS, result, config.eval_split)
    weights = weights_path(folder, config)
    if config.save_weights and not weights.exists():
        print(f"note: it kept no {weights.name}; --overwrite runs it again", file=sys.stderr)


def print_run_summary(
    config: Config, dataset: FewShotDataset, method: str, device: torch.device, processes: int = 1
) -> None:
    """Print what is about to happen."""
    evaluated = f"{len(dataset.test)} to test"
    if config.eval_split == "val":
        evaluated = f"{len(dataset.val)} to validate"
    times = f"{processes} x " if processes > 1 else ""
    which = "" if config.subsample == "all" else f"{config.subsample} "
    print(
        f"{dataset_name(config.dataset)}: {len(dataset.classnames)} {which}classes, "
        f"{len(dataset.train_x)} images to adapt with "
        f"({config.shots} per class, seed {config.seed}), {evaluated}\n"
        f"{config.backbone} on {times}{device_name(device)}, {config.precision}: {method}",
        flush=True,
    )


def print_output_dir(config: Config, folder: Path) -> None:
    """Print where the results lie, and after the embedded default how to go on from it."""
    print(f"\nResults: {folder}")
    if all(getattr(config, key) == value for key, value in DEMO.items()):
        method = "" if config.method == "so" else f" --method {config.method}"
        print(
            "The same with OpenAI's ViT-B/16 (downloaded once) on EuroSAT (see DATASETS.md):\n"
            f"    python main.py --root_path $DATA --dataset eurosat --shots 16{method}"
        )


# Read again


def load_finished_result(
    folder: Path, config: Config, data: dict[str, Any]
) -> dict[str, Any] | None:
    """The result of this very configuration on these very images, if the folder holds it.

    Raises:
        ValueError: The folder holds another configuration's or other images' result, or one that
            is damaged, and `overwrite` is not set.
    """
    path = folder / "result.json"
    if config.overwrite or config.eval_only or not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        changes = diff_configs(result["config"], result.get("data"), config, data)
        for key in ("zero_shot_accuracy", "final_accuracy"):
            float(result[key])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a run's result ({error!r}); {OVERWRITE_HINT}") from error
    if changes:
        raise ValueError(f"{folder} holds another run's result ({changes}); {OVERWRITE_HINT}")
    return result


def diff_configs(
    settings: dict[str, Any], images: dict[str, Any] | None, config: Config, data: dict[str, Any]
) -> str:
    """How what a file says of its run differs from a run on these images, in words; "" if not."""
    there = {**default_settings(), **settings}  # which may be older than some flag
    here = get_hparams(config)
    changes = [
        f"{key} {there.get(key)} there, {here.get(key)} here"
        for key in sorted((there.keys() | here.keys()) - NON_HPARAMS)
        if there.get(key) != here.get(key)
    ]
    if not images:
        changes.append("it does not say which images it used, being of an earlier version")
    elif images["digest"] != data["digest"]:
        told = [
            f"{i['train']} train, {i['val']} val, {i['test']} test ({i['split']} split)"
            for i in (images, data)
        ]
        changes.append(f"the images differ: {told[0]} there, {told[1]} here")
    return "; ".join(changes)


def remove_stale_files(folder: Path) -> None:
    """Remove leftovers of a run that was killed at its very end, unless one is at work there."""
    if any(folder.glob("checkpoint.pt")) or any(folder.glob(".*")):
        with suppress(OSError, ValueError), lock_output_dir(folder):
            (folder / "checkpoint.pt").unlink(missing_ok=True)


def find_saved_weights(folder: Path, config: Config) -> Path:
    """The weights that a finished run has kept.

    Raises:
        FileNotFoundError: It has kept none; the sentence says how it would.
    """
    path = weights_path(folder, config)
    if path.is_file():
        return path
    raise FileNotFoundError(
        f"{folder} holds a result and no {path.name}, with which --test_on tests a finished run: "
        "--overwrite --save_weights runs it again and keeps them"
    )


def find_eval_weights(folder: Path, config: Config) -> tuple[Path, float]:
    """The weights that --eval_only evaluates: the run's delta, or a whole state dict.

    New classes are evaluated with the delta of the run on base classes, where they have none.

    Returns:
        The file, and the factor of --wise that is left to scale it by: weights that were trained
        with --wise have been scaled when they were saved.

    Raises:
        FileNotFoundError: There is none of them; the sentence names the places.
    """
    whole = Path(config.save_path, f"{config.filename}.pt")

    def delta(subsample: str, wise: float) -> Path:
        other = copy(config)
        other.subsample, other.wise = subsample, wise
        return weights_path(get_output_dir(other), config)

    halves = ["new", "base"] if config.subsample == "new" else [config.subsample]
    places = [(delta(half, config.wise), 1.0) for half in halves]
    places += [*((delta(half, 1.0), config.wise) for half in halves), (whole, config.wise)]
    for path, alpha in places:
        if path.is_file():
            return path, alpha
    raise FileNotFoundError(
        f"there are no weights to evaluate: neither {weights_path(folder, config)}, which "
        f"--save_weights keeps, nor a whole state dict at {whole}"
    )
