"""Version 1 of the views written once more, in whole numbers and lists only, straight from its specification."""

import hashlib
import math
from collections.abc import Callable

Pixel = tuple[int, ...]
Rows = list[list[Pixel]]  # of (red, green, blue)

OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "posterize",
    "solarize",
    "brightness",
    "contrast",
    "saturation",
    "sharpness",
    "shear_x",
    "shear_y",
    "rotate",
)


def render(rows: Rows, key: bytes, view: int, seed: int, size: int) -> Rows:
    message = bytes([1]) + seed.to_bytes(8, "little") + key + view.to_bytes(4, "little")
    digest = hashlib.blake2b(message, digest_size=64).digest()
    words = [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 64, 4)]
    left, top, width, height = crop(len(rows[0]), len(rows), words)
    cropped = [row[left : left + width] for row in rows[top : top + height]]
    rendered = transpose(resize_rows(transpose(resize_rows(cropped, size)), size))
    if words[4] * 2 >> 32:
        rendered = [row[::-1] for row in rendered]
    for first in (6, 9)[: 1 + (words[5] * 2 >> 32)]:
        operation = OPERATIONS[words[first] * 12 >> 32]
        strength = words[first + 1] * 31 >> 32
        rendered = apply(rendered, operation, -strength if words[first + 2] * 2 >> 32 else strength)
    return rendered


def crop(width: int, height: int, words: list[int]) -> tuple[int, int, int, int]:
    area = 16384 + (words[0] * 49153 >> 32)
    lean = (words[1] * 2049 >> 32) - 1024
    p, q = (4096, 4096 - lean) if lean > 0 else (4096 + lean, 4096)
    cut_width = math.isqrt(area * width * height * p // (65536 * q))
    cut_width = max(cut_width, (area * width + 65535) // 65536)
    cut_width = min(cut_width, width)
    cut_height = max(1, (2 * area * width * height + 65536 * cut_width) // (2 * 65536 * cut_width))
    return (
        words[2] * (width - cut_width + 1) >> 32,
        words[3] * (height - cut_height + 1) >> 32,
        cut_width,
        cut_height,
    )


def transpose(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def resize_rows(rows: Rows, size: int) -> Rows:
    length = len(rows[0])
    resized: Rows = [[] for _ in rows]
    for target in range(size):
        weights = []
        for source in range(length):
            distance = abs((2 * source + 1) * size - (2 * target + 1) * length)
            weights.append(max(0, 2 * max(length, size) - distance))
        total = sum(weights)
        taps = [(at, (2**23 * weight + total) // (2 * total)) for at, weight in enumerate(weights) if weight]
        for row, out in zip(rows, resized, strict=True):
            sums = [sum(row[at][channel] * tap for at, tap in taps) for channel in range(3)]
            out.append(tuple(clip((value + 2**21) >> 22) for value in sums))
    return resized


def clip(value: int) -> int:
    return min(255, max(0, value))


def apply(rows: Rows, operation: str, strength: int) -> Rows:
    if operation == "sharpness":
        return sharpen(rows, strength)
    if operation in ("shear_x", "shear_y", "rotate"):
        return warp(rows, *matrix(operation, strength))
    change = point_operation(rows, operation, strength)
    return [[tuple(clip(value) for value in change(pixel)) for pixel in row] for row in rows]


def point_operation(rows: Rows, operation: str, strength: int) -> Callable[[Pixel], Pixel]:
    pixels = [pixel for row in rows for pixel in row]
    if operation in ("autocontrast", "equalize"):
        make = stretch if operation == "autocontrast" else equalize
        tables = [make([pixel[channel] for pixel in pixels]) for channel in range(3)]
        return lambda pixel: tuple(table[value] for table, value in zip(tables, pixel, strict=True))
    if operation == "posterize":
        unit = 2 ** ((5 * abs(strength) + 15) // 30)
        return lambda pixel: tuple(value // unit * unit for value in pixel)
    if operation == "solarize":
        return lambda pixel: tuple(255 - v if v >= 256 - 3 * abs(strength) else v for v in pixel)
    if operation == "brightness":
        return lambda pixel: tuple(away(value, 0, 2 * strength) for value in pixel)
    if operation == "contrast":
        total = sum(grey(pixel) for pixel in pixels)
        mean = (2 * total + len(pixels)) // (2 * len(pixels))
        return lambda pixel: tuple(away(value, mean, 3 * strength) for value in pixel)
    if operation == "saturation":
        return lambda pixel: tuple(away(value, grey(pixel), 3 * strength) for value in pixel)
    return lambda pixel: pixel


def stretch(values: list[int]) -> list[int]:
    low, high = min(values), max(values)
    if low == high:
        return list(range(256))
    return [((level - low) * 255 + (high - low) // 2) // (high - low) for level in range(256)]


def equalize(values: list[int]) -> list[int]:
    step = (len(values) - values.count(max(values))) // 255
    if step == 0:
        return list(range(256))
    return [(sum(value < level for value in values) + step // 2) // step for level in range(256)]


def away(value: int, origin: int, gain: int) -> int:
    return value + (gain * (value - origin) + 64) // 128


def grey(pixel: Pixel) -> int:
    return (77 * pixel[0] + 150 * pixel[1] + 29 * pixel[2] + 128) // 256


def sharpen(rows: Rows, strength: int) -> Rows:
    sharpened = [list(row) for row in rows]
    for y in range(1, len(rows) - 1):
        for x in range(1, len(rows) - 1):
            near = [rows[y + v][x + u] for v in (-1, 0, 1) for u in (-1, 0, 1)] + [rows[y][x]] * 4
            smooth = [(sum(pixel[channel] for pixel in near) + 6) // 13 for channel in range(3)]
            pairs = zip(rows[y][x], smooth, strict=True)
            sharpened[y][x] = tuple(clip(away(value, origin, 4 * strength)) for value, origin in pairs)
    return sharpened


def matrix(operation: str, strength: int) -> tuple[int, int, int, int]:
    if operation == "rotate":
        whole = 112 * 112 + strength * strength
        cosine = (2 * 65536 * (112 * 112 - strength * strength) + whole) // (2 * whole)
        sine = (2 * 65536 * 2 * 112 * strength + whole) // (2 * whole)
        return cosine, -sine, sine, cosine
    shear = (65536 * strength + 50) // 100
    return (65536, shear, 0, 65536) if operation == "shear_x" else (65536, 0, shear, 65536)


def warp(rows: Rows, a: int, b: int, c: int, d: int) -> Rows:
    size = len(rows)

    def at(y: int, x: int) -> Pixel:
        y, x = (index if index >= 0 else -1 - index for index in (y, x))
        y, x = (index if index < size else 2 * size - 1 - index for index in (y, x))
        return rows[y][x]

    def sample(y: int, x: int) -> Pixel:
        across, down = 2 * x + 1 - size, 2 * y + 1 - size
        u = (a * across + b * down + 65536 * (size - 1) + 4096) // 8192
        v = (c * across + d * down + 65536 * (size - 1) + 4096) // 8192
        (x, right), (y, lower) = divmod(u, 16), divmod(v, 16)
        weighted = [
            (at(y, x), (16 - lower) * (16 - right)),
            (at(y, x + 1), (16 - lower) * right),
            (at(y + 1, x), lower * (16 - right)),
            (at(y + 1, x + 1), lower * right),
        ]
        return tuple((sum(pixel[channel] * weight for pixel, weight in weighted) + 128) // 256 for channel in range(3))

    return [[sample(y, x) for x in range(size)] for y in range(size)]
