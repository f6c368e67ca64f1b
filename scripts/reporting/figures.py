"""The report's figures, as functions that return matplotlib's Figure.

They are drawn for reading: axes have labels and units, legends stand beside the data, and colors
survive gray printing and color blindness.
"""

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reporting.aggregate import ZERO_SHOT, BackboneResults, confidence_interval, display_name
from runs.output_dir import shorten
from runs.records import slugify
from utils import plural

# Okabe and Ito's. The first three differ in lightness, and all also in marker and line.
COLORS = ["#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#56B4E9", "#D55E00"]
MARKERS = "os^DvPX"
LINESTYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))]
FONT_FAMILIES = [  # those that are installed are tried in turn for each character
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "Arial Unicode MS", "Noto Emoji", "Symbola", "Segoe UI Emoji",
]  # fmt: skip
FONTS = [family for family in FONT_FAMILIES if family in font_manager.get_font_names()]
RC_PARAMS = {
    "font.family": FONTS, "font.size": 10, "savefig.dpi": 150, "savefig.bbox": "tight",
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True,
}  # fmt: skip
MEAN_STD = "mean ± standard\ndeviation over seeds"


def plan_figures(results: BackboneResults) -> dict[str, Callable[[], Figure]]:
    """Return what to draw for a backbone: by file name, functions that return a Figure."""
    plan = {}
    common = set.intersection(*(set(results.common_datasets(n)) for n in results.shots))
    if len(common) > 1:
        plan["accuracy-mean"] = partial(draw_accuracy, results, sorted(common))
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
    """Draw accuracy against shots, and the zero-shot accuracy."""
    what = f"Mean over {len(datasets)} datasets" if datasets[1:] else display_name(datasets[0])
    figure, (axes,) = make_figure(f"{what}, {results.name}")
    plot_by_shots(axes, results, datasets, "final_accuracy", "test accuracy (%)")
    if zero_shot := results.mean(datasets, results.shots[0], ZERO_SHOT):
        label = f"zero-shot ({zero_shot.mean:.1f})"
        axes.axhline(zero_shot.mean, color="0.45", linestyle=(0, (1, 1)), label=label)
    return add_legend(figure, MEAN_STD)


def draw_differences(results: BackboneResults, panels: Mapping[str, str]) -> Figure:
    """Draw paired differences of the first variant to others: a panel for each field of runs."""
    first, *others = results.variants
    figure, all_axes = make_figure("", panels=len(panels))
    figure.set_figheight(max(figure.get_figheight(), 0.35 * len(others)))
    for axes, (title, key) in zip(all_axes, panels.items(), strict=True):
        axes.axvline(0, color="0.45")
        for number, shots in enumerate(results.shots):
            offset = 0.12 * (number - (len(results.shots) - 1) / 2)
            points = []
            for y, other in enumerate(others):
                if by_seed := results.paired_differences(first, other, [shots], key):
                    mean, half_width = confidence_interval([fmean(row) for row in by_seed])
                    points.append((mean, y + offset, half_width or 0))
            if points:
                x, y, error = zip(*points, strict=True)
                color, marker, _ = style(number)
                axes.errorbar(
                    x, y, xerr=error, color=color, marker=marker, linestyle="", capsize=3,
                    markersize=5, label=plural(shots, "shot"),
                )  # fmt: skip
        axes.set_yticks(range(len(others)), [escape(textwrap.fill(v.label, 28)) for v in others])
        axes.set(ylim=(len(others) - 0.4, -0.6), xlabel=f"{escape(first.label)} - other (points)")
        axes.set_title(title, loc="left")
    return add_legend(figure, "mean, 95 % interval\nover seeds")


def draw_curves(results: BackboneResults, dataset: str, shots: int) -> Figure:
    """Draw training loss and test accuracy by iteration: a line for each run."""
    cells = [list(results.cell(dataset, shots, v).values()) for v in results.variants]
    width = math.ceil(max(run.iterations for cell in cells for run in cell) / 50)
    title = f"{display_name(dataset)}, {plural(shots, 'shot')}, {results.name}"
    figure, (left, right) = make_figure(title, panels=2)
    for number, cell in enumerate(cells):
        color, _, line = style(number)
        label = f"{results.variants[number].label} ({plural(len(cell), 'seed')})"
        look = {"color": color, "linestyle": line, "alpha": 0.7, "label": label}
        for run in cell:
            whole = len(run.loss_curve) // width * width
            losses = run.loss_curve[:whole].reshape(-1, width).mean(axis=1)
            left.plot(range(width, whole + 1, width), losses, **look)
            right.plot(*run.eval_curve.T, **look)
    left.set(xlabel="iteration", ylabel=f"training loss (mean of {width} iterations)", yscale="log")
    right.set(xlabel="iteration (0: zero-shot)", ylabel="test accuracy (%)")
    return add_legend(figure, "a line for each seed")


# Parts of figures


def style(number: int) -> tuple:
    """Return a line's color, marker and line style."""
    return tuple(looks[number % len(looks)] for looks in (COLORS, MARKERS, LINESTYLES))


def make_figure(title: str, panels: int = 1, size: tuple | None = None) -> tuple[Figure, Any]:
    """Return an empty figure that needs no window, and its panels in a row; sizes are in inches."""
    layout = None if size else "constrained"  # for the legend beside the panels
    figure = Figure(figsize=size or (2.4 + 4.2 * panels, 3.8), layout=layout)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].set_title(escape(textwrap.fill(title, 60)), loc="left")
    return figure, axes


def escape(text: str) -> str:
    """Return a text that matplotlib draws as it is: a $ would begin mathematics."""
    return text.replace("$", r"\$")


def plot_by_shots(
    axes: Axes, results: BackboneResults, datasets: Sequence[str], key: str, label: str
) -> None:
    """Plot a field of runs against shots: means over datasets."""
    for number, variant in enumerate(results.variants):
        means = [(n, results.mean(datasets, n, variant, key)) for n in results.shots]
        plot_means(axes, [(n, mean) for n, mean in means if mean], style(number), variant.label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(results.shots, labels=map(str, results.shots))
    axes.set_xticks([], minor=True)
    axes.set_xlim(results.shots[0] / 1.3, results.shots[-1] * 1.3)
    axes.set(xlabel="shots (training images per class)", ylabel=label)


def plot_means(axes: Axes, points: Sequence[tuple], style: tuple, label: str) -> None:
    """Plot means with error bars, if there are any: x and (mean, spread or None, ...)."""
    if points:
        color, marker, line = style
        x, means = zip(*points, strict=True)
        axes.errorbar(
            x, [mean[0] for mean in means], [mean[1] or 0 for mean in means], color=color,
            marker=marker, linestyle=line, capsize=3, markersize=5, label=label,
        )  # fmt: skip


def add_legend(figure: Figure, title: str) -> Figure:
    """Put the first panel's legend to the right of all panels; return the figure."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    wrapped = [escape(textwrap.fill(label, 28, break_on_hyphens=False)) for label in labels]
    by_label = dict(zip(wrapped, handles, strict=True))
    figure.legend(
        by_label.values(), by_label, title=title, frameon=False, loc="outside right upper",
        alignment="left", labelspacing=0.8, handlelength=3,
    )  # fmt: skip
    return figure


def render_png(draw: Callable[[], Figure]) -> bytes:
    """Draw a figure whatever the user's settings of matplotlib; the same bytes each time."""
    data = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of names in other scripts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC_PARAMS)
        draw().savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


@cache
def drawable_characters() -> frozenset[str]:
    """Return all characters that the fonts of the figures have."""
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in FONTS]
    return frozenset(chr(code) for font in fonts for code in font.get_charmap())
