"""The output directory of a run: its name, its lock, its files."""

import argparse
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

import clip
from datasets import DATASETS, FewShotDataset, dataset_name, dump_fewshot_split
from run_utils import EVAL_SPLITS, select_args
from runs.distributed import is_main_process
from runs.identity import diff_inputs, diff_runs, get_hparams
from runs.records import CURVE_COLUMNS, PREDICTION_COLUMNS
from utils import Predictions, atomic_write, to_csv, unique_classnames

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
    """Create a directory and keep other runs out of it; a dead process's lock ends with it.

    Of several processes, rank 0 has the lock. A directory in use or not writable is a ValueError.
    """
    if not is_main_process():
        yield
        return
    lock = FileLock(output_dir / ".lock")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # filelock, of file systems without locks
            lock.acquire(timeout=0.1)
        for stale in output_dir.glob(".*.tmp"):  # of processes that were killed
            stale.unlink()
    except Timeout:
        raise ValueError(f"{output_dir} is used by another run; use another --save_path") from None
    except OSError as error:
        raise ValueError(
            f"cannot write to {output_dir} ({error.strerror}); use another --save_path"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def save_run_inputs(output_dir: Path, args: argparse.Namespace, dataset: FewShotDataset) -> None:
    """Write config.yaml, from which --config repeats the run, and its few images, fewshot.json."""
    settings = {k: v for k, v in vars(args).items() if k not in ("config", "overrides")}
    settings.update(overwrite=False, eval_only=False, resume=False)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    atomic_write(output_dir / "config.yaml", text)
    atomic_write(output_dir / "fewshot.json", dump_fewshot_split(dataset))


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

    `predictions` are of the images of --eval_split, in order; `summary` has what the other
    arguments do not tell, and is written as it is.
    """
    names, titles = dataset.classnames, unique_classnames(dataset.classnames)
    accuracies = predictions.per_class_accuracy(len(names))
    result = {
        **select_args(args, *PATH_KEYS),
        "dataset": dataset_name(args.dataset),
        **summary,
        "macro_f1": predictions.macro_f1,
        "ece": predictions.expected_calibration_error,
        "per_class": dict(zip(titles, accuracies, strict=True)),
        "classnames": names,
        "template": dataset.template,
        "fewer_images": classes_with_fewer_images(dataset, args.shots),
    }
    items = eval_items(dataset, args.eval_split)
    rows = []
    for item, label, pred, prob in zip(items, *(x.tolist() for x in predictions), strict=True):
        path = Path(os.path.relpath(item.impath, dataset.image_dir)).as_posix()
        rows.append((path, label, pred, prob, names[label], names[pred]))
    atomic_write(output_dir / "predictions.csv", to_csv(PREDICTION_COLUMNS, rows))
    (output_dir / "transfer.json").unlink(missing_ok=True)
    for path in output_dir.glob("*.safetensors"):
        if not args.save_weights or path != weights_path(output_dir, args):
            path.unlink()
    atomic_write(output_dir / "result.json", json.dumps(result, indent=2) + "\n")


def classes_with_fewer_images(dataset: FewShotDataset, shots: int) -> dict[str, int]:
    """Classes with fewer different training images than shots, and how many; they are repeated."""
    images = dict.fromkeys((item.classname, item.impath) for item in dataset.train_x)
    counts = Counter(name for name, _ in images)
    return {name: count for name, count in counts.items() if count < shots}


def eval_items(dataset: FewShotDataset, split: str) -> list[Any]:
    """The images of --eval_split, "test" or "val"; a ValueError where there are none."""
    items = dataset.val if split == "val" else dataset.test
    if not items:
        raise ValueError(f"{dataset.name} has no {EVAL_SPLITS[split]} images to evaluate on")
    return items


def load_finished_result(
    output_dir: Path, args: argparse.Namespace, identity: dict[str, Any]
) -> dict[str, Any] | None:
    """The result of this very run (`runs.identity`), if the directory has it.

    With --eval_only there is none, but images and names must be those of the run. Without
    --overwrite, a damaged result and another run's are refused with a ValueError.
    """
    path = output_dir / "result.json"
    if args.overwrite or not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for key in ("zero_shot_accuracy", "final_accuracy"):
            float(result[key])
        changes = diff_inputs(result, identity) if args.eval_only else diff_runs(result, identity)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {OVERWRITE_HINT}") from error
    if changes:
        raise ValueError(
            f"{output_dir} has the result of another run ({'; '.join(changes)}); {OVERWRITE_HINT}"
        )
    return None if args.eval_only else result


def remove_stale_files(output_dir: Path) -> None:
    """Remove what a run that was killed at its very end has left, unless one is at work there."""
    if any(output_dir.glob("checkpoint.pt")) or any(output_dir.glob(".*")):
        with suppress(OSError, ValueError), lock_output_dir(output_dir):
            (output_dir / "checkpoint.pt").unlink(missing_ok=True)


def find_eval_weights(args: argparse.Namespace) -> tuple[Path, float]:
    """The weights that --eval_only evaluates: the run's delta, or a whole state dict.

    Without weights of their own, new classes are evaluated with those of the run on base classes.
    The second value is the factor of --wise to scale them by: 1 where they were saved scaled.
    """
    unscaled = [key for key in args.overrides if key != "wise"]
    candidates = []
    for overrides, alpha in ((args.overrides, 1.0), (unscaled, args.wise)):
        for subsample in ("new", "base") if args.subsample == "new" else (args.subsample,):
            settings = {**vars(args), "overrides": overrides, "subsample": subsample}
            output_dir = get_output_dir(argparse.Namespace(**settings))
            candidates.append((weights_path(output_dir, args), alpha))
    candidates.append((Path(args.save_path, f"{args.filename}.pt"), args.wise))
    for path, alpha in candidates:
        if path.is_file():
            return path, alpha
    raise FileNotFoundError(
        f"there are no weights to evaluate: neither {candidates[0][0]}, which --save_weights "
        f"writes, nor a whole state dict at {candidates[-1][0]}"
    )
