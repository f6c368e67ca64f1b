"""Experiment files: the runs that one lists, and the results that these have.

An experiment file has the keys

    report     what is made of the runs: comparison, lr_sweep or grid
    save_path  folder of the runs
    out        folder of the table and the figure
    common     flags of main.py for all runs
    runs       a list of further flags; a flag with a list of values is run with each of them
"""

import itertools
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from reporting.aggregate import unify_spellings
from run_utils import default_settings, get_arguments
from runs.identity import diff_settings, get_hparams
from runs.output_dir import get_output_dir
from runs.records import Run, read_run
from utils import plural

KEYS = {"report", "save_path", "out", "common", "runs"}


class PlannedRun(NamedTuple):
    """One run of an experiment."""

    arguments: list[str]  # of main.py
    config: Namespace

    @property
    def folder(self) -> Path:
        """Where its results are, or will be."""
        return get_output_dir(self.config)

    @property
    def is_finished(self) -> bool:
        """Whether its folder holds a result."""
        return (self.folder / "result.json").is_file()


class Experiment(NamedTuple):
    """The contents of an experiment file."""

    report: str
    out: Path
    runs: list[PlannedRun]  # those of most iterations first


def read_experiment(path: Path, extra: Sequence[str] = (), root: Path = Path()) -> Experiment:
    """Read an experiment file and list its runs.

    Args:
        path: The file.
        extra: Arguments of main.py for every run.
        root: Folder that the file's folders are relative to.

    Raises:
        ValueError: The file is not as the module's docstring says; the sentence names it.
        OSError: It cannot be read.
        SystemExit: main.py's parser refuses a run's arguments.
    """
    data = _read_file(path)
    runs = []
    for flags in (flags for entry in data["runs"] for flags in expand({**data["common"], **entry})):
        arguments = [*to_arguments(flags), *extra, "--save_path", str(root / data["save_path"])]
        if bad := next((text for text in arguments if len(text.split()) != 1), None):
            raise ValueError(f"{path}: {bad!r} is empty or has spaces, which sweep.sh cannot pass")
        # As sweep.sh has it: weights are not saved unless a flag asks for them.
        runs.append(PlannedRun(arguments, get_arguments(["--no-save_weights", *arguments])))
    runs.sort(key=lambda run: -run.config.n_iters * run.config.shots)
    if repeated := len(runs) - len({run.folder for run in runs}):
        raise ValueError(f"{path} lists {plural(repeated, 'run')} twice")
    return Experiment(data["report"], root / data["out"], runs)


def _read_file(path: Path) -> dict[str, Any]:
    """Return the entries of an experiment file, checked."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or data.keys() != KEYS:
        raise ValueError(f"{path} must have the keys {', '.join(sorted(KEYS))}, and no others")
    common, runs = data["common"], data["runs"]
    if (
        not isinstance(runs, list)
        or not runs
        or not all(isinstance(e, dict) for e in [common, *runs])
    ):
        raise ValueError(f"{path}: common must hold flags, and runs a list of such")
    flags = default_settings()
    for key in itertools.chain(common, *runs):
        if key not in flags:
            raise ValueError(f"{path}: main.py has no flag {key!r}")
    return data


def expand(flags: dict[str, Any]) -> list[dict[str, Any]]:
    """Return flags with one value each, for every combination of the listed values."""
    lists = [value if isinstance(value, list) else [value] for value in flags.values()]
    return [dict(zip(flags, values, strict=True)) for values in itertools.product(*lists)]


def to_arguments(flags: dict[str, Any]) -> list[str]:
    """Return flags as a command line."""
    switches = {True: "--{}", False: "--no-{}"}
    return [
        switches[value].format(key) if isinstance(value, bool) else f"--{key}={value}"
        for key, value in flags.items()
    ]


def load_finished(planned: Iterable[PlannedRun], required: bool = True) -> list[Run]:
    """Read the runs that are finished.

    Raises:
        ValueError: No run is finished though one is required, or a result is damaged or another
            run's.
    """
    runs = []
    for plan in planned:
        if plan.is_finished:
            try:
                run = read_run(plan.folder)
                # main.py compares the images; here a run is what it was planned to be.
                if changes := diff_settings(run.config, get_hparams(plan.config)):
                    raise ValueError(f"the result is another run's ({'; '.join(changes)})")
            except ValueError as error:
                raise ValueError(f"{plan.folder}: {error}; remove it, and run it again") from error
            runs.append(run)
    if not runs and required:
        raise ValueError("no run of this experiment is finished")
    return unify_spellings(runs)
