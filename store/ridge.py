"""The head: a linear classifier on raw embeddings, fitted in closed form by ridge regression.

One-hot targets, an unpenalised intercept, and the penalty λ with the least leave-one-out squared error, over all rows
or, where those are very many, over a random choice of them. The rows are streamed twice and never kept: memory is
O(D² + C·D) beside one block. Nothing is normalised here, and the scores are least-squares estimates of class
membership, not calibrated probabilities.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.manifest import HeadInfo

Batches = Callable[[], Iterable[tuple[NDArray[np.floating], NDArray[np.integer]]]]
Block = tuple[NDArray[np.float64], NDArray[np.int64]]

# Half decades of λ over the mean eigenvalue of the scatter (trace / D), so that the choice does not depend on the
# embeddings' unit or on the number of rows. The error is smooth in log λ: a finer grid gains nothing. At 1e3 even an
# eigenvalue that holds the whole trace (D times the mean, D ≈ 1,000) is halved. Below 1e-6 the fit would follow the
# rounding of float16 (relative variance about 1e-7), and 1 − leverage would drown in float64 rounding: its relative
# error grows as 2e-16·D/ratio, 2e-7 here. Largest first: of equal errors the smaller weights win.
PENALTY_RATIOS = tuple(10.0 ** (exponent / 2) for exponent in range(6, -13, -1))
# Errors closer than this are equal: rounding must not choose the penalty.
TIE = 1e-6
# Rows that choose the penalty: 200,000 of 100 classes, 20,000 of 1,000, and at random where there are more. A row costs
# D·C products for each penalty: all 14 million of ImageNet-21k would take weeks.
JUDGED_SCORES = 20_000_000
JUDGED_ROWS = 10_000
# Rows converted to float64 at a time, whatever the size of the caller's batches.
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class RidgeHead:
    """A fitted head: scores = weight · raw embedding + bias; and how well such a head scores rows it has not seen."""

    weight: NDArray[np.float32]  # [C, D]
    bias: NDArray[np.float32]  # [C]
    penalty: float  # λ, the chosen weight of Σ weight²
    loo_error: float  # mean squared leave-one-out error over rows and classes
    loo_accuracy: float  # share, 0…1, of the rows whose leave-one-out scores are highest at their own class

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """Return `head/weight` [C, D] and `head/bias` [C], both float32."""
        return {"head/weight": self.weight, "head/bias": self.bias}

    def info(self) -> HeadInfo:
        """Return what the manifest says of it."""
        return HeadInfo(penalty=self.penalty, loo_error=self.loo_error, loo_accuracy=self.loo_accuracy)


def fit_ridge(batches: Batches, num_classes: int, embed_dim: int) -> RidgeHead:
    """Minimise Σ‖onehot − weight·x − bias‖² + λ Σ weight², with λ chosen by leave-one-out squared error.

    Args:
        batches: called twice; each call streams the same rows: embeddings [B, D] raw, class_index [B] in 0…C−1.
        num_classes: C; a class without rows scores 0 everywhere.
        embed_dim: D.

    Returns:
        The head. A single row has nothing to be predicted from: its error is that of scores 0, its accuracy 0.

    Raises:
        ValueError: if there are no rows, shapes disagree, a value is not finite or the passes differ in length.
        IndexError: if a class index is outside 0…C−1.
    """
    moments = _Moments(num_classes, embed_dim)
    for values, class_index in _blocks(batches, num_classes, embed_dim):
        moments.add(values, class_index)
    if moments.num_rows == 0:
        raise ValueError("the batches hold no rows, expected at least one embedding to fit the head on")
    problem = _Problem(moments)
    if problem.num_rows == 1:
        return problem.head(0, 1 / num_classes, 0.0)

    num_rows, num_judged, scores = 0, 0, np.zeros((len(PENALTY_RATIOS), 2))
    share = max(JUDGED_ROWS, JUDGED_SCORES // num_classes) / problem.num_rows
    random = np.random.default_rng(0)
    for values, class_index in _blocks(batches, num_classes, embed_dim):
        num_rows += len(values)
        judged = random.random(len(values)) < share
        judged[0] |= num_judged == 0
        num_judged += int(judged.sum())
        scores += problem.leave_one_out(values[judged], class_index[judged])
    if num_rows != problem.num_rows:
        raise ValueError(f"the second pass streamed {num_rows} rows, expected the {problem.num_rows} of the first")
    squared_error, num_correct = scores.T
    best = int(np.flatnonzero(squared_error <= squared_error.min() * (1 + TIE))[0])
    return problem.head(best, squared_error[best] / (num_judged * num_classes), num_correct[best] / num_judged)


class _Moments:
    """Class counts, class sums and the scatter Σ(x − mean)(x − mean)ᵀ, with Chan's update as in `store.statistics`.

    Rows are taken relative to the first: a common offset cancels, and a constant feature scatters by exactly 0.
    """

    def __init__(self, num_classes: int, embed_dim: int) -> None:
        self.num_rows = 0
        self.count, self.sum = np.zeros(num_classes, np.int64), np.zeros((num_classes, embed_dim))
        self.origin, self.mean = np.zeros(embed_dim), np.zeros(embed_dim)
        self.scatter = np.zeros((embed_dim, embed_dim))

    def add(self, values: NDArray[np.float64], class_index: NDArray[np.int64]) -> None:
        if self.num_rows == 0:
            self.origin = values[0].copy()
        shifted = values - self.origin
        before, self.num_rows = self.num_rows, self.num_rows + len(values)
        block_mean = shifted.mean(axis=0)
        centred, delta = shifted - block_mean, block_mean - self.mean
        self.mean += delta * (len(values) / self.num_rows)
        self.scatter += centred.T @ centred
        self.scatter += np.outer(delta, delta * (before * len(values) / self.num_rows))

        order = np.argsort(class_index, kind="stable")
        classes, starts = np.unique(class_index[order], return_index=True)
        self.sum[classes] += np.add.reduceat(shifted[order], starts, axis=0)
        self.count += np.bincount(class_index, minlength=len(self.count))


class _Problem:
    """The ridge problem in the eigenbasis of the scatter, where a penalty is a division."""

    def __init__(self, moments: _Moments) -> None:
        self.num_rows, self.origin = moments.num_rows, moments.origin
        # From the class sums, so that the covariance is exactly 0 where one class holds every row.
        self.mean = moments.sum.sum(axis=0) / self.num_rows  # [D], relative to the origin
        self.class_share = moments.count / self.num_rows  # [C], the mean of the one-hot targets
        eigenvalues, self.basis = np.linalg.eigh(moments.scatter)
        self.eigenvalues = np.maximum(eigenvalues, 0)  # rounding leaves some of a rank-deficient scatter below 0
        class_mean = moments.sum / np.maximum(moments.count, 1)[:, None]
        self.covariance = self.basis.T @ ((class_mean - self.mean) * moments.count[:, None]).T  # [D, C]
        # Rows that are equal, or so nearly that weights of up to √(D / (16·ratio·variance)) might overflow float32,
        # have no scale: any λ that is not small gives weights of 0.
        varies = self.eigenvalues.sum() > self.num_rows * np.finfo(np.float32).tiny
        self.penalties = np.array(PENALTY_RATIOS) * (self.eigenvalues.mean() if varies else 1.0)

    def leave_one_out(self, values: NDArray[np.float64], class_index: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return, for each penalty, the summed squared error and the number of rows right, when each row is left out.

        Nothing is refitted: leaving a row out divides its residual by 1 − leverage, exactly so for a quadratic penalty
        (Allen, "The relationship between variable selection and data augmentation and a method for prediction", 1974;
        Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", section 7.10.1). Centred rows are
        orthogonal to the intercept, so that leverage = 1/n + Σ z² / (eigenvalue + λ), z the row in the eigenbasis.
        """
        coordinates = (values - self.origin - self.mean) @ self.basis
        rows, others = np.arange(len(values)), 1 - 1 / self.num_rows
        scores = np.empty((len(self.penalties), 2))
        for index, penalty in enumerate(self.penalties):
            shrunk = coordinates * (1 / (self.eigenvalues + penalty))
            # 1 − leverage is never below this (Sherman-Morrison, n ≥ 2): the maximum mends rounding, nothing else.
            floor = others * penalty / (penalty + self.eigenvalues.sum())
            remaining = np.maximum(others - np.einsum("bd,bd->b", coordinates, shrunk), floor)  # [B]
            residual = shrunk @ self.covariance + self.class_share  # [B, C]
            residual[rows, class_index] -= 1
            squared_error = (np.einsum("bc,bc->b", residual, residual) / np.square(remaining)).sum()
            # (onehot + residual / remaining) · remaining has the argmax of the left-out scores.
            residual[rows, class_index] += remaining
            scores[index] = squared_error, np.count_nonzero(residual.argmax(axis=1) == class_index)
        return scores

    def head(self, index: int, loo_error: float, loo_accuracy: float) -> RidgeHead:
        """Return the head of one penalty, in the embeddings' own coordinates."""
        shrunk = self.covariance / (self.eigenvalues + self.penalties[index])[:, None]
        weight = (self.basis @ shrunk).T.astype(np.float32, order="C")
        # From the rounded weight: what rounding changed then acts on x − mean alone, not on a large common offset.
        bias = self.class_share - weight.astype(np.float64) @ (self.origin + self.mean)
        numbers = float(self.penalties[index]), float(loo_error), float(loo_accuracy)
        return RidgeHead(weight, bias.astype(np.float32), *numbers)


def _blocks(batches: Batches, num_classes: int, embed_dim: int) -> Iterator[Block]:
    """Yield every checked batch as float64, `BLOCK_ROWS` rows or fewer at a time; empty batches yield nothing."""
    for embeddings, class_index in batches():
        if embeddings.shape != (len(class_index), embed_dim):
            raise ValueError(f"embeddings are {list(embeddings.shape)}, expected {[len(class_index), embed_dim]}")
        # NumPy would take −1 for the last class.
        wrong = class_index[(class_index < 0) | (class_index >= num_classes)]
        if len(wrong):
            raise IndexError(f"class_index {wrong[0]} is out of bounds, expected 0…{num_classes - 1}")
        for start in range(0, len(embeddings), BLOCK_ROWS):
            values = embeddings[start : start + BLOCK_ROWS].astype(np.float64)
            if not np.isfinite(values).all():
                raise ValueError("embeddings hold NaN or infinity, expected finite values: extract them again")
            yield values, class_index[start : start + BLOCK_ROWS].astype(np.int64)
