"""Metrics, by values worked out by hand; progress in a file."""

import itertools

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from utils import Predictions, Progress, unique_classnames


def test_accuracy_overall_and_per_class():
    labels, preds = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 0, 3])
    predictions = Predictions(labels, preds, None)
    assert predictions.accuracy == pytest.approx(400 / 6)
    expected = [pytest.approx(200 / 3), 50.0, None, 100.0, None]
    assert predictions.per_class_accuracy(num_classes=5) == expected


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_class_means_equal_scikit_learns():
    labels, preds = torch.randint(0, 4, (50,)), torch.randint(0, 7, (50,))  # 4 to 6 have no images
    predictions = Predictions(labels, preds, None)
    balanced = balanced_accuracy_score(labels, preds)
    f1 = f1_score(labels, preds, labels=range(4), average="macro")
    assert predictions.balanced_accuracy == pytest.approx(100 * balanced)
    assert predictions.macro_f1 == pytest.approx(100 * f1)


@pytest.mark.parametrize(
    "correct, probs, error",
    [
        ([1, 1, 0, 0], [0.75] * 4, 25.0),  # one bin: half are right, three quarters expected
        ([1, 0, 1, 0], [0.6, 0.6, 1.0, 1.0], 30.0),  # (2 |0.5 - 0.6| + 2 |0.5 - 1|) / 4
        ([1, 0], [0.95, 0.97], 46.0),  # errors in one bin cancel: |0.5 - 0.96|
        ([0], [1 / 15], 100 / 15),  # a bin ends with its upper bound
        ([1, 0], [0.4, 0.40001], 50.0005),  # which is 6 / 15: two bins, |1 - 0.4| and 0.40001
    ],
)
def test_ece_compares_bins(correct, probs, error):
    preds, probs = torch.tensor(correct), torch.tensor(probs, dtype=torch.float64)
    predictions = Predictions(torch.ones_like(preds), preds, probs)
    assert predictions.expected_calibration_error == pytest.approx(error, abs=1e-9)


def test_unique_classnames_adds_labels():
    names = ["crane", "crow", "crane"]
    assert unique_classnames(names) == ["crane (label 0)", "crow", "crane (label 2)"]


def test_progress_prints_plain_lines(monkeypatch, capsys):
    seconds = itertools.count(step=10)
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(seconds)))
    assert list(Progress(range(4), desc="Work")) == [0, 1, 2, 3]
    err = capsys.readouterr().err
    assert "Work: 2/4 it" in err and "Work: 4/4 it" in err and "\r" not in err
