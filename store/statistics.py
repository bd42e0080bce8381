"""Count, mean and M2 of each class's embeddings, accumulated in float64, one batch at a time.

M2 is Σ(x − mean)². A batch is folded in with the parallel update of Chan, Golub and LeVeque
("Updating formulae and a pairwise algorithm for computing sample variances", 1979), which is stable where
Σx² − (Σx)²/n is not, and which also merges two accumulators.
"""

import numpy as np
from numpy.typing import NDArray


class ClassStatistics:
    """Running statistics of the embeddings of every class."""

    def __init__(self, num_classes: int, embed_dim: int) -> None:
        """Start with no embedding in any class.

        Args:
            num_classes: C, rows of every array here.
            embed_dim: D, length of an embedding.
        """
        self.count: NDArray[np.int64] = np.zeros(num_classes, np.int64)
        self.mean: NDArray[np.float64] = np.zeros((num_classes, embed_dim), np.float64)
        self.m2: NDArray[np.float64] = np.zeros((num_classes, embed_dim), np.float64)

    def add(self, embeddings: NDArray[np.floating], class_index: NDArray[np.integer]) -> None:
        """Fold in one batch of embeddings.

        Args:
            embeddings: [B, D], raw (not normalised).
            class_index: [B], the class of each row, in 0…C−1.
        """
        values = embeddings.astype(np.float64)
        for index in np.unique(class_index):
            rows = values[class_index == index]
            mean = rows.mean(axis=0)
            self._combine(int(index), len(rows), mean, np.square(rows - mean).sum(axis=0))

    def merge(
        self,
        count: NDArray[np.integer],
        mean: NDArray[np.floating],
        m2: NDArray[np.floating],
        class_rows: NDArray[np.integer],
    ) -> None:
        """Fold in the statistics of other images, e.g. those of an artifact.

        Where `tensors` of disjoint images are merged, `tensors` of the result differ from those of one accumulator
        that saw all images, in each value, by at most: mean, u; M2, 2·ulp(M2) + u·Σ nᵢ|μᵢ − μ| + N·u²/4. Here nᵢ
        images of part i have the mean μᵢ, all N have the mean μ, u is ulp(max |μᵢ|), and ulp is that of float32.
        Both bounds hold for any number of parts, and are tight, but for float64's own rounding of the sums (N·2⁻⁵³ of
        the largest value). The last two terms may exceed M2 itself at an offset that is large beside the spread.

        Proof: rounding moves each μᵢ by eᵢ, |eᵢ| ≤ u/2, and so their weighted mean by at most u/2; the results are
        multiples of their ulp. M2 is Σ M2ᵢ + Σ nᵢ(μᵢ − μ)². The second sum moves by 2·Σ nᵢ(μᵢ − μ)eᵢ +
        Σ nᵢ(eᵢ − ē)² at most, which is the last two terms; the M2ᵢ are rounded by Σ ulp(M2ᵢ)/2 ≤ ulp(M2), since
        ulp(x) ≤ x·2⁻²³ for normal x; and rounding both results costs ulp(M2)/2 each.

        Args:
            count: [K] images in each class.
            mean: [K, D].
            m2: [K, D].
            class_rows: [K] the row here of each of those classes, each in 0…C−1.
        """
        for index, row in enumerate(class_rows.tolist()):
            self._combine(row, int(count[index]), mean[index].astype(np.float64), m2[index].astype(np.float64))

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """Return `class/count` [C] int64 and `class/mean`, `class/m2` [C, D] rounded to float32."""
        return {
            "class/count": self.count,
            "class/mean": self.mean.astype(np.float32),
            "class/m2": self.m2.astype(np.float32),
        }

    def _combine(self, index: int, count: int, mean: NDArray[np.float64], m2: NDArray[np.float64]) -> None:
        if count == 0:  # nothing to fold in, perhaps into nothing
            return
        before = int(self.count[index])
        total = before + count
        delta = mean - self.mean[index]
        self.count[index] = total
        self.mean[index] += delta * (count / total)
        self.m2[index] += m2 + np.square(delta) * (before * count / total)
