"""What a program prints, and how it ends: errors that the user can mend are one line, status 2."""

import argparse
import errno
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

import torch

from datasets import FewShotDataset, dataset_name
from run_utils import EVAL_SPLITS
from runs.distributed import PeerExited, get_world_size, is_first_to_report_error
from runs.environment import device_name
from runs.output_dir import classes_with_fewer_images, eval_items
from runs.signals import Preempted
from utils import format_error, one_line, truncate_list

# Accuracies by their keys in result.json, and the lines that users parse.
ACCURACY_LINES = {
    "zero_shot_accuracy": "Zero-shot CLIP's {} accuracy",
    "zero_shot_new_accuracy": "Zero-shot CLIP's {} accuracy on new classes",
    "final_accuracy": "Final {} accuracy",
    "balanced_accuracy": "Final balanced accuracy",
    "new_accuracy": "Final {} accuracy on new classes",
    "accuracy": "{} accuracy",
    "balanced": "Balanced accuracy",
}


def run_cli(main: Callable[[], int | None], prog: str = "main.py") -> int:
    """Run a program's main function and return the exit status; SO_TRACEBACK=1 shows tracebacks."""
    # Pillow's warnings about an image's metadata do not matter here.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.filterwarnings("ignore", message="SO keeps fewer")  # said in main.py's own words
    warnings.formatwarning = lambda message, *_, **__: one_line(f"note: {message}") + "\n"
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that its encoding lacks
    out, err = TolerantStream(sys.stdout), TolerantStream(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err), closing(out), closing(err):
        try:
            return main() or 0
        except (KeyboardInterrupt, Preempted) as stop:
            return _report_signal(stop, prog)
        except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
            message = _describe_error(error)
            if not message or os.environ.get("SO_TRACEBACK"):
                raise
            if is_first_to_report_error():
                print(one_line(f"{prog}: error: {message}"), file=sys.stderr)
            return 2


def _report_signal(stop: BaseException, prog: str) -> int:
    """Print which signal ended the program, and from where it can go on; the exit status."""
    signum, note = getattr(stop, "signum", signal.SIGINT), getattr(stop, "checkpoint_note", "")
    cause, status = signal.Signals(signum).name, 128 + signum
    if isinstance(stop, PeerExited):
        cause, status = "the loss of another process", 2
    if is_first_to_report_error(together=True):
        print(f"\n{prog}: ended by {cause}{note and f'; {note}'}", file=sys.stderr)
    return status


def _describe_error(error: Exception) -> str:
    """An error that the user can mend, in a sentence; "" for a bug."""
    message = format_error(error)
    memory_errors = (MemoryError, torch.cuda.OutOfMemoryError)
    if isinstance(error, memory_errors) or "can't allocate memory" in message:  # torch's, on a CPU
        reason = message.partition("\n")[0] or "out of memory"
        return f"{reason}: lower --batch_size, or use --grad_accum_steps or --precision bf16"
    return "" if isinstance(error, RuntimeError) else message


class TolerantStream:
    """A stream whose write errors (a closed pipe or terminal, a full disk) do not end the program.

    What standard error can no longer take, because the reader of its pipe was interrupted too,
    goes to the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            if self.stream is sys.__stderr__ and error.errno == errno.EPIPE:
                with suppress(OSError), open("/dev/tty", "w") as terminal:
                    terminal.write(text)
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def close(self) -> None:
        """Drop what cannot be written, which Python would try to write once more at its end."""
        try:
            self.stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def print_accuracy(kind: str, value: float, split: str, target: str = "") -> None:
    """Print an accuracy in percent on a line of the form that users of few-shot CLIP code parse.

    `kind` is a key of ACCURACY_LINES, `target` the name of another dataset than the run's own.
    """
    line = ACCURACY_LINES[kind].format(EVAL_SPLITS[split]) + (f" on {target}" if target else "")
    print(f"\n**** {line[0].upper()}{line[1:]}: {value:.2f}. ****", flush=True)


def print_accuracies(accuracies: Mapping[str, Any], split: str, uneven: bool = False) -> None:
    """Print the accuracies among the values of a result; the balanced one of uneven classes."""
    for kind in ACCURACY_LINES:
        if kind in accuracies and (uneven or kind != "balanced_accuracy"):
            print_accuracy(kind, accuracies[kind], split)


def print_run_summary(
    args: argparse.Namespace, dataset: FewShotDataset, method: str, device: torch.device
) -> None:
    """Print what is about to be trained; `method` describes that in words."""
    fewer = classes_with_fewer_images(dataset, args.shots)
    repeated = [f"{name}: {count} different of {args.shots}" for name, count in fewer.items()]
    if repeated:
        print(f"note: images are repeated where a class has too few ({truncate_list(repeated)})")
    subsample = "" if args.subsample == "all" else f"{args.subsample} "
    processes = f"{get_world_size()} x " if get_world_size() > 1 else ""
    print(
        f"{dataset_name(args.dataset)}: {len(dataset.classnames)} {subsample}classes, "
        f"{len(dataset.train_x)} images to adapt with ({args.shots} per class, seed {args.seed}), "
        f"{len(eval_items(dataset, args.eval_split))} to evaluate on\n"
        f"{args.backbone} on {processes}{device_name(device)}, {args.precision}:\n{method}",
        flush=True,
    )
