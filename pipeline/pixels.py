"""An image in the one form that all stages see, and who it is: its sample key."""

import hashlib
import struct

import numpy as np
from PIL import Image, ImageOps

SAMPLE_KEY_VERSION = 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring an image of any kind to 8-bit RGB, in one defined way.

    EXIF orientation is applied, alpha is composited on white, 16 bits are scaled to 8 (rounded to nearest),
    grey is repeated.

    Args:
        image: an opened image; it is decoded here.

    Returns:
        Mode RGB, without metadata.

    Raises:
        ValueError: floating-point pixels.
    """
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
