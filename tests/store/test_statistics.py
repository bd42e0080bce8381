import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from store import ClassStatistics
from tests.store.examples import SEARCH

NUM_CLASSES, EMBED_DIM = 3, 2


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
