"""Grading: measures a teacher's embeddings on some data, for the report card.

Every accuracy is that of a classifier on images that it has not seen, copies of them included. Pure functions of
arrays: reads and writes no files, and says nothing of what to make of the figures (`report_card` does).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.accuracy import Accuracy, accuracy_of, most_confused
from pipeline.extract import measures
from pipeline.extract.measures import NUM_FOLDS, Embedded, Floats, Rows
from pipeline.extract.report_card import MIN_CLASS_IMAGES, DoubtfulLabel, ReportCard, SmallClass
from store import fit_ridge

# Graded images, evaluation included: a fifth of them gives intervals of ±1.4 points, and memory does not grow beyond.
MAX_IMAGES = 20_000
MAX_HELD_OUT = 10_000
NUM_CONFUSED = 10
NUM_DOUBTFUL = 24


class _Sides(NamedTuple):
    """The graded images and their folds [N], 0…4; of them those to fit on; and those to measure on."""

    graded: Embedded
    folds: Rows
    training: Embedded
    held_out: Embedded


def grade(
    images: Embedded, class_names: Sequence[str], *, evaluation: Embedded | None = None, per_class: int | None = None
) -> ReportCard:
    """Measure what embeddings are worth; the order of the images changes nothing.

    Without an evaluation set a fifth of the distinct images is held out. Images are chosen, held out and cut into folds
    in the order of their sample keys, which are digests: at random, and copies always together.

    Args:
        images: N ≥ 1 of them: what the artifact is made of. At most 20,000 are read, evaluation included.
        class_names: C names.
        evaluation: other images, which accuracies are then measured on.
        per_class: images asked for in each class, to name those with fewer.

    Returns:
        The card.

    Raises:
        ValueError: there are no images, arrays disagree, or a value is not finite.
        IndexError: a label is outside 0…C−1.
    """
    num_classes, embed_dim = len(class_names), images.embeddings.shape[-1]
    for each in (images,) if evaluation is None else (images, evaluation):
        _check(each, num_classes, embed_dim)
    sides = _split(images, evaluation)
    whole = measures.moments(sides.graded, num_classes, sides.graded.embeddings[0].astype(np.float64))
    means = whole.class_means()[whole.count > 0]
    predicted, penalty = _predict(sides, num_classes)
    accuracies = [accuracy(each == sides.held_out.labels) for each in predicted]
    margins, rivals = np.full(len(sides.graded), np.nan), np.zeros(len(sides.graded), np.int64)
    if predicted:
        margins, rivals = measures.out_of_fold_margins(sides.graded, sides.folds, whole, penalty)
    fitted, measured = (np.bincount(each.labels, minlength=num_classes) for each in (sides.training, sides.held_out))
    return ReportCard(
        num_classes=num_classes,
        embed_dim=embed_dim,
        num_images=len(images),
        num_graded=len(sides.graded),
        held_out_from="fifth" if evaluation is None else "evaluation",
        num_held_out=len(sides.held_out),
        chance=float(measured.max() / len(sides.held_out)),
        nearest_mean=accuracies[0] if accuracies else None,
        ridge=accuracies[1] if accuracies else None,
        ten_neighbours=accuracies[2] if accuracies else None,
        effective_rank=measures.effective_rank(whole.scatter()),
        class_mean_cosine=measures.mean_cosine(means),
        class_mean_cosine_centred=measures.mean_cosine(means - means.mean(axis=0)),
        num_labels_judged=int(np.isfinite(margins).sum()),
        num_labels_doubtful=int((margins < 0).sum()),
        num_images_with_several_labels=_count_several_labels(sides.graded),
        num_images_on_both_sides=0 if evaluation is None else len(sides.graded) - len(sides.training),
        classes_without_held_out=_names(class_names, measured == 0),
        classes_without_training=_names(class_names, (measured > 0) & (fitted == 0)),
        small_classes=_small(images.labels, class_names, max(per_class or 0, MIN_CLASS_IMAGES)),
        confused=most_confused(sides.held_out.labels, predicted[1], class_names, NUM_CONFUSED) if predicted else (),
        doubtful=_doubtful(sides.graded, margins, rivals, class_names),
    )


def accuracy(right: NDArray[np.bool_]) -> Accuracy:
    """Count the rightly classified of N ≥ 1 images."""
    return accuracy_of(int(right.sum()), len(right))


def _check(images: Embedded, num_classes: int, embed_dim: int) -> None:
    number = len(images)
    if number == 0:
        raise ValueError("there are no images, expected at least one to grade")
    shapes = tuple(each.shape for each in (images.embeddings, images.labels, images.keys, images.rows))
    expected = ((number, embed_dim), (number,), (number, 16), (number,))
    if shapes != expected:
        raise ValueError(f"embeddings, labels, keys and rows are {shapes}, expected {expected}")
    if images.labels.min() < 0 or images.labels.max() >= num_classes:
        raise IndexError(f"labels go from {images.labels.min()} to {images.labels.max()}, expected 0…{num_classes - 1}")


def _split(images: Embedded, evaluation: Embedded | None) -> _Sides:
    if evaluation is None:
        graded = _first_by_key(images, MAX_IMAGES)
        folds = _folds(graded.keys)
        # One image cannot be both fitted on and measured on: it is measured on, and nothing is fitted.
        return _Sides(graded, folds, graded.take(folds > 0), graded.take(folds == 0))
    held_out = _first_by_key(evaluation, MAX_HELD_OUT)
    graded = _first_by_key(images, MAX_IMAGES - len(held_out))
    measured = {key.tobytes() for key in held_out.keys}
    unseen = np.array([key.tobytes() not in measured for key in graded.keys])
    return _Sides(graded, _folds(graded.keys), graded.take(unseen), held_out)


def _first_by_key(images: Embedded, most: int) -> Embedded:
    """Sort by key, label and row, and keep the first: in one order, so that sums round in one way."""
    high, low = np.ascontiguousarray(images.keys).view(">u8").T
    chosen = images.take(np.lexsort((images.rows, images.labels, low, high))[:most])
    if not np.isfinite(chosen.embeddings).all():
        raise ValueError("embeddings hold NaN or infinity, expected finite values: extract them again")
    return chosen


def _folds(keys: NDArray[np.uint8]) -> Rows:
    """Deal the distinct ones among sorted keys [N, 16] out to the folds in turn."""
    fresh = np.any(keys[1:] != keys[:-1], axis=1)
    return np.concatenate([[0], np.cumsum(fresh)]) % NUM_FOLDS


def _predict(sides: _Sides, num_classes: int) -> tuple[list[Rows], float]:
    """Classify the held-out images by nearest mean, ridge and neighbours; also return the ridge's penalty an image."""
    training, unseen = sides.training, sides.held_out.embeddings
    if len(training) == 0:
        return [], 0.0
    count = np.bincount(training.labels, minlength=num_classes)
    origin = np.zeros(unseen.shape[1])
    means = measures.moments(training, num_classes, origin).class_means()
    head = fit_ridge(lambda: [(training.embeddings, training.labels)], num_classes, unseen.shape[1])
    predicted = [
        measures.nearest_mean_predictions(unseen, means, count > 0),
        # Scores add up to 1: a class without images, which scores 0, is never the highest.
        measures.linear_predictions(unseen, head.weight.astype(np.float64), head.bias.astype(np.float64)),
        measures.neighbour_predictions(unseen, training, num_classes),
    ]
    return predicted, head.penalty / len(training)


def _count_several_labels(images: Embedded) -> int:
    """Count the distinct images that stand under more than one label; rows are sorted by key, then label."""
    copy = np.all(images.keys[1:] == images.keys[:-1], axis=1)
    other_label = copy & (images.labels[1:] != images.labels[:-1])
    return len(np.unique(images.keys[1:][other_label], axis=0))


def _names(class_names: Sequence[str], chosen: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(class_names[row] for row in np.flatnonzero(chosen).tolist())


def _small(labels: Rows, class_names: Sequence[str], wanted: int) -> tuple[SmallClass, ...]:
    count = np.bincount(labels, minlength=len(class_names))
    order = np.argsort(count, kind="stable")
    return tuple(SmallClass(class_names[row], int(count[row])) for row in order[count[order] < wanted].tolist())


def _doubtful(images: Embedded, margins: Floats, rivals: Rows, class_names: Sequence[str]) -> tuple[DoubtfulLabel, ...]:
    order = np.argsort(margins, kind="stable")  # NaN comes last
    return tuple(
        DoubtfulLabel(
            row=int(images.rows[row]),
            key=images.keys[row].tobytes().hex(),
            label=class_names[images.labels[row]],
            predicted=class_names[rivals[row]],
            margin=float(margins[row]),
        )
        for row in order[:NUM_DOUBTFUL]
        if margins[row] < 0
    )
