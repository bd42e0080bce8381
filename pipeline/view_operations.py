"""What a view undergoes after its crop: colours and geometry in integer arithmetic, the same on every machine.

The operations are TrivialAugment's (arXiv 2103.10158) but for translations, which the crop already does.
Strengths stop short of its own, since a teacher knows little of images unlike any it has seen. What a shear or
rotation uncovers is the image mirrored at its edge, since the teacher would embed flat corners too. Divisions and
shifts round down; where another rounding is meant, a half is added first.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

MAX_STRENGTH = 30
_BLOCK_PIXELS = 8192  # at a time: what lies between stays in the cache (twice as fast at 224 x 224 as in one piece)

Pixels = NDArray[np.uint8]
Integers = NDArray[np.signedinteger]


def apply_operation(pixels: Pixels, operation: str, strength: int) -> Pixels:
    """Change colours or geometry.

    Args:
        pixels: [size, size, 3], RGB; not written to.
        operation: one of `OPERATIONS`.
        strength: −30 to 30; 0 changes nothing, except that autocontrast and equalize have no strength.

    Returns:
        [size, size, 3].
    """
    return _OPERATIONS[operation](pixels, strength)


def _clip(values: Integers) -> Pixels:
    return np.clip(values, 0, 255).astype(np.uint8)


def _look_up(pixels: Pixels, table: Integers) -> Pixels:
    # bytes.translate is faster than numpy's gathers.
    return np.frombuffer(pixels.tobytes().translate(_clip(table).tobytes()), np.uint8).reshape(pixels.shape)


def _look_up_each(pixels: Pixels, make_table: Callable[[Integers], Integers]) -> Pixels:
    looked_up = np.empty_like(pixels)
    for channel in range(3):
        plane = np.ascontiguousarray(pixels[..., channel])
        looked_up[..., channel] = _look_up(plane, make_table(np.bincount(plane.ravel(), minlength=256)))
    return looked_up


def _autocontrast(pixels: Pixels, strength: int) -> Pixels:
    return _look_up_each(pixels, _stretched)


def _stretched(histogram: Integers) -> Integers:
    levels, present = np.arange(256), np.flatnonzero(histogram)
    low, span = int(present[0]), int(present[-1] - present[0])
    return ((levels - low) * 255 + span // 2) // span if span else levels


def _equalize(pixels: Pixels, strength: int) -> Pixels:
    return _look_up_each(pixels, _equalized)


def _equalized(histogram: Integers) -> Integers:
    # As Pillow's ImageOps.equalize: the brightest level present does not count towards the step.
    step = int(histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
    return (np.cumsum(histogram) - histogram + step // 2) // step if step else np.arange(256)


def _posterize(pixels: Pixels, strength: int) -> Pixels:
    dropped_bits = (abs(strength) * 5 + 15) // 30  # 0 to 5
    posterized: Pixels = pixels & np.uint8(256 - (1 << dropped_bits))
    return posterized


def _solarize(pixels: Pixels, strength: int) -> Pixels:
    levels, threshold = np.arange(256), 256 - 3 * abs(strength)
    return _look_up(pixels, np.where(levels < threshold, levels, 255 - levels))


def _extrapolate(values: NDArray[np.int16], origin: NDArray[np.int16] | int, gain: int) -> NDArray[np.int16]:
    # Away from `origin`, or towards it, by gain / 128; -120 to 120 stays within 16 bits.
    return values + ((gain * (values - origin) + 64) >> 7)


def _grey(pixels: Pixels) -> NDArray[np.int16]:
    # ITU-R BT.601 in 8 bits, so that the sum stays within 16.
    red, green, blue = (pixels[..., channel].astype(np.uint16) for channel in range(3))
    return ((77 * red + 150 * green + 29 * blue + 128) >> 8).astype(np.int16)


def _brightness(pixels: Pixels, strength: int) -> Pixels:
    return _look_up(pixels, _extrapolate(np.arange(256, dtype=np.int16), 0, 2 * strength))  # 0.53 to 1.47


def _contrast(pixels: Pixels, strength: int) -> Pixels:
    grey = _grey(pixels)
    mean = (2 * int(grey.sum(dtype=np.int64)) + grey.size) // (2 * grey.size)
    return _look_up(pixels, _extrapolate(np.arange(256, dtype=np.int16), mean, 3 * strength))  # 0.30 to 1.70


def _saturation(pixels: Pixels, strength: int) -> Pixels:
    return _clip(_extrapolate(pixels.astype(np.int16), _grey(pixels)[..., None], 3 * strength))  # 0.30 to 1.70


def _sharpness(pixels: Pixels, strength: int) -> Pixels:
    # Against the smoothing kernel (1 1 1, 1 5 1, 1 1 1) / 13, as Pillow has it; the outermost pixels stay.
    deep = pixels.astype(np.int16)
    rows = deep[:-2] + deep[1:-1] + deep[2:]
    smooth = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * deep[1:-1, 1:-1] + 6) // 13
    deep[1:-1, 1:-1] = _extrapolate(deep[1:-1, 1:-1], smooth, 4 * strength)  # 0.06 to 1.94
    return _clip(deep)


def _shear_x(pixels: Pixels, strength: int) -> Pixels:
    return _warp(pixels, (65536, _hundredths(strength), 0, 65536))


def _shear_y(pixels: Pixels, strength: int) -> Pixels:
    return _warp(pixels, (65536, 0, _hundredths(strength), 65536))


def _hundredths(strength: int) -> int:
    return (strength * 65536 + 50) // 100


def _rotate(pixels: Pixels, strength: int) -> Pixels:
    # tan(angle / 2) is strength / 112, so 30 is 30 degrees, and sine and cosine are fractions: no table of sines.
    whole = 112**2 + strength**2
    cosine = (2 * 65536 * (112**2 - strength**2) + whole) // (2 * whole)
    sine = (4 * 65536 * 112 * strength + whole) // (2 * whole)
    return _warp(pixels, (cosine, -sine, sine, cosine))


def _warp(pixels: Pixels, matrix: tuple[int, int, int, int]) -> Pixels:
    # Sixteen bits for each channel of a pixel in one number: a sum of four pixels whose weights sum to 256 carries
    # nothing from one channel into the next.
    size = len(pixels)
    packed = np.zeros((size, size, 4), np.uint16)
    packed[..., :3] = pixels
    flat = packed.view(np.int64).ravel()
    warped = np.empty_like(pixels)
    x = 2 * np.arange(size, dtype=np.int64) + 1 - size  # twice the distance from the centre, so it is whole
    num_rows = -(-_BLOCK_PIXELS // size)
    for first in range(0, size, num_rows):
        rows = slice(first, first + num_rows)
        warped[rows] = _sample(flat, x, x[rows, None], matrix)
    return warped


def _sample(
    flat: NDArray[np.int64], x: NDArray[np.int64], y: NDArray[np.int64], matrix: tuple[int, int, int, int]
) -> Pixels:
    """Read pixels at matrix · (x, y), bilinear between sixteenths of a pixel.

    The matrix has 16 fractional bits. A term of factor 0 is left out, so that a shear's other coordinate stays
    one row or column of numbers.
    """
    size, (a, b, c, d) = len(x), matrix
    corner = ((size - 1) << 16) + (1 << 12)
    across = (a * x + (b * y if b else 0) + corner) >> 13  # in 1/16 pixel, like `down`
    down = ((c * x if c else 0) + d * y + corner) >> 13
    right, lower = across & 15, down & 15
    columns = [_mirrored((across >> 4) + step, size) for step in (0, 1)]
    rows = [_mirrored((down >> 4) + step, size) * size for step in (0, 1)]
    above, below = (flat.take(row + columns[0]) * (16 - right) + flat.take(row + columns[1]) * right for row in rows)
    mixed = above * (16 - lower) + below * lower + 0x0080_0080_0080
    channels: NDArray[np.uint16] = mixed[..., None].view(np.uint16)[..., :3]
    return (channels >> 8).astype(np.uint8)


def _mirrored(index: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    inside = index ^ (index >> 63)  # -1, -2, … become 0, 1, …
    mirrored: NDArray[np.int64] = np.minimum(inside, 2 * size - 1 - inside)
    return mirrored


# Their order is part of version 1.
_OPERATIONS: dict[str, Callable[[Pixels, int], Pixels]] = {
    "identity": lambda pixels, strength: pixels,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "posterize": _posterize,
    "solarize": _solarize,
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "rotate": _rotate,
}
OPERATIONS = tuple(_OPERATIONS)
