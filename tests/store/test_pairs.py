import hashlib
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import store
from store import pairs
from store.pairs import PairIndex, check_sorted, pairs_sha256, sort_pairs
from tests.store.examples import SEARCH

Pair = tuple[bytes, int]
LAST = 2**64 - 1


def key(high: int, low: int = 0) -> bytes:
    return high.to_bytes(8, "big") + low.to_bytes(8, "big")


def arrays(rows: Iterable[Pair]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    rows = list(rows)
    keys = np.frombuffer(b"".join(row_key for row_key, _ in rows), np.uint8).reshape(-1, 16)
    return keys, np.array([label for _, label in rows], np.int32)


# Few halves, so that most keys share one: half a key is then not enough to find a row.
PAIRS = st.tuples(
    st.builds(key, st.sampled_from([0, 1, 2**63, LAST]), st.sampled_from([0, 1, 255, 256, LAST])), st.integers(0, 3)
)
ROWS = st.lists(PAIRS, min_size=1, max_size=40)
BLOCKS = pytest.mark.parametrize("block_rows", [1, 2, 3, 65536])


@SEARCH
@given(stored=ROWS, queries=ROWS)
def test_finding_agrees_with_a_dictionary(stored: list[Pair], queries: list[Pair]) -> None:
    stored = sorted(set(stored))
    rows = {pair: row for row, pair in enumerate(stored)}
    index = PairIndex(*arrays(stored), "file")
    assert index.find(*arrays(queries)).tolist() == [rows.get(pair, -1) for pair in queries]
    assert index.find(*arrays(stored)).tolist() == list(range(len(stored)))
    assert index.find(*arrays([])).tolist() == []


def test_many_rows_that_share_half_a_key_are_found() -> None:
    stored = sorted((key(high, low * 2), label) for high in (3, 4) for low in range(500) for label in (0, 7))
    absent = [(key(high, low), 3) for high in (2, 3, 4, 5) for low in (0, 1, 500, 998, 999, LAST)]
    index = PairIndex(*arrays(stored), "file")
    assert index.find(*arrays(stored[::-1])).tolist() == list(range(len(stored)))[::-1]
    assert (index.find(*arrays(absent)) == -1).all()


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "uint8", "uint64"])
def test_labels_may_be_of_any_integer_type(dtype: str) -> None:
    keys, labels = arrays([(key(1), 0), (key(1), 3), (key(2), 1)])
    found = PairIndex(keys, labels, "file").find(keys[[1, 0, 2, 2]], np.array([3, 0, 1, 2], dtype))
    assert found.tolist() == [1, 0, 2, -1]


def test_keys_need_not_be_contiguous() -> None:
    keys, labels = arrays([(key(number), 0) for number in range(6)])
    wide = np.concatenate([keys, keys], axis=1)
    assert PairIndex(keys, labels, "file").find(wide[:, :16][::2], labels[::2]).tolist() == [0, 2, 4]


@BLOCKS
@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([(key(2), 0), (key(1), 0)], "0 and 1"),
        ([(key(1), 0), (key(1), 0)], "0 and 1"),
        ([(key(1), 1), (key(1), 0)], "0 and 1"),
        ([(key(1, 5), 0), (key(1, 4), 9)], "0 and 1"),
        ([(key(1), 0), (key(2), 0), (key(3), 0), (key(3), 0), (key(0), 0)], "2 and 3"),
        ([(key(1), 0), (key(2), 0), (key(3), 0), (key(4), 0), (key(3), LAST % 99)], "3 and 4"),
        ([(key(LAST, LAST), 1), (key(LAST, LAST), 0)], "0 and 1"),
    ],
)
def test_pairs_that_are_not_sorted_and_unique_are_refused(
    rows: list[Pair], found: str, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_BLOCK_ROWS", block_rows)
    for check in (check_sorted, PairIndex):
        with pytest.raises(store.ArtifactFormatError) as caught:
            check(*arrays(rows), "file")
        assert str(caught.value) == (
            f"file: sample/key and sample/label are not sorted and unique (rows {found}). "
            "The file is damaged: extract it again."
        )


@BLOCKS
def test_sorted_pairs_are_accepted(block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_BLOCK_ROWS", block_rows)
    rows = sorted((key(high, low), label) for high in (0, 2**63) for low in (0, LAST) for label in (0, 5))
    for length in range(len(rows) + 1):
        check_sorted(*arrays(rows[:length]), "file")


@SEARCH
@given(rows=ROWS)
def test_sorting_is_that_of_bytes_then_label_and_keeps_the_order_of_equals(rows: list[Pair]) -> None:
    order, fresh = sort_pairs(*arrays(rows))
    expected = sorted(range(len(rows)), key=rows.__getitem__)
    assert order.tolist() == expected
    assert fresh.tolist() == [
        place == 0 or rows[row] != rows[expected[place - 1]] for place, row in enumerate(expected)
    ]
    unique = order[fresh]
    keys, labels = arrays(rows)
    check_sorted(keys[unique], labels[unique], "file")


def test_no_pairs_are_sorted() -> None:
    order, fresh = sort_pairs(*arrays([]))
    assert (order.tolist(), fresh.tolist()) == ([], [])


@BLOCKS
def test_the_digest_of_pairs_is_that_of_keys_and_labels_in_turn(
    block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_BLOCK_ROWS", block_rows)
    rows = [(key(1, 2), 3), (key(1, 2), 258), (key(LAST), 2**31 - 1), (key(LAST, 1), 0)]
    expected = hashlib.sha256(b"".join(row_key + label.to_bytes(4, "little") for row_key, label in rows)).hexdigest()
    keys, labels = arrays(rows)
    assert pairs_sha256(keys, labels) == expected
    assert pairs_sha256(np.asfortranarray(keys), labels.astype(np.int64)) == expected
    assert pairs_sha256(*arrays([])) == hashlib.sha256().hexdigest()
