"""Read main.py's command lines from standard input; print those whose runs have no result yet.

    python scripts/list_pending.py [arguments of all runs] < lines.txt

sweep.sh asks once for all runs, since main.py takes seconds to see that one is finished.
"""

import argparse
import io
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from typing import Any

import reporting  # noqa: F401  (which puts the repository on the path)

from datasets import dataset_fingerprint, dataset_name
from run_utils import get_arguments
from runs.cli import run_cli
from runs.identity import get_hparams
from runs.output_dir import get_output_dir, load_finished_result, remove_stale_files
from runs.transfer import load_known_targets
from runs.weights import PretrainedModel
from utils import plural


def main(argv: Sequence[str] | None = None) -> None:
    """Print the lines to run on standard output, and how many there were on standard error."""
    shared = sys.argv[1:] if argv is None else argv
    with redirect_stdout(sys.stderr):  # for a --help among the arguments
        if "--help" in shared:
            get_arguments(shared)
        # The first argument is sweep.sh's, which may be contradicted by those that follow.
        runs = {
            line: get_arguments(["--no-save_weights", *split_line(line), *shared])
            for line in sys.stdin.read().splitlines()
        }
        finished = {line: args for line, args in runs.items() if is_finished(args)}
    pending = {line: args for line, args in runs.items() if line not in finished}
    check_inputs(pending.values())
    print(*pending, sep="\n", end="\n" * bool(pending))
    text = f"{plural(len(runs), 'run')}, {len(finished)} of them finished"
    if finished and pending:
        hours = estimate_hours(finished.values(), pending.values())
        text += f"; the others take some {hours:.2g} hours, run after run, by the time of these"
    print(text, file=sys.stderr)


def split_line(line: str) -> list[str]:
    """Split a run's arguments as bash's `read` does: a backslash escapes a blank."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.quotes, lexer.commenters = True, "", ""
    return list(lexer)


def is_finished(args: argparse.Namespace) -> bool:
    """Whether the run has its result. A faulty one counts as none: main.py says what is wrong."""
    folder = get_output_dir(args)
    try:
        saved = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        data, sha256 = read_inputs(args)
        inputs = {**saved["inputs"], "backbone": sha256}  # images are compared by main.py only
        identity = {"config": get_hparams(args), "data": data, "inputs": inputs}
        targets = {
            dataset_name(name): cached_fingerprint(name, args.root_path, test_only=True)
            for name in args.test_on or ()
        }
        finished = load_finished_result(folder, args, identity) is not None
        finished &= load_known_targets(folder, targets).keys() == targets.keys()
    except (ValueError, OSError, KeyError, TypeError):
        return False
    if finished:
        remove_stale_files(folder)
    return finished


def read_inputs(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the fingerprint of a run's data and the digest of its backbone."""
    data = cached_fingerprint(args.dataset, args.root_path, args.classnames, args.subsample)
    return data, model_sha256(args.backbone, args.activation, args.heads and tuple(args.heads))


cached_fingerprint = cache(dataset_fingerprint)


@cache
def model_sha256(*backbone: Any) -> str:
    """Return the digest of a backbone; the arguments are PretrainedModel's."""
    pretrained = PretrainedModel(*backbone)
    with redirect_stderr(io.StringIO()):
        pretrained.load("cpu")
    return pretrained.model_sha256


def check_inputs(runs: Iterable[argparse.Namespace]) -> None:
    """Raise what is wrong with the first run's data or weights, if no run's can be read."""
    errors = []
    for args in runs:
        try:
            read_inputs(args)
            return
        except (ValueError, OSError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def estimate_hours(
    finished: Iterable[argparse.Namespace], pending: Iterable[argparse.Namespace]
) -> float:
    """Return the time of the pending runs, by the finished ones' time of an iteration."""
    files = [get_output_dir(args) / "result.json" for args in finished]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    seconds = sum(r["wall_seconds"] for r in results) / sum(r["iterations"] for r in results)
    return seconds * sum(args.n_iters * args.shots for args in pending) / 3600


if __name__ == "__main__":
    sys.exit(run_cli(main))
