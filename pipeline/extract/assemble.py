"""From finished chunks to the artifact's tensors: statistics, sorted samples, ridge head.

Everything is streamed from the chunks' files in their order; keys and labels alone are held in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.extract.measures import Embedded
from pipeline.extract.partial import Chunk
from store import ClassStatistics, RidgeHead, RowBlocks, check_fits, fit_ridge, pairs_sha256, sort_pairs

_BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Assembled:
    """The tensors of an artifact, the digest of the images behind them, and its head."""

    tensors: dict[str, NDArray[Any] | RowBlocks]
    images_sha256: str
    head: RidgeHead


class Chunks:
    """All chunks of an extraction as one sequence of embedded images."""

    def __init__(self, chunks: Sequence[Chunk], num_classes: int) -> None:
        """Read keys and labels, and find equal pairs.

        Args:
            chunks: in order; memory maps. At least one image in all.
            num_classes: C.
        """
        self._chunks = chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self._num_classes = num_classes
        self.keys = np.concatenate([chunk["key"] for chunk in chunks])
        self.labels = np.concatenate([chunk["label"] for chunk in chunks])
        order, fresh = sort_pairs(self.keys, self.labels)
        self._unique = order[fresh]  # images in the order of the artifact's rows

    def __len__(self) -> int:
        """Return the number of embedded images, repeats included."""
        return len(self.keys)

    @property
    def count(self) -> NDArray[np.int64]:
        """[C] embedded images of each class."""
        return np.bincount(self.labels, minlength=self._num_classes)

    @property
    def embed_dim(self) -> int:
        """D, the length of an embedding."""
        return int(self._chunks[0].dtype["embedding"].shape[-1])

    def unique_images(self, limit: int) -> Embedded:
        """Gather view 0 of distinct images, in the order of their keys.

        Args:
            limit: at most so many.

        Returns:
            The first of them: a random choice, since keys are digests.
        """
        chosen = self._unique[:limit]
        rows = np.concatenate([chunk["row"] for chunk in self._chunks])
        return Embedded(self._gather(chosen, 1)[:, 0], self.labels[chosen], self.keys[chosen], rows[chosen])

    def assemble(self, sample_dtype: str | None) -> Assembled:
        """Make the tensors.

        Args:
            sample_dtype: float16 or float32; none leaves the samples out.

        Returns:
            What goes into the artifact.
        """
        statistics = ClassStatistics(self._num_classes, self.embed_dim)
        for chunk in self._chunks:
            statistics.add(chunk["embedding"][:, 0], chunk["label"])
        keys, labels = self.keys[self._unique], self.labels[self._unique].astype(np.int32)
        head = fit_ridge(self._unique_images, self._num_classes, self.embed_dim)
        tensors: dict[str, NDArray[Any] | RowBlocks] = {**statistics.tensors(), **head.tensors()}
        if sample_dtype is not None:
            shape = (len(keys), *self._chunks[0].dtype["embedding"].shape)
            blocks = (_convert(block, sample_dtype) for block in self._sorted_embeddings())
            tensors |= {
                "sample/key": keys,
                "sample/label": labels,
                "sample/embedding": RowBlocks(shape, sample_dtype, blocks),
            }
        return Assembled(tensors, pairs_sha256(keys, labels), head)

    def _unique_images(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Yield view 0 and labels, chunk by chunk, each pair once."""
        wanted = np.zeros(len(self.keys), bool)
        wanted[self._unique] = True
        for chunk, start in zip(self._chunks, self._starts, strict=False):
            mask = wanted[start : start + len(chunk)]
            yield chunk["embedding"][mask, 0], chunk["label"][mask]

    def _sorted_embeddings(self) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(self._unique), _BLOCK_ROWS):
            yield self._gather(self._unique[start : start + _BLOCK_ROWS])

    def _gather(self, images: NDArray[np.int64], num_views: int | None = None) -> NDArray[np.float32]:
        part = np.searchsorted(self._starts, images, side="right") - 1
        views, embed_dim = self._chunks[0].dtype["embedding"].shape
        embeddings = np.empty((len(images), num_views or views, embed_dim), np.float32)
        for index in np.unique(part).tolist():
            here = part == index
            embeddings[here] = self._chunks[index]["embedding"][images[here] - self._starts[index], :num_views]
        return embeddings


def _convert(block: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    check_fits(block, dtype)  # a run that had asked for another type may have embedded it
    return block.astype(dtype)
