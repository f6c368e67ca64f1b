"""What a report says of classes: hard ones, confusions, calibration; worked by hand."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import report
from report_helpers import make_run
from reporting.classes import (
    Classes,
    class_figures,
    classes_csv,
    classes_text,
    confusions,
    draw_classes,
    draw_confusion,
    find_classes,
)
from reporting.numbers import Variant, find_runs, studies

COUNTS = np.array([[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0], [2, 2, 0, 4]])


def cell(counts=COUNTS, names=("a", "b|c", "none", "$d$"), seeds=2):
    variant = Variant("so", "lr 0.01")
    return Classes("ViT-B/16", "dtd", 4, variant, list(names), counts, seeds, [4.0, 6.0][:seeds])


def many(count):
    """A cell of so many classes, each of 25 images, one to five of them taken for another."""
    counts = np.diag(np.full(count, 25))
    for row in range(count):
        counts[row, row] -= 1 + row % 5
        counts[row, (row + 7) % count] += 1 + row % 5
    return cell(counts, [f"class of a long name, number {i}" for i in range(count)], seeds=1)


def test_classes_are_told_worst_first_with_their_images_by_seed():
    assert cell().worst_first == [("$d$", 4, 50.0), ("b|c", 2, 50.0), ("a", 2, 75.0)]
    rows = list(csv.DictReader(classes_csv([cell()]).splitlines()))
    assert [row["class"] for row in rows] == ["$d$", "b|c", "a"]
    assert rows[2] == {
        "backbone": "ViT-B/16", "dataset": "dtd", "shots": "4", "method": "so",
        "settings": "lr 0.01", "class": "a", "images": "2", "accuracy": "75.0",
    }  # fmt: skip
    row = classes_text([cell()]).splitlines()[-1]
    cells = [text.strip() for text in row.replace("\\|", "!").strip("|").split("|")]
    assert cells == ["DTD", "SO, lr 0.01", "4", "5.0 ± 1.4", "$d$ (50.0), b!c (50.0), a (75.0)"]
    assert classes_text([]) == ""


def test_confusions_are_shares_of_the_true_classs_images():
    assert confusions(cell())[3:] == [
        "50 %  b|c, 1: none, 2", "25 %  a, 0: b|c, 1", r"25 %  \$d\$, 3: a, 0",
        r"25 %  \$d\$, 3: b|c, 1",
    ]  # fmt: skip


def test_seeds_are_added_and_other_settings_apart(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, seed=seed)
    make_run(tmp_path, seed=1, settings={"lr": 1e-3, "classnames": "/some/where/names.yaml"})
    (study,) = studies(find_runs([tmp_path], pytest.fail))
    both, one = find_classes(study, pytest.fail)
    assert (both.seeds, both.counts.sum(), both.errors) == (2, 64, [6.0, 7.0])
    assert (one.seeds, one.counts.sum(), one.variant.settings) == (
        1,
        32,
        "classnames names, lr 0.001",
    )
    assert list(class_figures([both, one])) == [
        "ViT-B-16/confusion-dtd-4shots-so.png", "ViT-B-16/classes-dtd-4shots-so.png",
        "ViT-B-16/confusion-dtd-4shots-so-classnames-names--lr-0.001.png",
        "ViT-B-16/classes-dtd-4shots-so-classnames-names--lr-0.001.png",
    ]  # fmt: skip


def test_results_without_predictions_are_left_out_with_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reporting.report.can_draw", lambda: False)
    for seed in (1, 2):
        path = make_run(tmp_path, seed=seed) / "result.json"
        result = json.loads(path.read_text())
        for key in ("classnames", "template", "per_class", "ece"):
            del result[key]
        path.write_text(json.dumps(result))
    assert report.main([str(tmp_path)]) == 0
    assert "ViT-B/16, 2 runs of an earlier version, without predictions" in capsys.readouterr().err
    assert "Classes" not in (tmp_path / "report/tables.md").read_text()
    make_run(tmp_path, seed=3)
    assert report.main([str(tmp_path)]) == 0
    assert "### Classes" in (tmp_path / "report/tables.md").read_text()


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "there is no predictions.csv"),
        ("a,b\n", "does not begin with path,label"),
        ("path,label,predicted,probability\na,0,0,1\nb,4,0,1\n", "malformed at line 3"),
        ("path,label,predicted,probability\na,0,-1,1\n", "malformed at line 2"),
        ("path,label,predicted,probability\na,0\n", "malformed at line 2"),
        ("path,label,predicted,probability\n", "has 0 rows"),
    ],
)
def test_broken_predictions_are_named_and_their_run_left_out(text, reason, tmp_path):
    path = make_run(tmp_path, seed=1) / "predictions.csv"
    make_run(tmp_path, seed=2)
    path.unlink()
    if text is not None:
        path.write_text(text)
    told = []
    (study,) = studies(find_runs([tmp_path], pytest.fail))
    (left,) = find_classes(study, told.append)
    assert left.seeds == 1 and len(told) == 1
    assert str(path.parent) in told[0] and reason in told[0]


@pytest.mark.parametrize("count, numbers, names", [(10, 20, 10), (100, 0, 100), (400, 0, 0)])
def test_a_matrix_has_numbers_names_or_a_list_by_its_size(count, numbers, names):
    figure = draw_confusion(many(count))
    matrix = figure.axes[0]
    assert len(matrix.texts) == numbers
    labels = [tick.get_text() for tick in matrix.get_yticklabels() if "class" in tick.get_text()]
    assert len(labels) == names
    assert matrix.images[0].get_array().shape == (count, count)
    listed = [text.get_text() for axes in figure.axes[1:] for text in axes.texts]
    assert [text.count(" %") for text in listed] == ([25] if count == 400 else [])


@pytest.mark.parametrize("count, columns", [(1, 1), (10, 1), (100, 2), (400, 4)])
def test_accuracies_of_classes_stand_in_columns_worst_first(count, columns):
    figure = draw_classes(many(count))
    assert len(figure.axes) == columns
    widths = [bar.get_width() for axes in figure.axes for bar in axes.patches]
    assert len(widths) == count and widths == sorted(widths)


def test_names_of_any_kind_are_drawn(tmp_path):
    from reporting.figures import png

    for draw in (draw_confusion, draw_classes):
        assert png(partial(draw, cell(names=("$x", "猫", "_", "a" * 99))))[:4] == b"\x89PNG"
