"""A data set decoded once: uint8 pixels at the student's size, sample keys and labels.

The pixels lie in a nameless temporary file that is mapped into memory: they need no RAM of their own, and
vanish with the process.
"""

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from pipeline.data import BadImageError, Labelled, sample_key
from pipeline.errors import PipelineError
from pipeline.progress import LOGGER, ProgressBar

_READ_ROWS = 256


@dataclass(frozen=True)
class DecodedImages:
    """Images of one split.

    `pixels` [N, size, size, 3] uint8 are shared by every selection; `places` [M] say which of them these are.
    `source_rows` [M] are their rows in the split, `keys` [M, 16] uint8, `labels` [M] int64.
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


def decode_images(data: Labelled, image_size: int, *, skip_bad: bool, folder: Path | None = None) -> DecodedImages:
    """Decode all rows of a split.

    Args:
        data: the split.
        image_size: side of the student's input in pixels.
        skip_bad: leave out images that cannot be decoded, instead of stopping at the first.
        folder: where the temporary file may lie; none: the system's place for such files.

    Returns:
        The images, in the order of the rows.

    Raises:
        PipelineError: an image cannot be decoded, or the disk is full.
    """
    fit = fit_to(image_size)
    keys: list[bytes] = []
    kept: list[int] = []
    num_bad = 0
    file = None
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the memory map outlives this function)
        with ProgressBar(f"decoding {data.settings.split}", len(data)) as bar:
            for start in range(0, len(data), _READ_ROWS):
                rows = range(start, min(start + _READ_ROWS, len(data)))
                for row, image in zip(rows, data.read(rows), strict=True):
                    if isinstance(image, BadImageError):
                        if not skip_bad:
                            raise image
                        num_bad += 1
                        continue
                    keys.append(sample_key(image))
                    kept.append(row)
                    file.write(fit(image).tobytes())
                bar.advance(len(rows))
        file.flush()
    except OSError as error:
        if file is not None:
            with suppress(OSError):
                file.close()
        raise PipelineError(f"the decoded images cannot be kept in a temporary file ({error.strerror}).") from None
    if num_bad:
        LOGGER.info("%d images of split %s could not be decoded and were left out.", num_bad, data.settings.split)
    if not keys:
        raise PipelineError(f"{data.settings.dataset}, split {data.settings.split}: no image could be decoded.")
    return DecodedImages(
        pixels=np.memmap(file, np.uint8, "r").reshape(-1, 1, image_size, image_size, 3),
        places=np.arange(len(keys)),
        source_rows=data.numbers[kept],
        keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16),
        labels=data.labels[kept],
    )


def fit_to(image_size: int) -> Compose:
    """Return how an RGB image becomes the student's input: as timm does it with `crop_pct` 1.

    Args:
        image_size: side in pixels.

    Returns:
        A function from image to image: bicubic resize of the shorter side, then a crop at the centre.
    """
    return Compose([Resize(image_size, InterpolationMode.BICUBIC, antialias=True), CenterCrop(image_size)])


def held_out(keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Choose about a tenth of the images for evaluation, by content: copies of an image stay together.

    Args:
        keys: [N, 16] sample keys.

    Returns:
        [N] whether each image is held out.
    """
    apart: NDArray[np.bool_] = np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0] % 10 == 0
    return apart
