"""Small things several parts use: safe files, signals, progress bars."""

import csv
import difflib
import hashlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")


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
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # which a full disk leaves out
        raise


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk, too, where its system can do that (Windows cannot)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def one_line(text: str) -> str:
    """A text on one line: white space as single spaces, what cannot be printed by its code.

    The middle of a very long one is left out, for remedies stand at the end.
    """
    text = " ".join(text.split())
    if len(text) > 2000:
        text = f"{text[:1000]} ... {text[-900:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_few(names: Iterable[str]) -> str:
    """The first five names, and how many more there are, on one line whatever they hold."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(n if n.isprintable() else repr(n) for n in names[:5]) + more


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint at the valid name that looks most like this one: " (did you mean 'dtd'?)", or ""."""
    lower = {known.lower(): known for known in valid}
    found = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" (did you mean {lower[found[0]]!r}?)" if found else ""


def plural(count: int, what: str) -> str:
    """A count and its noun: "1 run", "1,024 runs"."""
    return f"{count:,} {what}" + ("s" if count != 1 else "")


def explain(error: Exception) -> str:
    """An error in words; one of the operating system names the file and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def say(text: str) -> None:
    """Print; a reader that has closed the pipe, as `head` does, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_csv(header: Sequence, rows: Iterable[Sequence] = ()) -> str:
    """The text of a CSV file, or of a line of it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def content_digest(data: Any) -> str:
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


class Interrupted(BaseException):
    """A signal asks to end.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.kept = number, ""  # `kept` says what a later run goes on from


class Signals:
    """SIGINT and SIGTERM as Interrupted: raised at once, or where `check` is called if deferred.

    One is dealt with at a time: while a checkpoint is written, repeats change nothing, since job
    schedulers signal every process, and sweeps pass on what they get. SIGINT (Ctrl-C) that comes
    again after `patience` seconds ends the process at once.
    """

    def __init__(self, patience: float = 3.0) -> None:
        self.deferring, self.pending, self.patience = False, 0, patience
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():  # a late repeat must not change the status
            signal.signal(number, signal.SIG_IGN if self.pending else handler)

    def _handle(self, number: int, _: object) -> None:
        if self.pending:
            if number == signal.SIGINT and time.monotonic() - self.since >= self.patience:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.pending, self.since = number, time.monotonic()
        if not self.deferring:
            raise Interrupted(number)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.pending:
            raise Interrupted(self.pending)

    @contextmanager
    def deferred(self, deferring: bool = True) -> Iterator[None]:
        """For a while, have signals wait for `check`."""
        before, self.deferring = self.deferring, deferring
        try:
            yield
        finally:
            self.deferring = before

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within such a while, have them raise at once."""
        with self.deferred(False):
            self.check()
            yield


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
