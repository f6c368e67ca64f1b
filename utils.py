"""Small things several parts use: atomic files, progress bars."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a file so that its name only ever stands for the whole content.

    The data goes to a temporary file beside it, to the disk, and is then renamed.

    Raises:
        OSError: The folder is missing, full or not writable; nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
        seconds: Least time between two plain lines.
    """

    def __init__(
        self, total: int | None, desc: str = "", unit: str = "it", seconds: float = 15.0
    ) -> None:
        self.total, self.desc, self.unit, self.seconds = total, desc, unit, seconds
        self.count, self.note = 0, ""
        self.start = self.last = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True, leave=False)

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
        rate = self.count / max(self.last - self.start, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        note = f", {self.note}" if self.note else ""
        print(
            f"{self.desc}: {self.count}{of} {self.unit}, {rate:.1f} {self.unit}/s{note}",
            file=sys.stderr,
            flush=True,
        )
