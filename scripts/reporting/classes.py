"""The classes of a report's runs: which are hard, and which are taken for which others.

Everything is about one cell, as in the tables: runs on the same data with the same settings, all
seeds together.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from reporting.aggregate import BackboneResults, Variant, display_name, summarize
from reporting.figures import drawable_characters, escape, figure_path, make_figure
from reporting.markdown import markdown
from reporting.tables import format_spread
from runs.records import Run, load_confusion_matrix, slugify
from utils import plural, unique_classnames

NUM_HARDEST = 5  # classes in the table
UNEVEN_COLUMNS = {"balanced accuracy": "balanced_accuracy", "macro F1": "macro_f1"}
UNEVEN_NOTE = (
    "where test classes differ in size, the means of their accuracies (balanced accuracy) and of "
    "their F1 scores (macro F1), in percent; "
)
MAX_NUMBERS, MAX_NAMES = 20, 120  # classes up to which a matrix has numbers in it, names beside it
UNDRAWABLE = "; no font here has the names of the numbered classes: predictions.csv has both"


class ConfusionCell(NamedTuple):
    """The predictions of a cell's runs."""

    backbone: str
    dataset: str
    shots: int
    variant: Variant
    names: list[str]  # by label, all different
    counts: np.ndarray  # (C, C): how often each true class (row) was predicted as each (column)
    runs: list[Run]  # of each seed

    @property
    def images(self) -> np.ndarray:
        """The number of test images of each class (C,)."""
        return self.counts.sum(axis=1) // len(self.runs)

    @property
    def row_percent(self) -> np.ndarray:
        """The counts in percent of each class's images (C, C); 0 where it has none."""
        return 100 * self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)

    @property
    def worst_first(self) -> list[tuple[float, str, int, int]]:
        """Accuracy in percent, name, label and number of images of each class that has images."""
        accuracies, images = self.row_percent.diagonal().tolist(), self.images.tolist()
        rows = zip(accuracies, self.names, range(len(images)), images, strict=True)
        return sorted(row for row in rows if row[-1])

    @property
    def title(self) -> str:
        """What was run, in words."""
        what = f"{display_name(self.dataset)}, {plural(self.shots, 'shot')}, {self.variant.label}"
        seeds, images = plural(len(self.runs), "seed"), int(self.images.sum())
        note = "" if all(map(is_drawable, self.names)) else UNDRAWABLE
        return f"{what}, {self.backbone} ({seeds}, n = {plural(images, 'test image')}){note}"

    def mean(self, key: str) -> str:
        """Return mean and standard deviation over seeds of a field of runs; "-" where it lacks."""
        values = [getattr(run, key) for run in self.runs]
        return "-" if None in values else format_spread(*summarize(values)[:2], ".1f")

    def figure_path(self, kind: str) -> str:
        """Return the path of a figure of the cell in the report."""
        parts = [self.dataset, f"{self.shots}shots", *filter(None, self.variant)]
        return figure_path(self.backbone, f"{kind}-{slugify('-'.join(parts))}")

    def tick_labels(self) -> list[str]:
        """Return the classes as figures name them: cut, or by label where no font has the name."""
        cut = [name if len(name) <= 28 else f"{name[:27]}…" for name in self.names]
        return [
            escape(name) if is_drawable(name) else f"class {label}"
            for label, name in enumerate(cut)
        ]


def confusion_cells(results: BackboneResults, warn: Callable[[str], None]) -> list[ConfusionCell]:
    """Return the cells of a backbone; warn of runs without readable predictions."""
    cells = []
    for key in product(results.datasets, results.shots, results.variants):
        runs, counts = [], []
        for _, run in sorted(results.cell(*key).items()):
            try:
                counts.append(load_confusion_matrix(run))
                runs.append(run)
            except (ValueError, OSError) as error:
                warn(f"the classes of {run.folder} are left out: {error}")
        if runs:
            names = unique_classnames(runs[0].classnames)
            cells.append(ConfusionCell(results.name, *key, names, np.sum(counts, axis=0), runs))
    return cells


def classes_section(cells: Sequence[ConfusionCell]) -> str:
    """Return the Markdown section on a backbone's classes; "" where there are no cells."""
    if not cells:
        return ""
    uneven = any(len(set(cell.images[cell.images > 0].tolist())) > 1 for cell in cells)
    columns = {"ECE": "ece"} | (UNEVEN_COLUMNS if uneven else {})
    lines = []
    for cell in cells:
        hardest = [f"{name} ({acc:.1f})" for acc, name, *_ in cell.worst_first[:NUM_HARDEST]]
        line = [display_name(cell.dataset), cell.variant.label, str(cell.shots)]
        lines.append([*line, *map(cell.mean, columns.values()), ", ".join(hardest)])
    header = ["dataset", "method", "shots", *columns, "hardest classes"]
    return (
        "### Classes\n\nExpected calibration error (ECE) in percent, over 15 bins of confidence; "
        f"{UNEVEN_NOTE if uneven else ''}the {NUM_HARDEST} classes of lowest accuracy (in percent, "
        f"all seeds together).\n\n{markdown(header, lines, left=2)}\n"
    )


def plan_class_figures(cells: Sequence[ConfusionCell]) -> dict[str, Callable[[], Figure]]:
    """Return what to draw: by file name, functions that return a Figure."""
    plan = {cell.figure_path("confusion"): partial(draw_confusion, cell) for cell in cells}
    return plan | {cell.figure_path("classes"): partial(draw_accuracies, cell) for cell in cells}


def draw_confusion(cell: ConfusionCell) -> Figure:
    """Draw the confusion matrix: true classes down, predicted ones across, in percent of the row.

    A small matrix has numbers in it, a large one has labels in the place of names.
    """
    count, percent = len(cell.names), cell.row_percent
    inches = 0.42 if count <= MAX_NUMBERS else 0.135  # of a class
    side = max(4.2, count * inches) if count <= MAX_NAMES else 8.5
    figure, (axes,) = make_figure(cell.title, size=(side + 3, side + 2))
    norm = PowerNorm(0.5, 0, 100)  # the square root shows one image of many better
    image = axes.imshow(percent, cmap="Blues", norm=norm, interpolation="nearest")
    axes.grid(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, ticks=[0, 1, 5, 10, 25, 50, 100])
    bar.set_label("share of the true class's images (%)")
    if count <= MAX_NAMES:
        size, names = 8 if count <= MAX_NUMBERS else 6.5, cell.tick_labels()
        axes.set_xticks(range(count), labels=names, rotation=90, fontsize=size)
        names = [f"{name} (n={n})" for name, n in zip(names, cell.images, strict=True)]
        axes.set_yticks(range(count), labels=names, fontsize=size)
    if count <= MAX_NUMBERS:
        for row, column in zip(*percent.nonzero(), strict=True):
            share = percent[row, column]
            text = f"{share:.0f}" if share >= 1 else "<1"
            color = "white" if share > 40 else "black"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    return figure


def draw_accuracies(cell: ConfusionCell) -> Figure:
    """Draw the accuracy of each class as a bar, worst first."""
    rows, labels = cell.worst_first, cell.tick_labels()
    figure, (axes,) = make_figure(cell.title, size=(6, 0.17 * len(rows) + 1.6))
    bars = axes.barh(range(len(rows)), [row[0] for row in rows], color="#0072B2", height=0.75)
    axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    names = [f"{labels[label]} (n={n})" for *_, label, n in rows]
    axes.set_yticks(range(len(rows)), labels=names, fontsize=8)
    axes.set(xlim=(0, 110), ylim=(len(rows) - 0.4, -0.6), xlabel="accuracy (%)")
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.grid(False, axis="y")
    return figure


def is_drawable(name: str) -> bool:
    """Return whether the figures' fonts have all characters of a name."""
    return set(name.replace(" ", "")) <= drawable_characters()
