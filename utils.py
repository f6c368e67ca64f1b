"""What many parts use: metrics, atomic files, texts for messages, a progress bar."""

import csv
import difflib
import hashlib
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

REPO_ROOT = Path(__file__).resolve().parent
N_BINS = 15  # of the expected calibration error

# Metrics


class Predictions(NamedTuple):
    """A classifier's predictions for N images, in their order, on the CPU."""

    labels: Tensor  # (N,) int64: the true classes
    preds: Tensor  # (N,) int64: the predicted classes
    probs: Tensor  # (N,) float32: probabilities of the predicted classes

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in percent."""
        return 100.0 * (self.preds == self.labels).sum().item() / len(self.labels)

    @property
    def balanced_accuracy(self) -> float:
        """Mean accuracy in percent of the classes that have images."""
        hits, counts = count_per_class(self.labels, self.preds)
        return 100.0 * (hits.double() / counts)[counts > 0].mean().item()

    @property
    def macro_f1(self) -> float:
        """Mean F1 score in percent of the classes that have images."""
        hits, counts = count_per_class(self.labels, self.preds)
        predicted = self.preds.bincount(minlength=len(counts))[: len(counts)]
        return 100.0 * (2.0 * hits.double() / (counts + predicted))[counts > 0].mean().item()

    @property
    def expected_calibration_error(self) -> float:
        """ECE in percent over 15 equal intervals (a, b] (Guo et al., ICML 2017, equation 3)."""
        probs = self.probs.double()
        edges = torch.linspace(0, 1, N_BINS + 1, dtype=torch.float64)
        bins = torch.bucketize(probs, edges[1:-1])  # (N,)
        gaps = torch.zeros(N_BINS, dtype=torch.float64)  # |B| (accuracy - confidence) of each bin
        gaps.index_add_(0, bins, (self.preds == self.labels).double() - probs)
        return 100.0 * gaps.abs().sum().item() / len(probs)

    def per_class_accuracy(self, num_classes: int) -> list[float | None]:
        """Accuracy in percent of each class, by label; None for a class without images."""
        hits, counts = (x.tolist() for x in count_per_class(self.labels, self.preds, num_classes))
        pairs = zip(hits, counts, strict=True)
        return [100.0 * hit / count if count else None for hit, count in pairs]


def count_per_class(labels: Tensor, preds: Tensor, num_classes: int = 0) -> tuple[Tensor, Tensor]:
    """Correct predictions and images of each class (C,), int64; C is at least `num_classes`."""
    counts = labels.bincount(minlength=num_classes)
    return labels[preds == labels].bincount(minlength=len(counts)), counts


def unique_classnames(classnames: Sequence[str]) -> list[str]:
    """Class names by label; names that several classes share get their labels added."""
    counts = Counter(classnames)
    return [
        f"{name} (label {label})" if counts[name] > 1 else name
        for label, name in enumerate(classnames)
    ]


# Files


def atomic_write(path: str | os.PathLike, data: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write content to a file atomically: to a temporary file beside it, to the disk, then rename.

    `data` is the content, or a function that writes it to an open file. An OSError leaves nothing
    behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # not the temporary one, which nobody knows
        raise


def detect_placeholder_file(path: str | os.PathLike) -> str | None:
    """What a Git LFS pointer or a web page in place of a file is, to follow "PATH is", or None."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<") and (b"<!doctype html" in text or b"<html" in text):
        return "a web page, not the file itself: download it again"
    return None


def sha256_of_tree(data: Any) -> str:
    """SHA-256 of nested dicts, lists and tuples of plain values."""

    def serialize(value: Any) -> str:
        if isinstance(value, dict):
            return f"{len(value)} pairs " + "".join(map(serialize, value.items()))
        if isinstance(value, list | tuple):
            return f"{len(value)} items " + "".join(map(serialize, value))
        return f"{value!r} "

    return hashlib.sha256(serialize(data).encode()).hexdigest()


def to_csv(header: Sequence, rows: Iterable[Sequence] = ()) -> str:
    """The text of a CSV file with a header and rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


# Texts for messages


def one_line(text: str) -> str:
    """A text on one line, white space as single spaces, unprintable characters escaped."""
    text = " ".join(text.split())
    if len(text) > 2000:  # the remedy is at the end
        text = f"{text[:1000]} ... {text[-900:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def truncate_list(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(n if n.isprintable() else repr(n) for n in names[:5]) + more


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A hint at the valid name that is most like this one: " (did you mean 'dtd'?)", or ""."""
    by_lower = {known.lower(): known for known in valid}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[matches[0]]!r}?)" if matches else ""


def plural(count: int, noun: str) -> str:
    """A count and its noun: "1 run", "1,024 runs"."""
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def format_error(error: Exception) -> str:
    """An error's message; for an error of the operating system the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


class Progress(tqdm):
    """tqdm's bar on a terminal; in a file or a pipe a plain line every 15 seconds."""

    monitor_interval = 0  # no thread of tqdm's

    def __init__(self, items: Iterable | None = None, **kwargs: Any) -> None:
        how = dict(dynamic_ncols=True, leave=False)
        if not sys.stderr.isatty():
            line = "{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}{postfix}"
            how = dict(mininterval=15, delay=15, bar_format=line)
        super().__init__(items, miniters=1, **how, **kwargs)

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """What prints the bar; tqdm calls it."""
        if sys.stderr.isatty():
            return tqdm.status_printer(file)
        return lambda line: print(line, file=file, flush=True)
