"""Samples between extraction and artifact: sorted, without repeats, spooled on disk."""

import errno
import hashlib
import io
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.extract import samples
from pipeline.extract.samples import SampleSpool
from store import RowBlocks

EMBED_DIM = 3
# Few keys and labels, so that they repeat; keys that differ in their first, middle or last byte only.
KEYS = [
    bytes(16),
    bytes(15) + b"\x01",
    bytes(7) + b"\x01" + bytes(8),
    bytes(8) + b"\x01" + bytes(7),
    b"\x80" + bytes(15),
    b"\xff" * 16,
]
PAIR = st.tuples(st.sampled_from(KEYS), st.integers(0, 3) | st.sampled_from([255, 256, 70_000]))
BATCHES = st.lists(st.lists(PAIR, min_size=1, max_size=6), min_size=1, max_size=5)


def fill(spool: SampleSpool, batches: list[list[tuple[bytes, int]]]) -> None:
    """Add batches; an embedding is the number of its row, so that it can be told where it came from."""
    row = 0
    for batch in batches:
        keys = np.array([list(key) for key, _ in batch], np.uint8)
        labels = np.array([label for _, label in batch], np.int64)
        embeddings = np.arange(row, row + len(batch), dtype=np.float32)[:, None].repeat(EMBED_DIM, axis=1)
        spool.add(keys, labels, embeddings)
        row += len(batch)


def rows_of(tensor: object) -> NDArray[Any]:
    assert isinstance(tensor, RowBlocks)
    blocks = np.concatenate(list(tensor.blocks))
    assert (blocks.dtype.name, blocks.shape) == (tensor.dtype, tensor.shape)
    return blocks


@settings(deadline=None, max_examples=60)
@given(batches=BATCHES, dtype=st.sampled_from(["float16", "float32"]))
def test_samples_are_sorted_and_the_first_of_a_pair_is_kept(batches: list[list[tuple[bytes, int]]], dtype: str) -> None:
    first: dict[tuple[bytes, int], int] = {}
    for row, pair in enumerate(pair for batch in batches for pair in batch):
        first.setdefault(pair, row)
    with tempfile.TemporaryDirectory() as folder:
        spool = SampleSpool(Path(folder), EMBED_DIM, dtype)
        fill(spool, batches)
        digest, tensors = spool.finish()
        embeddings = rows_of(tensors["sample/embedding"])
        assert list(Path(folder).iterdir()) == []
    keys, labels = tensors["sample/key"], tensors["sample/label"]
    assert isinstance(keys, np.ndarray)
    assert isinstance(labels, np.ndarray)
    pairs = sorted(first)
    assert (keys.dtype.name, labels.dtype.name, embeddings.dtype.name) == ("uint8", "int32", dtype)
    assert [(key.tobytes(), label) for key, label in zip(keys, labels.tolist(), strict=True)] == pairs
    assert embeddings.shape == (len(pairs), 1, EMBED_DIM)
    assert embeddings[:, 0].tolist() == [[float(first[pair])] * EMBED_DIM for pair in pairs]
    assert digest == hashlib.sha256(b"".join(key + struct.pack("<i", label) for key, label in pairs)).hexdigest()


def test_the_digest_is_the_same_with_and_without_embeddings_and_in_any_order(tmp_path: Path) -> None:
    batches = [[(KEYS[1], 2), (KEYS[5], 0)], [(KEYS[1], 0)]]
    digests = set()
    for order, dtype in ((batches, None), (batches, "float16"), (batches[::-1], "float32")):
        spool = SampleSpool(tmp_path, EMBED_DIM, dtype)
        fill(spool, order)
        digests.add(spool.finish()[0])
    assert len(digests) == 1


def test_only_pairs_are_kept_where_no_embeddings_are_wanted(tmp_path: Path) -> None:
    spool = SampleSpool(tmp_path / "does-not-exist", EMBED_DIM, None)
    fill(spool, [[(KEYS[0], 0)]])
    assert spool.finish()[1] == {}


def test_rows_come_back_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_BLOCK_ROWS", 2)
    spool = SampleSpool(tmp_path, EMBED_DIM, "float32")
    fill(spool, [[(key, 0) for key in sorted(KEYS)[4::-1]]])
    tensor = spool.finish()[1]["sample/embedding"]
    assert isinstance(tensor, RowBlocks)
    blocks = list(tensor.blocks)
    assert [len(block) for block in blocks] == [2, 2, 1]
    assert np.concatenate(blocks)[:, 0, 0].tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("sign", [1, -1])
def test_an_embedding_too_large_for_float16_is_refused(tmp_path: Path, sign: int) -> None:
    spool = SampleSpool(tmp_path, 2, "float16")
    embeddings = np.array([[1, 2], [3, sign * 70_000]], np.float32)
    with pytest.raises(PipelineError) as error:
        spool.add(np.zeros((2, 16), np.uint8), np.zeros(2, np.int64), embeddings)
    assert str(error.value) == "an embedding reaches 7e+04, float16 ends at 6.55e+04. Pass --dtype float32."


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_refusal_comes_without_a_warning(tmp_path: Path) -> None:
    spool = SampleSpool(tmp_path, 1, "float16")
    with pytest.raises(PipelineError):
        spool.add(np.zeros((1, 16), np.uint8), np.zeros(1, np.int64), np.array([[70_000]], np.float32))


def test_the_largest_float16_fits(tmp_path: Path) -> None:
    spool = SampleSpool(tmp_path, 2, "float16")
    spool.add(np.zeros((1, 16), np.uint8), np.zeros(1, np.int64), np.array([[65504, -65504]], np.float32))
    assert rows_of(spool.finish()[1]["sample/embedding"]).tolist() == [[[65504, -65504]]]


def test_float32_takes_what_float16_cannot(tmp_path: Path) -> None:
    spool = SampleSpool(tmp_path, 1, "float32")
    spool.add(np.zeros((1, 16), np.uint8), np.zeros(1, np.int64), np.array([[70_001]], np.float32))
    assert rows_of(spool.finish()[1]["sample/embedding"]).tolist() == [[[70_001]]]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.BytesIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: FullDisk())
    spool = SampleSpool(tmp_path, 1, "float16")
    with pytest.raises(PipelineError) as error:
        spool.add(np.zeros((1, 16), np.uint8), np.zeros(1, np.int64), np.array([[1]], np.float32))
    assert str(error.value) == f"{tmp_path}: the sample embeddings do not fit (No space left on device)."
