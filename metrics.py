"""What a classifier's answers say: accuracy, of each class too, and calibration.

Pure functions of tensors; labels and predictions are whole numbers, percentages go to 100.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15  # of confidence


class Predictions(NamedTuple):
    """A classifier's answers for N images, in their order, on the CPU."""

    labels: Tensor  # (N,) int64: the true classes
    predicted: Tensor  # (N,) int64: the classes of the largest probability
    probabilities: Tensor  # (N,) float32: of the predicted classes

    @property
    def accuracy(self) -> float:
        """Share of the images whose class was predicted, in percent."""
        return accuracy(self.labels, self.predicted)


def accuracy(labels: Tensor, predicted: Tensor) -> float:
    """Share of the images (N,) whose class was predicted, in percent."""
    return 100.0 * (predicted == labels).sum().item() / len(labels)


def class_accuracies(labels: Tensor, predicted: Tensor, classes: int) -> list[float | None]:
    """Accuracy in percent of the images (N,) of each class, by label; None where it has none."""
    counts = labels.bincount(minlength=classes).tolist()
    hits = labels[predicted == labels].bincount(minlength=classes).tolist()
    return [100.0 * hit / count if count else None for hit, count in zip(hits, counts, strict=True)]


def calibration_error(correct: Tensor, probabilities: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (ECE) in percent.

    Probabilities of the predicted classes are put into `bins` equal intervals (a, b] of [0, 1]. In
    each, the share of correct predictions is compared with the mean probability; the absolute
    differences are averaged, weighted by the number of images.

    Source: equation 3 of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        correct: Whether each prediction is right: (N,).
        probabilities: Its probability: (N,).
        bins: Number of intervals.
    """
    confidence = probabilities.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    place = torch.bucketize(confidence, edges[1:-1])  # (N,)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, place, correct.double() - confidence)  # |B| (accuracy - confidence) of each
    return 100.0 * gaps.abs().sum().item() / len(confidence)


def names_apart(names: Sequence[str]) -> list[str]:
    """The classes' names by label, those that several classes have with their labels behind them.

    >>> names_apart(["crane", "crow", "crane"])
    ['crane (label 0)', 'crow', 'crane (label 2)']
    """
    counts = Counter(names)
    return [
        f"{name} (label {label})" if counts[name] > 1 else name for label, name in enumerate(names)
    ]
