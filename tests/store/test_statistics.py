from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from store import ClassStatistics
from tests.store.examples import SEARCH

NUM_CLASSES, EMBED_DIM = 3, 2
Array = NDArray[Any]
SLACK = 1 + 1e-6  # rounding in float64 costs 2⁻²⁹ of rounding to float32: it decides nothing but a tie


def expected(
    embeddings: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    count = np.bincount(labels, minlength=NUM_CLASSES)
    mean = np.zeros((NUM_CLASSES, EMBED_DIM))
    m2 = np.zeros((NUM_CLASSES, EMBED_DIM))
    for index in np.flatnonzero(count):
        rows = embeddings[labels == index].astype(np.float64)
        mean[index], m2[index] = rows.mean(axis=0), rows.var(axis=0) * len(rows)
    return count, mean, m2


@settings(SEARCH, max_examples=100)
@given(data=st.data(), num_rows=st.integers(0, 30))
def test_any_split_into_batches_gives_mean_and_m2_of_all_rows(data: st.DataObject, num_rows: int) -> None:
    values = st.floats(-1000, 1000, width=32)
    embeddings = data.draw(hnp.arrays(np.float32, (num_rows, EMBED_DIM), elements=values))
    labels = data.draw(hnp.arrays(np.int64, num_rows, elements=st.integers(0, NUM_CLASSES - 1)))
    cuts = sorted(data.draw(st.lists(st.integers(0, num_rows))))

    statistics = ClassStatistics(NUM_CLASSES, EMBED_DIM)
    for start, stop in zip([0, *cuts], [*cuts, num_rows], strict=True):
        statistics.add(embeddings[start:stop], labels[start:stop])

    count, mean, m2 = expected(embeddings, labels)
    np.testing.assert_array_equal(statistics.count, count)
    np.testing.assert_allclose(statistics.mean, mean, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(statistics.m2, m2, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_a_large_offset_costs_no_precision(batch_size: int) -> None:
    noise = np.random.default_rng(0).normal(scale=1e-3, size=(500, EMBED_DIM))
    embeddings = 1e6 + noise
    statistics = ClassStatistics(1, EMBED_DIM)
    for start in range(0, len(embeddings), batch_size):
        batch = embeddings[start : start + batch_size]
        statistics.add(batch, np.zeros(len(batch), np.int64))
    # The inputs themselves are rounded to 1.2e-10; Σx² − (Σx)²/n would be off by more than 100 %.
    np.testing.assert_allclose(statistics.mean[0] - 1e6, noise.mean(axis=0), rtol=0, atol=1e-8)
    np.testing.assert_allclose(statistics.m2[0], noise.var(axis=0) * 500, rtol=1e-6)


def test_half_precision_is_accumulated_in_double() -> None:
    embeddings = np.full((4096, EMBED_DIM), 60_000, np.float16)
    statistics = ClassStatistics(1, EMBED_DIM)
    statistics.add(embeddings, np.zeros(4096, np.int32))
    assert (statistics.mean == float(np.float16(60_000))).all()
    assert (statistics.m2 == 0).all()


def test_the_input_is_left_as_it_was() -> None:
    embeddings = np.ones((2, EMBED_DIM))
    statistics = ClassStatistics(1, EMBED_DIM)
    statistics.add(embeddings, np.zeros(2, np.int64))
    statistics.add(embeddings + 1, np.zeros(2, np.int64))
    assert (embeddings == 1).all()
    assert statistics.mean.tolist() == [[1.5, 1.5]]
    assert statistics.m2.tolist() == [[1.0, 1.0]]


def test_tensors_have_the_names_and_dtypes_of_the_format() -> None:
    statistics = ClassStatistics(NUM_CLASSES, EMBED_DIM)
    statistics.add(np.array([[1, 2], [3, 6]], np.float32), np.array([2, 2]))
    tensors = statistics.tensors()
    assert {name: array.dtype.name for name, array in tensors.items()} == {
        "class/count": "int64",
        "class/mean": "float32",
        "class/m2": "float32",
    }
    assert {name: array.tolist() for name, array in tensors.items()} == {
        "class/count": [0, 0, 2],
        "class/mean": [[0, 0], [0, 0], [2, 4]],
        "class/m2": [[0, 0], [0, 0], [2, 8]],
    }


def test_a_class_beyond_the_last_is_an_error() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        ClassStatistics(1, EMBED_DIM).add(np.ones((1, EMBED_DIM)), np.array([1]))


def float64_error(rows: Array) -> float:
    """Return what summing in float64 may cost a mean: more than the stated bound where large numbers cancel."""
    return len(rows) * 2.0**-53 * float(np.abs(rows).max())


def ulp(values: Array) -> NDArray[np.float64]:
    return np.spacing(np.abs(values).astype(np.float32)).astype(np.float64)


def of_one_class(embeddings: Array) -> dict[str, Array]:
    """Return the tensors of an extraction of these images, [N, D]."""
    statistics = ClassStatistics(1, embeddings.shape[1])
    statistics.add(embeddings, np.zeros(len(embeddings), np.int64))
    return statistics.tensors()


def merged(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Merge the tensors of one class."""
    statistics = ClassStatistics(1, parts[0]["class/mean"].shape[1])
    for part in parts:
        statistics.merge(part["class/count"], part["class/mean"], part["class/m2"], np.zeros(1, np.int64))
    return statistics.tensors()


def assert_merged(found: Mapping[str, Array], expected: Mapping[str, Array], parts: Sequence[Array]) -> None:
    """Check a class against one extraction of all its images, with the bound that `ClassStatistics.merge` states.

    `found` and `expected` hold the class's rows; `parts` are its embeddings in each merged artifact, [nᵢ, D].
    """
    rows = np.concatenate(parts).astype(np.float64)
    counts = np.array([[len(part)] for part in parts])
    means = np.array([part.astype(np.float64).mean(axis=0) for part in parts])
    mean_bound = ulp(means).max(axis=0)
    m2_bound = 2 * ulp(np.maximum(found["class/m2"], expected["class/m2"]))
    m2_bound += mean_bound * (counts * np.abs(means - rows.mean(axis=0))).sum(axis=0)
    m2_bound += len(rows) * mean_bound**2 / 4

    np.testing.assert_array_equal(found["class/count"], expected["class/count"])
    mean_error, m2_error = (
        np.abs(found[name].astype(np.float64) - expected[name]) for name in ("class/mean", "class/m2")
    )
    assert (mean_error <= SLACK * mean_bound + float64_error(rows)).all()
    assert (m2_error <= SLACK * m2_bound).all()


@st.composite
def parts_of_a_class(draw: st.DrawFn) -> list[NDArray[np.float32]]:
    """Draw the embeddings of two to five parts: a common offset, and from it few steps of one size."""
    offset = draw(st.floats(-1e4, 1e4, width=32))
    step = draw(st.integers(-40, 40).map(lambda exponent: 2.0**exponent) | st.just(float(np.spacing(np.float32(1e4)))))
    counts = draw(st.lists(st.sampled_from([1, 2, 3, 7, 40]), min_size=2, max_size=5))
    steps = st.integers(-draw(st.integers(0, 9)), 9)
    drawn = [draw(hnp.arrays(np.int64, (count, EMBED_DIM), elements=steps)) for count in counts]
    return [(offset + step * part).astype(np.float32) for part in drawn]


@settings(SEARCH, max_examples=300)
@given(parts=parts_of_a_class())
def test_merging_parts_equals_one_extraction_within_the_stated_bound(parts: list[NDArray[np.float32]]) -> None:
    found = merged([of_one_class(part) for part in parts])
    assert_merged(found, of_one_class(np.concatenate(parts)), parts)


@pytest.mark.parametrize(
    ("one", "other", "expected", "found"),
    [
        ([0, 1], [1, 2], 2, 5),  # the means ½ and 1½ are rounded to 0 and 2: off by the whole bound
        ([3, 4], [4, 5], 2, 1),  # 3½ and 4½ are both rounded to 4
        ([0, 0], [0, 1], 0.75, 0.5),  # 0 and ½ are both rounded to 0
    ],
)
def test_rounding_the_means_costs_what_the_bound_says(
    one: list[int], other: list[int], expected: float, found: float
) -> None:
    unit = 2.0**-10  # the ulp of 2¹³
    parts = [8192 + unit * np.array(rows, np.float32)[:, None] for rows in (one, other)]
    whole, of_parts = of_one_class(np.concatenate(parts)), merged([of_one_class(part) for part in parts])
    assert whole["class/m2"].item() == expected * unit**2
    assert of_parts["class/m2"].item() == found * unit**2
    assert_merged(of_parts, whole, parts)


@dataclass
class Merged:
    """A merge of merges: its images, its tensors, and how far from the truth these may be."""

    rows: Array
    tensors: dict[str, Array]
    mean_error: Array
    m2_error: Array


def leaf(rows: Array) -> Merged:
    tensors = of_one_class(rows)
    return Merged(rows, tensors, ulp(tensors["class/mean"]) / 2, ulp(tensors["class/m2"]) / 2)


def join(parts: list[Merged]) -> Merged:
    """Merge, and add up the errors in the way of the proof in `ClassStatistics.merge`."""
    rows, tensors = np.concatenate([part.rows for part in parts]), merged([part.tensors for part in parts])
    mean = rows.astype(np.float64).mean(axis=0)
    mean_error = np.max([part.mean_error for part in parts], axis=0)
    m2_error = np.sum([part.m2_error for part in parts], axis=0) + len(rows) * mean_error**2
    for part in parts:
        away = np.abs(part.rows.astype(np.float64).mean(axis=0) - mean)
        m2_error += 2 * len(part.rows) * away * mean_error
    return Merged(rows, tensors, mean_error + ulp(tensors["class/mean"]) / 2, m2_error + ulp(tensors["class/m2"]) / 2)


@settings(SEARCH, max_examples=200)
@given(parts=parts_of_a_class(), data=st.data())
def test_merging_is_associative_and_commutative_within_rounding(
    parts: list[NDArray[np.float32]], data: st.DataObject
) -> None:
    rows = np.concatenate(parts).astype(np.float64)
    left = data.draw(st.permutations([leaf(part) for part in parts]))
    while len(left) > 1:
        count = data.draw(st.integers(2, len(left)))
        left = [*left[count:], join(left[:count])]
    (result,) = left
    assert result.tensors["class/count"].tolist() == [len(rows)]
    mean, m2 = rows.mean(axis=0), rows.var(axis=0) * len(rows)
    assert (np.abs(result.tensors["class/mean"] - mean) <= SLACK * result.mean_error + float64_error(rows)).all()
    assert (np.abs(result.tensors["class/m2"] - m2) <= SLACK * result.m2_error).all()


def test_merging_adds_to_the_rows_of_the_classes_alone() -> None:
    statistics = ClassStatistics(4, 1)
    count, mean, m2 = np.array([1, 3]), np.array([[2.0], [4.0]]), np.array([[0.0], [6.0]])
    statistics.merge(count, mean, m2, np.array([3, 1]))
    statistics.merge(count, mean, m2, np.array([1, 0]))
    assert statistics.count.tolist() == [3, 4, 0, 1]
    assert statistics.mean.tolist() == [[4], [3.5], [0], [2]]
    assert statistics.m2.tolist() == [[6], [6 + 4 * 3 / 4], [0], [0]]


def test_a_class_without_images_adds_nothing() -> None:
    statistics = ClassStatistics(2, 1)
    statistics.add(np.array([[1.0], [3.0]]), np.array([1, 1]))
    statistics.merge(np.zeros(2, np.int64), np.full((2, 1), 7.0), np.zeros((2, 1)), np.array([0, 1]))
    assert statistics.count.tolist() == [0, 2]
    assert statistics.mean.tolist() == [[0], [2]]
    assert statistics.m2.tolist() == [[0], [2]]
