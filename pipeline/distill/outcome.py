"""The outcome of a run: what its last evaluation says of the student, beyond two accuracies."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.accuracy import Accuracy, Confusion, accuracy_of, most_confused
from pipeline.distill.alignment import Alignment
from pipeline.distill.evaluate import Evaluation
from pipeline.distill.images import DecodedImages

NUM_LISTED = 20  # classes, and pairs of classes
NUM_PICTURES = 12


@dataclass(frozen=True)
class ClassAccuracy:
    """Top-1 accuracy of the images of one class."""

    name: str
    accuracy: Accuracy


@dataclass(frozen=True)
class Mistake:
    """One misclassified image: `row` in its split."""

    row: int
    label: str
    predicted: str


@dataclass(frozen=True)
class Outcome:
    """What evaluation images tell; `num_classes` have such images.

    `worst` are up to 20 classes of lowest accuracy, `confused` up to 20 pairs of classes, most images first, and
    `mistakes` the first image of each of the first 12 pairs.
    """

    top1: Accuracy
    top5: Accuracy
    num_classes: int
    worst: tuple[ClassAccuracy, ...]
    confused: tuple[Confusion, ...]
    mistakes: tuple[Mistake, ...]
    alignment: Alignment


def outcome_of(evaluation: Evaluation, images: DecodedImages, alignment: Alignment) -> Outcome:
    """Look at an evaluation closely.

    Args:
        evaluation: of `images`.
        images: labelled by the student's classes.
        alignment: of the same student.

    Returns:
        The outcome.
    """
    names, number = evaluation.class_names, len(images)
    confused = most_confused(images.labels, evaluation.predicted, names, NUM_LISTED)
    return Outcome(
        top1=accuracy_of(int(evaluation.correct.sum()), number),
        top5=accuracy_of(round(evaluation.top5 / 100 * number), number),
        num_classes=int((evaluation.count > 0).sum()),
        worst=tuple(_worst(evaluation)),
        confused=confused,
        mistakes=tuple(_mistakes(evaluation, images, confused[:NUM_PICTURES])),
        alignment=alignment,
    )


def mistaken_images(outcome: Outcome, images: DecodedImages) -> dict[int, Image.Image]:
    """Return the outcome's mistakes as the student saw them.

    Args:
        outcome: of these images.
        images: those evaluated on.

    Returns:
        Pictures by their row.
    """
    rows = [mistake.row for mistake in outcome.mistakes]
    chosen = np.flatnonzero(np.isin(images.source_rows, rows))
    return {
        int(images.source_rows[place]): Image.fromarray(np.array(images.pixels[images.places[place], 0]))
        for place in chosen
    }


def _worst(evaluation: Evaluation) -> Iterator[ClassAccuracy]:
    present = np.flatnonzero(evaluation.count)
    correct, count = evaluation.correct[present], evaluation.count[present]
    # Of equal accuracies that of more images is the surer.
    for place in np.lexsort((-count, correct / count))[:NUM_LISTED]:
        name = evaluation.class_names[present[place]]
        yield ClassAccuracy(name, accuracy_of(int(correct[place]), int(count[place])))


def _mistakes(evaluation: Evaluation, images: DecodedImages, confused: tuple[Confusion, ...]) -> Iterator[Mistake]:
    index_of = {name: index for index, name in enumerate(evaluation.class_names)}
    for pair in confused:
        label, predicted = index_of[pair.label], index_of[pair.predicted]
        place = np.flatnonzero((images.labels == label) & (evaluation.predicted == predicted))[0]
        yield Mistake(int(images.source_rows[place]), pair.label, pair.predicted)
