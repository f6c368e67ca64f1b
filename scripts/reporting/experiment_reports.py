"""What is made of an experiment's runs: a report, or a table over two settings and its figure."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from optimizers.build import ABLATION_DEFAULTS
from reporting.aggregate import METHODS, MeanStd, format_setting, hparams, summarize
from reporting.experiments import Experiment, load_finished
from reporting.figures import add_legend, make_figure, plot_means, render_png, style
from reporting.markdown import markdown
from reporting.report import write_report
from reporting.tables import format_spread
from runs.records import Run
from utils import atomic_write, plural


class Sweep(NamedTuple):
    """A table over two settings: the row and the column of a run, and what the columns are."""

    row: Callable[[Run], str]
    column: Callable[[Run], str]  # a number
    title: str
    over_shots: bool  # whether means are over several numbers of shots; then they have no spread


def write_experiment(experiment: Experiment) -> None:
    """Write and print what the finished runs of an experiment show.

    Raises:
        ValueError: No run is finished, a result is damaged, or a mean would be over runs of
            different settings.
        OSError: The files cannot be written.
    """
    runs, out = load_finished(experiment.runs), experiment.out
    if experiment.report == "comparison":
        write_report(runs, out, lambda sentence: print(f"experiment.py: {sentence}", flush=True))
        return
    text, draw = sweep(runs, experiment.report)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "figure.png", render_png(draw))
    atomic_write(out / "table.md", f"{text}\n\n![figure](figure.png)\n")
    print(f"\n{text}\n\nTable and figure: {out}", flush=True)


def sweep(runs: Sequence[Run], report: str) -> tuple[str, Callable[[], Figure]]:
    """Return the table of accuracies over two settings, and a function that draws it.

    Raises:
        ValueError: Runs of one cell differ in other settings.
    """
    kind = SWEEPS[report]
    lines = group_by_two(runs, kind)
    columns = sorted({column for line in lines.values() for column in line}, key=float)
    table = markdown(
        ["", *columns],
        [
            [row, *(format_spread(*line[c][:2], ".1f") if c in line else "-" for c in columns)]
            for row, line in lines.items()
        ],
    )
    split = "validation" if runs[0].config.get("eval_split") == "val" else "test"
    shots = " and ".join(map(str, sorted({run.shots for run in runs})))
    seeds = plural(len({run.seed for run in runs}), "seed")
    text = (
        f"Mean {split} accuracy in percent (± its standard deviation), {shots} shots, {seeds}, by "
        f"{kind.title}:\n\n{table}"
    )
    if split == "validation":  # nothing is chosen on test images
        # Rounded, since sums in another order differ in their last digits: the lowest of equals.
        best = (
            f"{row} {max(sorted(line, key=float), key=lambda c: round(line[c].mean, 9))}"
            for row, line in lines.items()
        )
        text += f"\n\nBest: {'; '.join(best)}."
    return text, partial(draw_sweep, lines, f"{split} accuracy (%)", kind.title)


def group_by_two(runs: Sequence[Run], kind: Sweep) -> dict[str, dict[str, MeanStd]]:
    """Return mean accuracies by row and column."""
    lines: dict[str, dict[str, list[float]]] = {}
    identities: dict[tuple[str, str], list] = {}
    for run in runs:
        key = kind.row(run), kind.column(run)
        identity = [run.method, run.backbone, run.dataset, run.data["digest"], hparams(run)]
        identity.append(None if kind.over_shots else run.shots)
        if identities.setdefault(key, identity) != identity:
            raise ValueError(
                f"{run.folder} differs in its settings from others of {' and '.join(key)}: this "
                "report has no place for them"
            )
        lines.setdefault(key[0], {}).setdefault(key[1], []).append(run.final_accuracy)
    means = {
        row: {c: summarize(values) for c, values in line.items()} for row, line in lines.items()
    }
    if kind.over_shots:
        return {
            row: {c: m._replace(std=None) for c, m in line.items()} for row, line in means.items()
        }
    return means


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


SWEEPS = {
    "lr_sweep": Sweep(
        lambda run: method_and_ablation(run.method, run.config),
        lambda run: f"{run.config['lr']:g}",
        "initial learning rate",
        over_shots=True,
    ),
    "grid": Sweep(
        refresh_interval,
        lambda run: f"{1 - run.config['s']:.6g}",  # without the noise of the last digits
        "density (share of entries)",
        over_shots=False,
    ),
}
REPORTS = ("comparison", *SWEEPS)
