import hashlib
import re

import numpy as np
import pytest

import store
from store.container import BLOCK_BYTES, row_blocks, write_blocks

INFO = store.TensorInfo(dtype="float32", shape=(4, 3))
ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def collect(*blocks: np.ndarray) -> tuple[str, bytes]:
    written: list[bytes] = []
    digest = write_blocks("class/mean", INFO, blocks, lambda block: written.append(block.tobytes()))
    return digest, b"".join(written)


def test_blocks_are_views_of_all_rows_in_order() -> None:
    array = np.arange(3 * BLOCK_BYTES // 4, dtype=np.int32).reshape(-1, 512)
    blocks = list(row_blocks(array))
    assert [len(block) for block in blocks] == [2048, 2048, 2048]
    assert all(np.shares_memory(block, array) for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), array)


def test_the_last_block_is_what_is_left() -> None:
    array = np.zeros((BLOCK_BYTES // 1024 + 1, 1024), np.uint8)
    assert [len(block) for block in row_blocks(array)] == [BLOCK_BYTES // 1024, 1]


def test_a_row_larger_than_a_block_is_a_block() -> None:
    array = np.zeros((3, BLOCK_BYTES + 1), np.uint8)
    assert [len(block) for block in row_blocks(array)] == [1, 1, 1]


def test_an_array_without_rows_has_no_blocks() -> None:
    assert list(row_blocks(np.zeros((0, 3), np.float32))) == []


def test_rows_without_bytes_are_one_block() -> None:
    assert [block.shape for block in row_blocks(np.zeros((5, 0), np.float32))] == [(5, 0)]


def test_all_blocks_are_hashed_and_handed_on() -> None:
    expected = hashlib.sha256(ROWS.tobytes()).hexdigest(), ROWS.tobytes()
    assert collect(ROWS) == expected
    assert collect(ROWS[:1], ROWS[1:1], ROWS[1:]) == expected
    assert collect(np.asfortranarray(ROWS)) == expected
    assert collect(np.repeat(ROWS, 2, axis=1)[:, ::2]) == expected


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (ROWS.astype(np.float64), "float64 [4, 3]"),
        (ROWS.astype(">f4"), ">f4 [4, 3]"),
        (ROWS.astype(np.int32), "int32 [4, 3]"),
        (ROWS.reshape(3, 4), "float32 [3, 4]"),
        (ROWS.reshape(-1), "float32 [12]"),
        (ROWS[None], "float32 [1, 4, 3]"),
        (ROWS[0, 0], "float32 []"),
    ],
)
def test_a_block_of_another_kind_is_refused(block: np.ndarray, found: str) -> None:
    expected = f"class/mean: a block is {found}, expected float32 rows of [3]."
    with pytest.raises(store.ArtifactWriteError, match=f"^{re.escape(expected)}$"):
        collect(ROWS[:1], block)


@pytest.mark.parametrize("num_rows", [0, 3, 5, 8])
def test_another_number_of_rows_is_refused(num_rows: int) -> None:
    rows = np.resize(ROWS, (num_rows, 3))
    expected = f"class/mean: {num_rows} rows were given, 4 were announced."
    with pytest.raises(store.ArtifactWriteError, match=f"^{re.escape(expected)}$"):
        collect(rows)


def test_a_block_that_is_not_finite_is_refused() -> None:
    expected = "artifact: class/mean has values that are not finite (NaN or infinity)."
    with pytest.raises(store.ArtifactFormatError, match=f"^{re.escape(expected)}$"):
        collect(ROWS[:2], np.full((2, 3), np.nan, np.float32))
