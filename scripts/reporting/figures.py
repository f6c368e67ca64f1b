"""The report's figures, as functions that return matplotlib's Figure.

Drawn for reading: labelled axes with units, legends beside the data, colours that survive grey
printing and colour blindness. matplotlib is imported where it is used.
"""

import io
import math
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from reporting.numbers import (
    LABELS,
    METHODS,
    Published,
    Study,
    Variant,
    complete,
    mean_over,
    published_for,
    title_of,
    zero_shot,
)
from runs.records import Run, slugify
from utils import plural

# Colours of Okabe and Ito; the first three differ in lightness, all in mark, line and hatch, too.
COLOURS = ["#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#56B4E9", "#D55E00"]
MARKS, HATCHES = "os^DvPX", ["", "///", "...", "xxx", "\\\\\\", "ooo", "+++"]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3))]
LOOK = {
    "savefig.dpi": 150, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "figure.constrained_layout.use": True, "hatch.linewidth": 0.6,
}  # fmt: skip


def figures(study: Study, published: Sequence[Published]) -> dict[str, Callable[[], Any]]:
    """What to draw for a backbone: by file name, functions that return matplotlib's Figure."""
    plan = {}
    whole = [complete(study, shots)[0] for shots in study.shots]
    common = [name for name in study.datasets if all(name in names for names in whole)]
    if len(common) > 1:
        plan["accuracy-mean"] = partial(draw_accuracy, study, published, common)
    for name in study.datasets:
        plan[f"accuracy-{slugify(name)}"] = partial(draw_accuracy, study, published, [name])
    if any(whole):
        plan["cost"] = partial(draw_cost, study)
    for name, shots in sorted({key[:2] for key in study.cells}):
        plan[f"curves-{slugify(name)}-{shots}shots"] = partial(draw_curves, study, name, shots)
    return {f"{slugify(study.backbone)}/{name}.png": draw for name, draw in plan.items()}


def draw_accuracy(study: Study, published: Sequence[Published], datasets: Sequence[str]) -> Any:
    """Accuracy against shots: means with error bars, zero-shot, published points."""
    one = len(datasets) == 1
    what = title_of(datasets[0]) if one else f"Mean over {len(datasets)} datasets"
    figure, (axes,) = canvas(f"{what}, {study.backbone}", panels=1)
    theirs = defaultdict(list)
    for variant in study.firsts():
        for row, value in published_for(published, study, variant.method, datasets):
            theirs[variant, row.source].append((row.shots, value))
    slots = [*study.variants, *theirs]  # side by side, so that none hides another
    dodge = {slot: 2 ** (0.045 * (i - (len(slots) - 1) / 2)) for i, slot in enumerate(slots)}

    for variant in study.variants:
        seeds = {shots: None if one else complete(study, shots)[1] for shots in study.shots}
        stats = {n: mean_over(study, datasets, seeds[n], n, variant) for n in study.shots}
        points = [(n * dodge[variant], s.mean, s.std or 0) for n, s in stats.items() if s]
        if points:
            colour, mark, line, _ = style(study, variant)
            axes.errorbar(
                *zip(*points, strict=True), color=colour, marker=mark, linestyle=line, capsize=3,
                markersize=5, label=broken(variant.label),
            )  # fmt: skip
    for (variant, source), points in theirs.items():
        colour, mark, _, _ = style(study, variant)
        place = [other for v, other in theirs if v == variant].index(source)
        axes.plot(
            [shots * dodge[variant, source] for shots, _ in points], [y for _, y in points],
            linestyle="", color=colour, markerfacecolor="none", markersize=7, markeredgewidth=1.3,
            marker=[mark, "D", "X", "*"][min(place, 3)],
            label=f"{LABELS[variant.method]}, published\n({source})",
        )  # fmt: skip
    if (base := zero_shot(study, datasets)) is not None:
        axes.axhline(base, color="0.45", linestyle=(0, (1, 1)), label=f"zero-shot ({base:.1f})")

    ticks = sorted({1, 2, 4, 8, 16, *study.shots})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.set_xticks([], minor=True)
    axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
    axes.set(xlabel="shots (training images per class)", ylabel="test accuracy (%)")
    return with_legend(figure, "mean ± standard\ndeviation over seeds")


def draw_curves(study: Study, dataset: str, shots: int) -> Any:
    """Training loss and test accuracy by iteration: mean and range over seeds."""
    cells = {v: list(study.cell(dataset, shots, v).values()) for v in study.variants}
    cells = {variant: runs for variant, runs in cells.items() if runs}
    width = math.ceil(max(len(run.loss) for runs in cells.values() for run in runs) / 50)
    followed = [v for v, runs in cells.items() if any(len(run.evaluated) > 2 for run in runs)]
    title = f"{title_of(dataset)}, {plural(shots, 'shot')}, {study.backbone}"
    figure, panels = canvas(title, panels=2 if followed else 1)
    for variant, runs in cells.items():
        label = broken(f"{variant.label} ({plural(len(runs), 'seed')})")
        draw_band(panels[0], *loss_lines(runs, width), style(study, variant), label)
        if variant in followed:
            x = sorted({i for run in runs for i in run.evaluated[:, 0]})
            lines = [np.interp(x, *run.evaluated.T) for run in runs]
            draw_band(panels[1], x, lines, style(study, variant), label)
            panels[1].set(xlabel="iteration (0: zero-shot)", ylabel="test accuracy (%)")
    averaged = f" (mean of {width} iterations)" if width > 1 else ""
    panels[0].set(xlabel="iteration", ylabel=f"training loss{averaged}", yscale="log")
    plain_numbers(panels[0].yaxis)
    return with_legend(figure, "mean and range\nover seeds")


def loss_lines(runs: Sequence[Run], width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Each run's loss as means of `width` iterations, and the iterations where these stand.

    A run's last mean is carried on to the end of the longest.
    """
    longest = max(len(run.loss) for run in runs)
    starts = np.arange(0, longest, width)
    lines = []
    for run in runs:
        means = [run.loss[i : i + width].mean() for i in range(0, len(run.loss), width)]
        lines.append(np.array(means + means[-1:] * (len(starts) - len(means))))
    return (starts + 1 + np.minimum(starts + width, longest)) / 2, lines


def draw_band(
    axes: Any, x: Sequence[float], lines: Sequence[np.ndarray], look: tuple, label: str
) -> None:
    """Draw the mean of lines over the range from the lowest to the highest."""
    colour, mark, line, _ = look
    every = max(1, len(x) // 7)
    first = MARKS.index(mark) * every // 4 % every  # marks of several lines do not coincide
    axes.fill_between(x, np.min(lines, 0), np.max(lines, 0), color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        x, np.mean(lines, 0), color=colour, linestyle=line, marker=mark, markersize=5,
        markevery=(first, every), label=label,
    )  # fmt: skip


def draw_cost(study: Study) -> Any:
    """Bars of peak memory and time by shots and variant, over complete datasets."""
    figure, panels = canvas(f"Memory and time of a run, {study.backbone}", panels=2)
    whole = {shots: complete(study, shots) for shots in study.shots}
    costs = {
        (variant, shots): [
            mean_over(study, *whole[shots], shots, variant, what) for what in ("memory", "seconds")
        ]
        for variant in study.variants
        for shots in study.shots
    }
    variants = [v for v in study.variants if any(all(costs[v, n]) for n in study.shots)]
    width = 0.8 / len(variants)
    for panel, axes in enumerate(panels):
        for number, variant in enumerate(variants):
            colour, _, _, hatch = style(study, variant)
            stats = {i: costs[variant, n][panel] for i, n in enumerate(study.shots)}
            bars = [(i, s.mean, s.std or 0) for i, s in stats.items() if s]
            x, y, error = zip(*bars, strict=True)
            axes.bar(
                np.array(x) + width * (number - (len(variants) - 1) / 2), y, width, yerr=error,
                capsize=2, ecolor="0.45", color=colour, hatch=hatch, edgecolor="white",
                label=broken(variant.label),
            )  # fmt: skip
        axes.set_xticks(range(len(study.shots)), labels=map(str, study.shots))
        middle, half = (len(study.shots) - 1) / 2, max(len(study.shots), 3) / 2
        axes.set_xlim(middle - half, middle + half)
        axes.grid(False, axis="x")
        axes.set_xlabel("shots (training images per class)")
        axes.set_ylabel(["peak memory (MB)", "time (s)"][panel])
    return with_legend(figure, "mean ± standard\ndeviation over seeds")


def style(study: Study, variant: Variant) -> tuple:
    """A variant's colour, mark, line and hatch, the same in all figures of a backbone."""
    known = {v: list(METHODS).index(v.method) for v in study.firsts() if v.method in METHODS}
    others = [v for v in study.variants if v not in known]
    i = known[variant] if variant in known else len(METHODS) + others.index(variant)
    turn, i = divmod(i, len(COLOURS))  # past the last colour, colours meet other marks and lines
    j = (i + turn) % len(COLOURS)
    return COLOURS[i], MARKS[j], LINES[j], HATCHES[j]


def broken(label: str) -> str:
    """A label of a legend, on lines that leave the axes their room."""
    return textwrap.fill(label, 24, break_long_words=False, break_on_hyphens=False)


def canvas(title: str, panels: int) -> tuple[Any, Any]:
    """An empty figure, of those that need no pyplot and no window, and its panels in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 + 4.2 * panels, 3.8))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].set_title(title, loc="left")
    return figure, axes


def with_legend(figure: Any, title: str) -> Any:
    """Put the first panel's legend to the right of all of them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    order = sorted(
        range(len(labels)), key=lambda i: ("published" in labels[i], "zero" in labels[i])
    )
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], title=title, frameon=False,
        loc="outside right upper", alignment="left", labelspacing=0.8, handlelength=3,
    )  # fmt: skip
    return figure


def plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis as 0.05 and 0.1 in place of powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def png(draw: Callable[[], Any]) -> bytes:
    """Draw a figure, whatever the user's own settings of matplotlib; the same bytes each time."""
    import matplotlib

    data = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of names in other scripts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        draw().savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def can_draw() -> bool:
    """Whether matplotlib is there; if so, it is told to draw into files."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    return True
