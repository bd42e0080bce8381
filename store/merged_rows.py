"""The samples of several artifacts as one sorted sequence of unique (key, label) pairs, in constant memory.

Every input is sorted, so all are read in step, one block of rows at a time, as often as somebody asks: once to
count, and once for every tensor that is written.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.artifact import Artifact
from store.container import block_rows
from store.layout import numpy_dtype
from store.pairs import pair_bytes, sort_pairs, split_pairs
from store.quantize import sample_embeddings
from store.writing import RowBlocks

_STEP_ROWS = 65536


@dataclass(frozen=True)
class _Rows:
    """Merged rows: [R, 16] keys, [R] merged labels, and [R] of which artifact each is, and which row there."""

    keys: NDArray[np.uint8]
    labels: NDArray[np.int32]
    part: NDArray[np.int64]
    row: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, places: slice | NDArray[Any]) -> "_Rows":
        return _Rows(self.keys[places], self.labels[places], self.part[places], self.row[places])


class MergedSamples:
    """The samples of verified artifacts that agree in dtype, views and embed_dim."""

    def __init__(self, artifacts: Sequence[Artifact], class_rows: Sequence[NDArray[np.int64]]) -> None:
        """Read the keys once, to count them.

        Args:
            artifacts: all with samples; none is fine.
            class_rows: for each, [K] the merged class row of each of its classes.
        """
        self._artifacts = artifacts
        self._class_rows = class_rows
        digest = hashlib.sha256()
        self.num_rows = 0
        for rows in self._blocks():
            digest.update(pair_bytes(rows.keys, rows.labels))
            self.num_rows += len(rows)
        self.num_shared = sum(len(artifact["sample/key"]) for artifact in artifacts) - self.num_rows
        self.images_sha256 = digest.hexdigest()

    def tensors(self) -> dict[str, RowBlocks]:
        """Return the `sample/*` tensors; none where no artifact has samples."""
        if not self._artifacts:
            return {}
        tensors = {
            "sample/key": RowBlocks((self.num_rows, 16), "uint8", (rows.keys for rows in self._blocks())),
            "sample/label": RowBlocks((self.num_rows,), "int32", (rows.labels for rows in self._blocks())),
        }
        for name in ("sample/embedding", "sample/scale"):
            if name in self._artifacts[0]:
                info = self._artifacts[0].manifest.tensors[name]
                tensors[name] = RowBlocks((self.num_rows, *info.shape[1:]), info.dtype, self._gathered(name))
        return tensors

    def labelled_embeddings(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
        """Yield blocks of view 0, [B, D], and their merged labels, [B]."""
        for rows in self._small_blocks("sample/embedding"):
            shape = (len(rows), *self._artifacts[0].manifest.tensors["sample/embedding"].shape[1:])
            embeddings = np.empty(shape, np.float32)
            for index, artifact in enumerate(self._artifacts):
                here = rows.part == index
                embeddings[here] = sample_embeddings(artifact, rows.row[here])
            yield embeddings[:, 0], rows.labels

    def _gathered(self, name: str) -> Iterator[NDArray[Any]]:
        info = self._artifacts[0].manifest.tensors[name]
        for rows in self._small_blocks(name):
            block = np.empty((len(rows), *info.shape[1:]), numpy_dtype(info.dtype))
            for index, artifact in enumerate(self._artifacts):
                here = rows.part == index
                block[here] = artifact.gather(name, rows.row[here])
            yield block

    def _small_blocks(self, name: str) -> Iterator[_Rows]:
        info = self._artifacts[0].manifest.tensors[name]
        step = block_rows(info.shape, numpy_dtype(info.dtype))
        for rows in self._blocks():
            for start in range(0, len(rows), step):
                yield rows[start : start + step]

    def _blocks(self) -> Iterator[_Rows]:
        starts = [0] * len(self._artifacts)
        step = _STEP_ROWS
        while any(start < len(a["sample/key"]) for start, a in zip(starts, self._artifacts, strict=True)):
            loaded = [self._load(index, start, step) for index, start in enumerate(starts)]
            counts = self._safe_counts(loaded, starts)
            if not any(counts):  # a block ends within keys that share 64 bits: look further
                step *= 2
                continue
            step = _STEP_ROWS
            starts = [start + count for start, count in zip(starts, counts, strict=True)]
            parts = [rows[:count] for rows, count in zip(loaded, counts, strict=True)]
            rows = _Rows(*(np.concatenate([getattr(part, f) for part in parts]) for f in _Rows.__dataclass_fields__))
            order, fresh = sort_pairs(rows.keys, rows.labels)
            yield rows[order[fresh]]

    def _load(self, index: int, start: int, step: int) -> _Rows:
        artifact, stop = self._artifacts[index], start + step
        keys = artifact["sample/key"][start:stop]
        labels = self._class_rows[index][artifact["sample/label"][start:stop]].astype(np.int32)
        row = np.arange(start, start + len(keys))
        return _Rows(keys, labels, np.full(len(keys), index), row)

    def _safe_counts(self, loaded: Sequence[_Rows], starts: Sequence[int]) -> list[int]:
        """Return how many loaded rows of each part come before all rows that are not loaded yet."""
        high = [split_pairs(rows.keys, rows.labels)[0] for rows in loaded]
        ends = [
            numbers[-1]
            for numbers, rows, start, artifact in zip(high, loaded, starts, self._artifacts, strict=True)
            if start + len(rows) < len(artifact["sample/key"])
        ]
        if not ends:
            return [len(rows) for rows in loaded]
        return [int(np.searchsorted(numbers, min(ends))) for numbers in high]
