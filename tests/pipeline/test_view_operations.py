"""Each operation of the views against the same written in whole numbers and lists, and what it must leave alone."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import view_operations
from pipeline.view_operations import MAX_STRENGTH, OPERATIONS, apply_operation
from tests.pipeline import naive_views

WITHOUT_STRENGTH = ("autocontrast", "equalize")
GEOMETRY = ("shear_x", "shear_y", "rotate")


def make_pixels(size: int, low: int = 0, span: int = 256) -> NDArray[np.uint8]:
    noise = np.frombuffer(hashlib.shake_128(bytes([size % 256])).digest(size * size * 3), np.uint8)
    return (low + noise.reshape(size, size, 3).astype(np.int64) % span).astype(np.uint8)


def naively(pixels: NDArray[np.uint8], operation: str, strength: int) -> NDArray[np.uint8]:
    rows = [[tuple(pixel) for pixel in row] for row in pixels.tolist()]
    return np.array(naive_views.apply(rows, operation, strength), np.uint8)


def test_there_are_these_operations_in_this_order() -> None:
    assert OPERATIONS == naive_views.OPERATIONS


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("strength", [-30, -17, -1, 0, 1, 8, 30])
@pytest.mark.parametrize("size", [1, 2, 3, 16, 17])
def test_an_operation_is_what_its_specification_says(operation: str, strength: int, size: int) -> None:
    pixels = make_pixels(size)
    changed = apply_operation(pixels, operation, strength)
    assert changed.dtype == np.uint8
    np.testing.assert_array_equal(changed, naively(pixels, operation, strength))


@pytest.mark.parametrize("operation", OPERATIONS)
@given(
    size=st.integers(1, 9),
    low=st.integers(0, 255),
    span=st.integers(1, 256),
    strength=st.integers(-MAX_STRENGTH, MAX_STRENGTH),
)
def test_so_it_is_at_every_strength_and_contrast(operation: str, size: int, low: int, span: int, strength: int) -> None:
    pixels = make_pixels(size, low, min(span, 256 - low))
    np.testing.assert_array_equal(apply_operation(pixels, operation, strength), naively(pixels, operation, strength))


@pytest.mark.parametrize("operation", ["saturation", "sharpness", "contrast"])
@pytest.mark.parametrize("strength", [-30, 30])
def test_sixteen_bits_hold_the_hardest_contrasts(operation: str, strength: int) -> None:
    pixels = (make_pixels(16) > 127).astype(np.uint8) * 255
    np.testing.assert_array_equal(apply_operation(pixels, operation, strength), naively(pixels, operation, strength))


@pytest.mark.parametrize("operation", GEOMETRY)
def test_an_image_of_several_blocks_is_warped_as_a_whole(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = make_pixels(40)
    whole = apply_operation(pixels, operation, 23)
    monkeypatch.setattr(view_operations, "_BLOCK_PIXELS", 300)  # 8 rows
    np.testing.assert_array_equal(apply_operation(pixels, operation, 23), whole)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in WITHOUT_STRENGTH])
@pytest.mark.parametrize("size", [1, 31, 32])
def test_strength_0_changes_nothing(operation: str, size: int) -> None:
    pixels = make_pixels(size)
    np.testing.assert_array_equal(apply_operation(pixels, operation, 0), pixels)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "identity"])
def test_full_strength_changes_something(operation: str) -> None:
    pixels = make_pixels(32, 20, 200)
    for strength in (-MAX_STRENGTH, MAX_STRENGTH):
        assert (apply_operation(pixels, operation, strength) != pixels).any()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_its_input_is_not_written_to(operation: str) -> None:
    pixels = make_pixels(32)
    pixels.flags.writeable = False
    apply_operation(pixels, operation, 30)


@pytest.mark.parametrize("operation", [*WITHOUT_STRENGTH, "saturation", "sharpness", *GEOMETRY])
@pytest.mark.parametrize("level", [0, 7, 128, 255])
def test_a_flat_image_stays_flat(operation: str, level: int) -> None:
    pixels = np.full((32, 32, 3), level, np.uint8)
    np.testing.assert_array_equal(apply_operation(pixels, operation, -30), pixels)


def test_a_grey_image_has_no_colours_to_saturate() -> None:
    pixels = np.repeat(make_pixels(32)[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(apply_operation(pixels, "saturation", 30), pixels)


def test_a_rotation_to_and_fro_keeps_the_centre_in_place() -> None:
    pixels = np.zeros((33, 33, 3), np.uint8)
    pixels[16, 16] = 255
    turned = apply_operation(pixels, "rotate", 30)
    assert turned[16, 16].tolist() == [255, 255, 255]
    assert apply_operation(pixels[:, ::-1], "rotate", -30)[:, ::-1].tolist() == turned.tolist()


def test_a_rotation_of_strength_30_is_30_degrees() -> None:
    pixels = np.zeros((101, 101, 3), np.uint8)
    pixels[50, 90] = 255  # 40 to the right of the centre
    row, column, _ = np.unravel_index(apply_operation(pixels, "rotate", 30).argmax(), pixels.shape)
    assert (abs(int(row) - 50), int(column) - 50) == (20, 35)  # 40 sin 30°, 40 cos 30°
