"""What a report says of classes: hard ones, confusions, calibration; worked by hand."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from report_helpers import make_run, read_table
from reporting import classes
from reporting.aggregate import Variant, find_runs, group_by_backbone
from reporting.figures import render_png

COUNTS = np.array([[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0], [2, 2, 0, 4]])


def cell(counts=COUNTS, names=("a", "b|c", "none", "$d$"), errors=(4.0, 6.0), **fields):
    """A cell with a run for each calibration error; `fields` are other fields of the runs."""
    variant = Variant("so", "lr 0.01")
    runs = [SimpleNamespace(ece=error, **fields) for error in errors]
    return classes.ConfusionCell("ViT-B/16", "dtd", 4, variant, list(names), counts, runs)


def test_classes_are_worst_first():
    new, old = (cell(balanced_accuracy=b, macro_f1=f) for b, f in ((58.3, 50.0), (None, None)))
    hardest = "$d$ (50.0), b!c (50.0), a (75.0)"  # the other class has no images
    assert read_table(classes.classes_section([new, old])) == [
        ["dataset", "method", "shots", "ECE", "balanced accuracy", "macro F1", "hardest classes"],
        ["DTD", "SO, lr 0.01", "4", "5.0 ± 1.4", "58.3 ± 0.0", "50.0 ± 0.0", hardest],
        ["DTD", "SO, lr 0.01", "4", "5.0 ± 1.4", "-", "-", hardest],
    ]  # fmt: skip
    even = cell(np.array([[3, 1], [2, 2]]), names=("a", "b"))
    assert "balanced" not in classes.classes_section([even]) and classes.classes_section([]) == ""


def test_confusion_cells_add_seeds(tmp_path):
    for seed in (1, 2, 3):
        folder = make_run(tmp_path, seed=seed)
    (folder / "predictions.csv").unlink()
    make_run(tmp_path, seed=1, settings={"lr": 1e-3, "classnames": "/some/where/names.yaml"})
    (results,) = group_by_backbone(find_runs([tmp_path], pytest.fail))
    sentences = []
    both, one = classes.confusion_cells(results, sentences.append)
    (sentence,) = sentences
    assert str(folder) in sentence and "predictions.csv" in sentence
    assert (both.counts.sum(), [run.seed for run in both.runs]) == (64, [1, 2])
    assert (one.counts.sum(), one.variant.settings) == (32, "classnames names, lr 0.001")
    path = "ViT-B-16/confusion-dtd-4shots-so-classnames-names--lr-0.001.png"
    assert list(classes.plan_class_figures([both, one]))[1] == path


def test_undrawable_names_become_labels(monkeypatch):
    monkeypatch.setattr(classes, "drawable_characters", lambda: frozenset("ab|cnoed$"))
    some = cell(names=("a", "猫 a", "none", "🦉"))
    assert some.tick_labels() == ["a", "class 1", "none", "class 3"]
    for draw in (classes.draw_confusion, classes.draw_accuracies):
        figure = draw(some)
        title = figure.axes[0].get_title("left").replace("\n", " ")
        assert "n = 8 test images" in title and "no font here has the names" in title
        labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        assert "class 1 (n=2)" in labels and "class 3 (n=4)" in labels
        assert render_png(partial(draw, cell(names=("$x", "猫", "_", "a" * 99))))[:4] == b"\x89PNG"
    assert "font" not in cell(names=("a", "b", "c", "$d$")).title


@pytest.mark.parametrize("count, numbers, names", [(10, 20, 10), (100, 0, 100), (400, 0, 0)])
def test_class_figures_fit_any_number(count, numbers, names):
    counts = np.diag(np.full(count, 20)) + np.roll(np.diag(np.arange(count) % 5 + 1), 7, axis=1)
    some = cell(counts, [f"class of a long name, number {i}" for i in range(count)], [4.0])
    figure = classes.draw_confusion(some)
    matrix = figure.axes[0]
    assert len(matrix.texts) == numbers
    labels = [tick.get_text() for tick in matrix.get_yticklabels() if "class" in tick.get_text()]
    assert len(labels) == names
    bars = [bar.get_width() for bar in classes.draw_accuracies(some).axes[0].patches]
    assert len(bars) == count and bars == sorted(bars)
