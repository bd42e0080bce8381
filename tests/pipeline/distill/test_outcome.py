from dataclasses import replace

import numpy as np
import pytest

from pipeline.accuracy import Confusion, accuracy_of
from pipeline.distill import outcome as module
from pipeline.distill.alignment import Alignment
from pipeline.distill.evaluate import Evaluation
from pipeline.distill.images import DecodedImages
from pipeline.distill.outcome import ClassAccuracy, Mistake, Outcome, mistaken_images, outcome_of

NAMES = ("ant", "bee", "cat", "dog")
LABELS = [0, 0, 0, 2, 2, 3, 0, 2]
PREDICTED = [1, 0, 1, 0, 2, 3, 3, 0]
ALIGNMENT = Alignment(8, 3)


def images_of(labels: list[int]) -> DecodedImages:
    """Make images whose red value is ten times their place; they stand at rows 100, 102, …, in shuffled places."""
    number = len(labels)
    pixels = np.zeros((number, 1, 4, 4, 3), np.uint8)
    places = np.arange(number)[::-1].copy()
    pixels[places, 0, :, :, 0] = 10 * np.arange(number)[:, None, None]
    keys = np.zeros((number, 16), np.uint8)
    return DecodedImages(pixels, places, 100 + 2 * np.arange(number), keys, np.array(labels, np.int64))


def evaluation_of(labels: list[int], predicted: list[int], names: tuple[str, ...] = NAMES) -> Evaluation:
    right = np.array([label for label, answer in zip(labels, predicted, strict=True) if label == answer], np.int64)
    return Evaluation(
        top1=100 * len(right) / len(labels),
        top5=100 * 7 / 8,
        class_names=names,
        correct=np.bincount(right, minlength=len(names)),
        count=np.bincount(labels, minlength=len(names)),
        predicted=np.array(predicted, np.int64),
        embedded=np.arange(len(labels)),
        embeddings=np.zeros((len(labels), 2), np.float32),
        seconds=1.0,
        images_per_second=1.0,
    )


def found() -> Outcome:
    return outcome_of(evaluation_of(LABELS, PREDICTED), images_of(LABELS), ALIGNMENT)


def test_an_outcome_counts_by_hand() -> None:
    assert found() == Outcome(
        top1=accuracy_of(3, 8),
        top5=accuracy_of(7, 8),
        num_classes=3,
        worst=(
            ClassAccuracy("ant", accuracy_of(1, 4)),
            ClassAccuracy("cat", accuracy_of(1, 3)),
            ClassAccuracy("dog", accuracy_of(1, 1)),
        ),
        confused=(
            Confusion("cat", "ant", 2, 2 / 3),
            Confusion("ant", "bee", 2, 0.5),
            Confusion("ant", "dog", 1, 0.25),
        ),
        mistakes=(Mistake(106, "cat", "ant"), Mistake(100, "ant", "bee"), Mistake(112, "ant", "dog")),
        alignment=ALIGNMENT,
    )


def test_mistakes_are_shown_as_the_student_saw_them() -> None:
    pictures = mistaken_images(found(), images_of(LABELS))
    assert sorted(pictures) == [100, 106, 112]
    assert [pictures[row].getpixel((0, 0)) for row in (100, 106, 112)] == [(0, 0, 0), (30, 0, 0), (60, 0, 0)]
    assert pictures[100].size == (4, 4)


def test_a_student_without_mistakes_has_none() -> None:
    perfect = outcome_of(evaluation_of(LABELS, LABELS), images_of(LABELS), ALIGNMENT)
    assert (perfect.confused, perfect.mistakes) == ((), ())
    assert mistaken_images(perfect, images_of(LABELS)) == {}


def test_of_equally_bad_classes_the_larger_comes_first() -> None:
    labels = [0, 1, 1, 2, 2, 2]
    outcome = outcome_of(evaluation_of(labels, [3] * 6), images_of(labels), ALIGNMENT)
    assert [each.name for each in outcome.worst] == ["cat", "bee", "ant"]


def test_no_more_is_listed_than_a_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(f"class {number}" for number in range(50))
    labels = list(range(50))
    evaluation = evaluation_of(labels, labels[1:] + labels[:1], names)
    outcome = outcome_of(evaluation, images_of(labels), ALIGNMENT)
    assert (outcome.num_classes, len(outcome.worst), len(outcome.confused), len(outcome.mistakes)) == (50, 20, 20, 12)
    monkeypatch.setattr(module, "NUM_PICTURES", 1)
    assert replace(outcome, mistakes=outcome.mistakes[:1]) == outcome_of(evaluation, images_of(labels), ALIGNMENT)
