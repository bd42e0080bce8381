"""Check every byte of an artifact, and everything that its numbers must obey."""

import math
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.artifact import Artifact, open_artifact
from store.container import Progress, ignore
from store.errors import ArtifactFormatError
from store.pairs import check_sorted, pairs_sha256
from store.quantize import LARGEST_SCALE

_BLOCK_ROWS = 65536
_MOST_IMAGES = 2**53  # of a class: merged counts stay far from overflow, and float64 holds each


def verify_artifact(path: str | os.PathLike[str], *, progress: Progress = ignore) -> str:
    """Verify a file from the first byte to the last, in constant memory.

    Args:
        path: the artifact.
        progress: told of the bytes of each block that was checked.

    Returns:
        The SHA-256 of its manifest, which names the whole artifact.

    Raises:
        StoreError: it is missing, damaged, or breaks a rule of the format.
    """
    with open_artifact(path) as artifact:
        verify_open(artifact, progress)
        return artifact.manifest_sha256


def verify_open(artifact: Artifact, progress: Progress = ignore) -> None:
    """Verify an open artifact: digests, finite values, counts, labels, order and uniqueness of the pairs.

    Args:
        artifact: what `open_artifact` returned.
        progress: told of the bytes of each block that was checked.

    Raises:
        ArtifactFormatError: it is damaged, or breaks a rule of the format.
    """
    for name in artifact.manifest.tensors:
        artifact.verify(name, progress)
    _check_range(artifact, "class/count", 1, _MOST_IMAGES)
    _check_range(artifact, "class/m2", 0)
    if "sample/scale" in artifact:
        _check_range(artifact, "sample/scale", 0, LARGEST_SCALE)
    if "sample/key" in artifact:
        _check_samples(artifact)


class _Rows:
    """Slices of a tensor, read from the file: were it cut off meanwhile, a memory map would kill the process."""

    def __init__(self, artifact: Artifact, name: str) -> None:
        self._stored = artifact.stored(name)

    def __len__(self) -> int:
        return self._stored.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        return self._stored.read(rows.start, rows.stop)


def _check_range(artifact: Artifact, name: str, least: int, most: float = math.inf) -> None:
    for block in artifact.stored(name).blocks():
        if block.min() < least:
            raise _broken(artifact, f"{name} has a value of {block.min()}, expected at least {least}")
        if block.max() > most:
            raise _broken(artifact, f"{name} has a value of {block.max()}, expected at most {most}")


def _check_samples(artifact: Artifact) -> None:
    keys, labels = _Rows(artifact, "sample/key"), _Rows(artifact, "sample/label")
    counts = artifact.stored("class/count").read(0, len(artifact.manifest.classes))
    rows_of_class = np.zeros(len(counts), np.int64)
    for start in range(0, len(labels), _BLOCK_ROWS):
        block = labels[start : start + _BLOCK_ROWS]
        if block.min() < 0 or block.max() >= len(counts):
            raise _broken(
                artifact, f"sample/label reaches from {block.min()} to {block.max()}, expected 0 to {len(counts) - 1}"
            )
        rows_of_class += np.bincount(block, minlength=len(counts))
    check_sorted(keys, labels, artifact.path.name)
    if (rows_of_class > counts).any():
        row = int(np.argmax(rows_of_class > counts))
        raise _broken(
            artifact, f"class {row} has {rows_of_class[row]} samples, but class/count says {counts[row]} images"
        )
    expected = artifact.manifest.sampling.images_sha256
    if expected is not None and pairs_sha256(keys, labels) != expected:
        raise _broken(artifact, "the pairs of sample/key and sample/label are not those of sampling.images_sha256")


def _broken(artifact: Artifact, what: str) -> ArtifactFormatError:
    return ArtifactFormatError(f"{artifact.path.name}: {what}. The file is damaged: extract it again.")
