"""Make tables and figures of finished runs, from the files in their folders.

    python scripts/report.py results                        # writes results/report/
    python scripts/report.py results more --out docs/study

Per backbone: accuracy by dataset, method and shots as mean and standard deviation over seeds,
beside published figures (reporting/published.yaml), memory and time; base and new classes for runs
with --subsample base, other datasets for runs with --test_on; accuracy by shots, curves, the
confusion matrix and the accuracy of each class. Runs that differ in another setting than the seed
are never averaged: what differs follows the method's name. tables.csv has the numbers of tables.md,
report.html all of it, with images. Broken and unfinished runs are named on standard error.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from reporting.aggregate import find_runs
from reporting.report import write_report

from run_utils import OneLineErrorParser, path_arg
from runs.cli import run_cli
from utils import one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = OneLineErrorParser(prog="report.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("results", nargs="+", type=path_arg, help="folders that hold runs, at any depth")
    add("--out", type=path_arg, help="the report's folder (report/ in the first one)")
    args = parser.parse_args(argv)
    out = args.out or args.results[0] / "report"
    return run_cli(lambda: report(args.results, out), parser.prog)


def report(folders: Sequence[Path], out: Path) -> None:
    """Read the runs and write the report; a ValueError where there are none."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
    runs = find_runs(folders, warn)
    if not runs:
        raise ValueError(f"there is no finished run below {', '.join(map(str, folders))}")
    write_report(runs, out, warn)


def warn(sentence: str) -> None:
    """Print a sentence to standard error."""
    print(one_line(f"report.py: {sentence}"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
