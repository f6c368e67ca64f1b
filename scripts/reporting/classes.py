"""The classes of a report's runs: which are hard, which are taken for which others.

Everything is of one cell, as in the tables: runs on the same data with the same settings, all
seeds together. Results of earlier versions, which kept no predictions, are left out.
"""

import csv
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from reporting.figures import canvas
from reporting.markdown import markdown
from reporting.numbers import Study, Variant, mean_and_std, title_of
from reporting.tables import with_spread
from runs.records import load_confusion_matrix, slugify
from utils import plural, to_csv, unique_classnames

HARDEST = 5  # classes in the table
NUMBERS, NAMES = 20, 120  # classes up to which a matrix has numbers in it, and names beside it
CONFUSIONS = 25  # listed beside a matrix without names
HEADER = ["backbone", "dataset", "shots", "method", "settings", "class", "images", "accuracy"]


class Classes(NamedTuple):
    """The predictions of a cell's runs."""

    backbone: str
    dataset: str
    shots: int
    variant: Variant
    names: list[str]  # by label, all different
    counts: np.ndarray  # (C, C): how often each class, down, was taken for each, across
    seeds: int
    errors: list[float]  # expected calibration error of each seed, in percent

    @property
    def shares(self) -> np.ndarray:
        """The counts in percent of each class's images (C, C); NaN where it has none."""
        with np.errstate(invalid="ignore"):
            return 100 * self.counts / self.counts.sum(axis=1, keepdims=True)

    @property
    def worst_first(self) -> list[tuple[str, int, float]]:
        """Name, images and accuracy in percent of each class that has images."""
        images = self.counts.sum(axis=1) // self.seeds
        rows = zip(self.names, images.tolist(), self.shares.diagonal().tolist(), strict=True)
        return sorted((row for row in rows if row[1]), key=lambda row: (row[2], row[0]))

    @property
    def title(self) -> str:
        """What was run, in words."""
        seeds = plural(self.seeds, "seed")
        what = f"{title_of(self.dataset)}, {plural(self.shots, 'shot')}, {self.variant.label}"
        return f"{what}, {self.backbone} ({seeds})"


# Gathering


def find_classes(study: Study, complain: Callable[[str], None]) -> list[Classes]:
    """The cells of a backbone that have predictions; complains of the runs that have none."""
    found, older = [], 0
    for dataset, shots, variant in product(study.datasets, study.shots, study.variants):
        runs, counts = [], []
        for _, run in sorted(study.cell(dataset, shots, variant).items()):
            if not run.classnames:
                older += 1
            elif not runs or run.classnames == runs[0].classnames:
                try:
                    counts.append(load_confusion_matrix(run))
                    runs.append(run)
                except (ValueError, OSError, csv.Error) as error:
                    complain(f"the classes of {run.folder} are left out: {error}")
        if runs:
            names = unique_classnames(runs[0].classnames)
            total, errors = np.sum(counts, axis=0), [run.ece for run in runs]
            where = study.backbone, dataset, shots, variant
            found.append(Classes(*where, names, total, len(runs), errors))
    if older:
        complain(
            f"note: {study.backbone}, {plural(older, 'run')} of an earlier version, without "
            "predictions: left out where classes are compared"
        )
    return found


# Tables


def classes_text(cells: Sequence[Classes]) -> str:
    """The Markdown section on a backbone's classes; "" where there are none."""
    if not cells:
        return ""
    lines = []
    for cell in cells:
        hardest = [f"{name} ({accuracy:.1f})" for name, _, accuracy in cell.worst_first[:HARDEST]]
        error = with_spread(*mean_and_std(cell.errors), ".1f")
        row = title_of(cell.dataset), cell.variant.label, str(cell.shots), error
        lines.append([*row, ", ".join(hardest)])
    table = markdown(["dataset", "method", "shots", "ECE", "hardest classes"], lines, left=2)
    return (
        "### Classes\n\nExpected calibration error (ECE) in percent, over 15 bins of confidence; "
        f"the {HARDEST} classes of lowest accuracy (in percent, all seeds together). classes.csv "
        f"has all classes, worst first.\n\n{table}\n"
    )


def classes_csv(cells: Iterable[Classes]) -> str:
    """The contents of classes.csv: the classes of each cell, worst first."""
    return to_csv(
        HEADER,
        (
            [cell.backbone, cell.dataset, cell.shots, *cell.variant, *row]
            for cell in cells
            for row in cell.worst_first
        ),
    )


# Figures


def class_figures(cells: Iterable[Classes]) -> dict[str, Callable[[], Any]]:
    """What to draw: by file name, functions that return matplotlib's Figure."""
    plan = {}
    for cell in cells:
        what = "-".join([cell.dataset, f"{cell.shots}shots", cell.variant.method])
        what += f"-{cell.variant.settings}" * bool(cell.variant.settings)
        for kind, draw in {"confusion": draw_confusion, "classes": draw_classes}.items():
            plan[f"{slugify(cell.backbone)}/{kind}-{slugify(what)}.png"] = partial(draw, cell)
    return plan


def draw_confusion(cell: Classes) -> Any:
    """The confusion matrix: true classes down, predicted ones across, in percent of the former.

    Few classes have numbers in it, more have their names beside it; of more than NAMES the labels
    are given and the most frequent confusions listed.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, PowerNorm

    count, shares = len(cell.names), np.nan_to_num(cell.shares)
    listed = count > NAMES
    figure, (axes, *beside) = canvas("", panels=2 if listed else 1)
    side = 8.5 if listed else max(4.2, 0.42 * count if count <= NUMBERS else 0.135 * count)
    figure.set_size_inches(2 * side if listed else side + 3, side + (0 if listed else 2))
    # White is none at all: one image of many is seen, and more so by the square root.
    blues = ListedColormap(colormaps["Blues"](np.linspace(0.2, 1, 256)))
    image = axes.imshow(
        np.ma.masked_equal(shares, 0), cmap=blues, norm=PowerNorm(0.5, 0, 100),
        interpolation="nearest",
    )  # fmt: skip
    axes.grid(False)
    set_title(figure, cell.title)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, ticks=[0, 1, 5, 10, 25, 50, 100])
    bar.set_label("share of the true class's images (%)")
    if listed:
        axes.set(xlabel="predicted class (label)", ylabel="true class (label)")
        beside[0].set_axis_off()
        beside[0].text(0, 1, "\n".join(confusions(cell)), va="top", linespacing=1.5)
        return figure
    size = 8 if count <= NUMBERS else 6.5
    names = [shortened(name) for name in cell.names]
    axes.set_xticks(range(count), labels=names, rotation=90, fontsize=size)
    axes.set_yticks(range(count), labels=names, fontsize=size)
    axes.set(xlabel="predicted class", ylabel="true class")
    if count <= NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if share:
                colour = "white" if share > 40 else "black"
                axes.text(
                    column, row, f"{share:.0f}" if share >= 1 else "<1", ha="center", va="center",
                    color=colour, fontsize=8,
                )  # fmt: skip
    return figure


def confusions(cell: Classes) -> list[str]:
    """The most frequent confusions, as lines of text under a heading."""
    shares = np.nan_to_num(cell.shares)
    np.fill_diagonal(shares, 0)
    order = np.argsort(-shares, axis=None, kind="stable")[:CONFUSIONS]
    lines = ["Most frequent confusions", "(true class, label: predicted class)", ""]
    for row, column in zip(*np.unravel_index(order, shares.shape), strict=True):
        if shares[row, column]:
            names = shortened(cell.names[row]), shortened(cell.names[column])
            lines.append(f"{shares[row, column]:.0f} %  {names[0]}, {row}: {names[1]}, {column}")
    return lines


def draw_classes(cell: Classes) -> Any:
    """The accuracy of each class as a bar, worst first, in as many columns as that takes."""
    rows = cell.worst_first
    columns = math.ceil(len(rows) / (50 if len(rows) <= 100 else 100))
    length = math.ceil(len(rows) / columns)
    size, height = (8, 0.17) if length <= 50 else (6.5, 0.135)
    figure, panels = canvas("", panels=columns)
    figure.set_size_inches(max(3.6 * columns, 6), height * length + 1.2)
    set_title(figure, cell.title)
    for number, axes in enumerate(panels):
        part = rows[number * length : (number + 1) * length]
        values = [accuracy for _, _, accuracy in part]
        axes.barh(range(len(part)), values, color="#0072B2", height=0.75)
        axes.set_yticks(range(len(part)), labels=[shortened(n) for n, _, _ in part], fontsize=size)
        for place, value in enumerate(values):
            axes.text(value + 1, place, f"{value:.0f}", va="center", fontsize=size)
        axes.set(xlim=(0, 110), ylim=(length - 0.4, -0.6), xlabel="accuracy (%)")
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.grid(False, axis="y")
    return figure


def set_title(figure: Any, title: str) -> None:
    """Put the title above a figure whose size is known, on as many lines as it takes."""
    lines = textwrap.wrap(title.replace("$", r"\$"), int(10 * figure.get_figwidth()))
    figure.suptitle("\n".join(lines), fontsize=12)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * len(lines))


def shortened(name: str) -> str:
    """A class's name for figures: of bearable length, and not taken for mathematics."""
    return (name if len(name) <= 28 else f"{name[:27]}…").replace("$", r"\$")
