"""Run what an experiment file lists, through scripts/sweep.sh, then write its table and figure.

    python scripts/experiment.py configs/experiments/digits_grid.yaml
    DATA=/path/to/data JOBS=2 python scripts/experiment.py configs/experiments/paper_grid.yaml

reporting/experiments.py has the format of the files. DATA, JOBS, GPUS, LOGS and PYTHON are
sweep.sh's. Finished runs are not run again; stop and restart it at any time. Unknown arguments go
to main.py.
"""

import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from reporting.experiment_reports import REPORTS, write_experiment
from reporting.experiments import PlannedRun, read_experiment

from run_utils import OneLineErrorParser
from runs.cli import run_cli

SWEEP = Path(__file__).resolve().with_name("sweep.sh")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = OneLineErrorParser(prog="experiment.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "file", type=Path, help="the experiment, such as one of configs/experiments"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="folder of its folders (.)")
    parser.add_argument("--dry-run", action="store_true", help="only print main.py's arguments")
    args, extra = parser.parse_known_args(argv)
    return run_cli(lambda: run_experiment(args, extra), parser.prog)


def run_experiment(args: Namespace, extra: Sequence[str]) -> int:
    """Make the runs and the report, or print the runs; return the exit status."""
    experiment = read_experiment(args.file, extra, args.root)
    if experiment.report not in REPORTS:
        raise ValueError(
            f"{args.file}: unknown report {experiment.report!r}; valid: {', '.join(REPORTS)}"
        )
    if args.dry_run:
        for run in experiment.runs:
            print("main.py", *run.arguments)
        return 0
    status = sweep(experiment.runs)
    if status in (0, 1):  # 1: some of the runs failed
        write_experiment(experiment)
    return status


def sweep(runs: Sequence[PlannedRun]) -> int:
    """Make the unfinished runs through sweep.sh and return its exit status."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(" ".join(run.arguments) + "\n" for run in runs)
        file.flush()
        environment = {"PYTHON": sys.executable, **os.environ, "RUNS": file.name}
        process = subprocess.Popen(["bash", str(SWEEP)], env=environment)
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                pass  # it reaches sweep.sh as well, which stops its runs


if __name__ == "__main__":
    sys.exit(main())
