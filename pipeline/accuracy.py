"""How good a classifier's answers are: the share of right ones and how sure it is, and the classes it confuses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # the normal distribution has 95 % within ±z


@dataclass(frozen=True)
class Accuracy:
    """Share of images classified rightly, 0…1, with its 95 % interval."""

    num_images: int
    num_right: int
    share: float
    low: float
    high: float

    def __str__(self) -> str:
        """Write it for people, e.g. `67.0 % (64.9–69.0)`."""
        return f"{percent(self.share)} ({100 * self.low:.1f}–{100 * self.high:.1f})"


@dataclass(frozen=True)
class Confusion:
    """Images of one class that a classifier takes for another, and their share of the class's."""

    label: str
    predicted: str
    num_images: int
    share: float


def accuracy_of(num_right: int, num_images: int) -> Accuracy:
    """Return an accuracy with Wilson's score interval.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927: sound near 0 and 1 too.

    Args:
        num_right: 0…`num_images`.
        num_images: ≥ 1.

    Returns:
        The accuracy.
    """
    share = num_right / num_images
    middle = (share + _Z**2 / (2 * num_images)) / (1 + _Z**2 / num_images)
    half = _Z / (1 + _Z**2 / num_images) * math.sqrt(share * (1 - share) / num_images + (_Z / (2 * num_images)) ** 2)
    # Rounding must not put the share itself outside.
    low, high = min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
    return Accuracy(num_images, num_right, share, low, high)


def most_confused(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], class_names: Sequence[str], most: int
) -> tuple[Confusion, ...]:
    """Find the pairs of classes that are confused in most images; memory grows with images, not with pairs of classes.

    Args:
        labels: [N] indices into `class_names`.
        predicted: [N] indices into `class_names`.
        class_names: C names.
        most: pairs to return.

    Returns:
        Up to `most` pairs, the most frequent first; of equal ones those with the larger share of their class.
    """
    num_classes, wrong = len(class_names), labels != predicted
    cells, number = np.unique(labels[wrong] * num_classes + predicted[wrong], return_counts=True)
    share = number / np.bincount(labels, minlength=num_classes)[cells // num_classes]
    order = np.lexsort((cells, -share, -number))[:most]
    return tuple(
        Confusion(class_names[cell // num_classes], class_names[cell % num_classes], int(count), float(part))
        for cell, count, part in zip(cells[order], number[order], share[order], strict=True)
    )


def percent(share: float) -> str:
    """Write a share of 1 for people, e.g. `67.0 %`."""
    return f"{100 * share:.1f} %"
