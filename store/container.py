"""What the two containers share: where a tensor lies in a file, and how its rows are checked and hashed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.digest import ThreadedSha256
from store.errors import ArtifactWriteError
from store.layout import check_finite, numpy_dtype
from store.manifest import TensorInfo

Blocks = Iterable[NDArray[Any]]
Progress = Callable[[int], object]  # told of bytes as they are done
BLOCK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class GzipChunks:
    """Where the compressed rows of a tensor lie.

    `rows` to a chunk, the last one padded; `spans` [num_chunks, 2] int64 are offset and size in the file;
    `shuffled` tells whether the bytes of each number were spread out before compression.
    """

    rows: int
    spans: NDArray[np.int64]
    shuffled: bool


@dataclass(frozen=True)
class Location:
    """Type, shape and place of one tensor: `offset` is its first byte in the file, or `chunks` say where it is."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    chunks: GzipChunks | None = None


@dataclass(frozen=True)
class Header:
    """What a container says before any tensor is read."""

    manifest: bytes
    manifest_sha256: str
    locations: Mapping[str, Location]


def ignore(num_bytes: int) -> None:
    """Report progress to nobody."""


def row_blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Cut an array into blocks of rows of about 4 MiB.

    Args:
        array: at least one axis; may be a memory map.

    Yields:
        Consecutive views of its rows.
    """
    step = block_rows(array.shape, array.dtype)
    for start in range(0, len(array), step):
        yield array[start : start + step]


def block_rows(shape: tuple[int, ...], dtype: np.dtype[Any], block_bytes: int = BLOCK_BYTES) -> int:
    """Return how many rows of a tensor make a block: at least one."""
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    return max(1, block_bytes // max(1, row_bytes))


def write_blocks(name: str, info: TensorInfo, blocks: Blocks, write: Callable[[NDArray[Any]], object]) -> str:
    """Check, hash and write the rows of one tensor; hashing runs beside the rest.

    Args:
        name: tensor name, for messages.
        info: what dtype and shape the rows must add up to.
        blocks: the rows, in order.
        write: receives each block, contiguous and little-endian.

    Returns:
        SHA-256 of all bytes, in hexadecimal.

    Raises:
        ArtifactWriteError: the rows are of another dtype, or more or fewer than the shape says.
        ArtifactFormatError: a value is not finite.
    """
    dtype = numpy_dtype(info.dtype)
    num_rows = 0
    with ThreadedSha256() as digest:
        for block in blocks:
            if block.dtype != dtype.newbyteorder("=") or block.shape[1:] != info.shape[1:]:
                raise ArtifactWriteError(
                    f"{name}: a block is {block.dtype} {list(block.shape)}, "
                    f"expected {info.dtype} rows of {list(info.shape[1:])}."
                )
            num_rows += len(block)
            if num_rows > info.shape[0]:
                break  # a source may be endless
            data = np.ascontiguousarray(block, dtype)
            with digest.beside(data):
                check_finite(name, data, "artifact")
                write(data)
    if num_rows != info.shape[0]:
        raise ArtifactWriteError(f"{name}: {num_rows} rows were given, {info.shape[0]} were announced.")
    return digest.hexdigest()
