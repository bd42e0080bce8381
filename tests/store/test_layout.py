import re
from typing import Any

import numpy as np
import pytest

import store
from store.layout import RULES, check_finite, check_layout, num_bytes, numpy_dtype
from tests.store.examples import Tensors, all_tensors, int8_tensors, make_manifest


def infos(tensors: Tensors | None = None) -> dict[str, store.TensorInfo]:
    tensors = all_tensors() if tensors is None else tensors
    return {name: store.TensorInfo(dtype=array.dtype.name, shape=array.shape) for name, array in tensors.items()}


def refusal(tensors: dict[str, store.TensorInfo], **fields: Any) -> str:
    with pytest.raises(store.ArtifactFormatError) as caught:
        check_layout(make_manifest(tensors=tensors, **fields), "file")
    return str(caught.value)


def test_every_tensor_of_the_format_has_an_example_that_is_accepted() -> None:
    assert set(infos()) | set(infos(int8_tensors())) == set(RULES)
    check_layout(make_manifest(tensors=infos()), "file")
    check_layout(make_manifest(tensors=infos(int8_tensors())), "file")


@pytest.mark.parametrize("dropped", [("sample/",), ("head/",), ("class/text",), ("head/", "sample/")])
def test_optional_tensors_may_be_missing(dropped: tuple[str, ...]) -> None:
    tensors = {name: info for name, info in infos().items() if not name.startswith(dropped)}
    check_layout(make_manifest(tensors=tensors), "file")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sample_embeddings_may_be_of_both_float_types(dtype: str) -> None:
    tensors = infos() | {"sample/embedding": store.TensorInfo(dtype=dtype, shape=(5, 2, 4))}
    check_layout(make_manifest(tensors=tensors), "file")


@pytest.mark.parametrize(
    "name",
    [
        "class/count",
        "class/mean",
        "class/m2",
        "head/weight",
        "head/bias",
        "sample/key",
        "sample/label",
        "sample/embedding",
    ],
)
def test_a_missing_tensor_is_refused(name: str) -> None:
    tensors = infos()
    del tensors[name]
    assert refusal(tensors) == f"file: {name} is missing. Extract the artifact again."


def test_the_first_missing_tensor_in_order_of_names_is_reported() -> None:
    assert refusal({}) == "file: class/count is missing. Extract the artifact again."


def test_int8_embeddings_without_scale_are_refused() -> None:
    tensors = infos(int8_tensors())
    del tensors["sample/scale"]
    assert refusal(tensors) == "file: sample/scale is missing. Extract the artifact again."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("class/count", "int64"),
        ("class/mean", "float32"),
        ("class/m2", "float32"),
        ("class/text", "float32"),
        ("head/weight", "float32"),
        ("head/bias", "float32"),
        ("sample/key", "uint8"),
        ("sample/label", "int32"),
        ("sample/embedding", "float32 or float16 or int8"),
        ("sample/scale", "float32"),
    ],
)
def test_another_dtype_is_refused(name: str, expected: str) -> None:
    tensors = infos(int8_tensors() if name == "sample/scale" else None)
    tensors[name] = store.TensorInfo(dtype="float64", shape=tensors[name].shape)
    assert refusal(tensors) == f"file: {name} is float64, expected {expected}."


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("class/count", (2,), "[3] (C"),
        ("class/count", (3, 1), "[3] (C"),
        ("class/mean", (4, 3), "[3, 4] (C × D"),
        ("class/m2", (3,), "[3, 4] (C × D"),
        ("class/text", (3, 5), "[3, 4] (C × D"),
        ("head/weight", (3, 0), "[3, 4] (C × D"),
        ("head/bias", (), "[3] (C"),
        ("sample/key", (5, 15), "[5, 16] (S × 16"),
        ("sample/label", (6,), "[5] (S"),
        ("sample/embedding", (5, 4), "[5, 2, 4] (S × V × D"),
        ("sample/embedding", (5, 3, 4), "[5, 2, 4] (S × V × D"),
        ("sample/scale", (5, 2, 4), "[5, 2] (S × V"),
    ],
)
def test_another_shape_is_refused(name: str, shape: tuple[int, ...], expected: str) -> None:
    tensors = infos(int8_tensors() if name == "sample/scale" else None)
    tensors[name] = store.TensorInfo(dtype=tensors[name].dtype, shape=shape)
    assert refusal(tensors) == (
        f"file: {name} has shape {list(shape)}, expected {expected}: 3 classes, embed_dim 4). "
        "The file is damaged: extract it again."
    )


def test_shapes_follow_the_manifest() -> None:
    assert refusal(infos(), classes=("a", "b")) == (
        "file: class/mean has shape [3, 4], expected [2, 4] (C × D: 2 classes, embed_dim 4). "
        "The file is damaged: extract it again."
    )


@pytest.mark.parametrize("shape", [(), (0, 16)])
def test_sample_keys_without_rows_are_refused(shape: tuple[int, ...]) -> None:
    tensors = infos() | {"sample/key": store.TensorInfo(dtype="uint8", shape=shape)}
    assert refusal(tensors).startswith(f"file: sample/key has shape {list(shape)}, expected ")


@pytest.mark.parametrize("dtype", ["float32", "float16", None])
def test_a_scale_without_int8_samples_is_refused(dtype: str | None) -> None:
    tensors = infos(int8_tensors())
    if dtype is None:
        tensors = {name: info for name, info in tensors.items() if name.startswith("class/")}
        tensors["sample/scale"] = store.TensorInfo(dtype="float32", shape=(5, 2))
    else:
        tensors["sample/embedding"] = store.TensorInfo(dtype=dtype, shape=(5, 2, 4))
    assert refusal(tensors) == "file: sample/scale stands without int8 samples. Extract the artifact again."


def test_tensors_that_the_format_does_not_name_are_left_alone() -> None:
    check_layout(make_manifest(tensors=infos() | {"future/x": store.TensorInfo(dtype="uint8", shape=(9,))}), "file")


@pytest.mark.parametrize(
    ("name", "itemsize"),
    [("float32", 4), ("float16", 2), ("int64", 8), ("int32", 4), ("int8", 1), ("uint8", 1)],
)
def test_every_dtype_is_little_endian(name: str, itemsize: int) -> None:
    dtype = numpy_dtype(name)
    assert (dtype.name, dtype.itemsize) == (name, itemsize)
    assert dtype == np.dtype(name).newbyteorder("<")


def test_a_dtype_that_the_format_does_not_have_is_a_key_error() -> None:
    with pytest.raises(KeyError, match=re.escape("'float64'")):
        numpy_dtype("float64")


def test_sizes_are_exact_beyond_64_bits() -> None:
    assert num_bytes(store.TensorInfo(dtype="float16", shape=(2**40, 2**40, 3))) == 6 * 2**80
    assert num_bytes(store.TensorInfo(dtype="int64", shape=())) == 8
    assert num_bytes(store.TensorInfo(dtype="float32", shape=(0, 5))) == 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(dtype: str, value: float) -> None:
    block = np.zeros((2, 3), dtype)
    check_finite("class/mean", block, "file")
    block[1, 2] = value
    with pytest.raises(store.ArtifactFormatError) as caught:
        check_finite("class/mean", block, "file")
    assert str(caught.value) == "file: class/mean has values that are not finite (NaN or infinity)."


def test_every_integer_is_finite() -> None:
    check_finite("sample/key", np.full((2, 16), 255, np.uint8), "file")


@pytest.mark.parametrize("name", ["flat", "a/b/c", "a/./b", "../a", "a\nb/c", "", "__metadata__"])
def test_a_name_that_is_not_group_and_leaf_is_refused(name: str) -> None:
    assert refusal(infos() | {name: store.TensorInfo(dtype="float32", shape=(3,))})
