"""Any image in the one form that all stages see, and its sample key."""

import hashlib
import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.pixels import sample_key, to_rgb
from tests.conftest import make_images


def reopened(image: Image.Image, kind: str = "PNG", **options: Any) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return Image.open(stream)


def pixels(image: Any) -> NDArray[np.uint8]:
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    return np.asarray(image)


# Any image to RGB


def every_value_and_alpha() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Return every value, every alpha, and the value over white, rounded to nearest."""
    alpha, value = np.divmod(np.arange(65536), 256)
    over_white = (value * alpha + 255 * (255 - alpha) + 127) // 255
    plain = [array.reshape(256, 256).astype(np.uint8) for array in (value, alpha, over_white)]
    return plain[0], plain[1], plain[2]


def grey(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(values[..., None], 3, axis=2)


def test_grey_is_repeated() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(pixels(to_rgb(reopened(Image.fromarray(values)))), grey(values))


def test_one_bit_becomes_black_and_white() -> None:
    values = np.array([[0, 255, 255], [255, 0, 0]], np.uint8)
    assert np.array_equal(pixels(to_rgb(reopened(Image.fromarray(values).convert("1")))), grey(values))


def test_rgb_stays_as_it_is() -> None:
    image = make_images(1, 0)[0]
    assert np.array_equal(pixels(to_rgb(reopened(image))), np.asarray(image))


def test_alpha_is_composited_on_white() -> None:
    value, alpha, over_white = every_value_and_alpha()
    image = reopened(Image.fromarray(np.stack([value, 255 - value, value, alpha], axis=2)))
    assert image.mode == "RGBA"
    expected = np.stack([over_white, over_white[:, ::-1], over_white], axis=2)
    assert np.array_equal(pixels(to_rgb(image)), expected)


def test_grey_with_alpha_is_composited_on_white() -> None:
    value, alpha, over_white = every_value_and_alpha()
    image = reopened(Image.merge("LA", [Image.fromarray(value), Image.fromarray(alpha)]))
    assert image.mode == "LA"
    assert np.array_equal(pixels(to_rgb(image)), grey(over_white))


def test_premultiplied_alpha_is_composited_on_white() -> None:
    image = Image.new("RGBA", (1, 1), (100, 50, 20, 128))
    assert np.array_equal(pixels(to_rgb(image.convert("RGBa"))), pixels(to_rgb(image)))


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [(0, [255, 255, 255]), (bytes([128, 255]), [132, 137, 142]), (1, [10, 20, 30])],
    ids=["index", "alphas", "other-index"],
)
def test_a_palette_with_transparency_is_composited_on_white(transparency: int | bytes, expected: list[int]) -> None:
    image = Image.new("P", (1, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert pixels(to_rgb(reopened(image, transparency=transparency))).tolist() == [[expected]]


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (9, 8, 7)), ("L", 9), ("1", 0)])
def test_a_transparent_colour_is_white(mode: str, colour: Any) -> None:
    image = reopened(Image.new(mode, (1, 1), colour), transparency=colour)
    assert (image.mode, "transparency" in image.info) == (mode, True)
    assert pixels(to_rgb(image)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_to_eight_and_rounded_to_nearest(mode: str) -> None:
    values = np.arange(65536).reshape(256, 256)
    raw = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (256, 256), values.astype(raw).tobytes())
    assert image.mode == mode
    # 65535 = 255 · 257, so nothing lies half-way.
    assert np.array_equal(pixels(to_rgb(image)), grey(np.rint(values / 257).astype(np.uint8)))


def test_a_sixteen_bit_file_is_scaled_likewise() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = reopened(Image.fromarray(values))
    assert image.mode == "I;16"
    assert np.array_equal(pixels(to_rgb(image)), grey(np.rint(values / 257).astype(np.uint8)))


def test_wide_integers_are_cut_to_sixteen_bits() -> None:
    image = Image.fromarray(np.array([[-5, 0, 65535, 70000]], np.int32))
    assert pixels(to_rgb(image))[0, :, 0].tolist() == [0, 0, 255, 255]


def test_printing_colours_become_rgb() -> None:
    image = reopened(Image.new("CMYK", (1, 1), (10, 20, 30, 40)), "TIFF")
    assert image.mode == "CMYK"
    expected = [round((255 - ink) * (255 - 40) / 255) for ink in (10, 20, 30)]
    assert pixels(to_rgb(image)).tolist() == [[expected]]


@pytest.mark.parametrize("kind", ["EPS", "WMF"])
def test_what_another_program_would_draw_is_refused_before_it_is_run(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", (2, 2))
    image.format = kind
    monkeypatch.setattr(image, "load", lambda: pytest.fail("it was drawn"))
    with pytest.raises(ValueError, match=f"^{kind} is drawn by another program, which is not run; convert it"):
        to_rgb(image)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^its pixels are floating-point numbers; 8 or 16 bits are expected$"):
        to_rgb(reopened(Image.new("F", (1, 1)), "TIFF"))


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, lambda array: array),
        (2, lambda array: array[:, ::-1]),
        (3, lambda array: array[::-1, ::-1]),
        (4, lambda array: array[::-1]),
        (5, lambda array: array.transpose(1, 0, 2)),
        (6, lambda array: np.rot90(array, -1)),
        (7, lambda array: array[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda array: np.rot90(array)),
    ],
)
def test_exif_orientation_is_applied(
    orientation: int, expected: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> None:
    array = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = to_rgb(reopened(Image.fromarray(array), exif=exif))
    assert np.array_equal(pixels(image), expected(array))
    assert sample_key(image) == sample_key(Image.fromarray(np.ascontiguousarray(expected(array))))


def test_metadata_is_left_behind() -> None:
    exif = Image.Exif()
    exif[0x010E] = "who, where and when"
    image = to_rgb(reopened(make_images(1, 0)[0], exif=exif, dpi=(72, 72)))
    assert image.info == {}


# Sample keys


def test_a_sample_key_hashes_version_size_and_pixels() -> None:
    image = make_images(1, 5, size=7)[0].crop((0, 0, 4, 7))
    content = bytes([1]) + struct.pack("<I", 7) + struct.pack("<I", 4) + np.asarray(image).tobytes()
    assert sample_key(image) == hashlib.blake2b(content, digest_size=16).digest()


def test_a_sample_key_never_changes() -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    assert sample_key(image).hex() == "b2c326f2cc9ce685a4ec8ef2f928bdc7"


def test_a_sample_key_is_the_same_whatever_the_lossless_format() -> None:
    image = make_images(1, 6)[0]
    files = [
        reopened(image),
        reopened(image, compress_level=0),
        reopened(image, "WEBP", lossless=True),
        reopened(image, "TIFF"),
        reopened(image, "BMP"),
    ]
    assert {sample_key(to_rgb(file)) for file in files} == {sample_key(image)}


def test_a_sample_key_knows_the_size_of_the_image() -> None:
    keys = {sample_key(Image.new("RGB", size)) for size in ((2, 3), (3, 2), (6, 1), (1, 6))}
    assert len(keys) == 4


def test_a_sample_key_knows_every_pixel() -> None:
    keys = set()
    for pixel in range(4):
        image = Image.new("RGB", (2, 2))
        image.putpixel(divmod(pixel, 2), (0, 0, 1))
        keys.add(sample_key(image))
    assert len(keys) == 4
