"""The report card: what is measured, by hand and by brute force, and what is said of it."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
import pytest

from pipeline.accuracy import Confusion
from pipeline.extract import grading, measures
from pipeline.extract.grading import accuracy, grade
from pipeline.extract.measures import Embedded
from pipeline.extract.report_card import ReportCard, SmallClass
from store import fit_ridge

NAMES = ("ant", "bee", "cat", "dog")


def embedded(embeddings: Any, labels: Any, keys: Any = None, first_row: int = 0) -> Embedded:
    """Make images; those with equal `keys` are copies of each other."""
    rows = np.arange(first_row, first_row + len(labels))
    digests = [hashlib.blake2b(f"{key}".encode(), digest_size=16).digest() for key in (rows if keys is None else keys)]
    unique = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    return Embedded(np.asarray(embeddings, np.float32), np.asarray(labels, np.int64), unique, rows)


def clusters(num_images: int, num_classes: int = 4, embed_dim: int = 6, noise: float = 0.3, seed: int = 0) -> Embedded:
    """Make images around the centres of their classes, which do not depend on the seed."""
    random, labels = np.random.default_rng(seed), np.arange(num_images) % num_classes
    centres = np.random.default_rng(99).normal(size=(num_classes, embed_dim)) + 2
    noisy = centres[labels] + noise * random.normal(size=(num_images, embed_dim))
    return embedded(noisy, labels, first_row=10_000 * seed)


def shares(card: ReportCard) -> list[float]:
    return [each.share for _, each in card.accuracies()]


def fold_of(images: Embedded) -> list[int]:
    """Deal the distinct keys out to the five folds in order, the slow way."""
    rank = {key: number for number, key in enumerate(sorted({key.tobytes() for key in images.keys}))}
    return [rank[key.tobytes()] % 5 for key in images.keys]


def test_the_interval_is_wilsons() -> None:
    half = accuracy(np.arange(100) < 50)
    assert (half.num_images, half.num_right, half.share) == (100, 50, 0.5)
    assert [half.low, half.high] == pytest.approx([0.40383, 0.59617], abs=1e-5)
    none, every = accuracy(np.zeros(10, bool)), accuracy(np.ones(10, bool))
    assert [none.low, none.high] == pytest.approx([0, 0.27753], abs=1e-5)
    assert [every.low, every.high] == pytest.approx([0.72247, 1], abs=1e-5)
    assert str(half) == "50.0 % (40.4–59.6)"


@pytest.mark.parametrize(
    ("scatter", "rank"),
    [(np.eye(5), 5.0), (np.diag([7.0, 0, 0]), 1.0), (np.diag([3.0, 1.0]), 1.754765), (np.zeros((3, 3)), 0.0)],
)
def test_effective_rank_by_hand(scatter: Any, rank: float) -> None:
    assert measures.effective_rank(scatter) == pytest.approx(rank)
    assert measures.effective_rank(1e6 * scatter) == pytest.approx(rank)


def test_mean_cosine_is_that_of_all_pairs() -> None:
    means = np.random.default_rng(0).normal(size=(5, 3))
    units = means / np.linalg.norm(means, axis=1, keepdims=True)
    pairs = [units[i] @ units[j] for i in range(5) for j in range(i)]
    assert measures.mean_cosine(means) == pytest.approx(np.mean(pairs))
    assert measures.mean_cosine(np.eye(3)) == 0
    assert measures.mean_cosine(np.ones((4, 2))) == pytest.approx(1)
    assert measures.mean_cosine(means[:1]) is None


def test_the_nearest_mean_is_nearest_in_euclidean_distance() -> None:
    means = np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 0.0]])
    images = np.array([[1.0, 3.0], [2.6, 9.0], [-5.0, 0.0], [9.0, 9.0]], np.float32)
    every = np.ones(3, bool)
    assert measures.nearest_mean_predictions(images, means, every).tolist() == [2, 1, 0, 1]
    assert measures.nearest_mean_predictions(images, means, np.array([True, True, False])).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("block", [1, 7 * 40, 1 << 20])
def test_neighbours_vote_as_by_brute_force(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(measures, "_BLOCK_SIMILARITIES", block)
    random = np.random.default_rng(0)
    # Small integers make votes tie often; lengths differ, which a cosine must not see.
    others = embedded(random.normal(size=(40, 3)) * random.uniform(1, 9, (40, 1)), random.integers(0, 7, 40))
    images = random.normal(size=(50, 3)).astype(np.float32)
    expected = []
    for image in images.astype(np.float64):
        cosine = others.embeddings @ image / np.linalg.norm(others.embeddings, axis=1) / np.linalg.norm(image)
        nearest = np.argsort(-cosine)[:10]
        labels = others.labels[nearest]
        ranked = [((labels == each).sum(), cosine[nearest][labels == each].sum(), each) for each in range(7)]
        expected.append(max(ranked)[2])
    assert measures.neighbour_predictions(images, others, 7).tolist() == expected


def test_neighbours_as_similar_as_the_tenth_all_vote() -> None:
    others = embedded(np.ones((13, 2)), [0] * 6 + [1] * 7)
    assert measures.neighbour_predictions(np.ones((1, 2), np.float32), others, 3).tolist() == [1]


def margins_by_refitting(images: Embedded) -> dict[int, tuple[float, str]]:
    """Fit a head for each fold by least squares with rows that stand for the penalty; margin and rival of each row."""
    folds = np.array(fold_of(images))
    fitted = [(images.embeddings[folds > 0], images.labels[folds > 0])]
    penalty = fit_ridge(lambda: fitted, 4, 6).penalty / (folds > 0).sum()  # the ridge head's own, for each image
    margins = {}
    for fold in range(5):
        seen = folds != fold
        centre = images.embeddings[seen].mean(axis=0, dtype=np.float64)
        share = np.eye(4)[images.labels[seen]].mean(axis=0)
        centred = np.concatenate([images.embeddings[seen] - centre, np.sqrt(penalty * seen.sum()) * np.eye(6)])
        targets = np.concatenate([np.eye(4)[images.labels[seen]] - share, np.zeros((6, 4))])
        weight = np.linalg.lstsq(centred, targets, rcond=None)[0]
        for row in np.flatnonzero(~seen).tolist():
            scores, label = (images.embeddings[row] - centre) @ weight + share, images.labels[row]
            others = np.delete(np.arange(4), label)
            rival = others[scores[others].argmax()]
            margins[row] = (float(scores[label] - scores[rival]), NAMES[rival])
    return margins


def test_each_label_is_judged_by_a_head_that_has_not_seen_it() -> None:
    images = clusters(60, noise=2.0)
    card, expected = grade(images, NAMES), margins_by_refitting(images)
    negative = sorted((margin, row) for row, (margin, _) in expected.items() if margin < 0)
    assert card.num_labels_judged == 60
    assert card.num_labels_doubtful == len(negative) > grading.NUM_DOUBTFUL / 2
    assert [each.row for each in card.doubtful] == [row for _, row in negative][: grading.NUM_DOUBTFUL]
    for each in card.doubtful:
        assert (each.label, each.predicted) == (NAMES[images.labels[each.row]], expected[each.row][1])
        assert each.margin == pytest.approx(expected[each.row][0])
        assert each.key == images.keys[each.row].tobytes().hex()


def test_wrong_labels_are_found() -> None:
    images = clusters(200)
    wrong = [3, 77, 120]
    labels = images.labels.copy()
    labels[wrong] = (labels[wrong] + 1) % 4
    card = grade(dataclasses.replace(images, labels=labels), NAMES)
    assert sorted(each.row for each in card.doubtful) == wrong
    assert all(NAMES[images.labels[each.row]] == each.predicted for each in card.doubtful)


def test_good_embeddings_get_a_good_card_without_warnings() -> None:
    card = grade(clusters(400), NAMES, evaluation=clusters(80, seed=1))
    assert shares(card) == [1.0, 1.0, 1.0]
    assert (card.num_graded, card.num_held_out, card.chance) == (400, 80, 0.25)
    assert (card.confused, card.doubtful, card.small_classes, card.warnings()) == ((), (), (), [])
    assert [label for label, _ in card.rows()] == [
        *("nearest mean", "ridge head", "10-NN", "measured on", "effective rank", "doubtful labels")
    ]
    assert dict(card.rows())["measured on"] == "80 images of the evaluation set"


def test_a_fifth_is_held_out_when_there_is_no_evaluation_set() -> None:
    images = clusters(101)
    card, folds = grade(images, NAMES), np.array(fold_of(images))
    assert (card.held_out_from, card.num_held_out) == ("fifth", 21)
    means = np.stack([images.embeddings[(folds > 0) & (images.labels == row)].mean(axis=0) for row in range(4)])
    held_out = images.embeddings[folds == 0]
    nearest = np.linalg.norm(held_out[:, None] - means, axis=2).argmin(axis=1)
    assert card.nearest_mean == accuracy(nearest == images.labels[folds == 0])
    assert card.basis() == "21 images: a fifth, held out by sample key"


def test_copies_of_an_image_stay_on_one_side() -> None:
    random = np.random.default_rng(0)
    # Nothing can be learnt but the images themselves: whoever has seen a copy is right.
    once, labels = random.normal(size=(300, 8)), random.integers(0, 4, 300)
    card = grade(embedded(np.repeat(once, 2, 0), np.repeat(labels, 2), np.repeat(np.arange(300), 2)), NAMES)
    assert card.num_held_out == 120
    assert max(shares(card)) < 0.45
    assert card.num_labels_doubtful > 300


def test_images_of_the_evaluation_set_are_not_fitted_on() -> None:
    random = np.random.default_rng(0)
    images = embedded(random.normal(size=(300, 8)), random.integers(0, 4, 300))
    card = grade(images, NAMES, evaluation=images.take(np.arange(100)))
    assert card.num_images_on_both_sides == 100
    assert max(shares(card)) < 0.45
    assert "100 images are in the evaluation set too: left out of fitting." in card.warnings()
    everything = grade(images, NAMES, evaluation=images)
    assert (everything.accuracies(), everything.num_labels_judged) == ([], 0)
    assert everything.warnings()[0] == "No accuracy is known: no image was left to fit a classifier on."
    json.dumps(everything.as_json(), allow_nan=False)


@pytest.mark.parametrize("with_evaluation", [False, True])
def test_the_order_of_rows_changes_nothing(with_evaluation: bool) -> None:
    images = clusters(90, noise=2.0)
    images = dataclasses.replace(images, keys=images.keys[np.arange(90) // 8 * 8])  # copies, twice under each label
    evaluation = clusters(40, noise=2.0, seed=1)
    order, other = np.random.default_rng(0).permutation(90), np.random.default_rng(1).permutation(40)
    first = grade(images, NAMES, evaluation=evaluation if with_evaluation else None)
    again = grade(images.take(order), NAMES, evaluation=evaluation.take(other) if with_evaluation else None)
    assert first == again
    assert first.num_images_with_several_labels == 12
    assert "12 images stand under several labels, pixel by pixel the same. Only one can be learnt." in first.warnings()


def test_no_more_images_are_graded_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "MAX_IMAGES", 50)
    monkeypatch.setattr(grading, "MAX_HELD_OUT", 10)
    card = grade(clusters(90), NAMES, evaluation=clusters(40, seed=1))
    assert (card.num_images, card.num_graded, card.num_held_out) == (90, 40, 10)
    assert card.basis() == ("10 images of the evaluation set; 40 of 90 images graded, chosen by sample key")
    alone = grade(clusters(90), NAMES)
    assert (alone.num_graded, alone.num_held_out) == (50, 10)


def test_confused_classes_are_counted_in_one_direction() -> None:
    images = clusters(200)
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    shown = np.array([1, 1, 3, 0, 1, 0, 2])  # what they look like
    unseen = embedded(clusters(4).embeddings[shown], labels, first_row=500)
    card = grade(images, NAMES, evaluation=unseen)
    assert card.confused == (
        Confusion("ant", "bee", 2, 0.5),
        Confusion("bee", "ant", 1, 0.5),
        Confusion("ant", "dog", 1, 0.25),
    )
    assert ("confused", "ant → bee, 2 (50.0 %)") in card.rows()
    assert card.classes_without_held_out == ("dog",)


def test_classes_with_few_images_are_named() -> None:
    images = clusters(100)
    few = images.take(np.flatnonzero((images.labels != 2) | (np.arange(100) < 16)))
    assert grade(few, NAMES).small_classes == (SmallClass("cat", 4),)
    assert "1 class has fewer than 10 images, too few for a reliable mean." in grade(few, NAMES).warnings()
    asked = grade(images, NAMES, per_class=30)
    assert [each.name for each in asked.small_classes] == list(NAMES)
    assert asked.warnings() == []


def test_a_class_on_one_side_only_is_said() -> None:
    images, unseen = clusters(100), clusters(40, seed=1)
    card = grade(images.take(images.labels != 3), NAMES, evaluation=unseen)
    assert card.classes_without_training == ("dog",)
    assert shares(card) == [0.75, 0.75, 0.75]
    assert "1 class has held-out images only: counted as wrong." in card.warnings()
    assert SmallClass("dog", 0) in card.small_classes


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_teacher_that_knows_nothing_is_found_out(num_classes: int) -> None:
    random = np.random.default_rng(0)
    images = embedded(random.normal(size=(500, 8)), random.integers(0, num_classes, 500))
    warnings = grade(images, NAMES[:num_classes]).warnings()
    assert warnings[0].startswith("The teacher is hardly better than chance: its best accuracy may be as low as ")
    good = grade(clusters(500, num_classes), NAMES[:num_classes])
    assert good.warnings() == []


def test_most_labels_are_doubtful_where_labels_are_noise() -> None:
    random = np.random.default_rng(0)
    images = embedded(random.normal(size=(200, 4)), random.integers(0, 4, 200))
    card = grade(images, NAMES)
    assert any(text.startswith("Most labels look doubtful: ") for text in card.warnings())
    assert len(card.doubtful) == grading.NUM_DOUBTFUL


def test_a_ridge_head_far_better_than_class_means_is_said() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 800)
    informative = np.eye(4)[labels] + 0.05 * random.normal(size=(800, 4))
    images = embedded(np.concatenate([informative, 20 * random.normal(size=(800, 6))], axis=1), labels)
    warnings = grade(images, NAMES).warnings()
    assert len(warnings) == 1
    assert "points better than the nearest class mean: class means alone lose much" in warnings[0]


def test_embeddings_on_a_line_are_said() -> None:
    position = np.arange(400) % 4 + 0.01 * np.random.default_rng(0).normal(size=400)
    card = grade(embedded(position[:, None] * np.ones(5), np.arange(400) % 4), NAMES)
    assert card.effective_rank == pytest.approx(1)
    assert "The embeddings hardly vary: their effective rank is 1.0 of 5. Try another --pooling or teacher." in (
        card.warnings()
    )


@pytest.mark.parametrize(
    ("embeddings", "labels", "names"),
    [
        (np.random.default_rng(0).normal(size=(30, 3)), np.zeros(30, int), NAMES[:1]),  # one class
        (np.random.default_rng(0).normal(size=(4, 3)), np.arange(4), NAMES),  # an image a class
        (np.full((30, 3), 0.1), np.arange(30) % 4, NAMES),  # all equal
        (np.zeros((30, 3)), np.arange(30) % 4, NAMES),  # without a direction
        (np.arange(30)[:, None], np.arange(30) % 4, NAMES),  # one value
        (np.ones((1, 2)), np.zeros(1, int), NAMES),  # one image
        (np.random.default_rng(0).normal(size=(2, 600)), np.arange(2), NAMES),  # more values than images
    ],
)
def test_nothing_is_too_poor_to_be_graded(embeddings: Any, labels: Any, names: tuple[str, ...]) -> None:
    card = grade(embedded(embeddings, labels), names)
    json.dumps(card.as_json(), allow_nan=False)
    assert card.warnings()
    assert all(0 <= each.low <= each.share <= each.high <= 1 for _, each in card.accuracies())


def test_degenerate_cards_say_what_is_missing() -> None:
    one_class = grade(embedded(np.random.default_rng(0).normal(size=(30, 3)), [0] * 30), NAMES[:1])
    assert one_class.warnings() == ["There is one class only: accuracies say nothing."]
    assert (one_class.class_mean_cosine, one_class.num_labels_judged) == (None, 0)
    one_of_four = grade(embedded(np.random.default_rng(0).normal(size=(30, 3)), [2] * 30), NAMES)
    assert (one_of_four.num_labels_judged, one_of_four.chance, shares(one_of_four)) == (0, 1.0, [1.0, 1.0, 1.0])
    one_image = grade(embedded(np.ones((2, 2)), [0, 0], [5, 5]), NAMES)
    assert (one_image.ridge, one_image.num_held_out) == (None, 2)
    equal = grade(embedded(np.full((30, 3), 0.1), np.arange(30) % 4), NAMES)
    assert (equal.effective_rank, equal.class_mean_cosine_centred) == (0, 0)


def test_json_has_these_keys_and_plain_types() -> None:
    card = grade(clusters(60, noise=3.0), NAMES)
    document = card.as_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert list(document) == [
        "num_classes",
        "embed_dim",
        "num_images",
        "num_graded",
        "held_out_from",
        "num_held_out",
        "chance",
        "nearest_mean",
        "ridge",
        "ten_neighbours",
        "effective_rank",
        "class_mean_cosine",
        "class_mean_cosine_centred",
        "num_labels_judged",
        "num_labels_doubtful",
        "num_images_with_several_labels",
        "num_images_on_both_sides",
        "classes_without_held_out",
        "classes_without_training",
        "small_classes",
        "confused",
        "doubtful",
        "warnings",
    ]
    assert list(document["ridge"]) == ["num_images", "num_right", "share", "low", "high"]
    assert list(document["confused"][0]) == ["label", "predicted", "num_images", "share"]
    assert list(document["doubtful"][0]) == ["row", "key", "label", "predicted", "margin"]
    assert document["warnings"] == card.warnings()


def test_embeddings_may_be_float16_of_which_few_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    images = clusters(90)
    half = dataclasses.replace(images, embeddings=images.embeddings.astype(np.float16))
    rounded = dataclasses.replace(images, embeddings=half.embeddings.astype(np.float32))
    assert grade(half, NAMES) == grade(rounded, NAMES)
    monkeypatch.setattr(grading, "MAX_IMAGES", 50)
    last = np.argmax([key.tobytes() for key in images.keys])
    half.embeddings[last] = np.nan
    assert grade(half, NAMES).num_graded == 50


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"labels": np.array([0, 1, 4])}, IndexError, "labels go from 0 to 4, expected 0…3"),
        ({"labels": np.array([0, -1, 2])}, IndexError, "labels go from -1 to 2, expected 0…3"),
        ({"embeddings": np.full((3, 2), np.nan, np.float32)}, ValueError, "embeddings hold NaN or infinity"),
        ({"rows": np.arange(2)}, ValueError, "embeddings, labels, keys and rows are ((3, 2), (3,), (3, 16), (2,))"),
    ],
)
def test_arrays_that_cannot_be_graded_are_refused(change: Any, kind: type[Exception], text: str) -> None:
    images = dataclasses.replace(embedded(np.ones((3, 2)), [0, 1, 2]), **change)
    with pytest.raises(kind) as error:
        grade(images, NAMES)
    assert str(error.value).startswith(text)


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no images"):
        grade(embedded(np.zeros((0, 2)), []).take(np.arange(0)), NAMES)
