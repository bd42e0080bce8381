"""Replayable augmentation: (seed, sample key, view) -> the same pixels on every machine, with nothing stored.

The teacher's side embeds a view, the student's side renders it again. View 0 is the image itself; every other view is
cropped, resized to a square, perhaps mirrored, and changed by one operation or two (`view_operations`). Nothing is
normalised here, nor resized to what a model wants.

All arithmetic is of integers, with a defined rounding. Pillow's resize of 8-bit images sums integers too, but computes
its coefficients in floating point, and Pillow 13 chooses the order of its two passes where 12 does not. Hence one
call for each pass, and the bilinear filter: its coefficients are fractions of small denominators, none so near a
rounding boundary that a last bit, or a fused multiply-add, could matter. pillow-simd keeps fewer bits: it is refused.

Where this leaves the papers: the crop keeps a quarter of the area or more, not 8 %, since a small image has few pixels
to lose and the true label is used beside the embedding; and the crop is all that translates.
"""

import functools
import hashlib
import math
import struct

import numpy as np
import PIL
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.view_operations import MAX_STRENGTH, OPERATIONS, Pixels, apply_operation

VIEWS_VERSION = 1
_RESIZED_NOISE = "228e2330c243143e65c9053ae53daa9b"  # BLAKE2b-128


def render_view(image: Image.Image, key: bytes, view: int, *, seed: int, view_size: int) -> Image.Image:
    """Render one view of an image.

    Args:
        image: the decoded original, mode RGB, of any size.
        key: its sample key, 16 bytes.
        view: which view, 0 to 2**32 - 1.
        seed: one for all views of an artifact, 0 to 2**63.
        view_size: side of every view but view 0, in pixels, 1 or more.

    Returns:
        For view 0 `image` itself, else an RGB image of `view_size` x `view_size`.

    Raises:
        ValueError: an argument out of its range.
        PipelineError: a Pillow whose resize gives other pixels than the Pillow project's own.
    """
    words = draw_words(key, view, seed=seed)
    if view_size < 1:
        raise ValueError(f"view_size is {view_size}, expected 1 or more.")
    if image.mode != "RGB" or 0 in image.size:
        raise ValueError(f"the image is {image.mode}, {image.width}x{image.height}, expected RGB, 1x1 or larger.")
    if view == 0:
        return image
    _require_exact_resize()
    rendered = _resize(image.crop(crop_box(image.width, image.height, words)), view_size)
    if _below(words[4], 2):
        rendered = rendered.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels: Pixels = np.asarray(rendered)
    for operation, strength in choose_operations(words):
        pixels = apply_operation(pixels, operation, strength)
    return Image.fromarray(pixels)


def draw_words(key: bytes, view: int, *, seed: int) -> tuple[int, ...]:
    """Draw a view's random numbers.

    They are BLAKE2b-512, without key, salt or personalisation, over the version (u8), the seed (u64), the sample key
    (16 bytes) and the view (u32), all little-endian, read as little-endian u32. A number below n is word * n >> 32.

    Args:
        key: as `render_view` takes it, like the next two.
        view: which view.
        seed: one for all views of an artifact.

    Returns:
        Sixteen words: 0 to 3 for area, aspect, left and top of the crop; 4: mirrored or not; 5: one operation or two;
        6, 7, 8 and 9, 10, 11: kind, strength and sign of each operation; the rest is unused.

    Raises:
        ValueError: an argument out of its range.
    """
    if len(key) != 16:
        raise ValueError(f"the sample key has {len(key)} bytes, expected 16.")
    if not 0 <= view < 2**32:
        raise ValueError(f"view is {view}, expected 0 to 2**32 - 1.")
    if not 0 <= seed <= 2**63:
        raise ValueError(f"seed is {seed}, expected 0 to 2**63.")
    return struct.unpack("<16I", hashlib.blake2b(struct.pack("<BQ16sI", VIEWS_VERSION, seed, key, view)).digest())


def crop_box(width: int, height: int, words: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Choose the part of an image that a view shows.

    The area is uniform in 1/4 to 1 of the image's, the aspect in 3/4 to 4/3; where no such crop fits into the image,
    the aspect is the nearest that fits, and the area stays. So one draw suffices.

    Args:
        width: of the original, in pixels.
        height: of the original, in pixels.
        words: the view's random numbers.

    Returns:
        Left, top, right, bottom, in whole pixels.
    """
    area = (1 << 14) + _below(words[0], 3 * (1 << 14) + 1)  # of 1 << 16
    lean = _below(words[1], 2049) - 1024
    numerator, denominator = (4096, 4096 - lean) if lean > 0 else (4096 + lean, 4096)
    total = area * width * height
    crop_width = math.isqrt(total * numerator // (denominator << 16))
    narrowest = -(-area * width >> 16)  # where the crop is as high as the image
    crop_width = min(max(crop_width, narrowest), width)
    crop_height = max((total + (crop_width << 15)) // (crop_width << 16), 1)
    left = _below(words[2], width - crop_width + 1)
    top = _below(words[3], height - crop_height + 1)
    return left, top, left + crop_width, top + crop_height


def choose_operations(words: tuple[int, ...]) -> list[tuple[str, int]]:
    """Choose what is done to a view after the crop.

    Args:
        words: the view's random numbers.

    Returns:
        One or two operations and their strengths, −30 to 30, in their order.
    """
    chosen = []
    for kind, magnitude, sign in (words[6:9], words[9:12])[: 1 + _below(words[5], 2)]:
        strength = _below(magnitude, MAX_STRENGTH + 1)
        chosen.append((OPERATIONS[_below(kind, len(OPERATIONS))], -strength if _below(sign, 2) else strength))
    return chosen


def _below(word: int, count: int) -> int:
    return word * count >> 32


def _resize(image: Image.Image, size: int) -> Image.Image:
    across = image.resize((size, image.height), Image.Resampling.BILINEAR)
    return across.resize((size, size), Image.Resampling.BILINEAR)


@functools.cache
def _require_exact_resize() -> None:
    noise = Image.frombytes("RGB", (61, 47), hashlib.shake_128(b"views").digest(61 * 47 * 3))
    if hashlib.blake2b(_resize(noise, 53).tobytes(), digest_size=16).hexdigest() != _RESIZED_NOISE:
        raise PipelineError(
            f"Pillow {PIL.__version__} does not resize as the Pillow project's own does (pillow-simd, for one, does "
            "not), so views would not match their embeddings. Run: pip install --force-reinstall pillow"
        )
