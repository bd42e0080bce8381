"""Sample embeddings in int8: one scale a row, chosen so that the row's largest value becomes 127."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from store.errors import ArtifactWriteError

if TYPE_CHECKING:
    from store.artifact import Artifact

_LARGEST = 127
# With a scale up to this one every int8, −128 too, decodes to a finite number.
LARGEST_SCALE = float(np.finfo(np.float32).max) / 128


def row_scales(embeddings: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the scale of each row.

    Args:
        embeddings: [S, V, D].

    Returns:
        [S, V] float32; 0 where a row is zero, or too small for a normal float32 scale: a subnormal one is so
        coarse that the largest value would be more than 127 steps.
    """
    scales = np.abs(embeddings.astype(np.float32)).max(axis=-1) / np.float32(_LARGEST)
    return np.asarray(np.where(scales < np.finfo(np.float32).tiny, 0, scales), np.float32)


def quantize(embeddings: NDArray[np.floating], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """Divide by the scale and round to the nearest integer, halves to the even one.

    Args:
        embeddings: [S, V, D].
        scales: [S, V], as `row_scales` gives.

    Returns:
        [S, V, D], −127…127.
    """
    steps = np.zeros(embeddings.shape)
    np.divide(embeddings.astype(np.float64), scales[..., None], out=steps, where=scales[..., None] > 0)
    return np.clip(np.rint(steps), -_LARGEST, _LARGEST).astype(np.int8)


def decode_embeddings(stored: NDArray[np.generic], scales: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Return [S, V, D] float32 from any stored type; int8 comes with its scales [S, V]."""
    embeddings = stored.astype(np.float32)
    return embeddings if scales is None else embeddings * scales[..., None]


def sample_embeddings(artifact: "Artifact", rows: NDArray[np.integer]) -> NDArray[np.float32]:
    """Gather sample embeddings as numbers, however they are stored.

    Args:
        artifact: with samples.
        rows: [R] rows of `sample/*`.

    Returns:
        [R, V, D] float32.
    """
    stored = artifact.gather("sample/embedding", rows)
    return decode_embeddings(stored, artifact.gather("sample/scale", rows) if stored.dtype == np.int8 else None)


def check_fits(embeddings: NDArray[np.float32], dtype: str) -> None:
    """Check that embeddings can be stored in a type.

    Args:
        embeddings: of any shape.
        dtype: `float32`, `float16`, or `int8`.

    Raises:
        ArtifactWriteError: a value does not fit: never is infinity written.
    """
    # As Python's floats: numpy would compare in float16, and warn of the overflow.
    largest = float(np.abs(embeddings).max(initial=0))
    limit = _LARGEST * LARGEST_SCALE if dtype == "int8" else float(np.finfo(dtype).max)
    if largest > limit:
        raise ArtifactWriteError(
            f"an embedding reaches {largest:.4g}, {dtype} ends at {limit:.4g}. Pass --dtype float32."
        )


def encode_embeddings(embeddings: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """Convert embeddings to the type in which they will be stored.

    Args:
        embeddings: [S, V, D].
        dtype: `float32`, `float16`, or `int8`.

    Returns:
        [S, V, D].

    Raises:
        ArtifactWriteError: a value does not fit: never is infinity written.
    """
    check_fits(embeddings, dtype)
    return quantize(embeddings, row_scales(embeddings)) if dtype == "int8" else embeddings.astype(dtype)
