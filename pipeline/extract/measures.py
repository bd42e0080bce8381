"""What embeddings are worth, measured: classifiers on images that they have not seen, and how directions spread.

Pure functions of arrays, in bounded memory; which images stand on which side is decided in `report_card`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

NUM_FOLDS = 5
NUM_NEIGHBOURS = 10
BLOCK_ROWS = 1024
_BLOCK_SIMILARITIES = 1 << 22  # 16 MiB of float32, and a few times that beside them


@dataclass(frozen=True)
class Embedded:
    """Some images: raw `embeddings` [N, D], `labels` [N] class rows, sample `keys` [N, 16], `rows` [N].

    `rows` are those of the data set, each at most once: what an image is named by. Embeddings may be a memory map of
    float16: what is taken is float32.
    """

    embeddings: NDArray[np.floating]
    labels: Rows
    keys: NDArray[np.uint8]
    rows: Rows

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def take(self, chosen: NDArray[np.generic]) -> "Embedded":
        """Return the images of an index or a mask."""
        embeddings = np.asarray(self.embeddings[chosen], np.float32)
        return Embedded(embeddings, self.labels[chosen], self.keys[chosen], self.rows[chosen])


@dataclass(frozen=True)
class Moments:
    """Sums over images less `origin` [D]: `count` [C], `class_sum` [C, D], and `gram` [D, D], that is Σ x xᵀ."""

    origin: Floats
    count: Rows
    class_sum: Floats
    gram: Floats

    def less(self, other: "Moments") -> "Moments":
        """Return the sums without some of their images, taken from the same origin."""
        return Moments(self.origin, self.count - other.count, self.class_sum - other.class_sum, self.gram - other.gram)

    def mean(self) -> Floats:
        """Return the mean [D], relative to the origin."""
        return np.asarray(self.class_sum.sum(axis=0) / self.count.sum())

    def scatter(self) -> Floats:
        """Return Σ(x − mean)(x − mean)ᵀ [D, D]."""
        mean = self.mean()
        return np.asarray(self.gram - self.count.sum() * np.outer(mean, mean))

    def class_means(self) -> Floats:
        """Return the class means [C, D] in the embeddings' own coordinates; the origin for a class without images."""
        return self.origin + self.class_sum / np.maximum(self.count, 1)[:, None]


def moments(images: Embedded, num_classes: int, origin: Floats) -> Moments:
    """Sum over images.

    Args:
        images: N of them.
        num_classes: C.
        origin: [D], near the embeddings: differences from it are squared.

    Returns:
        The sums, in float64.
    """
    count, class_sum = np.bincount(images.labels, minlength=num_classes), np.zeros((num_classes, len(origin)))
    gram = np.zeros((len(origin), len(origin)))
    for block in _blocks(len(images)):
        values = images.embeddings[block] - origin
        np.add.at(class_sum, images.labels[block], values)
        gram += values.T @ values
    return Moments(origin, count, class_sum, gram)


def linear_predictions(images: NDArray[np.floating], weight: Floats, bias: Floats) -> Rows:
    """Classify embeddings [N, D] by the highest of weight [C, D] · x + bias [C]; −inf forbids a class."""
    predicted = np.empty(len(images), np.int64)
    for block in _blocks(len(images)):
        predicted[block] = (images[block].astype(np.float64) @ weight.T + bias).argmax(axis=1)
    return predicted


def nearest_mean_predictions(images: NDArray[np.floating], means: Floats, known: NDArray[np.bool_]) -> Rows:
    """Classify embeddings [N, D] by the nearest of the `known` [C] class means [C, D], in Euclidean distance."""
    # ‖x − μ‖² = ‖x‖² − 2 (x·μ − ‖μ‖²/2), and ‖x‖² is the same for every class.
    bias = np.where(known, -np.einsum("cd,cd->c", means, means) / 2, -np.inf)
    return linear_predictions(images, means, bias)


def neighbour_predictions(images: NDArray[np.floating], others: Embedded, num_classes: int) -> Rows:
    """Classify embeddings [N, D] by their ten nearest neighbours in cosine similarity.

    The class with the most votes wins; of several the one whose votes are more similar in sum. Neighbours exactly as
    similar as the tenth all vote, so that nothing depends on the order of rows.
    """
    nearest = min(NUM_NEIGHBOURS, len(others))
    reference = _unit(others.embeddings)
    size = max(1, _BLOCK_SIMILARITIES // max(len(others), num_classes))
    predicted = np.empty(len(images), np.int64)
    for block in _blocks(len(images), size):
        similarity = _unit(images[block]) @ reference.T  # (B, R)
        tenth = np.partition(similarity, -nearest, axis=1)[:, -nearest, None]
        query, neighbour = np.nonzero(similarity >= tenth)
        cell = query * num_classes + others.labels[neighbour]
        shape = (len(similarity), num_classes)
        votes = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
        weights = similarity[query, neighbour].astype(np.float64)
        summed = np.bincount(cell, weights, minlength=shape[0] * shape[1]).reshape(shape)
        predicted[block] = np.where(votes == votes.max(axis=1, keepdims=True), summed, -np.inf).argmax(axis=1)
    return predicted


def out_of_fold_margins(images: Embedded, folds: Rows, whole: Moments, penalty: float) -> tuple[Floats, Rows]:
    """Judge each label by a ridge head that was fitted on the other folds.

    One-hot targets and an unpenalised intercept as in `store.fit_ridge`, whose penalty is taken over: a head then
    costs one solution. Copies of an image must share a fold, else a head would have seen it.

    Args:
        images: N of them.
        folds: [N], 0…4.
        whole: sums over these images.
        penalty: λ for each image that a head is fitted on.

    Returns:
        The margins [N]: the score of the image's own class less the best of the others; NaN where the other folds lack
        its class, or all other classes. And the best class [N] among the others.
    """
    margins, rivals = np.full(len(images), np.nan), np.zeros(len(images), np.int64)
    for fold in range(NUM_FOLDS):
        inside = np.flatnonzero(folds == fold)
        seen = whole.less(moments(images.take(inside), len(whole.count), whole.origin))
        num_seen, known = int(seen.count.sum()), seen.count > 0
        if len(inside) == 0 or known.sum() < 2:
            continue
        mean, share = seen.mean(), seen.count / num_seen
        covariance = (seen.class_sum - seen.count[:, None] * mean).T  # (D, C)
        weight = np.linalg.solve(seen.scatter() + num_seen * penalty * np.eye(len(mean)), covariance)
        for block in _blocks(len(inside)):
            rows = inside[block]
            scores = (images.embeddings[rows] - whole.origin - mean) @ weight + share
            own = (np.arange(len(rows)), images.labels[rows])
            score = scores[own]
            scores[own] = -np.inf
            rivals[rows] = scores.argmax(axis=1)
            margins[rows] = np.where(known[images.labels[rows]], score - scores.max(axis=1), np.nan)
    return margins, rivals


def effective_rank(scatter: Floats) -> float:
    """Return exp(−Σ p log p), p the eigenvalues of a covariance [D, D] over their sum; 0 where nothing varies.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", 2007, of the covariance matrix: its
    singular values are its eigenvalues. From 1, all on a line, to D, as wide in every direction.
    """
    eigenvalues = np.maximum(np.linalg.eigvalsh(scatter), 0)  # rounding leaves some below 0
    if not eigenvalues.any():
        return 0.0
    share = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def mean_cosine(means: Floats) -> float | None:
    """Return the mean cosine similarity over the pairs of different rows [C, D]; none where there is no pair."""
    if len(means) < 2:
        return None
    units = _unit(means)
    # Σ over i ≠ j of u_i·u_j = ‖Σ u‖² − Σ ‖u‖².
    total = np.square(units.sum(axis=0)).sum() - np.square(units).sum()
    return float(total / (len(means) * (len(means) - 1)))


def _unit(rows: NDArray[np.floating]) -> NDArray[np.floating]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def _blocks(num_rows: int, size: int = BLOCK_ROWS) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, num_rows, size))
