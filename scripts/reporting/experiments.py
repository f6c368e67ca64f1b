"""Experiment files: the runs that one lists, and what became of them.

An experiment file says:

    kind       compare, rates, grid, ablation or moments: what is made of the runs (kinds.py)
    save_path  folder of the runs, and `out` that of the table and the figure
    rates      a file of the kind rates, whose chosen learning rates are taken, or several; optional
    common     flags of main.py for all runs
    settings   lists of flags for some; where a flag has several values, each is run with each
"""

import itertools
import math
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from optimizers.build import ABLATION_DEFAULTS, METHODS
from reporting.numbers import settings_of
from run_utils import default_settings, get_arguments
from runs.output_dir import diff_configs, get_hparams, get_output_dir
from runs.records import Run, read_run
from utils import plural

KINDS = ("compare", "rates", "grid", "ablation", "moments")
OF_RATES = ("lr", "shots", "moments", "moment_support")  # in which runs of rates may differ

Cells = dict[tuple[int, str], dict[int, float]]  # values by (shots, variant), by seed
KEYS = {"kind", "save_path", "out", "rates", "common", "settings"}


class Experiment(NamedTuple):
    """The contents of an experiment file."""

    kind: str
    out: Path
    runs: list["Planned"]


class Planned(NamedTuple):
    """One run of an experiment."""

    arguments: list[str]  # of main.py
    config: Namespace

    @property
    def folder(self) -> Path:
        """Where its results are, or will be."""
        return get_output_dir(self.config)

    @property
    def variant(self) -> str:
        """Its method, and what of SO it makes otherwise."""
        return variant(self.config.method, vars(self.config))

    @property
    def is_done(self) -> bool:
        """Whether its folder holds a result."""
        return (self.folder / "result.json").is_file()


def variant(method: str, settings: Mapping[str, Any]) -> str:
    """A method and what of SO it makes otherwise: "so", "so, moments none"."""
    parts = [
        f"{k} {settings[k]}"
        for k, usual in ABLATION_DEFAULTS.items()
        if settings.get(k, usual) != usual
    ]
    return ", ".join([method, *parts])


# Reading


def read_experiment(path: Path, extra: Sequence[str] = (), root: Path = Path()) -> Experiment:
    """Read an experiment file and list its runs, those of most iterations first.

    Args:
        path: The file.
        extra: Arguments of main.py for every run.
        root: Folder that the file's folders are relative to.

    Raises:
        ValueError: The file is not as the module's docstring says; the sentence names it.
        OSError: It cannot be read.
        SystemExit: main.py's parser refuses a run's arguments.
    """
    data = read_file(path)
    every = [flags for entry in data["settings"] for flags in product({**data["common"], **entry})]
    named = [variant(flags.get("method", "so"), flags) for flags in every]
    rates = {}
    files = data.get("rates", [])
    for file in files if isinstance(files, list) else [files]:
        tried = read_experiment(path.parent / file, extra, root).runs
        rates |= best_rates([run for run in tried if run.variant in named])
    runs = []
    for flags, name in zip(every, named, strict=True):
        if rates and "lr" not in flags:
            if name not in rates:
                raise ValueError(f"{path}: no learning rate was chosen for {name}")
            flags["lr"] = rates[name]
        folder = root / data["save_path"]
        arguments = [*to_arguments(flags), *extra, "--save_path", str(folder)]
        if bad := next((text for text in arguments if len(text.split()) != 1), None):
            raise ValueError(f"{path}: {bad!r} is empty or has spaces, which sweep.sh cannot pass")
        # As sweep.sh has it: weights are not kept unless a flag asks for them.
        runs.append(Planned(arguments, get_arguments(["--no-save_weights", *arguments])))
    runs.sort(key=lambda run: -run.config.n_iters * run.config.shots)
    if twice := len(runs) - len({run.folder for run in runs}):
        raise ValueError(f"{path} lists {plural(twice, 'run')} twice")
    return Experiment(data["kind"], root / data["out"], runs)


def read_file(path: Path) -> dict[str, Any]:
    """The entries of an experiment file, checked."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not KEYS - {"rates"} <= data.keys() <= KEYS:
        raise ValueError(
            f"{path} must have the keys {', '.join(sorted(KEYS))} (rates may be left out)"
        )
    if data["kind"] not in KINDS:
        raise ValueError(f"{path}: unknown kind {data['kind']!r}; valid: {', '.join(KINDS)}")
    common, settings = data["common"], data["settings"]
    good = isinstance(common, dict) and isinstance(settings, list) and settings
    if not good or not all(isinstance(entry, dict) for entry in settings):
        raise ValueError(f"{path}: common must hold flags, settings a list of such")
    flags = default_settings()
    for key in itertools.chain(common, *settings):
        if key not in flags:
            raise ValueError(f"{path}: main.py has no flag {key!r}")
    return data


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


# Results


def read_done(planned: Iterable[Planned], *free: str) -> list[Run]:
    """Read the runs that are finished.

    Args:
        planned: The experiment's runs.
        free: Settings, besides method and seed, in which they may differ; no mean is over others.

    Raises:
        ValueError: None is finished, a result is damaged or another run's, or they differ in more
            than that; the sentence names it.
    """
    done = []
    for plan in planned:
        if plan.is_done:
            try:
                run = read_run(plan.folder)
                images = run.data or {"digest": None}  # whichever they are: main.py looks at them
                if changes := diff_configs(run.settings, images, get_hparams(plan.config), images):
                    raise ValueError(f"the result is another run's ({changes})")
            except ValueError as error:
                raise ValueError(f"{plan.folder}: {error}; remove it, and run it again") from error
            done.append(run)
    if not done:
        raise ValueError("no run of this experiment is finished")
    values: dict[tuple[str, str], set[str]] = {}
    for run in done:
        place = {"backbone": run.backbone, "dataset": run.dataset, "shots": run.shots}
        for key, value in (settings_of(run) | place).items():
            values.setdefault((run.method, key), set()).add(repr(value))
    varied = {key for (_, key), found in values.items() if len(found) > 1}
    if odd := sorted(varied - set(free)):
        raise ValueError(f"this kind of experiment has no place for several {', '.join(odd)}")
    return done


def accuracies_by_rate(runs: Iterable[Run]) -> dict[str, dict[float, list[float]]]:
    """Accuracies by variant and learning rate, in the order of methods and rates."""
    table: dict[str, dict[float, list[float]]] = {}
    for run in sorted(runs, key=lambda run: (METHODS.index(run.method), run.settings["lr"])):
        of_rate = table.setdefault(variant(run.method, run.settings), {})
        of_rate.setdefault(run.settings["lr"], []).append(run.accuracy)
    return table


def best_rates(planned: Sequence[Planned]) -> dict[str, float]:
    """Each variant's learning rate of the best mean accuracy, the lowest of equals.

    Raises:
        ValueError: Not all runs are finished.
    """
    if missing := [plan for plan in planned if not plan.is_done]:
        raise ValueError(
            f"{plural(len(missing), 'run')} of the learning rates' choice not finished, such as "
            f"{missing[0].folder}: run that experiment first"
        )
    best = {}
    if not planned:
        return best
    for name, of_rate in accuracies_by_rate(read_done(planned, *OF_RATES)).items():
        means = {lr: fmean(values) for lr, values in of_rate.items()}
        highest = max(means.values())
        best[name] = min(lr for lr, m in means.items() if math.isclose(m, highest, rel_tol=1e-12))
    return best
