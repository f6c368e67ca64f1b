"""Small things several parts use: safe files, signals, progress bars."""

import csv
import difflib
import hashlib
import io
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")
N_BINS = 15  # of confidence


class Predictions(NamedTuple):
    """A classifier's answers for N images, in their order, on the CPU."""

    labels: Tensor  # (N,) int64: the true classes
    predicted: Tensor  # (N,) int64: the classes of the largest probability
    probabilities: Tensor  # (N,) float32: of the predicted classes

    @property
    def accuracy(self) -> float:
        """Share of the images whose class was predicted, in percent."""
        return accuracy(self.labels, self.predicted)


def accuracy(labels: Tensor, predicted: Tensor) -> float:
    """Share of the images (N,) whose class was predicted, in percent."""
    return 100.0 * (predicted == labels).sum().item() / len(labels)


def per_class_accuracy(labels: Tensor, predicted: Tensor, classes: int) -> list[float | None]:
    """Accuracy in percent of the images (N,) of each class, by label; None where it has none."""
    counts = labels.bincount(minlength=classes).tolist()
    hits = labels[predicted == labels].bincount(minlength=classes).tolist()
    return [100.0 * hit / count if count else None for hit, count in zip(hits, counts, strict=True)]


def expected_calibration_error(correct: Tensor, probabilities: Tensor, bins: int = N_BINS) -> float:
    """Expected calibration error (ECE) in percent.

    Probabilities of the predicted classes are put into `bins` equal intervals (a, b] of [0, 1]. In
    each, the share of correct predictions is compared with the mean probability; the absolute
    differences are averaged, weighted by the number of images.

    Source: equation 3 of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        correct: Whether each prediction is right: (N,).
        probabilities: Its probability: (N,).
        bins: Number of intervals.
    """
    confidence = probabilities.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    place = torch.bucketize(confidence, edges[1:-1])  # (N,)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, place, correct.double() - confidence)  # |B| (accuracy - confidence) of each
    return 100.0 * gaps.abs().sum().item() / len(confidence)


def unique_classnames(names: Sequence[str]) -> list[str]:
    """The classes' names by label, those that several classes have with their labels behind them.

    >>> names_apart(["crane", "crow", "crane"])
    ['crane (label 0)', 'crow', 'crane (label 2)']
    """
    counts = Counter(names)
    return [
        f"{name} (label {label})" if counts[name] > 1 else name for label, name in enumerate(names)
    ]


def atomic_write(path: str | os.PathLike, data: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write a file so that its name only ever stands for the whole content.

    The data goes to a temporary file beside it, to the disk, and is then renamed.

    Args:
        path: The file.
        data: Its content, or what writes that to an open file.

    Raises:
        OSError: The folder is missing, full or not writable; nothing is left behind.
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
        fsync_dir(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # which a full disk leaves out
        raise


def fsync_dir(folder: Path) -> None:
    """Have a folder's names on the disk, too, where its system can do that (Windows cannot)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def detect_placeholder_file(path: str | os.PathLike) -> str | None:
    """Detect a Git LFS pointer or a web page that was saved in place of a file.

    Returns:
        What the file is and the remedy, to follow "PATH is"; None for any other file, and where
        it cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if re.match(rb"(<\?xml[^>]*>\s*|<!--.*?-->\s*)*<(!doctype html|html|head|body)\b", text, re.S):
        return "a web page, not the file itself: download it again"
    return None


def one_line(text: str) -> str:
    """A text on one line: white space as single spaces, what cannot be printed by its code.

    The middle of a very long one is left out, for remedies stand at the end.
    """
    text = " ".join(text.split())
    if len(text) > 2000:
        text = f"{text[:1000]} ... {text[-900:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def truncate_list(names: Iterable[str]) -> str:
    """The first five names, and how many more there are, on one line whatever they hold."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(n if n.isprintable() else repr(n) for n in names[:5]) + more


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A hint at the valid name that looks most like this one: " (did you mean 'dtd'?)", or ""."""
    lower = {known.lower(): known for known in valid}
    found = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" (did you mean {lower[found[0]]!r}?)" if found else ""


def plural(count: int, what: str) -> str:
    """A count and its noun: "1 run", "1,024 runs"."""
    return f"{count:,} {what}" + ("s" if count != 1 else "")


def format_error(error: Exception) -> str:
    """An error in words; one of the operating system names the file and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def print_quietly(text: str) -> None:
    """Print; a reader that has closed the pipe, as `head` does, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_csv(header: Sequence, rows: Iterable[Sequence] = ()) -> str:
    """The text of a CSV file, or of a line of it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def sha256_of_tree(data: Any) -> str:
    """SHA-256 over nested dicts, lists and tuples of plain values and tensors."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            value = value.detach().cpu().contiguous().reshape(-1)
            sha.update(value.view(torch.uint8).numpy())
        elif isinstance(value, dict):
            sha.update(f"{len(value)} pairs ".encode())
            for pair in value.items():
                add(pair)
        elif isinstance(value, list | tuple):
            sha.update(f"{len(value)} items ".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{value!r} ".encode())

    add(data)
    return sha.hexdigest()


def progress(
    items: Iterable[T], total: int | None = None, desc: str = "", unit: str = "it"
) -> Iterator[T]:
    """Yield the items, showing how far along they are on standard error.

    A terminal gets tqdm's bar; a file or a pipe a plain line now and then (`Progress`).
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Progress(total, desc, unit) as bar:
        for item in items:
            yield item
            bar.update()


class Progress:
    """A bar on a terminal, else a plain line at most every `seconds`.

    Args:
        total: How many units there will be; None when unknown.
        desc: What is being done.
        unit: What is counted.
        done: Units that were done before.
        seconds: Least time between two plain lines.
    """

    def __init__(
        self,
        total: int | None,
        desc: str = "",
        unit: str = "it",
        done: int = 0,
        seconds: float = 15.0,
    ) -> None:
        self.total, self.desc, self.unit, self.seconds = total, desc, unit, seconds
        self.count, self.done, self.note = done, done, ""
        self.start = self.last = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total, initial=done, desc=desc, unit=unit, dynamic_ncols=True, leave=False
            )

    def update(self, n: int = 1, note: str = "") -> None:
        """Count n more units; `note` (such as the loss) is shown behind the count."""
        self.count += n
        self.note = note or self.note
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.last >= self.seconds:
            self._line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.last > self.start:  # what took no longer than one line's interval stays silent
            self._line()

    def _line(self) -> None:
        """Print one plain line: what, how many of how many, rate, note."""
        self.last = time.monotonic()
        rate = (self.count - self.done) / max(self.last - self.start, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        note = f", {self.note}" if self.note else ""
        print(
            f"{self.desc}: {self.count}{of} {self.unit}, {rate:.1f} {self.unit}/s{note}",
            file=sys.stderr,
            flush=True,
        )
