"""Write the tables and figures of docs/digits/README.md from runs.csv and curves.csv.gz beside it.

    python scripts/digits/study.py        # trains nothing; collect.py makes the two files

The page's prose is kept. Tables stand between <!-- NAME --> and <!-- /NAME -->.

runs.csv has a line for each run. Settings without a column are those of configs/digits.yaml.
Accuracies are in percent: `per_class` by label, `interpolation` as "alpha task glyphs; ..." of the
weights base + alpha (trained - base). curves.csv.gz has the loss and, where it was measured, the
test accuracy of each iteration, for the runs that were evaluated as they went.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reporting import ROOT, figures, tables
from reporting.aggregate import LABELS, confidence_interval, group_by_backbone
from reporting.experiments import sweep
from reporting.markdown import markdown

from run_utils import OneLineErrorParser, path_arg
from runs.cli import run_cli
from utils import atomic_write, plural

PAGE = ROOT / "docs/digits/README.md"
RUNS_FILE, CURVES_FILE = "runs.csv", "curves.csv.gz"
KEY = ("experiment", "method", "dataset", "shots", "seed")
SETTINGS = (  # that the study varies
    "lr", "s", "t", "grad_support", "moment_support", "moments", "bias_correction", "n_iters",
    "early_stop_loss", "eval_every", "eval_split",
)  # fmt: skip
TASK, GLYPHS = "final_accuracy", "glyphs_accuracy"
ON_TASK = {"On the task": TASK}
ON_BOTH = ON_TASK | {"On the glyphs": GLYPHS}
COMPARED_ALPHA = 0.7
StudyRun = SimpleNamespace  # with the columns of runs.csv and the attributes of Run


def main() -> int:
    parser = OneLineErrorParser(prog="study.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=path_arg, default=PAGE.parent, help="folder to write")
    return run_cli(lambda: write_page(parser.parse_args().out), parser.prog)


def write_page(out: Path) -> None:
    """Write the page with its tables, and its figures beside it, of experiments that have runs."""
    study = read_runs(PAGE.parent)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "README.md", fill_page(PAGE.read_text(encoding="utf-8"), study))
    for name, (experiment, draw) in FIGURES.items():
        if runs := runs_of(study, experiment):
            atomic_write(out / f"{name}.png", figures.render_png(partial(draw, runs)))


def read_runs(folder: Path) -> list[StudyRun]:
    """Read both files; `interpolation` has the accuracies on task and glyphs by alpha."""
    curves: dict[tuple, list[tuple]] = defaultdict(list)
    for row in read_csv(folder / CURVES_FILE):
        key = tuple(row[column] for column in KEY)
        curves[key].append((row["iteration"], row["loss"], row["test_accuracy"]))
    runs = []
    for row in read_csv(folder / RUNS_FILE):
        run = StudyRun(**row, config={key: row[key] for key in SETTINGS}, backbone="ViT-Tiny/8")
        points = [map(float, text.split()) for text in run.interpolation.split(";") if text]
        run.interpolation = {alpha: (task, glyphs) for alpha, task, glyphs in points}
        run.data = {"split": "fixed", "digest": run.data_digest}
        curve = curves[tuple(row[column] for column in KEY)]
        evaluated = [(i, accuracy) for i, _, accuracy in curve if not math.isnan(accuracy)]
        run.loss_curve = np.array([loss for _, loss, _ in curve])
        run.eval_curve = np.array([(0, run.zero_shot_accuracy), *evaluated])
        runs.append(run)
    return runs


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a CSV file by column; empty numbers are NaN."""
    options = dict(delimiter=",", names=True, dtype=None, encoding="utf-8", comments=None)
    table = np.atleast_1d(np.genfromtxt(path, **options))
    return [dict(zip(table.dtype.names, row, strict=True)) for row in table.tolist()]


def fill_page(text: str, study: Sequence[StudyRun]) -> str:
    """Return the page with its tables made again."""
    for name, (experiment, make_table) in TABLES.items():
        if runs := runs_of(study, experiment):
            before, begin, rest = text.partition(f"<!-- {name} -->\n")
            _, end, after = rest.partition(f"<!-- /{name} -->")
            text = f"{before}{begin}{make_table(runs)}\n{end}{after}"
    return text


def runs_of(study: Sequence[StudyRun], experiment: str) -> Sequence[StudyRun]:
    """Return the runs of an experiment, with those that it shares with others."""
    if experiment == "all":
        return study
    if experiment == "interpolation":
        return [run for run in study if len(run.interpolation) > 1]
    runs = [run for run in study if run.experiment == experiment]
    if experiment == "moments":
        runs = [r for r in study if r.experiment == "compare" and r.method == "so"] + runs
    if experiment == "greek_rates":
        seeds = {run.seed for run in runs}
        runs += [r for r in runs_of(study, "greek") if r.shots == 16 and r.seed in seeds]
    return runs


def about(study: Sequence[StudyRun]) -> str:
    """Return how many runs there are, and how they were made."""
    commits, versions, processors = (
        ", ".join(sorted({getattr(run, key) for run in study}))
        for key in ("git_commit", "torch", "processor")
    )
    return (
        f"{plural(len(study), 'run')}. Commit: {commits}. PyTorch: {versions}. "
        f"Processor: {processors}, one core for a run."
    )


def means_and_differences(runs: Sequence[StudyRun], key: str) -> str:
    """Return the table of means of a field of runs, and that of paired differences."""
    (results,) = group_by_backbone(runs)
    differences = tables.paired_differences_table(results, key)
    return f"{tables.shots_table(results, key)}\n\n{differences}"


def rates_table(runs: Sequence[StudyRun]) -> str:
    """Return both accuracies by learning rate and bias correction."""
    lines = []
    for lr in sorted({run.config["lr"] for run in runs}):
        line = [f"{lr:g}"]
        for correction in ("tensor", "entry"):
            settings = {"lr": lr, "bias_correction": correction}
            cell = [run for run in runs if settings.items() <= run.config.items()]
            means = [fmean(getattr(run, key) for run in cell) for key in (TASK, GLYPHS)]
            line.append("{:.1f} / {:.1f} ({})".format(*means, len(cell)))
        lines.append(line)
    return markdown(["learning rate", "SO", "SO, bias_correction entry"], lines)


def interpolation_table(runs: Sequence[StudyRun]) -> str:
    """Return both accuracies by alpha, and the difference of one alpha to 1, paired by seed."""
    alphas, lines = list(runs[0].interpolation), []
    for (dataset, shots, name), points in group_interpolations(runs).items():
        texts = ["{:.1f} / {:.1f}".format(*pair) for pair in points.mean(axis=0)]
        changes = points[:, alphas.index(COMPARED_ALPHA)] - points[:, alphas.index(1.0)]  # (S, 2)
        spreads = [tables.format_spread(*confidence_interval(v), "+.1f") for v in changes.T]
        label = f"{dataset}, {plural(shots, 'shot')}: {name} ({len(points)})"
        lines.append([label, *texts, " / ".join(spreads)])
    return markdown(["alpha", *map("{:g}".format, alphas), f"{COMPARED_ALPHA} minus 1"], lines)


def group_interpolations(runs: Sequence[StudyRun]) -> dict[tuple[str, int, str], np.ndarray]:
    """Return accuracies (seeds, alphas, 2) on task and glyphs by dataset, shots and method."""
    groups: dict[tuple[str, int, str], list] = defaultdict(list)
    for run in runs:
        name = LABELS[run.method] + ", entry" * (run.config["bias_correction"] == "entry")
        groups[run.dataset, run.shots, name].append(list(run.interpolation.values()))
    order = ["SO", "SO, entry", "LoRA", "Adam"]
    keys = sorted(groups, key=lambda key: (*key[:2], order.index(key[2])))
    return {key: np.array(groups[key]) for key in keys}


def draw_both(runs: Sequence[StudyRun], title: str) -> Figure:
    """Draw the accuracy on the task and on the glyphs against shots."""
    (results,) = group_by_backbone(runs)
    figure, panels = figures.make_figure(title, panels=2)
    labels = {TASK: "accuracy on the task (%)", GLYPHS: "accuracy on 70 classes of glyphs (%)"}
    before = next(run.interpolation[0.0] for run in runs if 0.0 in run.interpolation)
    for axes, (key, label), accuracy in zip(panels, labels.items(), before, strict=True):
        figures.plot_by_shots(axes, results, results.datasets, key, label)
        axes.axhline(accuracy, color="0.45", linestyle=(0, (1, 1)), label="before adaptation")
    return figures.add_legend(figure, figures.MEAN_STD)


def draw_interpolation(runs: Sequence[StudyRun]) -> Figure:
    """Draw the task against the glyphs at most shots: a line for a method, a marker for alpha."""
    most = max(run.shots for run in runs)
    groups = group_interpolations([run for run in runs if run.shots == most])
    datasets, names = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 2))
    figure, panels = figures.make_figure("", panels=len(datasets))
    for (dataset, _, name), points in groups.items():
        axes = panels[datasets.index(dataset)]
        color, marker, line = figures.style(names.index(name))
        y, x = points.mean(axis=0).T
        axes.plot(x, y, label=name, color=color, marker=marker, linestyle=line, markersize=4)
        axes.plot(x[-1], y[-1], "o", markersize=12, color=color, markerfacecolor="none")
        axes.set_title(f"{dataset}, {plural(most, 'shot')}", loc="left")
        axes.set(xlabel="accuracy on 70 classes of glyphs (%)", ylabel="accuracy on the task (%)")
    return figures.add_legend(figure, "markers: alpha from 0\n(where lines meet)\nto 1 (ringed)")


TABLES = {  # of the page: the experiment, and what makes the table of its runs
    "about": ("all", about),
    "accuracy": ("compare", partial(means_and_differences, key=TASK)),
    "forgetting": ("compare", partial(means_and_differences, key=GLYPHS)),
    "greek": ("greek", partial(means_and_differences, key=TASK)),
    "greek_forgetting": ("greek", partial(means_and_differences, key=GLYPHS)),
    "greek_rates": ("greek_rates", rates_table),
    "moments": ("moments", partial(means_and_differences, key=TASK)),
    "moments_forgetting": ("moments", partial(means_and_differences, key=GLYPHS)),
    "interpolation": ("interpolation", interpolation_table),
    "lr": ("lr", lambda runs: sweep(runs, "lr_sweep")[0]),
    "greek_lr": ("greek_lr", lambda runs: sweep(runs, "lr_sweep")[0]),
    "grid": ("grid", lambda runs: sweep(runs, "grid")[0]),
    "ablation": ("ablation", partial(means_and_differences, key=TASK)),
}
FIGURES = {  # of the page: the experiment, and what draws its runs
    "accuracy": ("compare", partial(draw_both, title="Digits")),
    "greek": ("greek", partial(draw_both, title="Greek letters")),
    "moments": (
        "moments", lambda runs: figures.draw_differences(*group_by_backbone(runs), ON_BOTH)
    ),
    "interpolation": ("interpolation", draw_interpolation),
    "lr": ("lr", lambda runs: sweep(runs, "lr_sweep")[1]()),
    "grid": ("grid", lambda runs: sweep(runs, "grid")[1]()),
    "ablation": (
        "ablation", lambda runs: figures.draw_differences(*group_by_backbone(runs), ON_TASK)
    ),
    "overfitting": (
        "overfitting", lambda runs: figures.draw_curves(*group_by_backbone(runs), "digits", 4)
    ),
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
