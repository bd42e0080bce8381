"""Sample embeddings on their way to the artifact: spooled in the order of extraction, read back sorted.

The spool is a nameless temporary file beside the artifact: it takes no memory, and vanishes with the
process, however that ends.
"""

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from store import RowBlocks, pairs_sha256, sort_pairs

_BLOCK_ROWS = 4096


class SampleSpool:
    """Collects (sample key, label) pairs, and embeddings where they are wanted."""

    def __init__(self, folder: Path, embed_dim: int, dtype: str | None) -> None:
        """Open an empty spool.

        Args:
            folder: where the temporary file may lie; the artifact's own folder has the room.
            embed_dim: D.
            dtype: `float16` or `float32`; none keeps the pairs only.
        """
        self._folder = folder
        self._embed_dim = embed_dim
        self._dtype = np.dtype(dtype) if dtype else None
        self._file = tempfile.TemporaryFile(dir=folder) if dtype else None  # noqa: SIM115 (lives as long as this)
        self._keys: list[NDArray[np.uint8]] = []
        self._labels: list[NDArray[np.int32]] = []

    def close(self) -> None:
        """Let go of the temporary file."""
        if self._file is not None:
            with suppress(OSError):  # a full disk, which `add` has reported
                self._file.close()

    def add(self, keys: NDArray[np.uint8], labels: NDArray[np.int64], embeddings: NDArray[np.float32]) -> None:
        """Append one batch.

        Args:
            keys: [B, 16] sample keys.
            labels: [B] class rows.
            embeddings: [B, D].

        Raises:
            PipelineError: an embedding does not fit the dtype.
        """
        self._keys.append(keys)
        self._labels.append(labels.astype(np.int32))
        if self._file is None or self._dtype is None:
            return
        # As Python's floats: numpy would compare in float16, and warn of the overflow.
        largest, limit = float(np.abs(embeddings).max()), float(np.finfo(self._dtype).max)
        if largest > limit:
            raise PipelineError(
                f"an embedding reaches {largest:.4g}, {self._dtype} ends at {limit:.4g}. Pass --dtype float32."
            )
        try:
            self._file.write(embeddings.astype(self._dtype).tobytes())
            self._file.flush()
        except OSError as error:
            raise PipelineError(f"{self._folder}: the sample embeddings do not fit ({error.strerror}).") from None

    def finish(self) -> tuple[str, dict[str, NDArray[Any] | RowBlocks]]:
        """Sort by (key, label) and drop repeats of a pair.

        Returns:
            SHA-256 over the sorted unique pairs (16-byte key, int32 little-endian label), and the `sample/*`
            tensors, empty where no embeddings were kept.
        """
        keys, labels = np.concatenate(self._keys), np.concatenate(self._labels)
        order, fresh = sort_pairs(keys, labels)
        order = order[fresh]
        keys, labels = keys[order], labels[order]
        digest = pairs_sha256(keys, labels)
        if self._file is None or self._dtype is None:
            return digest, {}
        shape = (len(order), 1, self._embed_dim)
        rows = RowBlocks(shape, self._dtype.name, _blocks(self._file, self._dtype, shape[1:], order))
        return digest, {"sample/key": keys, "sample/label": labels, "sample/embedding": rows}


def _blocks(
    file: IO[bytes], dtype: np.dtype[Any], row_shape: tuple[int, int], order: NDArray[np.int64]
) -> Iterator[NDArray[Any]]:
    stored = np.memmap(file, dtype, "r").reshape(-1, *row_shape)
    for start in range(0, len(order), _BLOCK_ROWS):
        yield stored[order[start : start + _BLOCK_ROWS]]
