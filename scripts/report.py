"""Tables and figures of finished runs, from the files in their folders alone.

    python scripts/report.py results                        # writes results/report/
    python scripts/report.py results more --out docs/study

Per backbone: accuracy by dataset, method and shots as mean and standard deviation over seeds,
beside published figures (reporting/published.yaml); base and new classes with their harmonic mean,
for runs with --subsample base; other datasets and their average, for runs with --test_on; memory
and time; accuracy by shots; curves; the confusion matrix and the accuracies of the classes, worst
first, over all seeds of a cell. Runs that differ in any other setting than the seed are never
averaged: the method's name is followed by what differs. tables.md is for reading. tables.csv holds
the same numbers, one line per cell and published figure, classes.csv one line per cell and class,
base_to_new.csv and transfer.csv what their names say, where there are such runs. Runs that are
broken or unfinished are named on standard error and left out, as are from what is said of classes
those of earlier versions, without predictions.csv. Figures need matplotlib; without it there are
tables alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from reporting.report import write_report

from run_utils import OneLineErrorParser
from utils import format_error, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = OneLineErrorParser(prog="report.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "results", nargs="+", type=Path, help="folders that hold runs, at any depth"
    )
    parser.add_argument("--out", type=Path, help="the report's folder (report/ in the first one)")
    args = parser.parse_args(argv)

    def complain(sentence: str) -> None:
        print(one_line(f"report.py: {sentence}"), file=sys.stderr, flush=True)

    try:
        write_report(args.results, args.out or args.results[0] / "report", complain)
        return 0
    except (ValueError, OSError) as error:
        complain(f"error: {format_error(error)}")
        return 2
    except KeyboardInterrupt:
        complain("interrupted; the same command starts it again")
        return 130


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # for terminals without ±
    sys.exit(main())
