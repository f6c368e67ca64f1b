"""Experiment files: the runs that one lists, and what is made of the finished ones.

An experiment file has the keys

    report     what is made of the runs: comparison, lr_sweep or grid
    save_path  folder of the runs
    out        folder of the table and the figure
    common     flags of main.py for all runs
    runs       a list of further flags; a flag with a list of values is run with each of them
"""

from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure

from optimizers.build import ABLATION_DEFAULTS
from reporting.aggregate import (
    METHODS,
    MeanStd,
    format_setting,
    hparams,
    label_inputs,
    summarize,
)
from reporting.figures import add_legend, make_figure, plot_means, render_png, style
from reporting.markdown import markdown
from reporting.report import write_report
from reporting.tables import format_spread
from run_utils import get_arguments
from runs.identity import diff_settings, get_hparams
from runs.output_dir import get_output_dir
from runs.records import Run, read_run
from utils import atomic_write, plural

KEYS = ("report", "save_path", "out", "common", "runs")
# Reports over two settings, and what their columns are.
COLUMN_TITLES = {"lr_sweep": "initial learning rate", "grid": "density (share of entries)"}
REPORTS = ("comparison", *COLUMN_TITLES)


class PlannedRun(NamedTuple):
    """One run of an experiment."""

    arguments: list[str]  # of main.py
    config: Namespace

    @property
    def folder(self) -> Path:
        """Where its results are, or will be."""
        return get_output_dir(self.config)


class Experiment(NamedTuple):
    """The contents of an experiment file."""

    report: str
    out: Path
    runs: list[PlannedRun]  # all different, those of most iterations first


def read_experiment(path: Path, extra: Sequence[str] = (), root: Path = Path()) -> Experiment:
    """Read an experiment file and list its runs; a ValueError says what is wrong with it.

    Folders in it are relative to `root`. `extra` are arguments of main.py for every run.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        report, save_path, out, common, entries = (data[key] for key in KEYS)
        lines = [line for entry in entries for line in command_lines(common | entry)]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML with the keys {', '.join(KEYS)}: {reason}") from error
    if report not in REPORTS:
        raise ValueError(f"{path}: unknown report {report!r}; valid: {', '.join(REPORTS)}")
    runs = {}
    for line in lines:
        arguments = [*line, *extra, "--save_path", str(root / save_path)]
        # As sweep.sh has it: weights are not saved unless a flag asks for them.
        run = PlannedRun(arguments, get_arguments(["--no-save_weights", *arguments]))
        runs[run.folder] = run
    ordered = sorted(runs.values(), key=lambda run: -run.config.n_iters * run.config.shots)
    return Experiment(report, root / out, ordered)


def command_lines(flags: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return arguments of main.py for every combination of the listed values."""
    options = []
    for key, value in flags.items():
        values = value if isinstance(value, list) else [value]
        options.append([f"--{key}={value}" for value in values])
        if isinstance(values[0], bool):
            options[-1] = [f"--{key}" if value else f"--no-{key}" for value in values]
    return list(product(*options))


def load_finished(planned: Iterable[PlannedRun]) -> list[Run]:
    """Read the runs that are finished; a ValueError names a damaged one, or another run's."""
    runs = []
    for folder, config in ((run.folder, run.config) for run in planned):
        if (folder / "result.json").is_file():
            try:
                runs.append(read_run(folder))
                if changes := diff_settings(runs[-1].config, get_hparams(config)):
                    raise ValueError(f"the result is another run's ({'; '.join(changes)})")
            except ValueError as error:
                raise ValueError(f"{folder}: {error}; remove it, and run it again") from error
    return label_inputs(runs)


def write_experiment(experiment: Experiment) -> None:
    """Write and print what the finished runs of an experiment show."""
    runs, out = load_finished(experiment.runs), experiment.out
    if not runs:
        raise ValueError("no run of this experiment is finished")
    if experiment.report == "comparison":
        write_report(runs, out, lambda sentence: print(f"experiment.py: {sentence}", flush=True))
        return
    text, draw = sweep(runs, experiment.report)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "table.md", f"{text}\n\n![figure](figure.png)\n")
    atomic_write(out / "figure.png", render_png(draw))
    print(f"\n{text}\n\nTable and figure: {out}", flush=True)


def sweep(runs: Sequence[Run], report: str) -> tuple[str, Callable[[], Figure]]:
    """Return the table of accuracies over two settings, and a function that draws it."""
    lines, title = group_by_two(runs, report), COLUMN_TITLES[report]
    columns = sorted({column for line in lines.values() for column in line}, key=float)
    rows = [
        [row, *(format_spread(*line[c][:2], ".1f") if c in line else "-" for c in columns)]
        for row, line in lines.items()
    ]
    split = "validation" if runs[0].config.get("eval_split") == "val" else "test"
    shots = " and ".join(map(str, sorted({run.shots for run in runs})))
    seeds = plural(len({run.seed for run in runs}), "seed")
    text = (
        f"Mean {split} accuracy in percent (± its standard deviation), {shots} shots, {seeds}, by "
        f"{title}:\n\n{markdown(['', *columns], rows)}"
    )
    if split == "validation":  # nothing is chosen on test images
        # Rounded, since sums in another order differ in their last digits: the lowest of equals.
        best = (
            f"{row} {max(sorted(line, key=float), key=lambda c: round(line[c].mean, 9))}"
            for row, line in lines.items()
        )
        text += f"\n\nBest: {'; '.join(best)}."
    return text, partial(draw_sweep, lines, f"{split} accuracy (%)", title)


def group_by_two(runs: Sequence[Run], report: str) -> dict[str, dict[str, MeanStd]]:
    """Return mean accuracies by row and column. Those over several shots have no spread."""
    is_lr_sweep = report == "lr_sweep"
    cells: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        row = method_and_ablation(run.method, run.config) if is_lr_sweep else refresh_interval(run)
        # Of a density without the noise of its last digits.
        column = f"{run.config['lr']:g}" if is_lr_sweep else f"{1 - run.config['s']:.6g}"
        cells[row, column].append(run)
    lines: dict[str, dict[str, MeanStd]] = defaultdict(dict)
    for (row, column), cell in cells.items():
        settings = [
            (run.method, run.backbone, run.data["digest"], hparams(run), is_lr_sweep or run.shots)
            for run in cell
        ]
        if any(other != settings[0] for other in settings):
            raise ValueError(
                f"runs of {row} and {column} differ in other settings, such as {cell[0].folder} "
                "from others: this report has no place for them"
            )
        mean = summarize([run.final_accuracy for run in cell])
        lines[row][column] = mean._replace(std=None) if is_lr_sweep else mean
    return lines


def draw_sweep(lines: Mapping[str, Mapping[str, MeanStd]], ylabel: str, xlabel: str) -> Figure:
    """Draw a line for each row against the numbers of the columns."""
    figure, (axes,) = make_figure("")
    for number, (row, line) in enumerate(lines.items()):
        points = sorted((float(column), mean) for column, mean in line.items())
        plot_means(axes, points, style(number), row)
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_formatter("{x:g}")
    return add_legend(figure, "mean (± standard\ndeviation) over seeds")


def method_and_ablation(method: str, config: Mapping[str, Any]) -> str:
    """Return a method's name, followed by what an ablation of SO changes: "SO, moments none"."""
    changes = [
        format_setting(key, config[key])
        for key, default in ABLATION_DEFAULTS.items()
        if config.get(key, default) != default
    ]
    return ", ".join([METHODS[method], *changes])


def refresh_interval(run: Run) -> str:
    """Return T, or that SO drew its gradient support only once in this run."""
    is_refreshed = run.config["t"] < run.config["n_iters"] * run.shots
    return f"T = {run.config['t']}" if is_refreshed else "never refreshed"
