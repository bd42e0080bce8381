"""Batches of the chosen images, read, keyed and preprocessed for the teacher."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipeline.data import BadImageError, Labelled, sample_key
from pipeline.views import render_view

if TYPE_CHECKING:
    from pipeline.extract.teacher import Preprocess


@dataclass(frozen=True)
class Batch:
    """Some images, ready for the teacher.

    `rows` [B] are those that could be decoded, `keys` [B, 16] uint8 their sample keys, `pixels` for each view
    their float32 [B, 3, height, width] (no view where B is 0). `bad` has an error for each of the others.
    """

    rows: NDArray[np.int64]
    keys: NDArray[np.uint8]
    pixels: list[torch.Tensor]
    bad: list[BadImageError]


@dataclass(frozen=True)
class Rendering:
    """How an image becomes what the teacher sees: its views, and the teacher's own image processor."""

    preprocess: "Preprocess"
    views: int = 1
    view_size: int = 224
    seed: int = 0

    def __call__(self, images: list[Image.Image], keys: list[bytes]) -> list[torch.Tensor]:
        """Return, for each view, the pixels of all images."""
        rendered = (
            [
                render_view(image, key, view, seed=self.seed, view_size=self.view_size)
                for image, key in zip(images, keys, strict=True)
            ]
            for view in range(self.views)
        )
        return [self.preprocess(view) for view in rendered] if images else []


def read_batches(
    data: Labelled, cuts: Sequence[NDArray[np.int64]], rendering: Rendering, num_workers: int
) -> Iterator[Batch]:
    """Read rows in order, a batch at a time.

    Args:
        data: the data set.
        cuts: for each batch, which rows of the data.
        rendering: what becomes of an image.
        num_workers: processes that read ahead; 0 reads in a thread of this one.

    Yields:
        The batches, in the order of `cuts` whatever the number of workers.
    """
    reader = _Reader(data, cuts, rendering)
    if num_workers:
        yield from DataLoader(reader, batch_size=None, num_workers=num_workers)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as thread:
        read: Future[Batch] | None = None
        for index in range(len(cuts) + 1):
            following = thread.submit(reader.__getitem__, index) if index < len(cuts) else None
            if read is not None:
                yield read.result()
            read = following


class _Reader(Dataset[Batch]):
    def __init__(self, data: Labelled, cuts: Sequence[NDArray[np.int64]], rendering: Rendering) -> None:
        self._data, self._cuts, self._rendering = data, cuts, rendering

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, index: int) -> Batch:
        rows = self._cuts[index]
        read = self._data.read(rows.tolist())
        # Errors travel as values: a worker process would wrap a raised one in a traceback.
        bad = [image for image in read if isinstance(image, BadImageError)]
        images = [image for image in read if not isinstance(image, BadImageError)]
        decoded = np.array([not isinstance(image, BadImageError) for image in read])
        keys = [sample_key(image) for image in images]
        pixels = self._rendering(images, keys)
        return Batch(rows[decoded], np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16), pixels, bad)
