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

from reporting.experiments import read_experiment, write_experiment

from run_utils import OneLineErrorParser, path_arg
from runs.cli import run_cli

SWEEP = Path(__file__).resolve().with_name("sweep.sh")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = OneLineErrorParser(prog="experiment.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("file", type=path_arg, help="the experiment, such as one of configs/experiments")
    add("--root", type=path_arg, default=Path(), help="folder of its folders (.)")
    add("--dry-run", action="store_true", help="only print main.py's arguments")
    args, extra = parser.parse_known_args(argv)
    return run_cli(lambda: run_experiment(args, extra), parser.prog)


def run_experiment(args: Namespace, extra: Sequence[str]) -> int:
    """Make the runs and the report, or print the runs; return the exit status."""
    experiment = read_experiment(args.file, extra, args.root)
    # sweep.sh reads a run's arguments as bash's `read` does: a backslash escapes a blank.
    lines = [" ".join(x.replace(" ", "\\ ") for x in run.arguments) for run in experiment.runs]
    if args.dry_run:
        print(*(f"main.py {line}" for line in lines), sep="\n")
        return 0
    status = sweep(lines)
    if status in (0, 1):  # 1: some of the runs failed
        write_experiment(experiment)
    return status


def sweep(lines: Sequence[str]) -> int:
    """Make the unfinished ones of these runs through sweep.sh and return its exit status."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{line}\n" for line in lines)
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
