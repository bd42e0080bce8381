"""One tensor of an open artifact: rows gathered or streamed from the file, nothing held that cannot be sent away.

A contiguous tensor is gathered through a memory map. Gzip chunks are inflated here rather than by HDF5: no
HDF5 object goes into worker processes, and no chunk inflates to more than the format says.
"""

import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.container import GzipChunks, Location, block_rows
from store.errors import ArtifactFormatError, ArtifactNotFoundError
from store.layout import numpy_dtype

Identity = tuple[int, ...]


def identity_of(status: os.stat_result) -> Identity:
    """Return what changes when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass
class StoredTensor:
    """Where the rows of a tensor are, and how to read them."""

    path: Path
    identity: Identity
    name: str
    location: Location
    _map: NDArray[Any] | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process without the memory map, which would be pickled as an array."""
        return {**self.__dict__, "_map": None}

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its little-endian numpy type."""
        return numpy_dtype(self.location.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.location.shape

    def forget(self) -> None:
        """Let go of the memory map; arrays that were handed out stay valid."""
        self._map = None

    def whole(self) -> NDArray[Any]:
        """Return all rows: a read-only memory map, or, where they are compressed, an array in memory."""
        if self.location.chunks is None:
            return self._mapped()
        array = np.empty(self.shape, self.dtype)
        start = 0
        for block in self.blocks():
            array[start : start + len(block)] = block
            start += len(block)
        array.flags.writeable = False
        return array

    def gather(self, rows: NDArray[np.integer]) -> NDArray[Any]:
        """Read some rows.

        Args:
            rows: [R], each in 0…length−1, in any order, repeats allowed.

        Returns:
            [R, …], a copy.
        """
        chunks = self.location.chunks
        if chunks is None:
            return np.asarray(self._mapped()[rows])
        rows = np.asarray(rows, np.int64)  # small types cannot count the rows of a chunk
        gathered = np.empty((len(rows), *self.shape[1:]), self.dtype)
        order = np.argsort(rows, kind="stable")
        chunk_of = rows[order] // chunks.rows
        starts = np.flatnonzero(np.diff(chunk_of, prepend=-1))
        with self._open() as file:
            for places in np.split(order, starts[1:]) if len(order) else ():
                chunk = int(rows[places[0]]) // chunks.rows
                gathered[places] = self._inflate(file, chunks, chunk)[rows[places] - chunk * chunks.rows]
        return gathered

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Read all rows in order.

        Yields:
            Blocks of about 4 MiB. Two buffers take turns: a block is valid until the next but one.

        Raises:
            ArtifactFormatError: the file was cut off, or a chunk is damaged.
        """
        step = block_rows(self.shape, self.dtype)
        if self.location.chunks is not None:
            for start in range(0, self.shape[0], step):
                yield self.gather(np.arange(start, min(start + step, self.shape[0])))
            return
        # Read, not mapped: a file that is cut off meanwhile is an error, where a map would kill the process.
        buffers = [np.empty((min(step, self.shape[0]), *self.shape[1:]), self.dtype) for _ in range(2)]
        with self._open() as file:
            file.seek(self.location.offset)
            for start in range(0, self.shape[0], step):
                block = buffers[start // step % 2][: self.shape[0] - start]
                _fill(file, block, f"{self.path.name}: {self.name}")
                yield block

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read consecutive rows of a tensor that is not compressed, not mapped: see `blocks`."""
        rows = np.empty((max(0, min(stop, self.shape[0]) - start), *self.shape[1:]), self.dtype)
        with self._open() as file:
            file.seek(self.location.offset + start * self.dtype.itemsize * math.prod(self.shape[1:]))
            _fill(file, rows, f"{self.path.name}: {self.name}")
        return rows

    def _mapped(self) -> NDArray[Any]:
        if self._map is None:
            with self._open() as file:
                try:
                    self._map = np.memmap(file, self.dtype, "r", self.location.offset, self.shape)
                except (OSError, ValueError) as error:
                    raise ArtifactFormatError(f"{self.path.name}: {self.name} cannot be mapped ({error}).") from None
        return self._map

    def _open(self) -> FileIO:
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise ArtifactNotFoundError(f"{self.path}: cannot be read any more ({error.strerror}).") from None
        if identity_of(os.fstat(file.fileno())) != self.identity:
            file.close()
            raise ArtifactFormatError(f"{self.path.name}: was replaced while it was open. Open it again.")
        return file

    def _inflate(self, file: FileIO, chunks: GzipChunks, index: int) -> NDArray[Any]:
        offset, size = chunks.spans[index].tolist()
        data = np.empty(size, np.uint8)
        file.seek(offset)
        _fill(file, data, f"{self.path.name}: {self.name}")
        itemsize = self.dtype.itemsize
        chunk_bytes = chunks.rows * itemsize * int(np.prod(self.shape[1:]))
        inflater = zlib.decompressobj()
        try:
            plain = inflater.decompress(data.data, chunk_bytes + 1)
        except zlib.error as error:
            raise self._bad_chunk(index, str(error)) from None
        if len(plain) != chunk_bytes or not inflater.eof or inflater.unused_data:
            raise self._bad_chunk(index, f"it inflates to other than {chunk_bytes} bytes")
        bytes_ = np.frombuffer(plain, np.uint8)
        if chunks.shuffled:
            bytes_ = np.ascontiguousarray(bytes_.reshape(itemsize, -1).T)
        return bytes_.view(self.dtype).reshape(chunks.rows, *self.shape[1:])

    def _bad_chunk(self, index: int, reason: str) -> ArtifactFormatError:
        return ArtifactFormatError(
            f"{self.path.name}: chunk {index} of {self.name} is damaged ({reason}). Copy or extract the file again."
        )


def _fill(file: FileIO, buffer: NDArray[Any], where: str) -> None:
    view = buffer.reshape(-1).view(np.uint8).data
    while len(view):
        try:
            count = file.readinto(view)
        except OSError as error:
            raise ArtifactNotFoundError(f"{where} cannot be read ({error.strerror}).") from None
        if not count:
            raise ArtifactFormatError(f"{where} ends early: the file was cut off while it was read. Copy it again.")
        view = view[count:]
