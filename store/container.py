"""What the two containers share: where a tensor lies in a file, and how its rows are checked and hashed."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import ArtifactWriteError
from store.layout import check_finite, numpy_dtype
from store.manifest import TensorInfo

Blocks = Iterable[NDArray[Any]]
BLOCK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Location:
    """Type, shape and place of one tensor: `offset` is its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """What a container says before any tensor is read."""

    manifest: bytes
    manifest_sha256: str
    locations: Mapping[str, Location]


def row_blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Cut an array into blocks of rows of about 4 MiB.

    Args:
        array: at least one axis; may be a memory map.

    Yields:
        Consecutive views of its rows.
    """
    row_bytes = max(1, array.nbytes // max(1, len(array)))
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, len(array), step):
        yield array[start : start + step]


def hash_blocks(name: str, info: TensorInfo, blocks: Blocks, write: Callable[[bytes], object]) -> str:
    """Check, hash and hand on the rows of one tensor.

    Args:
        name: tensor name, for messages.
        info: what dtype and shape the rows must add up to.
        blocks: the rows, in order.
        write: receives the little-endian bytes of each block.

    Returns:
        SHA-256 of all bytes, in hexadecimal.

    Raises:
        ArtifactWriteError: the rows are of another dtype, or more or fewer than the shape says.
        ArtifactFormatError: a value is not finite.
    """
    digest = hashlib.sha256()
    dtype = numpy_dtype(info.dtype)
    num_rows = 0
    for block in blocks:
        if block.dtype != dtype.newbyteorder("=") or block.shape[1:] != info.shape[1:]:
            raise ArtifactWriteError(
                f"{name}: a block is {block.dtype} {list(block.shape)}, "
                f"expected {info.dtype} rows of {list(info.shape[1:])}."
            )
        check_finite(name, block, "artifact")
        num_rows += len(block)
        if num_rows > info.shape[0]:
            break  # a source may be endless
        data = np.ascontiguousarray(block, dtype).tobytes()
        digest.update(data)
        write(data)
    if num_rows != info.shape[0]:
        raise ArtifactWriteError(f"{name}: {num_rows} rows were given, {info.shape[0]} were announced.")
    return digest.hexdigest()
