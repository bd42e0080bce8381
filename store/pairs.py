"""The sorted (sample key, label) pairs of an artifact, and the search among them."""

import hashlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from store.errors import ArtifactFormatError

_BLOCK_ROWS = 65536
Pairs = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.integer]]  # halves of the key, label


class Rows(Protocol):
    """An array, or what reads slices of one from a file."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """Return some rows."""


class PairIndex:
    """Finds rows by (sample key, label)."""

    def __init__(self, keys: NDArray[np.uint8], labels: NDArray[np.integer], where: str) -> None:
        """Check the order of the rows; 8 bytes a row are held beside the tensors.

        Args:
            keys: [S, 16], sorted together with the labels; may be a memory map.
            labels: [S].
            where: file name, for the message.

        Raises:
            ArtifactFormatError: the pairs are not sorted, or one stands twice.
        """
        check_sorted(keys, labels, where)
        self._keys, self._labels = keys, labels
        self._high = _halves(keys[:, :8])[:, 0]

    def find(self, keys: NDArray[np.uint8], labels: NDArray[np.integer]) -> NDArray[np.int64]:
        """Find the row of each pair.

        Args:
            keys: [N, 16].
            labels: [N].

        Returns:
            [N] int64, −1 where there is none.
        """
        found = np.full(len(keys), -1, np.int64)
        order = np.argsort(_halves(keys[:, :8])[:, 0])  # neighbours search nearby rows
        query = split_pairs(keys[order], np.asarray(labels)[order])
        row = np.searchsorted(self._high, query[0])
        row[row == len(self._high)] = 0  # beyond the last row: the comparison below says no
        equal = self._equal(row, query)
        found[order[equal]] = row[equal]
        # Half a key is nearly always enough. Where several rows share it, the whole pair decides.
        shared = ~equal & (self._high[row] == query[0])
        if shared.any():
            query = (query[0][shared], query[1][shared], query[2][shared])
            row = self._bisect(query)
            equal = self._equal(row, query)
            found[order[shared][equal]] = row[equal]
        return found

    def _bisect(self, query: Pairs) -> NDArray[np.int64]:
        """Return the first row that is not less than each query, or the last row."""
        first = np.zeros(len(query[0]), np.int64)
        last = np.full(len(query[0]), len(self._high) - 1, np.int64)
        while (first < last).any():
            middle = (first + last) // 2
            less = _less(split_pairs(self._keys[middle], self._labels[middle]), query)
            first, last = np.where(less, np.minimum(middle + 1, last), first), np.where(less, last, middle)
        return first

    def _equal(self, row: NDArray[np.int64], query: Pairs) -> NDArray[np.bool_]:
        high, low, labels = split_pairs(self._keys[row], self._labels[row])
        equal: NDArray[np.bool_] = (high == query[0]) & (low == query[1]) & (labels == query[2])
        return equal


def check_sorted(keys: Rows, labels: Rows, where: str) -> None:
    """Check that pairs are sorted by key, then label, and that none stands twice, in constant memory.

    Args:
        keys: [S, 16]; may be a memory map.
        labels: [S].
        where: file name, for the message.

    Raises:
        ArtifactFormatError: they are not.
    """
    for start in range(0, len(keys), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS + 1)  # one row more: the first of the next block
        high, low, label = split_pairs(keys[rows], labels[rows])
        ordered = _less((high[:-1], low[:-1], label[:-1]), (high[1:], low[1:], label[1:]))
        if not ordered.all():
            row = start + int(np.argmin(ordered))
            raise ArtifactFormatError(
                f"{where}: sample/key and sample/label are not sorted and unique (rows {row} and {row + 1}). "
                "The file is damaged: extract it again."
            )


def sort_pairs(keys: NDArray[np.uint8], labels: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Order (key, label) pairs as artifacts do.

    Args:
        keys: [N, 16].
        labels: [N].

    Returns:
        [N] the rows in sorted order, equal pairs in the order in which they came; [N] for each of those,
        whether it differs from the one before.
    """
    high, low, labels = split_pairs(keys, labels)
    order = np.lexsort((labels, low, high))
    high, low, labels = high[order], low[order], labels[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1]) | (labels[1:] != labels[:-1])
    return order, fresh


def pairs_sha256(keys: Rows, labels: Rows) -> str:
    """Hash sorted unique pairs: 16 bytes of key and the label as int32, little-endian, for each."""
    digest = hashlib.sha256()
    for start in range(0, len(keys), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        digest.update(pair_bytes(keys[part], labels[part]))
    return digest.hexdigest()


def pair_bytes(keys: NDArray[np.uint8], labels: NDArray[np.integer]) -> bytes:
    """Encode pairs as `pairs_sha256` hashes them."""
    label_bytes = np.ascontiguousarray(labels, "<i4").view(np.uint8).reshape(-1, 4)
    return np.concatenate([keys, label_bytes], axis=1).tobytes()


def split_pairs(keys: NDArray[np.uint8], labels: NDArray[np.integer]) -> Pairs:
    """Return the halves of each key as numbers that sort as its bytes do, and the label."""
    halves = _halves(keys)
    return halves[:, 0], halves[:, 1], np.asarray(labels)


def _halves(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return [N, columns / 8] native numbers, each column contiguous."""
    return np.asfortranarray(np.ascontiguousarray(keys).view(">u8"), np.uint64)


def _less(one: Pairs, other: Pairs) -> NDArray[np.bool_]:
    less: NDArray[np.bool_] = (one[0] < other[0]) | (
        (one[0] == other[0]) & ((one[1] < other[1]) | ((one[1] == other[1]) & (one[2] < other[2])))
    )
    return less
