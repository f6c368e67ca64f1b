"""How a program ends: what the user can mend is one sentence and status 2."""

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable

import torch

from runs.distributed import PeerExited, is_first_to_report_error
from runs.signals import Preempted
from utils import format_error, one_line


def run_cli(main: Callable[[], None], prog: str = "main.py") -> int:
    """Run main; turn what the user can mend into one sentence of `prog` and status 2.

    The environment variable SO_TRACEBACK brings the traceback back.
    """
    # Pillow's complaints about an image's metadata do not matter here.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.formatwarning = lambda message, *_, **__: one_line(f"note: {message}") + "\n"
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that it lacks
    try:
        main()
        return 0
    except (KeyboardInterrupt, Preempted) as stop:
        number, kept = getattr(stop, "number", signal.SIGINT), getattr(stop, "kept", "")
        cause = signal.Signals(number).name
        if lost := isinstance(stop, PeerExited):
            if os.environ.get("SO_TRACEBACK"):
                raise
            cause = "the loss of another process"
        if is_first_to_report_error(together=True):
            print(f"\n{prog}: ended by {cause}{kept and f'; {kept}'}", file=sys.stderr)
        return 2 if lost else 128 + number
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        full = full or "can't allocate memory" in str(error)  # torch's, on a CPU
        if os.environ.get("SO_TRACEBACK") or (isinstance(error, RuntimeError) and not full):
            raise
        sentence = format_error(error)
        if full:
            reason = sentence.partition("\n")[0] or "out of memory"
            sentence = (
                f"{reason}: lower --batch_size, or use --grad_accum_steps or --precision bf16"
            )
        if is_first_to_report_error():
            print(one_line(f"{prog}: error: {sentence}"), file=sys.stderr)
        return 2
