"""Batches of the chosen images, read, keyed and preprocessed for the teacher."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipeline.data import BadImageError, Labelled
from pipeline.pixels import StripImageError, check_resized, sample_key
from pipeline.views import render_view

if TYPE_CHECKING:
    from pipeline.extract.teacher import Preprocess

_ORIGINALS = 16  # in a process at once: a photograph takes 36 MB, and three times that when it is resized


@dataclass(frozen=True)
class Batch:
    """Some images, ready for the teacher.

    `rows` [B] are those that could be decoded, `keys` [B, 16] uint8 their sample keys, `pixels` for each view
    their [B, 3, height, width] (no view where B is 0). `bad` has an error for each of the others.
    """

    rows: NDArray[np.int64]
    keys: NDArray[np.uint8]
    pixels: list[torch.Tensor]
    bad: list[BadImageError]

    def pin_memory(self) -> "Batch":
        """Move the pixels to where a GPU copies them from while it computes; DataLoader asks for it by this name."""
        return replace(self, pixels=[pixels.pin_memory() for pixels in self.pixels])


@dataclass(frozen=True)
class Rendering:
    """How an image becomes what the teacher sees: its views, the teacher's own image processor, and its precision.

    `shortest_edge` is what that resizes the shorter side to, in pixels, if it keeps the shape.
    """

    preprocess: "Preprocess"
    views: int = 1
    view_size: int = 224
    seed: int = 0
    precision: torch.dtype = torch.float32
    shortest_edge: int | None = None

    def render(self, images: list[Image.Image], keys: list[bytes]) -> list[list[Image.Image]]:
        """Return all images as each view shows them."""
        return [
            [
                render_view(image, key, view, seed=self.seed, view_size=self.view_size)
                for image, key in zip(images, keys, strict=True)
            ]
            for view in range(self.views)
        ]


@dataclass(frozen=True)
class _Decoded:
    rows: NDArray[np.int64]
    keys: list[bytes]
    views: list[list[Image.Image]]
    bad: list[BadImageError]


def read_batches(
    data: Labelled, cuts: Sequence[NDArray[np.int64]], rendering: Rendering, num_workers: int, *, pin: bool = False
) -> Iterator[Batch]:
    """Read rows in order, a batch at a time, ahead of who asks for them.

    Args:
        data: the data set.
        cuts: for each batch, which rows of the data.
        rendering: what becomes of an image.
        num_workers: processes that decode and preprocess. With 0, a thread of this process decodes the next batch,
            and the image processor runs when that batch is asked for: where the teacher computes on every core, two
            teams of threads at once would wait for each other.
        pin: put pixels where a GPU copies them from while it computes.

    Yields:
        The batches, in the order of `cuts` whatever the number of workers.
    """
    reader = _Reader(data, cuts, rendering)
    if num_workers:
        yield from DataLoader(reader, batch_size=None, num_workers=num_workers, pin_memory=pin)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as thread:
        read = thread.submit(reader.decode, cuts[0])
        for index in range(len(cuts)):
            batch = reader.preprocess(read.result())
            if index + 1 < len(cuts):  # beside the teacher's work on this one
                read = thread.submit(reader.decode, cuts[index + 1])
            yield batch


class _Reader(Dataset[Batch]):
    def __init__(self, data: Labelled, cuts: Sequence[NDArray[np.int64]], rendering: Rendering) -> None:
        self._data, self._cuts, self._rendering = data, cuts, rendering

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, index: int) -> Batch:
        rows = self._cuts[index]
        starts = range(0, len(rows), _ORIGINALS)
        return _joined([self.preprocess(self.decode(rows[start : start + _ORIGINALS])) for start in starts])

    def decode(self, rows: NDArray[np.int64]) -> _Decoded:
        # Errors travel as values: a worker process would wrap a raised one in a traceback.
        read = [
            self._refuse_strip(row, image)
            for row, image in zip(rows.tolist(), self._data.read(rows.tolist()), strict=True)
        ]
        bad = [image for image in read if isinstance(image, BadImageError)]
        images = [image for image in read if not isinstance(image, BadImageError)]
        decoded = np.array([not isinstance(image, BadImageError) for image in read])
        keys = [sample_key(image) for image in images]
        return _Decoded(rows[decoded], keys, self._rendering.render(images, keys), bad)

    def preprocess(self, decoded: _Decoded) -> Batch:
        keys = np.frombuffer(b"".join(decoded.keys), np.uint8).reshape(-1, 16)
        # In the teacher's precision: half of the bytes to carry to a GPU.
        pixels = [
            self._rendering.preprocess(view).to(self._rendering.precision) for view in decoded.views if decoded.keys
        ]
        return Batch(decoded.rows, keys, pixels, decoded.bad)

    def _refuse_strip(self, row: int, image: Image.Image | BadImageError) -> Image.Image | BadImageError:
        side = self._rendering.shortest_edge
        if side is None or isinstance(image, BadImageError):
            return image
        try:
            check_resized(image, side)
        except StripImageError as error:
            return self._data.bad_image(row, str(error))
        return image


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    views = zip(*(part.pixels for part in parts if len(part.rows)), strict=True)
    return Batch(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.keys for part in parts]),
        [torch.cat(view) for view in views],
        [error for part in parts for error in part.bad],
    )
