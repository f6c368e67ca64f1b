"""Signals that end a run, and when they may."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Of a user, a closed terminal, and batch systems; Windows lacks some.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


class Preempted(BaseException):
    """A signal asks the process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class SignalHandler:
    """Turns signals into Preempted: at once, or where `pending` is looked at while deferred.

    Only the first signal counts, since job schedulers signal every process of a job, and sweeps
    pass on what they get. A second Ctrl-C after `force_quit_after_s` ends the process at once.
    """

    def __init__(self, force_quit_after_s: float = 3.0) -> None:
        self.force_quit_after_s = force_quit_after_s
        self.is_deferring, self.pending, self.received_at = False, 0, 0.0
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "SignalHandler":
        is_main_thread = threading.current_thread() is threading.main_thread()
        for name in SIGNALS if is_main_thread else ():  # elsewhere Python allows no handlers
            signum = getattr(signal, name, None)
            by_nohup = name == "SIGHUP" and signum and signal.getsignal(signum) == signal.SIG_IGN
            if signum and not by_nohup:
                self.previous_handlers[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous_handlers.items():
            # A repeat while the process ends must not change its exit status.
            signal.signal(signum, signal.SIG_IGN if self.pending else handler)

    def _handle(self, signum: int, _: object) -> None:
        if not self.pending:
            self.pending, self.received_at = signum, time.monotonic()
            if not self.is_deferring:
                raise Preempted(signum)
        elif signum == signal.SIGINT and (
            time.monotonic() - self.received_at >= self.force_quit_after_s
        ):
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    @contextmanager
    def defer(self, deferring: bool = True) -> Iterator[None]:
        """Within this context, signals only become `pending`; with False, they raise again."""
        before, self.is_deferring = self.is_deferring, deferring
        try:
            if self.pending and not deferring:
                raise Preempted(self.pending)
            yield
        finally:
            self.is_deferring = before
