"""Read main.py's command lines from standard input; print those whose runs have no result yet.

    python scripts/list_pending.py [arguments of all runs] < lines.txt

sweep.sh asks once for all runs, since main.py takes seconds to see that one is finished.
"""

import io
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from statistics import fmean
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
        lines = sys.stdin.read().splitlines()
        # The first argument is sweep.sh's, which may be contradicted by those that follow.
        arguments = {x: ["--no-save_weights", *split_line(x), *shared] for x in lines}
        pending = [x for x in lines if not is_finished(arguments[x])]
    check_inputs([arguments[x] for x in pending])
    print(*pending, sep="\n", end="\n" * bool(pending))
    finished = [x for x in lines if x not in pending]
    text = f"{plural(len(lines), 'run')}, {len(finished)} of them finished"
    if finished and pending:
        hours = estimate_hours(*([arguments[x] for x in group] for group in (finished, pending)))
        text += f"; the others take some {hours:.2g} hours, run after run, by the time of these"
    print(text, file=sys.stderr)


def split_line(line: str) -> list[str]:
    """Split a run's arguments as bash's `read` does: a backslash escapes a blank."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.quotes, lexer.commenters = True, "", ""
    return list(lexer)


def check_inputs(runs: Sequence[Sequence[str]]) -> None:
    """Raise what is wrong with the first run's data or weights, if no run's can be read."""
    errors = []
    for arguments in runs:
        args = get_arguments(arguments)
        try:
            cached_fingerprint(args.dataset, args.root_path, args.classnames)
            cached_model_sha256(args.backbone, args.activation, args.heads and tuple(args.heads))
            return
        except (ValueError, OSError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def is_finished(arguments: Sequence[str]) -> bool:
    """Whether the run has its result. A faulty one counts as none: main.py says what is wrong."""
    args = get_arguments(arguments)
    folder = get_output_dir(args)
    if not (folder / "result.json").exists():
        return False
    try:
        half = [] if args.subsample == "all" else [args.subsample]
        data = cached_fingerprint(args.dataset, args.root_path, args.classnames, *half)
        saved = json.loads((folder / "result.json").read_text())
        heads = args.heads and tuple(args.heads)
        sha256 = cached_model_sha256(args.backbone, args.activation, heads)
        inputs = {**saved["inputs"], "backbone": sha256}  # images are compared by main.py only
        identity = {"config": get_hparams(args), "data": data, "inputs": inputs}
        finished = load_finished_result(folder, args, identity) is not None
        targets = {
            dataset_name(name): cached_fingerprint(name, args.root_path, test_only=True)
            for name in args.test_on or ()
        }
        finished &= load_known_targets(folder, targets).keys() == targets.keys()
    except (ValueError, OSError, KeyError, TypeError):
        return False
    if finished:
        remove_stale_files(folder)
    return finished


def estimate_hours(finished: Sequence[Sequence[str]], pending: Sequence[Sequence[str]]) -> float:
    """Return the time of the pending runs, by the finished ones' time of an iteration.

    Iterations of a method take the mean of its finished runs, or that of all of them.
    """
    times: dict[str, list[float]] = {}
    for args in map(get_arguments, finished):
        result = json.loads((get_output_dir(args) / "result.json").read_text())
        times.setdefault(args.method, []).append(result["wall_seconds"] / result["iterations"])
    mean = fmean(time for values in times.values() for time in values)
    runs = [get_arguments(arguments) for arguments in pending]
    return sum(a.n_iters * a.shots * fmean(times.get(a.method, [mean])) for a in runs) / 3600


@cache
def cached_fingerprint(*task: str | None, test_only: bool = False) -> dict[str, Any]:
    """`dataset_fingerprint`, computed once for all runs on the same data."""
    return dataset_fingerprint(*task, test_only=test_only)


@cache
def cached_model_sha256(*backbone: Any) -> str:
    """The digest of a backbone, computed once for all runs with it."""
    pretrained = PretrainedModel(*backbone)
    with redirect_stderr(io.StringIO()):
        pretrained.load("cpu")
    return pretrained.model_sha256


if __name__ == "__main__":
    sys.exit(run_cli(main))
