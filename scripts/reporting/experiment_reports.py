"""What is made of an experiment's runs: a report, or a table of two settings and its figure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from optimizers.build import ABLATION_DEFAULTS
from reporting.aggregate import METHODS, format_setting, hparams, summarize
from reporting.experiments import Experiment, load_finished
from reporting.figures import add_legend, make_figure, plot_means, render_png, style
from reporting.markdown import markdown
from reporting.report import write_report
from reporting.tables import format_spread
from runs.records import Run
from utils import atomic_write, plural

NEVER = "never refreshed"


class Section(NamedTuple):
    """What a sweep over two settings shows."""

    text: str  # Markdown
    draw: Callable[[], Figure]


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
    section = SECTIONS[experiment.report](runs)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "figure.png", render_png(section.draw))
    atomic_write(out / "table.md", f"{section.text}\n\n![figure](figure.png)\n")
    print(f"\n{section.text}\n\nTable and figure: {out}", flush=True)


def lr_sweep(runs: Sequence[Run]) -> Section:
    """Show mean validation accuracy by learning rate. The best is chosen, the lowest of equals."""
    cells = group_by_two(
        runs,
        lambda run: method_and_ablation(run.method, run.config),
        lambda run: f"{run.config['lr']:g}",
    )
    rows, columns = rows_and_columns(cells)
    # Rounded, since sums in another order differ in their last digits.
    means = {key: round(fmean(values), 9) for key, values in cells.items()}
    best = {row: max(columns, key=lambda lr: means.get((row, lr), -1)) for row in rows}
    shots = " and ".join(map(str, sorted({run.shots for run in runs})))
    text = (
        f"Mean accuracy in percent on the few validation images, with {shots} shots, by learning "
        f"rate:\n\n{cells_table(cells, mean_only)}\n\nBest: "
        f"{'; '.join(f'{name} {lr}' for name, lr in best.items())}."
    )

    def draw() -> Figure:
        figure = draw_cells(cells, "initial learning rate", "validation accuracy (%)", mean_only)
        return add_legend(figure, "mean over seeds\nand shots")

    return Section(text, draw)


def grid(runs: Sequence[Run]) -> Section:
    """Show test accuracy by density and refresh interval T."""
    shots = sorted({run.shots for run in runs})
    if len(shots) > 1:
        raise ValueError(f"a grid has one number of shots, not {', '.join(map(str, shots))}")
    # The density is rounded to leave out the noise of its last digits.
    cells = group_by_two(runs, refresh_interval, lambda run: f"{1 - run.config['s']:.6g}")
    seeds = plural(len({run.seed for run in runs}), "seed")
    text = (
        f"Test accuracy in percent (zero-shot {runs[0].zero_shot_accuracy:.1f}), mean ± standard "
        f"deviation over {seeds}, {plural(shots[0], 'shot')}, learning rate "
        f"{runs[0].config['lr']:g}. T down, density across:\n\n{cells_table(cells, summarize)}"
    )

    def draw() -> Figure:
        figure = draw_cells(cells, "density (share of entries)", "test accuracy (%)", summarize)
        return add_legend(figure, "T; mean ± standard\ndeviation over seeds")

    return Section(text, draw)


SECTIONS = {"lr_sweep": lr_sweep, "grid": grid}
REPORTS = ("comparison", *SECTIONS)
Cells = dict[tuple[str, str], list[float]]  # accuracies by two settings


def group_by_two(
    runs: Iterable[Run], row: Callable[[Run], str], column: Callable[[Run], str]
) -> Cells:
    """Group accuracies by two settings; a ValueError where runs of a cell differ in others."""
    cells: Cells = {}
    settings: dict[tuple[str, str], list] = {}
    for run in runs:
        key = row(run), column(run)
        own = [run.method, run.backbone, run.dataset, run.data.get("digest"), hparams(run)]
        if settings.setdefault(key, own) != own:
            raise ValueError(
                f"{run.folder} differs in its settings from others of {' and '.join(key)}: this "
                "report has no place for them"
            )
        cells.setdefault(key, []).append(run.final_accuracy)
    return cells


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
    return str(run.config["t"]) if is_refreshed else NEVER


def rows_and_columns(cells: Cells) -> tuple[list[str], list[str]]:
    """Return the labels of both settings: rows as they come, columns by size."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    return rows, sorted(columns, key=float)


def mean_only(values: Sequence[float]) -> tuple[float, None]:
    """Return a mean without a spread."""
    return fmean(values), None


def cells_table(cells: Cells, spread: Callable) -> str:
    """Return the table of means, with a spread where there is one."""
    rows, columns = rows_and_columns(cells)
    texts = {key: format_spread(*spread(values)[:2], ".1f") for key, values in cells.items()}
    lines = ([row, *(texts.get((row, column), "-") for column in columns)] for row in rows)
    return markdown(["", *columns], lines)


def draw_cells(cells: Cells, xlabel: str, ylabel: str, spread: Callable) -> Figure:
    """Draw a line for each row against the numbers of the columns."""
    figure, (axes,) = make_figure("")
    rows, columns = rows_and_columns(cells)
    for number, row in enumerate(rows):
        points = [(float(x), spread(cells[row, x])) for x in columns if (row, x) in cells]
        plot_means(axes, points, style(number), row)
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_formatter("{x:g}")
    return figure
