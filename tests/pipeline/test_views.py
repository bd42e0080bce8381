"""Views: the same pixels from the same three numbers, on every machine, and what is drawn."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import views
from pipeline.errors import PipelineError
from pipeline.view_operations import OPERATIONS
from pipeline.views import VIEWS_VERSION, choose_operations, crop_box, draw_words, render_view
from tests.pipeline import naive_views

ROOT = Path(__file__).parent.parent.parent
KEY = bytes(range(16))
WORD = st.integers(0, 2**32 - 1)

# Image (kind, width, height), seed, first byte of the key, view, view_size: BLAKE2b-128 of the pixels.
GOLDEN = {
    ("noise", 32, 32, 0, 0, 0, 32): "7bdb541059b064d7a186a563d1132681",
    ("noise", 32, 32, 0, 0, 1, 32): "d7452100cc0ba470a831a543bb19e5b8",
    ("noise", 32, 32, 0, 1, 1, 32): "df68302b601172b5d093d9e3d51ea62d",
    ("noise", 32, 32, 1, 0, 1, 32): "5a928561b92e0ab6cfd50ee7d4c52222",
    ("noise", 32, 32, 2, 5, 15, 32): "ff37920078ed889515796350b67e5d5c",
    ("noise", 1, 1, 0, 5, 4, 32): "4b6c36e9e7db756089ba9821258e7376",
    ("noise", 1, 500, 0, 0, 3, 32): "a03bd4db55cce343840d5f8bdff15263",
    ("noise", 500, 1, 7, 2, 1, 33): "ab6085c29ad4e27f102934d12d29b1ed",
    ("noise", 3, 2, 0, 0, 2**32 - 1, 5): "84ee2800dcbf159b142f96b2f77bbbdc",
    ("noise", 3, 2, 2, 5, 11, 7): "357a32620b8d39598d514f1cc94eb934",
    ("noise", 64, 64, 2**63, 255, 4, 1): "e1f9ea2db7f1c1f95f11fd9a7ee4d412",
    ("noise", 96, 400, 2, 0, 2, 32): "63e69ce4a3ffaac7d56b14e1b6b75d05",
    ("slope", 500, 375, 0, 0, 7, 224): "0983c8f4b723b88f485cdfb37d82e504",
    ("slope", 500, 375, 0, 0, 14, 224): "01921395651cb866a082399d0986178e",
    ("slope", 375, 500, 2, 0, 2, 224): "a6da57460dcfde3a12db3ec48dd2b0c6",
    ("slope", 375, 500, 2, 5, 8, 96): "db6f4fec5459507ae22db30cf20f2be7",
    ("slope", 2048, 1536, 0, 3, 5, 224): "44d6d7afabc4800d1465abce0c0b4694",
    ("grey", 200, 100, 0, 0, 6, 64): "6a256602b952fe5b07e2986c96fb6676",
    ("grey", 200, 100, 2, 5, 1, 64): "9b9347b14b7959e22a4881651d9e9964",
    ("flat", 48, 48, 0, 0, 6, 32): "dc8412f28d4802928b448cfdaab6bafc",
}


def make_image(kind: str, width: int, height: int) -> Image.Image:
    noise = np.frombuffer(hashlib.shake_128(kind.encode()).digest(width * height * 3), np.uint8)
    pixels = noise.reshape(height, width, 3)
    if kind == "grey":
        pixels = np.repeat(pixels[..., :1] // 4 + 90, 3, axis=-1)
    if kind == "flat":
        pixels = np.full_like(pixels, 90)
    if kind == "slope":
        y, x = np.mgrid[0:height, 0:width]
        slope = np.stack([x * 200 // width, y * 200 // height, (x + y) % 200], axis=-1)
        pixels = (slope + pixels % 32).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


def render_hash(kind: str, width: int, height: int, seed: int, key: int, view: int, view_size: int) -> str:
    image = make_image(kind, width, height)
    rendered = render_view(image, bytes([key, *range(1, 16)]), view, seed=seed, view_size=view_size)
    assert rendered.mode == "RGB"
    assert rendered.size == ((view_size, view_size) if view else image.size)
    return hashlib.blake2b(rendered.tobytes(), digest_size=16).hexdigest()


def to_rows(image: Image.Image) -> naive_views.Rows:
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


def test_the_version_is_1() -> None:
    assert VIEWS_VERSION == 1


@pytest.mark.parametrize("case", GOLDEN)
def test_pixels_are_those_of_version_1(case: tuple[str, int, int, int, int, int, int]) -> None:
    assert render_hash(*case) == GOLDEN[case]


@pytest.mark.parametrize("instructions", ["default", "avx2", "none that numpy can do without"])
def test_pixels_are_the_same_with_other_instructions(instructions: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions.split()[0]}
    if instructions.startswith("none"):
        environment["ATEN_CPU_CAPABILITY"] = "default"
        environment["NPY_DISABLE_CPU_FEATURES"] = " ".join(optional_cpu_features())
    check = (
        "import json, sys; from tests.pipeline.test_views import GOLDEN, render_hash; "
        "print(json.dumps([[render_hash(*case) for case in GOLDEN], 'torch' in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    # Without torch there is nothing whose kernels could differ: numpy's and Pillow's are all there is.
    assert json.loads(done.stdout) == [list(GOLDEN.values()), False]


def optional_cpu_features() -> list[str]:
    configuration: dict[str, dict[str, list[str]]] = np.show_config(mode="dicts")  # type: ignore[assignment]
    return configuration.get("SIMD Extensions", {}).get("found", [])


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (50, 1), (3, 2), (9, 9), (16, 11), (40, 70)])
@pytest.mark.parametrize("view_size", [1, 2, 9, 16])
def test_a_view_is_what_the_specification_says(width: int, height: int, view_size: int) -> None:
    image = make_image("noise", width, height)
    for view in range(1, 6):
        rendered = render_view(image, KEY, view, seed=5, view_size=view_size)
        assert to_rows(rendered) == naive_views.render(to_rows(image), KEY, view, 5, view_size)


@pytest.mark.parametrize("size", [1, 2, 7, 31, 32, 33, 64, 224])
def test_pillow_resizes_as_the_specification_says(size: int) -> None:
    for length in (1, 2, 3, 5, 16, 23, 31, 32, 33, 48, 61, 100, 224, 375, 500):
        image = make_image("noise", length, 2)
        assert to_rows(image.resize((size, 2), Image.Resampling.BILINEAR)) == naive_views.resize_rows(
            to_rows(image), size
        )


@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), words=st.tuples(WORD, WORD, WORD, WORD))
def test_a_crop_is_inside_and_of_a_quarter_of_the_area_or_more(
    width: int, height: int, words: tuple[int, int, int, int]
) -> None:
    left, top, right, bottom = crop_box(width, height, words)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    area = (right - left) * (bottom - top)
    assert 4 * area >= width * height - 2 * (right - left)  # the height is rounded, by half a row at most


@given(width=st.integers(12, 4000), share=st.integers(0, 100), words=st.tuples(WORD, WORD, WORD, WORD))
def test_a_crop_of_an_image_of_common_aspect_is_of_common_aspect(
    width: int, share: int, words: tuple[int, int, int, int]
) -> None:
    height = -(-width * 3 // 4) + share * (width * 4 // 3 - -(-width * 3 // 4)) // 100  # from 3/4 to 4/3 of the width
    left, top, right, bottom = crop_box(width, height, words)
    crop_width, crop_height = right - left, bottom - top
    assert 3 * crop_height <= 4 * crop_width + 12  # both are whole numbers
    assert 3 * crop_width <= 4 * crop_height + 12


def test_extreme_draws_give_extreme_crops() -> None:
    most = 2**32 - 1
    assert crop_box(400, 400, (0, 2**31, 0, 0)) == (0, 0, 200, 200)
    assert crop_box(400, 400, (0, 2**31, most, most)) == (200, 200, 400, 400)
    assert crop_box(400, 400, (0, 0, 0, 0)) == (0, 0, 173, 231)  # 3 : 4
    assert crop_box(400, 400, (0, most, 0, 0)) == (0, 0, 230, 174)  # 4 : 3
    assert crop_box(500, 375, (most, 0, most, most)) == (0, 0, 500, 375)
    assert crop_box(1, 500, (0, 0, 0, 0)) == (0, 0, 1, 125)
    assert crop_box(500, 1, (0, 0, 0, 0)) == (0, 0, 125, 1)


def test_every_choice_is_made_as_often_as_it_should_be() -> None:
    words = [draw_words(KEY, view, seed=0) for view in range(20_000)]
    boxes = [crop_box(1000, 1000, drawn) for drawn in words]
    areas = [(right - left) * (bottom - top) / 1e6 for left, top, right, bottom in boxes]
    wider = [(right - left) > (bottom - top) for left, top, right, bottom in boxes]
    chosen = [choose_operations(drawn) for drawn in words]
    kinds = Counter(operation for operations in chosen for operation, _ in operations)
    strengths = Counter(strength for operations in chosen for _, strength in operations)
    total = sum(kinds.values())
    assert np.mean([drawn[4] >> 31 for drawn in words]) == pytest.approx(1 / 2, abs=0.02)
    assert np.mean([len(operations) == 2 for operations in chosen]) == pytest.approx(1 / 2, abs=0.02)
    assert np.mean(areas) == pytest.approx(5 / 8, abs=0.01)
    assert np.mean(np.array(areas) < 7 / 16) == pytest.approx(1 / 4, abs=0.02)
    assert np.mean(wider) == pytest.approx(1 / 2, abs=0.02)
    assert {kind: count / total for kind, count in kinds.items()} == pytest.approx(
        dict.fromkeys(OPERATIONS, 1 / 12), abs=0.01
    )
    assert set(strengths) == set(range(-30, 31))
    assert np.mean([strengths[level] for level in range(-30, 31) if level]) == pytest.approx(total / 62, rel=0.03)
    assert strengths[0] == pytest.approx(total / 31, rel=0.1)


def test_every_bit_of_the_draw_is_as_often_set_as_not() -> None:
    drawn = np.array([draw_words(KEY, view, seed=1) for view in range(4000)], np.uint32)
    bits = np.unpackbits(drawn.view(np.uint8), axis=1)
    assert bits.mean(axis=0) == pytest.approx(np.full(512, 0.5), abs=0.05)


def test_the_words_are_those_of_the_specification() -> None:
    message = b"\1" + (3).to_bytes(8, "little") + KEY + (2).to_bytes(4, "little")
    digest = hashlib.blake2b(message).digest()
    assert draw_words(KEY, 2, seed=3) == tuple(np.frombuffer(digest, "<u4").tolist())
    assert draw_words(KEY, 2, seed=3)[:2] == (1786410792, 2821725417)


def test_a_view_rendered_again_is_equal_and_the_original_is_left_alone() -> None:
    image = make_image("noise", 40, 30)
    before = image.tobytes()
    first, again = (render_view(image, KEY, 1, seed=0, view_size=32) for _ in range(2))
    assert first.tobytes() == again.tobytes()
    assert image.tobytes() == before


def test_seeds_keys_and_views_give_different_pixels() -> None:
    image = make_image("noise", 40, 30)
    rendered = {
        render_view(image, bytes([key]) * 16, view, seed=seed, view_size=32).tobytes()
        for seed in range(4)
        for key in range(4)
        for view in range(1, 5)
    }
    assert len(rendered) == 64


def test_view_0_is_the_image_itself() -> None:
    image = make_image("noise", 40, 30)
    assert render_view(image, KEY, 0, seed=0, view_size=32) is image


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": bytes(15)}, "the sample key has 15 bytes, expected 16."),
        ({"view": -1}, "view is -1, expected 0 to 2**32 - 1."),
        ({"view": 2**32}, "view is 4294967296, expected 0 to 2**32 - 1."),
        ({"seed": -1}, "seed is -1, expected 0 to 2**63."),
        ({"seed": 2**63 + 1}, "seed is 9223372036854775809, expected 0 to 2**63."),
        ({"view_size": 0}, "view_size is 0, expected 1 or more."),
        ({"image": Image.new("L", (3, 2))}, "the image is L, 3x2, expected RGB, 1x1 or larger."),
        ({"image": Image.new("RGB", (0, 2))}, "the image is RGB, 0x2, expected RGB, 1x1 or larger."),
    ],
)
@pytest.mark.parametrize("view", [0, 1])
def test_what_is_out_of_range_is_refused(change: dict[str, object], message: str, view: int) -> None:
    arguments: dict[str, object] = {"image": make_image("noise", 4, 4), "key": KEY, "view": view, "seed": 0}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        render_view(**{**arguments, "view_size": 4, **change})  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_pillow_that_resizes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_RESIZED_NOISE", "0" * 32)
    monkeypatch.setattr(PIL, "__version__", "12.1.1.post0")
    views._require_exact_resize.cache_clear()
    with pytest.raises(PipelineError) as caught:
        render_view(make_image("noise", 4, 4), KEY, 1, seed=0, view_size=4)
    assert str(caught.value) == (
        "Pillow 12.1.1.post0 does not resize as the Pillow project's own does (pillow-simd, for one, does not), so "
        "views would not match their embeddings. Run: pip install --force-reinstall pillow"
    )
