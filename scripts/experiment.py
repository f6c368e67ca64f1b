"""The runs of an experiment file, through scripts/sweep.sh, then its table and figure.

    python scripts/experiment.py configs/experiments/digits_grid.yaml
    DATA=/path/to/data JOBS=2 python scripts/experiment.py configs/experiments/paper_grid.yaml

DATA, JOBS, GPUS, LOGS and PYTHON are sweep.sh's. Finished runs are not run again; stop it and start
it again at any time. Arguments that are not its own are passed on to main.py. The file says:

    kind       compare, rates, grid or ablation: what is made of the runs (reporting/kinds.py)
    save_path  folder of the runs, and `out` that of the table and the figure
    rates      a file of the kind rates, whose chosen learning rates are taken; optional
    common     flags of main.py for all runs
    settings   lists of flags for some; where a flag has several values, each is run with each

Where runs would share a path, their other flags tell them apart: folders such as `lr0.01-t5`.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from reporting.kinds import KINDS, best_rates
from reporting.numbers import plural

from results import run_folder
from run_utils import Parser, make_parser, parse_args
from utils import explain, one_line

HERE = Path(__file__).resolve().parent
KEYS = {"kind", "save_path", "out", "rates", "common", "settings"}


class Experiment(NamedTuple):
    """What an experiment file says."""

    kind: str
    out: Path
    runs: list["Planned"]


class Planned(NamedTuple):
    """One run of an experiment."""

    arguments: list[str]  # of main.py
    config: argparse.Namespace

    @property
    def folder(self) -> Path:
        """Where its results are, or will be."""
        return run_folder(self.config)

    @property
    def is_done(self) -> bool:
        """Whether there is a result, of whatever settings."""
        return (self.folder / "result.json").is_file()


def read_experiment(path: Path, extra: Sequence[str] = (), root: Path = Path()) -> Experiment:
    """Read an experiment file and list its runs, those of most iterations first.

    Args:
        path: The file.
        extra: Arguments of main.py for every run.
        root: Folder that the file's folders are relative to.

    Raises:
        ValueError: The file is not what the module's docstring says; the sentence names it.
        OSError: It cannot be read.
        SystemExit: main.py's parser refuses a run's arguments.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not KEYS - {"rates"} <= data.keys() <= KEYS:
        raise ValueError(f"{path} must have the keys {', '.join(sorted(KEYS))} (rates may lack)")
    kind, common, settings = data["kind"], data["common"], data["settings"]
    if kind not in KINDS:
        raise ValueError(f"{path}: unknown kind {kind!r}; valid: {', '.join(KINDS)}")
    good = isinstance(common, dict) and isinstance(settings, list) and settings
    if not good or not all(isinstance(entry, dict) for entry in settings):
        raise ValueError(f"{path}: common must hold flags, settings a list of such")
    flags = {action.dest for action in make_parser()._actions}
    for key in itertools.chain(common, *settings):
        if key not in flags:
            raise ValueError(f"{path}: {key!r} is no flag of main.py")

    rates = {}
    if "rates" in data:
        rates = best_rates(read_experiment(path.parent / data["rates"], extra, root).runs)
    points = []
    for entry in settings:
        for point in product({**common, **entry}):
            if rates and "lr" not in point:
                point["lr"] = rates[point.get("method", "so")]
            points.append((point, run_folder(parse_args([*to_arguments(point), *extra]))))
    values: dict[tuple[str, Path], set[str]] = {}  # of each flag, among runs of one path
    for point, folder in points:
        for key, value in point.items():
            values.setdefault((key, folder), set()).add(repr(value))
    varied = {key for (key, _), found in values.items() if len(found) > 1}
    runs = []
    for point, _ in points:
        name = "-".join(f"{key}{point[key]}" for key in sorted(varied & point.keys()))
        folder = root / data["save_path"] / name.replace("/", "_")
        arguments = [*to_arguments(point), *extra, "--save_path", str(folder)]
        if bad := next((text for text in arguments if len(text.split()) != 1), None):
            raise ValueError(f"{path}: {bad!r} is empty or has spaces, which sweep.sh cannot pass")
        runs.append(Planned(arguments, parse_args(arguments)))
    runs.sort(key=lambda run: -run.config.n_iters * run.config.shots)
    twice = len(runs) - len({run.folder for run in runs})
    if twice:
        raise ValueError(f"{path} lists {plural(twice, 'run')} twice")
    return Experiment(kind, root / data["out"], runs)


def product(flags: dict[str, Any]) -> list[dict[str, Any]]:
    """Flags with one value each, for every combination of the values that there are."""
    lists = [value if isinstance(value, list) else [value] for value in flags.values()]
    return [dict(zip(flags, values, strict=True)) for values in itertools.product(*lists)]


def to_arguments(flags: dict[str, Any]) -> list[str]:
    """The command line that says the same."""
    arguments = []
    for key, value in flags.items():
        if isinstance(value, bool):
            arguments.append(f"--{key}" if value else f"--no-{key}")
        else:
            arguments.append(f"--{key}={value}")
    return arguments


def sweep(runs: Sequence[Planned]) -> int:
    """Make those runs that are not finished, through sweep.sh, and return its exit status."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(" ".join(run.arguments) + "\n" for run in runs)
        file.flush()
        # In a session of its own: an interrupt reaches it through us alone, and once.
        process = subprocess.Popen(
            ["bash", str(HERE / "sweep.sh")],
            env={"PYTHON": sys.executable, **os.environ, "RUNS": file.name},
            start_new_session=True,
        )
        before = [
            signal.signal(number, lambda *_: process.terminate())
            for number in (signal.SIGINT, signal.SIGTERM)
        ]
        status = process.wait()
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = Parser(prog="experiment.py", description=__doc__.split("\n")[0])
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
        print(one_line(f"experiment.py: error: {explain(error)}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
