"""The output directory of a run: its name, its lock, its files."""

import argparse
import hashlib
import json
import os
import platform
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

import clip
from datasets import DATASETS, FewShotDataset, dataset_name, dump_fewshot_split
from run_utils import select_args
from runs.identity import diff_inputs, diff_runs, get_hparams
from runs.records import CURVE_COLUMNS, PREDICTION_COLUMNS
from utils import (
    Predictions,
    atomic_write,
    expected_calibration_error,
    per_class_accuracy,
    to_csv,
    unique_classnames,
)

PATH_KEYS = ("method", "backbone", "dataset", "shots", "seed")
OVERWRITE_HINT = "use another --save_path, or --overwrite to replace it"
MAX_NAME_BYTES = 200


def get_output_dir(args: argparse.Namespace) -> Path:
    """The directory of a run: save_path/method/backbone/dataset/<N>shots/seed<N>[-<setting>...].

    The settings are the stem of a --config file, then each hyper-parameter that the command line
    gave another value than it would have had.
    """
    parts = [f"seed{args.seed}"]
    if args.config:
        parts.append(Path(args.config).stem)
    for key, value in sorted(get_hparams(args).items()):
        if key not in args.overrides or key in PATH_KEYS:
            continue
        if isinstance(value, bool):
            parts.append(key if value else f"no-{key}")
        elif key == "template":
            parts.append(f"{key}_{slugify_templates(value)}")
        else:
            values = value if isinstance(value, list) else [value]
            parts.append("_".join([key, *map(format_for_path, values)]))
    dataset = re.sub("[/@:]", "-", dataset_name(args.dataset))
    names = [args.method, format_for_path(args.backbone), dataset, f"{args.shots}shots"]
    return Path(args.save_path, *map(shorten, [*names, "-".join(parts)]))


def shorten(name: str) -> str:
    """A file name cut, with a digest of what it was, where it is longer than file systems take."""
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    sha = hashlib.sha256(name.encode()).hexdigest()
    return name.encode()[: MAX_NAME_BYTES - 9].decode(errors="ignore") + f"-{sha[:8]}"


def format_for_path(value: float | str) -> str:
    """A value as part of a directory name; a path gives its file's stem."""
    if not isinstance(value, str):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    is_name = value in DATASETS or value in clip.available_models()
    is_path = "/" in value or os.path.isfile(value)
    if is_path and not is_name and not value.startswith("open_clip:"):
        value = Path(value).name if os.path.isdir(value) else Path(value).stem
    return re.sub("[/@:]", "-", value)


def slugify_templates(templates: Sequence[str]) -> str:
    """Prompt templates as part of a directory name: at most 40 characters, with a digest."""
    if templates in (["dataset"], ["clip"]):
        return templates[0]
    sha = hashlib.sha256("\n".join(templates).encode()).hexdigest()
    words = re.sub(r"[\W_]+", "-", " ".join(templates)).strip("-")[:33].rstrip("-")
    return f"{words}-{sha[:6]}"


def weights_path(output_dir: Path, args: argparse.Namespace) -> Path:
    """The weights file of a run in this directory."""
    return output_dir / f"{args.filename}.safetensors"


@contextmanager
def lock_output_dir(output_dir: Path) -> Iterator[None]:
    """Create a directory and keep other processes out of it; a dead process's lock ends with it.

    Raises:
        ValueError: Another process is using it, or it cannot be created or written.
    """
    path = output_dir / ".lock"
    lock = FileLock(path)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # filelock, of file systems without locks
            lock.acquire(timeout=0.1)
    except Timeout:
        owner = path.read_text(errors="replace").strip() or "another process"
        raise ValueError(
            f"{output_dir} is in use by {owner}: wait for its end, or use another --save_path"
        ) from None
    except OSError as error:
        raise not_writable_error(output_dir, error) from error
    try:
        path.write_text(f"process {os.getpid()} on {platform.node()}\n")
        for stale in output_dir.glob(".*.tmp"):  # of processes that were killed
            stale.unlink()
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


def check_writable(output_dir: Path) -> None:
    """Refuse a directory that cannot be written, before hours of work for a file in it.

    Raises:
        ValueError: It cannot be written.
    """
    try:
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise not_writable_error(output_dir, error) from error


def not_writable_error(output_dir: Path, error: OSError) -> ValueError:
    """The error of an output directory that cannot be written."""
    return ValueError(f"cannot write to {output_dir} ({error.strerror}); use another --save_path")


# Writing


def save_run_inputs(output_dir: Path, args: argparse.Namespace, dataset: FewShotDataset) -> None:
    """Write config.yaml, from which --config repeats the run, and its few images, fewshot.json."""
    settings = {k: v for k, v in vars(args).items() if k not in ("config", "overrides")}
    settings.update(overwrite=False, eval_only=False, resume=False)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    try:
        atomic_write(output_dir / "config.yaml", text)
        atomic_write(output_dir / "fewshot.json", dump_fewshot_split(dataset))
    except OSError as error:
        raise not_writable_error(output_dir, error) from error


def save_curve(output_dir: Path, rows: Sequence[tuple]) -> None:
    """Write curve.csv: iteration, loss, lr, test_accuracy (empty where nothing was evaluated)."""
    atomic_write(output_dir / "curve.csv", to_csv(CURVE_COLUMNS, rows))


def save_result(
    output_dir: Path,
    args: argparse.Namespace,
    dataset: FewShotDataset,
    predictions: Predictions,
    summary: dict[str, Any],
) -> None:
    """Write predictions.csv, then result.json; remove what belongs to an earlier run.

    Args:
        output_dir: The run's directory.
        args: Its arguments.
        dataset: Its task.
        predictions: For the images of --eval_split, in order.
        summary: The run's identity, accuracies and what else is known; written as it is.
    """
    labels, preds, probs = predictions
    classnames = unique_classnames(dataset.classnames)
    accuracies = per_class_accuracy(labels, preds, len(classnames))
    result = {
        **select_args(args, *PATH_KEYS),
        "dataset": dataset_name(args.dataset),
        **summary,
        "macro_f1": predictions.macro_f1,
        "ece": expected_calibration_error(preds == labels, probs),
        "per_class": dict(zip(classnames, accuracies, strict=True)),
        "classnames": dataset.classnames,
        "template": dataset.template,
        "fewer_images": classes_with_fewer_images(dataset, args.shots),
    }
    items, names = eval_items(dataset, args.eval_split), dataset.classnames
    paths = [Path(os.path.relpath(item.impath, dataset.image_dir)).as_posix() for item in items]
    rows = [
        (path, label, pred, prob, names[label], names[pred])
        for path, label, pred, prob in zip(
            paths, labels.tolist(), preds.tolist(), probs.tolist(), strict=True
        )
    ]
    atomic_write(output_dir / "predictions.csv", to_csv(PREDICTION_COLUMNS, rows))
    (output_dir / "transfer.json").unlink(missing_ok=True)
    if not args.save_weights:
        weights_path(output_dir, args).unlink(missing_ok=True)
    atomic_write(output_dir / "result.json", json.dumps(result, indent=2) + "\n")


def classes_with_fewer_images(dataset: FewShotDataset, shots: int) -> dict[str, int]:
    """Classes with fewer different training images than shots, and how many; they are repeated."""
    paths = defaultdict(set)
    for item in dataset.train_x:
        paths[item.classname].add(item.impath)
    return {name: len(images) for name, images in paths.items() if len(images) < shots}


def eval_items(dataset: FewShotDataset, split: str) -> list[Any]:
    """The images of --eval_split, "test" or "val".

    Raises:
        ValueError: There are none.
    """
    items = dataset.val if split == "val" else dataset.test
    if not items:
        title = "validation" if split == "val" else "test"
        raise ValueError(f"{dataset.name} has no {title} images to measure accuracy on")
    return items


# Reading


def load_finished_result(
    output_dir: Path, args: argparse.Namespace, identity: dict[str, Any]
) -> dict[str, Any] | None:
    """The result of this very run (`runs.identity`), if the directory has it.

    Raises:
        ValueError: The directory has the result of another run, or a damaged one, and --overwrite
            is not set.
    """
    path = output_dir / "result.json"
    if args.overwrite or args.eval_only or not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        changes = diff_runs(result, identity)
        for key in ("zero_shot_accuracy", "final_accuracy"):
            float(result[key])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a run's result ({error!r}); {OVERWRITE_HINT}") from error
    if changes:
        raise ValueError(
            f"{output_dir} has the result of another run ({changes}); {OVERWRITE_HINT}"
        )
    return result


def check_weights_fit(weights: Path, identity: dict[str, Any]) -> None:
    """Refuse to evaluate a run's weights on other images or names than its own.

    Raises:
        ValueError: The images were divided otherwise, replaced or renamed since the run.
    """
    path = weights.with_name("result.json")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        inputs = {**identity["inputs"], "backbone": result["inputs"]["backbone"]}
        changes = diff_inputs(result, {**identity, "inputs": inputs})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # weights without their run
    if changes:
        raise ValueError(
            f"{weights} was trained on another task ({'; '.join(changes)}): its training images "
            "may be among the test images now; restore the data, or train again with --overwrite"
        )


def remove_stale_files(output_dir: Path) -> None:
    """Remove what a run that was killed at its very end has left, unless one is at work there."""
    if any(output_dir.glob("checkpoint.pt")) or any(output_dir.glob(".*")):
        with suppress(OSError, ValueError), lock_output_dir(output_dir):
            (output_dir / "checkpoint.pt").unlink(missing_ok=True)


def find_saved_weights(output_dir: Path, args: argparse.Namespace) -> Path:
    """The weights that a finished run has saved.

    Raises:
        FileNotFoundError: It has saved none.
    """
    path = weights_path(output_dir, args)
    if path.is_file():
        return path
    raise FileNotFoundError(
        f"{output_dir} has a result but no {path.name}, with which --test_on tests a finished "
        "run: --overwrite --save_weights runs it again and saves them"
    )


def find_eval_weights(output_dir: Path, args: argparse.Namespace) -> tuple[Path, float]:
    """The weights that --eval_only evaluates: the run's delta, or a whole state dict.

    Without weights of their own, new classes are evaluated with those of the run on base classes.

    Returns:
        The file, and the factor of --wise to scale it by: 1 where it was saved scaled.

    Raises:
        FileNotFoundError: There are none.
    """
    state_dict = Path(args.save_path, f"{args.filename}.pt")
    unscaled = copy(args)
    unscaled.overrides = [key for key in args.overrides if key != "wise"]
    candidates = []
    for run, alpha in ((args, 1.0), (unscaled, args.wise)):
        for subsample in ("new", "base") if args.subsample == "new" else (args.subsample,):
            other = copy(run)
            other.subsample = subsample
            candidates.append((weights_path(get_output_dir(other), args), alpha))
    for path, alpha in (*candidates, (state_dict, args.wise)):
        if path.is_file():
            return path, alpha
    raise FileNotFoundError(
        f"there are no weights to evaluate: neither {weights_path(output_dir, args)}, which "
        f"--save_weights writes, nor a whole state dict at {state_dict}"
    )
