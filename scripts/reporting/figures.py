"""The report's figures, as functions that return matplotlib's Figure.

They are drawn for reading: axes have labels and units, legends stand beside the data, and colors
survive gray printing and color blindness.
"""

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from reporting.aggregate import (
    BackboneResults,
    common_datasets_and_seeds,
    display_name,
    mean_over_seeds,
    paired_test,
    published_figures,
    zero_shot_mean,
)
from runs.output_dir import shorten
from runs.records import Run, slugify
from utils import plural

# Okabe and Ito's. The first three differ in lightness, and all also in marker and line.
COLORS = ["#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#56B4E9", "#D55E00"]
MARKERS = "os^DvPX"
LINESTYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3))]
RC_PARAMS = {
    "savefig.dpi": 150, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}  # fmt: skip
FONT_FAMILIES = [  # those that are installed are tried in turn for each character
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "WenQuanYi Zen Hei",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "Apple SD Gothic Neo",
    "Arial Unicode MS", "Noto Emoji", "Symbola", "Segoe UI Emoji",
]  # fmt: skip
SHOTS_LABEL = "shots (training images per class)"
INTERVAL = "mean, 95 % interval\nover seeds"
MEAN_STD = "mean ± standard\ndeviation over seeds"


def plan_figures(
    results: BackboneResults,
) -> dict[str, Callable[[], Figure]]:
    """Return what to draw for a backbone: by file name, functions that return a Figure."""
    plan = {}
    common = [set(common_datasets_and_seeds(results, shots)[0]) for shots in results.shots]
    always = [name for name in results.datasets if all(name in names for names in common)]
    if len(always) > 1:
        plan["accuracy-mean"] = partial(draw_accuracy, results, always)
    for name in results.datasets:
        plan[f"accuracy-{slugify(name)}"] = partial(draw_accuracy, results, [name])
    if len(results.variants) > 1:
        panels = {f"Test accuracy, {results.name}": "final_accuracy"}
        plan["differences"] = partial(draw_differences, results, panels)
    for name, shots in sorted({key[:2] for key in results.cells}):
        plan[f"curves-{slugify(name)}-{shots}shots"] = partial(draw_curves, results, name, shots)
    return {figure_path(results.name, name): draw for name, draw in plan.items()}


def figure_path(backbone: str, name: str) -> str:
    """Return a figure's path in the report, cut where file systems do not take it."""
    return f"{shorten(slugify(backbone))}/{shorten(name)}.png"


def draw_accuracy(results: BackboneResults, datasets: Sequence[str]) -> Figure:
    """Draw accuracy against shots: means with error bars, zero-shot, published points."""
    single = len(datasets) == 1
    what = display_name(datasets[0]) if single else f"Mean over {len(datasets)} datasets"
    figure, (axes,) = make_figure(f"{what}, {results.name}")
    plot_by_shots(axes, results, datasets, "final_accuracy", "test accuracy (%)")
    ticks = sorted({1, 2, 4, 8, 16, *results.shots})
    for variant in results.default_variants():
        points: dict[str, list[tuple[int, float]]] = {}
        for shots in ticks:
            for source, y in published_figures(results, variant.method, shots, datasets):
                points.setdefault(source, []).append((shots, y))
        color, marker, _ = style(results.variants.index(variant))
        for shape, source in zip([marker, *"DX*"], points, strict=False):
            axes.plot(
                *zip(*points[source], strict=True), linestyle="", color=color, marker=shape,
                markerfacecolor="none", markersize=7, markeredgewidth=1.3,
                label=f"{variant.label}, published ({source})",
            )  # fmt: skip
    if (zero_shot := zero_shot_mean(results, datasets)) is not None:
        plot_zero_shot(axes, zero_shot)
    set_shots_axis(axes, ticks)
    return add_legend(figure, MEAN_STD)


def draw_differences(results: BackboneResults, panels: Mapping[str, str]) -> Figure:
    """Draw paired differences of the first variant to others: a panel for each field of runs."""
    first, *others = results.variants
    figure, all_axes = make_figure("", panels=len(panels))
    for axes, (title, key) in zip(all_axes, panels.items(), strict=True):
        axes.axvline(0, color="0.45")
        for number, shots in enumerate(results.shots):
            offset = 0.12 * (number - (len(results.shots) - 1) / 2)
            tests = [paired_test(results, first, other, [shots], key) for other in others]
            points = [(y + offset, t.mean, t.half_width or 0) for y, t in enumerate(tests) if t]
            if points:
                y, x, error = zip(*points, strict=True)
                color, marker, _ = style(number)
                axes.errorbar(
                    x, y, xerr=error, color=color, marker=marker, linestyle="", capsize=3,
                    markersize=5, label=plural(shots, "shot"),
                )  # fmt: skip
        labels = [textwrap.fill(other.label, 28) for other in others]
        axes.set_yticks(range(len(others)), labels=labels)
        axes.set(ylim=(len(others) - 0.4, -0.6), xlabel=f"{first.label} - other (points)")
        axes.set_title(title, loc="left")
    return add_legend(figure, INTERVAL)


def draw_curves(results: BackboneResults, dataset: str, shots: int) -> Figure:
    """Draw training loss and test accuracy by iteration: mean and range over seeds."""
    cells = {v: list(results.cell(dataset, shots, v).values()) for v in results.variants}
    cells = {variant: runs for variant, runs in cells.items() if runs}
    width = math.ceil(max(run.iterations for runs in cells.values() for run in runs) / 50)
    evaluated = [v for v, runs in cells.items() if any(len(run.eval_curve) > 2 for run in runs)]
    title = f"{display_name(dataset)}, {plural(shots, 'shot')}, {results.name}"
    figure, panels = make_figure(title, panels=2 if evaluated else 1)
    for variant, runs in cells.items():
        look = style(results.variants.index(variant))
        label = f"{variant.label} ({plural(len(runs), 'seed')})"
        plot_band(panels[0], *average_losses(runs, width), look, label)
        if variant in evaluated:
            x = sorted({i for run in runs for i in run.eval_curve[:, 0]})
            plot_band(panels[1], x, [np.interp(x, *r.eval_curve.T) for r in runs], look, label)
            panels[1].set(xlabel="iteration (0: zero-shot)", ylabel="test accuracy (%)")
    averaged = f" (mean of {width} iterations)" if width > 1 else ""
    panels[0].set(xlabel="iteration", ylabel=f"training loss{averaged}", yscale="log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_locator(NullLocator())
    return add_legend(figure, "mean and range\nover seeds")


def average_losses(runs: Sequence[Run], width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return each run's loss as means of `width` iterations, and the middles of these.

    A run's last mean is continued to the end of the longest run.
    """
    longest = max(run.iterations for run in runs)
    starts = np.arange(0, longest, width)
    lines = []
    for run in runs:
        means = [run.loss_curve[i : i + width].mean() for i in range(0, run.iterations, width)]
        lines.append(np.array(means + means[-1:] * (len(starts) - len(means))))
    return (starts + 1 + np.minimum(starts + width, longest)) / 2, lines


# Parts of figures


def style(number: int) -> tuple:
    """Return a line's color, marker and line style. After seven colors they meet other markers."""
    turn, i = divmod(number, len(COLORS))
    j = (i + turn) % len(COLORS)
    return COLORS[i], MARKERS[j], LINESTYLES[j]


def make_figure(title: str, panels: int = 1) -> tuple[Any, Any]:
    """Return an empty figure that needs no window, and its panels in a row."""
    figure = Figure(figsize=(2.4 + 4.2 * panels, 3.8))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].set_title(title, loc="left")
    return figure, axes


def plot_by_shots(
    axes: Axes, results: BackboneResults, datasets: Sequence[str], key: str, label: str
) -> None:
    """Plot a field of runs against shots: means over datasets."""
    for number, variant in enumerate(results.variants):
        points = []
        for shots in results.shots:
            seeds = common_datasets_and_seeds(results, shots)[1] if len(datasets) > 1 else None
            points.append((shots, mean_over_seeds(results, datasets, seeds, shots, variant, key)))
        plot_means(axes, points, style(number), variant.label)
    set_shots_axis(axes, results.shots)
    axes.set_ylabel(label)


def plot_zero_shot(axes: Axes, accuracy: float) -> None:
    """Plot a line at the zero-shot accuracy."""
    label = f"zero-shot ({accuracy:.1f})"
    axes.axhline(accuracy, color="0.45", linestyle=(0, (1, 1)), label=label)


def plot_means(
    axes: Axes, points: Iterable[tuple[float, tuple | None]], style: tuple, label: str
) -> None:
    """Plot means with error bars. Points are x and (mean, spread, ...), or None where it lacks."""
    points = [(x, stat[0], stat[1] or 0) for x, stat in points if stat]
    if points:
        color, marker, line = style
        axes.errorbar(
            *zip(*points, strict=True), color=color, marker=marker, linestyle=line, capsize=3,
            markersize=5, label=label,
        )  # fmt: skip


def plot_band(
    axes: Axes, x: Sequence[float], lines: Sequence[np.ndarray], style: tuple, label: str
) -> None:
    """Plot the mean of lines over the range from the lowest to the highest."""
    color, marker, line = style
    every = max(1, len(x) // 7)
    first = MARKERS.index(marker) * every // 4 % every  # markers of several lines do not coincide
    axes.fill_between(x, np.min(lines, 0), np.max(lines, 0), color=color, alpha=0.15, linewidth=0)
    axes.plot(
        x, np.mean(lines, 0), color=color, linestyle=line, marker=marker, markersize=5,
        markevery=(first, every), label=label,
    )  # fmt: skip


def set_shots_axis(axes: Axes, shots: Iterable[int]) -> None:
    """Make x the axis of shots: logarithmic, with a tick for each number."""
    shots = sorted(shots)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, labels=map(str, shots))
    axes.set_xticks([], minor=True)
    axes.set_xlim(shots[0] / 1.3, shots[-1] * 1.3)
    axes.set_xlabel(SHOTS_LABEL)


def add_legend(figure: Figure, title: str) -> Figure:
    """Put the first panel's legend to the right of all panels; return the figure."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    order = sorted(
        range(len(labels)), key=lambda i: ("published" in labels[i], "zero" in labels[i])
    )
    wrapped = [textwrap.fill(labels[i], 28, break_on_hyphens=False) for i in order]
    lines = sum(label.count("\n") + 1.8 for label in wrapped) + title.count("\n") + 2
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, max(height, 0.17 * lines))  # a line of 10 points, in inches
    figure.legend(
        [handles[i] for i in order], wrapped, title=title, frameon=False,
        loc="outside right upper", alignment="left", labelspacing=0.8, handlelength=3,
    )  # fmt: skip
    return figure


def render_png(draw: Callable[[], Figure]) -> bytes:
    """Draw a figure whatever the user's settings of matplotlib; the same bytes each time."""
    data = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of names in other scripts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC_PARAMS | {"font.family": installed_families()})
        draw().savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


@cache
def installed_families() -> list[str]:
    """Return the font families of FONT_FAMILIES that this machine has."""
    installed = set(font_manager.get_font_names())
    return [family for family in FONT_FAMILIES if family in installed]


@cache
def drawable_characters() -> frozenset[str]:
    """Return all characters that these families have."""
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in installed_families()]
    return frozenset(chr(code) for font in fonts for code in font.get_charmap())
