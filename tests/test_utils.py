"""What predictions say, by values worked by hand."""

import pytest
import torch

from utils import (
    Predictions,
    accuracy,
    expected_calibration_error,
    per_class_accuracy,
    unique_classnames,
)

LABELS = torch.tensor([0, 0, 0, 1, 1, 3])
PREDICTED = torch.tensor([0, 0, 1, 1, 0, 3])


def test_accuracies_are_shares_of_all_images_and_of_each_class():
    assert accuracy(LABELS, PREDICTED) == Predictions(LABELS, PREDICTED, None).accuracy
    assert accuracy(LABELS, PREDICTED) == pytest.approx(400 / 6)
    expected = [pytest.approx(200 / 3), 50.0, None, 100.0, None]
    assert per_class_accuracy(LABELS, PREDICTED, num_classes=5) == expected


@pytest.mark.parametrize(
    "correct, probabilities, error",
    [
        ([1, 1, 0, 0], [0.75] * 4, 25.0),  # one bin: half are right, three quarters expected
        ([1, 0, 1, 0], [0.6, 0.6, 1.0, 1.0], 30.0),  # (2 |0.5 - 0.6| + 2 |0.5 - 1|) / 4
        ([1, 0], [0.95, 0.97], 46.0),  # errors in one bin cancel: |0.5 - 0.96|
        ([1, 1], [1.0, 1.0], 0.0),
        ([0], [1 / 15], 100 / 15),  # a bin ends with its upper bound
        ([1, 0], [0.4, 0.40001], 50.0005),  # which is 6 / 15: two bins, |1 - 0.4| and 0.40001
    ],
)
def test_calibration_compares_confidence_and_accuracy_bin_by_bin(correct, probabilities, error):
    found = expected_calibration_error(
        torch.tensor(correct).bool(), torch.tensor(probabilities, dtype=torch.float64)
    )
    assert found == pytest.approx(error, abs=1e-9)


def test_other_numbers_of_bins_are_possible():
    correct, probabilities = torch.tensor([True, False]), torch.tensor([0.2, 0.9])
    assert expected_calibration_error(correct, probabilities, n_bins=1) == pytest.approx(
        5.0, abs=1e-5
    )
    assert expected_calibration_error(correct, probabilities, n_bins=2) == pytest.approx(
        85.0, abs=1e-5
    )


def test_classes_of_one_name_are_told_apart_by_label():
    names = ["crane", "crow", "crane"]
    assert unique_classnames(names) == ["crane (label 0)", "crow", "crane (label 2)"]
    assert unique_classnames(names[:2]) == names[:2]
