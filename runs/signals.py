"""Signals that end a run, and when they may."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Preempted(BaseException):
    """A signal asks to end.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.kept = number, ""  # `kept` says what a later run goes on from


class SignalHandler:
    """SIGINT and SIGTERM as Interrupted: raised at once, or where `check` is called if deferred.

    One is dealt with at a time: while a checkpoint is written, repeats change nothing, since job
    schedulers signal every process, and sweeps pass on what they get. SIGINT (Ctrl-C) that comes
    again after `patience` seconds ends the process at once.
    """

    def __init__(self, patience: float = 3.0) -> None:
        self.deferring, self.pending, self.patience = False, 0, patience
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "SignalHandler":
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
            raise Preempted(number)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.pending:
            raise Preempted(self.pending)

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
