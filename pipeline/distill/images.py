"""Labelled images as a student sees them: uint8 pixels at its size, sample keys and labels.

Decodes nothing: that is `decoding`, and `cache` keeps what it made.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from pipeline.pixels import check_resized


@dataclass(frozen=True)
class DecodedImages:
    """Images of one split.

    `pixels` [N, V, size, size, 3] uint8, every view of every image, are shared by every selection; `places` [M] say
    which of them these are. `source_rows` [M] are their rows in the split, `keys` [M, 16] uint8, `labels` [M] int64.
    """

    pixels: NDArray[np.uint8]
    places: NDArray[np.int64]
    source_rows: NDArray[np.int64]
    keys: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.places)

    def select(self, chosen: NDArray[Any]) -> "DecodedImages":
        """Return some of the images, by mask or index."""
        return DecodedImages(
            self.pixels, self.places[chosen], self.source_rows[chosen], self.keys[chosen], self.labels[chosen]
        )


def fit_to(image_size: int) -> Compose:
    """Return how an RGB image becomes the student's input: as timm does it with `crop_pct` 1.

    Args:
        image_size: side in pixels.

    Returns:
        A function from image to image: bicubic resize of the shorter side, then a crop at the centre. It raises
        `StripImageError` as `check_resized` does.
    """
    resize = Resize(image_size, InterpolationMode.BICUBIC, antialias=True)
    return Compose([partial(_checked, image_size), resize, CenterCrop(image_size)])


def held_out(keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Choose about a tenth of the images for evaluation, by content: copies of an image stay together.

    Args:
        keys: [N, 16] sample keys.

    Returns:
        [N] whether each image is held out.
    """
    apart: NDArray[np.bool_] = np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0] % 10 == 0
    return apart


def _checked(image_size: int, image: Image.Image) -> Image.Image:
    check_resized(image, image_size)
    return image
