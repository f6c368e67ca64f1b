"""Print those of main.py's command lines on standard input whose runs are not finished.

    python scripts/list_pending.py [arguments that all of them share] < lines.txt

sweep.sh asks this once, where main.py would take seconds for each finished run.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cache
from typing import Any

import reporting  # noqa: F401  (which puts the repository on the path)

from datasets import dataset_fingerprint, dataset_name
from run_utils import get_arguments
from runs.cli import run_cli
from runs.output_dir import get_output_dir, load_finished_result, remove_stale_files
from runs.transfer import load_known_targets
from utils import plural


def main(argv: Sequence[str] | None = None) -> None:
    """Print the lines to run on standard output, and how many there were on standard error."""
    shared = sys.argv[1:] if argv is None else argv
    lines = sys.stdin.read().splitlines()
    with redirect_stdout(sys.stderr):  # for a --help among the arguments
        # As in sweep.sh, which keeps no weights unless they are asked for.
        left = [x for x in lines if not is_finished(["--no-save_weights", *x.split(), *shared])]
    print(*left, sep="\n", end="\n" * bool(left))
    done = len(lines) - len(left)
    print(f"{plural(len(lines), 'run')}, {done} of them finished", file=sys.stderr)


def is_finished(arguments: Sequence[str]) -> bool:
    """Whether the run's result is there; one that is not as it should be is left to main.py."""
    config = get_arguments(arguments)
    folder = get_output_dir(config)
    if not (folder / "result.json").exists():
        return False
    try:
        half = [] if config.subsample == "all" else [config.subsample]
        data = cached_fingerprint(config.dataset, config.root_path, config.classnames, *half)
        done = load_finished_result(folder, config, data) is not None
        targets = {
            dataset_name(name): cached_fingerprint(name, config.root_path)
            for name in config.test_on or ()
        }
        done &= load_known_targets(folder, targets).keys() == targets.keys()
    except (ValueError, OSError):
        return False
    if done:
        remove_stale_files(folder)
    return done


@cache
def cached_fingerprint(*task: str | None) -> dict[str, Any]:
    """The data of a task, as `dataset_fingerprint` names it, read once for all of its runs."""
    return dataset_fingerprint(*task)


if __name__ == "__main__":
    sys.exit(run_cli(main))
