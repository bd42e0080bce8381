"""An image in the one form that all stages see, and who it is: its sample key."""

import hashlib
import struct

import numpy as np
from PIL import Image, ImageOps

SAMPLE_KEY_VERSION = 1
# Of an image resized, before its crop. Only a strip comes so far, of which the crop would show nothing: a file of a few
# kilobytes would take gigabytes.
MAX_RESIZED_PX = 50_000_000
_PROGRAMS = ("EPS", "WMF")  # formats that Pillow has other programs draw


class StripImageError(ValueError):
    """An image so much longer than wide that its resize would take too much memory; its text says how much."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring an image of any kind to 8-bit RGB, in one defined way.

    EXIF orientation is applied, alpha is composited on white, 16 bits are scaled to 8 (rounded to nearest),
    grey is repeated.

    Args:
        image: an opened image; it is decoded here.

    Returns:
        Mode RGB, without metadata.

    Raises:
        ValueError: floating-point pixels, or a format that is a program and not pixels.
    """
    if image.format in _PROGRAMS:
        raise ValueError(f"{image.format} is drawn by another program, which is not run; convert it to PNG or JPEG")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; 8 or 16 bits are expected")
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    image.info = {}
    return image


def sample_key(image: Image.Image) -> bytes:
    """Compute who an image is, whatever its position, file format or compression.

    Args:
        image: mode RGB, as `to_rgb` makes it.

    Returns:
        16 bytes: BLAKE2b-128 over a version byte, height and width (u32, little-endian) and the RGB bytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(struct.pack("<BII", SAMPLE_KEY_VERSION, image.height, image.width))
    digest.update(image.tobytes())
    return digest.digest()


def check_resized(image: Image.Image, shorter_px: int) -> None:
    """Refuse a strip before memory is taken for it.

    Args:
        image: of any size.
        shorter_px: what its shorter side will be resized to.

    Raises:
        StripImageError: the resized image would have more than `MAX_RESIZED_PX` pixels.
    """
    shorter, longer = sorted(image.size)
    resized_px = shorter_px * int(shorter_px * longer / shorter)
    if resized_px > max(MAX_RESIZED_PX, shorter_px * shorter_px):
        raise StripImageError(
            f"it has {image.width}×{image.height} pixels, {resized_px:,} with a shorter side of {shorter_px}; at most "
            f"{MAX_RESIZED_PX:,} are taken"
        )
