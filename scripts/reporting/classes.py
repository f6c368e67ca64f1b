"""The classes of a report's runs: which are hard, and which are taken for which others.

Everything is about one cell, as in the tables: runs on the same data with the same settings, all
seeds together.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure

from reporting.aggregate import BackboneResults, Variant, display_name, summarize
from reporting.figures import drawable_characters, figure_path, make_figure
from reporting.markdown import markdown
from reporting.tables import format_spread
from runs.records import Run, load_confusion_matrix, slugify
from utils import plural, to_csv, unique_classnames

NUM_HARDEST = 5  # classes in the table
UNEVEN_COLUMNS = {"balanced accuracy": "balanced_accuracy", "macro F1": "macro_f1"}
UNEVEN_NOTE = (
    "where test classes differ in size, the means of their accuracies (balanced accuracy) and of "
    "their F1 scores (macro F1), in percent; "
)
MAX_NUMBERS, MAX_NAMES = 20, 120  # classes up to which a matrix has numbers in it, names beside it
UNDRAWABLE = "; no font here has the names of the numbered classes: predictions.csv has both"
CSV_HEADER = ["backbone", "dataset", "shots", "method", "settings", "class", "images", "accuracy"]
CSV_HEADER += ["confused_with", "confused_percent"]  # the most frequent wrong class


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
    def row_percent(self) -> np.ndarray:
        """The counts in percent of each class's images (C, C); NaN where it has none."""
        with np.errstate(invalid="ignore"):
            return 100 * self.counts / self.counts.sum(axis=1, keepdims=True)

    @property
    def worst_first(self) -> list[tuple[str, int, float, str, float]]:
        """Name, images and accuracy in percent of each class that has images.

        Then the wrong class that is predicted most often, and its share in percent.
        """
        percent = np.nan_to_num(self.row_percent)
        wrong = percent - np.diag(percent.diagonal())
        rows = zip(
            self.names, self.images.tolist(), percent.diagonal().tolist(),
            [self.names[label] for label in wrong.argmax(axis=1)], wrong.max(axis=1).tolist(),
            strict=True,
        )  # fmt: skip
        return sorted((row for row in rows if row[1]), key=lambda row: (row[2], row[0]))

    @property
    def title(self) -> str:
        """What was run, in words."""
        seeds = plural(len(self.runs), "seed")
        shots = plural(self.shots, "shot")
        images = plural(int(self.images.sum()), "test image")
        what = f"{display_name(self.dataset)}, {shots}, {self.variant.label}, {self.backbone}"
        note = "" if all(map(is_drawable, self.names)) else UNDRAWABLE
        return f"{what} ({seeds}, n = {images}){note}"

    @property
    def images(self) -> np.ndarray:
        """The number of test images of each class (C,)."""
        return self.counts.sum(axis=1) // len(self.runs)

    @property
    def has_uneven_classes(self) -> bool:
        """Whether the classes that have test images differ in their numbers of them."""
        return len(set(self.images[self.images > 0].tolist())) > 1

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
        return [
            truncate(name) if is_drawable(name) else f"class {label}"
            for label, name in enumerate(self.names)
        ]


def confusion_cells(results: BackboneResults, warn: Callable[[str], None]) -> list[ConfusionCell]:
    """Return the cells of a backbone; warn of runs without readable predictions."""
    cells = []
    for dataset, shots, variant in product(results.datasets, results.shots, results.variants):
        runs, counts = [], []
        for _, run in sorted(results.cell(dataset, shots, variant).items()):
            if not runs or run.classnames == runs[0].classnames:
                try:
                    counts.append(load_confusion_matrix(run))
                    runs.append(run)
                except (ValueError, OSError) as error:
                    warn(f"the classes of {run.folder} are left out: {error}")
        if runs:
            names = unique_classnames(runs[0].classnames)
            key = results.name, dataset, shots, variant
            cells.append(ConfusionCell(*key, names, np.sum(counts, axis=0), runs))
    return cells


def classes_section(cells: Sequence[ConfusionCell]) -> str:
    """Return the Markdown section on a backbone's classes; "" where there are no cells."""
    if not cells:
        return ""
    uneven = any(cell.has_uneven_classes for cell in cells)
    columns = {"ECE": "ece"} | (UNEVEN_COLUMNS if uneven else {})
    lines = []
    for cell in cells:
        hardest = [f"{name} ({acc:.1f})" for name, _, acc, *_ in cell.worst_first[:NUM_HARDEST]]
        values = [
            cell.mean(key) if key == "ece" or cell.has_uneven_classes else "-"
            for key in columns.values()
        ]
        line = display_name(cell.dataset), cell.variant.label, str(cell.shots)
        lines.append([*line, *values, ", ".join(hardest)])
    header = ["dataset", "method", "shots", *columns, "hardest classes"]
    return (
        "### Classes\n\nExpected calibration error (ECE) in percent, over 15 bins of confidence; "
        f"{UNEVEN_NOTE if uneven else ''}the {NUM_HARDEST} classes of lowest accuracy (in percent, "
        "all seeds together). classes.csv has all classes, worst first.\n\n"
        f"{markdown(header, lines, left=2)}\n"
    )


def classes_csv(cells: Iterable[ConfusionCell]) -> str:
    """Return the contents of classes.csv: the classes of each cell, worst first."""
    keys = [(cell, [cell.backbone, cell.dataset, cell.shots, *cell.variant]) for cell in cells]
    return to_csv(CSV_HEADER, ([*key, *row] for cell, key in keys for row in cell.worst_first))


def plan_class_figures(cells: Iterable[ConfusionCell]) -> dict[str, Callable[[], Figure]]:
    """Return what to draw: by file name, functions that return a Figure."""
    plan = {}
    for cell in cells:
        for kind, draw in {"confusion": draw_confusion, "classes": draw_accuracies}.items():
            plan[cell.figure_path(kind)] = partial(draw, cell)
    return plan


def draw_confusion(cell: ConfusionCell) -> Figure:
    """Draw the confusion matrix: true classes down, predicted ones across, in percent of the row.

    A small matrix has numbers in it, a large one has labels in the place of names.
    """
    count, percent = len(cell.names), np.nan_to_num(cell.row_percent)
    figure, (axes,) = make_figure("")
    side = 8.5 if count > MAX_NAMES else max(4.2, count * (0.42 if count <= MAX_NUMBERS else 0.135))
    figure.set_size_inches(side + 3, side + 2)
    # White means none: one image of many is seen, and the square root shows it better.
    blues = ListedColormap(colormaps["Blues"](np.linspace(0.2, 1, 256)))
    image = axes.imshow(
        np.ma.masked_equal(percent, 0), cmap=blues, norm=PowerNorm(0.5, 0, 100),
        interpolation="nearest",
    )  # fmt: skip
    axes.grid(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    set_title(figure, cell.title)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, ticks=[0, 1, 5, 10, 25, 50, 100])
    bar.set_label("share of the true class's images (%)")
    if count <= MAX_NAMES:
        size, names = 8 if count <= MAX_NUMBERS else 6.5, cell.tick_labels()
        axes.set_xticks(range(count), labels=names, rotation=90, fontsize=size)
        names = [f"{name} (n={n})" for name, n in zip(names, cell.images, strict=True)]
        axes.set_yticks(range(count), labels=names, fontsize=size)
    for row, column in zip(*percent.nonzero(), strict=True) if count <= MAX_NUMBERS else ():
        share = percent[row, column]
        color, text = "white" if share > 40 else "black", f"{share:.0f}" if share >= 1 else "<1"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    return figure


def draw_accuracies(cell: ConfusionCell) -> Figure:
    """Draw the accuracy of each class as a bar, worst first."""
    rows, labels = cell.worst_first, dict(zip(cell.names, cell.tick_labels(), strict=True))
    figure, (axes,) = make_figure("")
    figure.set_size_inches(6, 0.17 * len(rows) + 1.2)
    set_title(figure, cell.title)
    bars = axes.barh(range(len(rows)), [row[2] for row in rows], color="#0072B2", height=0.75)
    axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    names = [f"{labels[name]} (n={n})" for name, n, *_ in rows]
    axes.set_yticks(range(len(rows)), labels=names, fontsize=8)
    axes.set(xlim=(0, 110), ylim=(len(rows) - 0.4, -0.6), xlabel="accuracy (%)")
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.grid(False, axis="y")
    return figure


def set_title(figure: Figure, title: str) -> None:
    """Put the title above a figure whose size is set, on as many lines as it takes."""
    lines = textwrap.wrap(title.replace("$", r"\$"), int(10 * figure.get_figwidth()))
    figure.suptitle("\n".join(lines), fontsize=12)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * len(lines))


def truncate(name: str) -> str:
    """Return a class name for figures: not too long, and not read as mathematics."""
    return (name if len(name) <= 28 else f"{name[:27]}…").replace("$", r"\$")


def is_drawable(name: str) -> bool:
    """Return whether the fonts here have all characters of a name."""
    return set(name.replace(" ", "")) <= drawable_characters()
