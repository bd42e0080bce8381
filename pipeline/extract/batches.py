"""Batches of the chosen images, read, keyed and preprocessed for the teacher."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from pipeline.data import BadImageError, Labelled, sample_key

if TYPE_CHECKING:
    from pipeline.extract.teacher import Preprocess


@dataclass(frozen=True)
class Batch:
    """Some images, ready for the teacher.

    `rows` [B] are those that could be decoded, `keys` [B, 16] uint8 their sample keys, `pixels` their float32
    [B, 3, height, width] (none where B is 0). `bad` has an error for each of the others.
    """

    rows: NDArray[np.int64]
    keys: NDArray[np.uint8]
    pixels: torch.Tensor | None
    bad: list[BadImageError]


def read_batches(
    data: Labelled, rows: NDArray[np.int64], preprocess: "Preprocess", batch_size: int, num_workers: int
) -> Iterator[Batch]:
    """Read rows in order, a batch at a time.

    Args:
        data: the data set.
        rows: [N] which of its rows.
        preprocess: the teacher's own image processor.
        batch_size: rows in a batch; the last may be shorter.
        num_workers: processes that read ahead; 0 reads here.

    Yields:
        The batches, in the order of `rows` whatever the number of workers.
    """
    cuts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    reader = _Reader(data, cuts, preprocess)
    yield from DataLoader(reader, batch_size=None, num_workers=num_workers)


class _Reader(Dataset[Batch]):
    def __init__(self, data: Labelled, cuts: list[NDArray[np.int64]], preprocess: "Preprocess") -> None:
        self._data, self._cuts, self._preprocess = data, cuts, preprocess

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, index: int) -> Batch:
        rows = self._cuts[index]
        read = self._data.read(rows.tolist())
        # Errors travel as values: a worker process would wrap a raised one in a traceback.
        bad = [image for image in read if isinstance(image, BadImageError)]
        images = [image for image in read if not isinstance(image, BadImageError)]
        decoded = np.array([not isinstance(image, BadImageError) for image in read])
        keys = np.frombuffer(b"".join(map(sample_key, images)), np.uint8).reshape(-1, 16)
        return Batch(rows[decoded], keys, self._preprocess(images) if images else None, bad)
