"""Write the tables and figures of docs/digits/README.md from runs.csv and curves.csv.gz beside it.

    python scripts/digits/study.py        # trains nothing; collect.py makes the two files

The page's prose is kept. Tables stand between <!-- NAME --> and <!-- /NAME -->.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from digits.study_runs import StudyRun, read_runs
from reporting import ROOT, figures, tables
from reporting.aggregate import LABELS, confidence_interval, group_by_backbone
from reporting.experiments import sweep
from reporting.markdown import markdown

from run_utils import OneLineErrorParser
from runs.cli import run_cli
from utils import atomic_write, plural

PAGE = ROOT / "docs/digits/README.md"
TASK, GLYPHS = "final_accuracy", "glyphs_accuracy"
ON_BOTH = {"On the task": TASK, "On the glyphs": GLYPHS}
COMPARED_ALPHA = 0.7


def main() -> int:
    """Run the command and return its exit status."""
    parser = OneLineErrorParser(prog="study.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=PAGE.parent, help="folder to write")
    return run_cli(lambda: write_page(parser.parse_args().out), parser.prog)


def write_page(out: Path) -> None:
    """Write the page with its tables, and its figures beside it."""
    study = read_runs(PAGE.parent)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "README.md", fill_page(PAGE.read_text(encoding="utf-8"), study))
    for name, draw in plan_figures(study).items():
        atomic_write(out / f"{name}.png", figures.render_png(draw))


def fill_page(text: str, study: Sequence[StudyRun]) -> str:
    """Return the page with its tables made again.

    Raises:
        ValueError: It has no place for a table.
    """
    for name, table in make_tables(study).items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"{PAGE} has no place for {name}: {begin.strip()} and {end}")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}{table}\n{end}{after}"
    return text


def make_tables(study: Sequence[StudyRun]) -> dict[str, str]:
    """Return the tables of the page by name, of the experiments that have runs."""
    makers = {  # the experiment, and what makes the table of its runs
        "about": ("compare", lambda _: about(study)),
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
    runs = {name: runs_of(study, experiment) for name, (experiment, _) in makers.items()}
    return {name: make(runs[name]) for name, (_, make) in makers.items() if runs[name]}


def plan_figures(study: Sequence[StudyRun]) -> dict[str, Callable[[], Figure]]:
    """Return functions that draw the figures of the page, of the experiments that have runs."""
    makers = {
        "accuracy": ("compare", partial(draw_both, title="Digits")),
        "greek": ("greek", partial(draw_both, title="Greek letters")),
        "moments": ("moments", partial(draw_differences, panels=ON_BOTH)),
        "interpolation": ("interpolation", draw_interpolation),
        "lr": ("lr", lambda runs: sweep(runs, "lr_sweep")[1]()),
        "grid": ("grid", lambda runs: sweep(runs, "grid")[1]()),
        "ablation": ("ablation", partial(draw_differences, panels={"On the task": TASK})),
        "overfitting": ("overfitting", draw_curves),
    }
    runs = {name: runs_of(study, experiment) for name, (experiment, _) in makers.items()}
    return {name: partial(draw, runs[name]) for name, (_, draw) in makers.items() if runs[name]}


def runs_of(study: Sequence[StudyRun], experiment: str) -> list[StudyRun]:
    """Return the runs of an experiment, with those that it shares with others."""
    runs = [run for run in study if run.experiment == experiment]
    if experiment == "moments" and runs:
        runs = [r for r in study if r.experiment == "compare" and r.method == "so"] + runs
    if experiment == "greek_rates":
        seeds = {run.seed for run in runs}
        runs += [r for r in runs_of(study, "greek") if r.shots == 16 and r.seed in seeds]
    if experiment == "interpolation":
        runs = [run for run in study if len(run.interpolation) > 1]
    return runs


# Tables


def about(study: Sequence[StudyRun]) -> str:
    """Return how many runs there are, how they were made, and which cells have fewer seeds."""
    texts = [
        ", ".join(sorted({getattr(run, key) for run in study}))
        for key in ("git_commit", "torch", "processor")
    ]
    line = "{}. Commit: {}. PyTorch: {}. Processor: {}, one core for a run.".format(
        plural(len(study), "run"), *texts
    )
    fewer: dict[str, set[int]] = {}
    for runs in (runs_of(study, experiment) for experiment in ("compare", "greek", "moments")):
        for results in group_by_backbone(runs):
            most = max(map(len, results.cells.values()))
            for (_, shots, variant), cell in results.cells.items():
                if len(cell) < most:
                    fewer.setdefault(f"{variant.label}: {len(cell)}", set()).add(shots)
    notes = [
        f"{note} at {', '.join(map(str, sorted(shots)))} shots" for note, shots in fewer.items()
    ]
    return line + (f" Seeds, where there are fewer than ten: {'; '.join(notes)}." if notes else "")


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


def group_paths(runs: Sequence[StudyRun]) -> dict[tuple[str, int, str], list[Mapping]]:
    """Return the accuracies by alpha of each seed, by dataset, shots and method."""
    paths: dict[tuple[str, int, str], list[Mapping]] = {}
    for run in runs:
        name = LABELS[run.method] + ", entry" * (run.config["bias_correction"] == "entry")
        paths.setdefault((run.dataset, run.shots, name), []).append(run.interpolation)
    order = ["SO", "SO, entry", "LoRA", "Adam"]
    return dict(sorted(paths.items(), key=lambda item: (*item[0][:2], order.index(item[0][2]))))


def mean_path(path: Sequence[Mapping]) -> dict[float, list[float]]:
    """Return the mean accuracies on task and glyphs by alpha."""
    return {
        alpha: [fmean(points[alpha][i] for points in path) for i in (0, 1)] for alpha in path[0]
    }


def interpolation_table(runs: Sequence[StudyRun]) -> str:
    """Return both accuracies by alpha, and the difference of one alpha to 1, paired by seed."""
    lines = []
    for (dataset, shots, name), path in group_paths(runs).items():
        means = mean_path(path)
        texts = ["{:.1f} / {:.1f}".format(*pair) for pair in means.values()]
        changes = [[points[COMPARED_ALPHA][i] - points[1.0][i] for points in path] for i in (0, 1)]
        spreads = [tables.format_spread(*confidence_interval(v), "+.1f") for v in changes]
        label = f"{dataset}, {plural(shots, 'shot')}: {name} ({len(path)})"
        lines.append([label, *texts, " / ".join(spreads)])
    return markdown(["alpha", *map("{:g}".format, means), f"{COMPARED_ALPHA} minus 1"], lines)


# Figures


def draw_both(runs: Sequence[StudyRun], title: str) -> Figure:
    """Draw the accuracy on the task and on the glyphs against shots."""
    (results,) = group_by_backbone(runs)
    figure, panels = figures.make_figure(title, panels=2)
    labels = {TASK: "accuracy on the task (%)", GLYPHS: "accuracy on 70 classes of glyphs (%)"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        figures.plot_by_shots(axes, results, results.datasets, key, label)
    before = next(run.interpolation[0.0] for run in runs if 0.0 in run.interpolation)
    for axes, accuracy in zip(panels, before, strict=True):
        axes.axhline(accuracy, color="0.45", linestyle=(0, (1, 1)), label="before adaptation")
    return figures.add_legend(figure, figures.MEAN_STD)


def draw_differences(runs: Sequence[StudyRun], panels: Mapping[str, str]) -> Figure:
    """Draw paired differences of SO to its variants: a panel for each field of runs."""
    return figures.draw_differences(*group_by_backbone(runs), panels)


def draw_curves(runs: Sequence[StudyRun]) -> Figure:
    """Draw loss and accuracy of the runs of one number of shots by iteration."""
    (results,) = group_by_backbone(runs)
    return figures.draw_curves(results, results.datasets[0], results.shots[0])


def draw_interpolation(runs: Sequence[StudyRun]) -> Figure:
    """Draw the task against the glyphs at most shots: a line for a method, a marker for alpha."""
    most = max(run.shots for run in runs)
    paths = group_paths([run for run in runs if run.shots == most])
    datasets, names = (list(dict.fromkeys(key[i] for key in paths)) for i in (0, 2))
    figure, panels = figures.make_figure("", panels=len(datasets))
    for (dataset, _, name), path in paths.items():
        axes = panels[datasets.index(dataset)]
        color, marker, line = figures.style(names.index(name))
        y, x = zip(*mean_path(path).values(), strict=True)
        axes.plot(x, y, label=name, color=color, marker=marker, linestyle=line, markersize=4)
        axes.plot(x[-1], y[-1], "o", markersize=12, color=color, markerfacecolor="none")
        axes.set_title(f"{dataset}, {plural(most, 'shot')}", loc="left")
        axes.set(xlabel="accuracy on 70 classes of glyphs (%)", ylabel="accuracy on the task (%)")
    return figures.add_legend(figure, "markers: alpha from 0\n(where lines meet)\nto 1 (ringed)")


if __name__ == "__main__":
    sys.exit(main())
