from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import store
from store.quantize import decode_embeddings, encode_embeddings, quantize, row_scales, sample_embeddings
from tests.store.examples import SEARCH, all_tensors, int8_tensors, make_manifest

pytestmark = pytest.mark.filterwarnings("error")

FLOAT32 = np.finfo(np.float32)
LARGEST = float(FLOAT32.max) / 128 * 127  # of what int8 takes: with it −128, too, decodes to a finite number

magnitudes = st.sampled_from([0.0, 1e-45, 1e-40, 1e-37, 2e-36, 1e-20, 1e-3, 1.0, 1e4, 1e20, 3e38])


@st.composite
def embeddings_of_any_size(draw: st.DrawFn) -> NDArray[np.float32]:
    """Draw [S, V, D] float32 whose rows are of very different sizes."""
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=5))
    numbers = draw(hnp.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32)))
    rows = draw(hnp.arrays(np.float32, shape[:2], elements=magnitudes.map(np.float32)))
    return np.asarray(numbers * rows[..., None], np.float32)


def with_row(*values: float) -> NDArray[np.float32]:
    return np.array([[values]], np.float32)


@SEARCH
@given(embeddings=embeddings_of_any_size())
def test_int8_is_off_by_half_a_step_at_most(embeddings: NDArray[np.float32]) -> None:
    scales = row_scales(embeddings)
    decoded = decode_embeddings(encode_embeddings(embeddings, "int8"), scales)
    error = np.abs(decoded.astype(np.float64) - embeddings)
    largest = np.abs(embeddings).max(axis=-1).astype(np.float64)
    # Half a step, and the roundings to float32: of the scale and the product.
    bound = scales / 2 + 2 * largest * FLOAT32.eps + FLOAT32.tiny
    bound[scales == 0] = largest[scales == 0]
    assert (error <= bound[..., None]).all()
    assert (largest[scales == 0] < 127.001 * FLOAT32.tiny).all()
    assert scales.dtype == np.float32


def test_a_value_is_divided_by_the_scale_to_the_bit() -> None:
    # Half of the largest value is next to 63.5 steps: which one is nearest, the rounding of the scale decides.
    largest = np.random.default_rng(0).uniform(0.1, 10, 1000).astype(np.float32)
    embeddings = np.stack([largest, largest / 2, -largest / 2], axis=-1)[:, None]
    scales = row_scales(embeddings)
    rows = zip(embeddings[:, 0].tolist(), scales[:, 0].tolist(), strict=True)
    steps = [[round(value / scale) for value in row] for row, scale in rows]
    assert {row[1] for row in steps} == {63, 64}
    assert quantize(embeddings, scales)[:, 0].tolist() == steps


@SEARCH
@given(embeddings=embeddings_of_any_size())
def test_quantizing_again_changes_no_step(embeddings: NDArray[np.float32]) -> None:
    scales = row_scales(embeddings)
    steps = quantize(embeddings, scales)
    again = decode_embeddings(steps, scales)
    np.testing.assert_array_equal(quantize(again, row_scales(again)), steps)
    np.testing.assert_array_max_ulp(row_scales(again), scales, 1)


@SEARCH
@given(embeddings=embeddings_of_any_size())
def test_the_largest_value_of_a_row_becomes_127(embeddings: NDArray[np.float32]) -> None:
    scales = row_scales(embeddings)
    largest = np.abs(quantize(embeddings, scales).astype(np.int16)).max(axis=-1)
    np.testing.assert_array_equal(largest, np.where(scales > 0, 127, 0))


def test_each_view_of_a_row_has_a_scale_of_its_own() -> None:
    embeddings = np.array([[[127, -1, 0], [0, 0, 0]], [[0.5, -254, 1], [0.25, 0, 0.5]]], np.float32)
    scales = row_scales(embeddings)
    assert scales.tolist() == [[1, 0], [2, np.float32(0.5 / 127)]]
    assert quantize(embeddings, scales).tolist() == [[[127, -1, 0], [0, 0, 0]], [[0, -127, 0], [64, 0, 127]]]


def test_halves_are_rounded_to_the_even_step() -> None:
    embeddings = with_row(0.5, 1.5, 2.5, -0.5, -1.5, -2.5)
    assert quantize(embeddings, np.ones((1, 1), np.float32)).tolist() == [[[0, 2, 2, 0, -2, -2]]]


def test_values_beyond_the_scale_end_at_127() -> None:
    assert quantize(with_row(1000, -1000), np.ones((1, 1), np.float32)).tolist() == [[[127, -127]]]


@pytest.mark.parametrize("largest", [1e-45, 1e-44, 1.3e-43, 1e-42, 1e-41, 1e-38, 1.4e-36])
def test_a_row_too_small_for_a_normal_scale_becomes_zero(largest: float) -> None:
    embeddings = with_row(largest, largest / 2, 0, -largest / 3)
    scales = row_scales(embeddings)
    assert scales.tolist() == [[0]]
    assert quantize(embeddings, scales).tolist() == [[[0, 0, 0, 0]]]


def test_the_largest_row_decodes_to_finite_numbers() -> None:
    embeddings = with_row(LARGEST, -LARGEST / 4, 0)
    scales = row_scales(embeddings)
    steps = encode_embeddings(embeddings, "int8")
    assert steps.tolist() == [[[127, -32, 0]]]
    assert np.isfinite(decode_embeddings(np.full_like(steps, -128), scales)).all()


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float16", 65505, "an embedding reaches 6.55e+04, float16 ends at 6.55e+04. Pass --dtype float32."),
        ("float16", -1e6, "an embedding reaches 1e+06, float16 ends at 6.55e+04. Pass --dtype float32."),
        ("int8", FLOAT32.max, "an embedding reaches 3.403e+38, int8 ends at 3.376e+38. Pass --dtype float32."),
    ],
)
def test_what_does_not_fit_is_refused(dtype: str, value: float, message: str) -> None:
    with pytest.raises(store.ArtifactWriteError) as caught:
        encode_embeddings(with_row(1, value), dtype)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("float16", (65504, -65504, 1e-9, 1 / 3)), ("float32", (FLOAT32.max, FLOAT32.min, 1e-45, -0.0))],
)
def test_other_types_are_rounded_as_numpy_does(dtype: str, values: tuple[float, ...]) -> None:
    embeddings = with_row(*values)
    encoded = encode_embeddings(embeddings, dtype)
    assert encoded.tobytes() == embeddings.astype(dtype).tobytes()
    assert decode_embeddings(encoded, None).tobytes() == embeddings.astype(dtype).astype(np.float32).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_no_rows_are_no_error(dtype: str) -> None:
    encoded = encode_embeddings(np.zeros((0, 2, 4), np.float32), dtype)
    assert (encoded.shape, encoded.dtype) == ((0, 2, 4), np.dtype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_samples_are_gathered_as_numbers(storage: tuple[Path, dict[str, bool]], dtype: str) -> None:
    path, how = storage
    tensors: dict[str, Any] = int8_tensors() if dtype == "int8" else all_tensors()
    if dtype == "float32":
        tensors["sample/embedding"] = tensors["sample/embedding"].astype(np.float32)
    store.write_artifact(path, make_manifest(), tensors, **how)
    store.verify_artifact(path)
    rows = np.array([4, 0, 0, 2])
    with store.open_artifact(path) as artifact:
        found = sample_embeddings(artifact, rows)
        assert sample_embeddings(artifact, rows[:0]).shape == (0, 2, 4)
    stored = tensors["sample/embedding"][rows].astype(np.float64)
    expected = stored * tensors["sample/scale"][rows][..., None] if dtype == "int8" else stored
    assert found.dtype == np.float32
    assert found.tolist() == expected.tolist()
