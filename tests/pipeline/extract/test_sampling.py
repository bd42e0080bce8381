"""Which images stand for a class."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.extract.sampling import check_no_empty_class, rows_within, sample_rows

NAMES = ("ant", "bee", "cat")
# 20 ants, 10 bees, 3 cats, in an order of no meaning.
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [20, 10, 3])).astype(np.int64)


def rows_of(rows: NDArray[np.int64], index: int) -> list[int]:
    return [row for row in rows.tolist() if LABELS[row] == index]


@pytest.mark.parametrize(
    ("per_class", "counts", "short"),
    [(1, [1, 1, 1], 0), (3, [3, 3, 3], 0), (5, [5, 5, 3], 1), (10, [10, 10, 3], 1), (11, [11, 10, 3], 2)],
)
def test_each_class_gives_so_many_rows_or_all_that_it_has(per_class: int, counts: list[int], short: int) -> None:
    rows, short_classes = sample_rows(LABELS, NAMES, per_class, seed=0)
    assert np.bincount(LABELS[rows]).tolist() == counts
    assert short_classes == short
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_none_takes_every_row() -> None:
    rows, short_classes = sample_rows(LABELS, NAMES, None, seed=0)
    assert rows.tolist() == list(range(33))
    assert short_classes == 0


def test_the_same_seed_chooses_the_same_rows() -> None:
    first, second = (sample_rows(LABELS, NAMES, 3, seed=7)[0] for _ in range(2))
    assert first.tolist() == second.tolist()


def test_another_seed_chooses_other_rows() -> None:
    choices = {tuple(sample_rows(LABELS, NAMES, 5, seed)[0].tolist()) for seed in range(10)}
    assert len(choices) == 10


def test_every_row_of_a_class_can_be_chosen() -> None:
    chosen = {row for seed in range(60) for row in sample_rows(LABELS, NAMES, 2, seed)[0].tolist()}
    assert chosen == set(range(33))


def test_classes_have_random_streams_of_their_own() -> None:
    # Two classes of equal size whose rows alternate: with one stream for both they would agree on the ranks.
    labels = np.tile(np.array([0, 1], np.int64), 50)
    rows, _ = sample_rows(labels, ("ant", "bee"), 10, seed=0)
    ranks = [(rows[labels[rows] == index] // 2).tolist() for index in (0, 1)]
    assert ranks[0] != ranks[1]


def test_a_class_more_changes_no_other_choice() -> None:
    before, _ = sample_rows(LABELS, NAMES, 4, seed=3)
    labels = np.concatenate([LABELS, np.full(12, 3)])
    after, _ = sample_rows(labels, (*NAMES, "dog"), 4, seed=3)
    assert [row for row in after.tolist() if labels[row] != 3] == before.tolist()
    assert (labels[after] == 3).sum() == 4


def test_a_class_without_images_is_refused() -> None:
    with pytest.raises(PipelineError) as error:
        sample_rows(LABELS, (*NAMES, "dog"), 4, seed=0)
    assert str(error.value) == (
        "1 of 4 classes have no image (dog). Every class needs at least one: "
        "choose another split, raise --limit, or remove the class from the data set."
    )


def test_at_most_five_classes_without_images_are_named() -> None:
    names = [f"c{index}" for index in range(8)]
    with pytest.raises(PipelineError) as error:
        check_no_empty_class(np.array([0, 2, 0, 0, 0, 0, 0, 1]), names)
    assert str(error.value) == (
        "6 of 8 classes have no image (c0, c2, c3, c4, c5, …). Every class needs at least one: "
        "choose another split, raise --limit, or remove the class from the data set."
    )
    with pytest.raises(PipelineError, match=r"^5 of 6 classes have no image \(c0, c1, c2, c3, c4\)\. "):
        check_no_empty_class(np.array([0, 0, 0, 0, 0, 1]), names[:6])


def test_classes_with_images_pass() -> None:
    check_no_empty_class(np.array([1, 5]), ("ant", "bee"))


def rows_data(*, classes_named: bool) -> Any:
    """Ten rows of which the labels go round three classes."""
    return cast(
        "Any",
        SimpleNamespace(
            num_rows_before_limit=10,
            numbers=np.arange(10),
            labels=np.arange(10) % 3,
            class_names=NAMES,
            classes_named=classes_named,
        ),
    )


def test_a_part_without_a_chosen_image_is_refused() -> None:
    with pytest.raises(PipelineError) as error:
        rows_within(rows_data(classes_named=True), np.array([0, 9]), (3, 6))
    assert str(error.value) == "--rows 3:6: none of the chosen images stands there. Take a larger part."


def test_classes_without_names_must_all_be_in_a_part() -> None:
    data = rows_data(classes_named=False)
    assert rows_within(data, np.arange(10), (3, 6)).tolist() == [3, 4, 5]
    with pytest.raises(PipelineError) as error:
        rows_within(data, np.arange(10), (3, 5))
    assert str(error.value) == (
        "--rows 3:5: 1 of 3 classes have no image there, and classes without names are known by their place. Name the "
        "classes, shuffle the data, or take larger parts."
    )
