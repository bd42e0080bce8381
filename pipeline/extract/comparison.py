"""Compare embeddings with those of a file: how far apart they are, and how far they may be. Only numbers here.

What may differ is what arithmetic and storage round; each part is derived, or measured and labelled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from store import Artifact, sample_embeddings

Floats = NDArray[np.float64]

# Relative errors ‖a − b‖/‖b‖ of one embedding between two runs with equal weights and pixels, each with room above the
# worst that was measured: ViT-Ti/16 and EfficientNet-Lite0, 128 CIFAR-100 images × 2 views, on one CPU limited to AVX2
# or not. The size of the batch changed no bit there; on a GPU it may, and none was at hand to measure.
FLOAT32_TOLERANCE = 1e-3  # measured 4e-6; one grey level in 0.07 % of the pixels, by another resize, is 3e-3 already
BFLOAT16_TOLERANCE = 0.1  # measured 0.024; rounding grows with the square root of the depth, and a ViT-g has 40 layers
MIXED_TOLERANCE = 0.5  # bfloat16 beside float32, measured 0.042 (ViT) and 0.34 (EfficientNet); strangers are 1.4 apart
_FLOAT16_STEP, _FLOAT16_SMALLEST = 2.0**-11, 2.0**-25  # largest rounding: relative, and absolute below 6e-5


class Deviation(NamedTuple):
    """How far one row is from the file's, in the view in which it is furthest."""

    row: int
    view: int
    relative_error: float


@dataclass(frozen=True)
class Comparison:
    """N rows × V views beside the file's: relative errors, the largest allowed, cosine similarities, each [N, V]."""

    relative_error: Floats
    allowed: Floats
    cosine: Floats

    @property
    def differing(self) -> NDArray[np.bool_]:
        """[N] whether a row is further away than it may be, in any view."""
        return np.asarray((self.relative_error > self.allowed).any(axis=1))

    def worst(self, most: int) -> list[Deviation]:
        """Return the rows with the largest relative errors above zero, the largest first."""
        views, errors = self.relative_error.argmax(axis=1), self.relative_error.max(axis=1)
        order = np.argsort(-errors, kind="stable")[:most].tolist()
        return [Deviation(row, int(views[row]), float(errors[row])) for row in order if errors[row] > 0]


def tolerance(one: str, other: str) -> float:
    """Return the relative error that two precisions allow, rounding of the storage apart.

    Args:
        one: a precision, `float32` or `bfloat16`; an unknown one is taken for another than both.
        other: a precision.
    """
    if one != other:
        return MIXED_TOLERANCE
    return FLOAT32_TOLERANCE if one == "float32" else BFLOAT16_TOLERANCE


def compare(embeddings: NDArray[np.floating], stored: NDArray[np.floating], room: Floats) -> Comparison:
    """Compare embeddings with stored ones.

    Args:
        embeddings: [N, V, D], computed here.
        stored: [N, V, D], as the file has them.
        room: [N, V] how long their difference may be.

    Returns:
        The comparison. Errors and what is allowed are relative to the stored length, or to the computed one where
        that is zero.
    """
    a, b = embeddings.astype(np.float64), stored.astype(np.float64)
    length_a, length_b = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    length = np.where(length_b > 0, length_b, np.where(length_a > 0, length_a, 1))
    error = np.linalg.norm(a - b, axis=-1) / length
    both = length_a * length_b
    cosine = np.divide(np.einsum("nvd,nvd->nv", a, b), both, out=np.where(error > 0, 0.0, 1.0), where=both > 0)
    return Comparison(error, room / length, cosine)


def joined(parts: Sequence[Comparison]) -> Comparison:
    """Put comparisons of different rows one behind the other; at least one."""
    names = ("relative_error", "allowed", "cosine")
    return Comparison(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def compare_samples(
    artifact: Artifact, rows: NDArray[np.int64], embeddings: NDArray[np.floating], relative: float
) -> Comparison:
    """Compare embeddings with samples of an artifact.

    Args:
        artifact: with samples.
        rows: [N] rows of `sample/*`.
        embeddings: [N, V, D] of the same images, computed here.
        relative: what arithmetic may make of it, as `tolerance` says.

    Returns:
        The comparison. Beside arithmetic, half a step of the stored type is allowed in every value.
    """
    stored = sample_embeddings(artifact, rows)
    length, values = np.linalg.norm(stored.astype(np.float64), axis=-1), stored.shape[-1]
    room = relative * length
    if "sample/scale" in artifact:
        room += np.sqrt(values) / 2 * artifact.gather("sample/scale", rows)
    if artifact.manifest.tensors["sample/embedding"].dtype != "float32":  # int8 was made from float16, mostly
        room += _FLOAT16_STEP * length + np.sqrt(values) * _FLOAT16_SMALLEST
    return compare(embeddings, stored, room)


def compare_means(
    artifact: Artifact, rows: NDArray[np.int64], means: NDArray[np.floating], relative: float
) -> Comparison:
    """Compare class means with those of an artifact.

    Args:
        artifact: the artifact.
        rows: [N] class rows.
        means: [N, D] of the same classes, computed here.
        relative: as for `compare_samples`.

    Returns:
        The comparison, of one view. Allowed is the share of the embeddings' length, not of the mean's: the mean of
        opposite directions is short, and no less rounded.
    """
    stored = artifact["class/mean"][rows].astype(np.float64)
    variance = artifact["class/m2"][rows].astype(np.float64).sum(axis=1) / artifact["class/count"][rows]
    length = np.sqrt(np.square(stored).sum(axis=1) + variance)
    return compare(means[:, None], stored[:, None], relative * length[:, None])
