"""The runs of an experiment file, through scripts/sweep.sh, then its table and figure.

    python scripts/experiment.py configs/experiments/digits_grid.yaml
    DATA=/path/to/data JOBS=2 python scripts/experiment.py configs/experiments/paper_grid.yaml

DATA, JOBS, GPUS, LOGS and PYTHON are sweep.sh's. Finished runs are not run again; stop it and start
it again at any time. Arguments that are not its own are passed on to main.py. What such a file says
stands in reporting/experiments.py.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from reporting.experiments import Planned, read_experiment
from reporting.kinds import KINDS

from run_utils import OneLineErrorParser
from utils import format_error, one_line

SWEEP = Path(__file__).resolve().with_name("sweep.sh")
STOPS = (signal.SIGINT, signal.SIGTERM)


def sweep(runs: Sequence[Planned]) -> int:
    """Make those runs that are not finished, through sweep.sh, and return its exit status."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(" ".join(run.arguments) + "\n" for run in runs)
        file.flush()
        # In a session of its own: an interrupt reaches it through us alone, and once.
        process = subprocess.Popen(
            ["bash", str(SWEEP)],
            env={"PYTHON": sys.executable, **os.environ, "RUNS": file.name},
            start_new_session=True,
        )
        before = [signal.signal(number, lambda *_: process.terminate()) for number in STOPS]
        status = process.wait()
        for number, handler in zip(STOPS, before, strict=True):
            signal.signal(number, handler)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = OneLineErrorParser(prog="experiment.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "file", type=Path, help="the experiment, such as one of configs/experiments"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="folder of its folders (.)")
    parser.add_argument("--dry-run", action="store_true", help="only print main.py's arguments")
    args, extra = parser.parse_known_args(argv)
    try:
        experiment = read_experiment(args.file, extra, args.root)
        if args.dry_run:
            for run in experiment.runs:
                print("main.py", *run.arguments)
            return 0
        status = sweep(experiment.runs)
        if status in (0, 1):  # 1: some of the runs failed
            KINDS[experiment.kind](experiment.runs, experiment.out)
        return status
    except (ValueError, OSError) as error:
        print(one_line(f"experiment.py: error: {format_error(error)}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
