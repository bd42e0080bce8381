import os
import pickle
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import store
from store import stored
from store.hdf5_parse import parse
from store.stored import StoredTensor, identity_of
from tests.store.examples import SEARCH, class_tensors, make_manifest, replace_chunk, samples_of, save_gzip

NAME = "sample/embedding"
ROWS = np.array([9, 0, 4, 4, 3])
EMBEDDING = np.arange(80, dtype=np.float16).reshape(10, 2, 4)
CHUNK_BYTES = 4 * 2 * 4 * 2  # four rows to a chunk: ten rows are three chunks, the last one half full
METHODS: dict[str, Callable[[StoredTensor], object]] = {
    "gather": lambda tensor: tensor.gather(ROWS),
    "blocks": lambda tensor: list(tensor.blocks()),
    "whole": lambda tensor: tensor.whole(),
}
each_method = pytest.mark.parametrize("method", METHODS)


def open_stored(path: Path) -> StoredTensor:
    """Locate the sample embeddings of an HDF5 file; no manifest is looked at."""
    return StoredTensor(path, identity_of(path.stat()), NAME, parse(path, path.stat().st_size).locations[NAME])


@pytest.fixture(params=[False, True], ids=["contiguous", "gzip"])
def tensor(request: pytest.FixtureRequest, tmp_path: Path) -> StoredTensor:
    """Return EMBEDDING in a file, contiguous and in chunks of four rows."""
    path = tmp_path / "artifact.h5"
    compression: dict[str, Any] = {} if request.param else {"chunks": None, "compression": None, "shuffle": None}
    save_gzip(path, EMBEDDING, 4, **compression)
    return open_stored(path)


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    """Return an artifact with EMBEDDING in chunks of four rows."""
    path = tmp_path / "artifact.h5"
    save_gzip(path, EMBEDDING, 4)
    return path


def blocks_of(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(stored, "block_rows", lambda shape, dtype: rows)


@SEARCH
@given(data=st.data())
def test_rows_of_gzip_chunks_are_those_that_numpy_indexes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 9)) for _ in range(3))
    dtype = data.draw(st.sampled_from(["float32", "float16", "int8"]))
    embedding = np.frombuffer(data.draw(st.randoms()).randbytes(np.zeros(shape, dtype).nbytes), dtype).reshape(shape)
    chunk_rows = data.draw(st.integers(1, shape[0]))
    rows_dtype = data.draw(st.sampled_from(["int64", "int32", "uint64", "uint8"]))
    queries = data.draw(st.lists(hnp.arrays(rows_dtype, st.integers(0, 12), elements=st.integers(0, shape[0] - 1))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact.h5"
        save_gzip(path, embedding, chunk_rows, shuffle=data.draw(st.booleans()))
        tensor = open_stored(path)
        for rows in queries:
            gathered = tensor.gather(rows)
            assert (gathered.dtype, gathered.shape) == (embedding.dtype, (len(rows), *shape[1:]))
            assert gathered.tobytes() == embedding[rows].tobytes()
        assert tensor.whole().tobytes() == embedding.tobytes()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_rows_may_be_of_any_integer_type(dtype: str, tmp_path: Path) -> None:
    embedding = np.arange(1000, dtype=np.float32).reshape(500, 1, 2)
    save_gzip(tmp_path / "artifact.h5", embedding, 400)  # more rows to a chunk than the small types can count
    gathered = open_stored(tmp_path / "artifact.h5").gather(np.array([100, 3], dtype))
    np.testing.assert_array_equal(gathered, embedding[[100, 3]])


def test_gathered_rows_are_a_copy_that_may_be_written_to(tensor: StoredTensor) -> None:
    tensor.gather(ROWS)[...] = 0
    np.testing.assert_array_equal(tensor.gather(ROWS), EMBEDDING[ROWS])
    assert tensor.gather(ROWS[:0]).shape == (0, 2, 4)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 10, 11])
def test_blocks_are_all_rows_in_order(tensor: StoredTensor, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(monkeypatch, rows)
    blocks = [block.copy() for block in tensor.blocks()]
    assert [len(block) for block in blocks[:-1]] == [rows] * (len(blocks) - 1)
    assert np.concatenate(blocks).tobytes() == EMBEDDING.tobytes()


def test_a_block_is_valid_until_the_next_but_one(tensor: StoredTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(monkeypatch, 1)
    before = None
    for row, block in enumerate(tensor.blocks()):
        if before is not None:
            np.testing.assert_array_equal(before, EMBEDDING[row - 1 : row])
        before = block


def test_a_tensor_is_pickled_without_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "artifact.safetensors"
    store.write_artifact(path, make_manifest(3, 2000), class_tensors(3, 2000))
    place = store.open_artifact(path)._tensors["class/mean"]
    place.whole()
    pickled = pickle.dumps(place)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).whole(), class_tensors(3, 2000)["class/mean"])


def test_rows_that_are_mapped_stay_readable_when_the_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "artifact.safetensors"
    store.write_artifact(path, make_manifest(), class_tensors())
    with store.open_artifact(path) as artifact:
        mean = artifact["class/mean"]
        path.unlink()
        np.testing.assert_array_equal(artifact.gather("class/mean", np.array([2])), class_tensors()["class/mean"][2:])
    np.testing.assert_array_equal(mean, class_tensors()["class/mean"])


@each_method
def test_a_removed_file_is_reported(tensor: StoredTensor, method: str) -> None:
    tensor.path.unlink()
    with pytest.raises(store.ArtifactNotFoundError) as caught:
        METHODS[method](tensor)
    assert str(caught.value) == f"{tensor.path}: cannot be read any more (No such file or directory)."


def _replace(path: Path) -> None:
    other = path.with_name("other.h5")
    save_gzip(other, EMBEDDING + 1, 4)
    other.replace(path)


@each_method
@pytest.mark.parametrize(
    "change",
    [_replace, lambda path: os.truncate(path, 100), lambda path: path.open("ab").write(b"x"), Path.touch],
    ids=["replaced", "cut off", "appended to", "touched"],
)
def test_a_file_that_changed_since_it_was_opened_is_reported(
    tensor: StoredTensor, method: str, change: Callable[[Path], object]
) -> None:
    os.utime(tensor.path, ns=(0, 0))
    tensor.identity = identity_of(tensor.path.stat())
    change(tensor.path)
    with pytest.raises(store.ArtifactFormatError) as caught:
        METHODS[method](tensor)
    assert str(caught.value) == "artifact.h5: was replaced while it was open. Open it again."


@pytest.mark.parametrize("method", ["gather", "blocks", "whole"])
def test_a_chunk_that_is_cut_off_is_reported(compressed: Path, method: str) -> None:
    tensor = open_stored(compressed)
    os.truncate(compressed, int(tensor.location.chunks.spans[2].sum()) - 1)  # type: ignore[union-attr]
    tensor.identity = identity_of(compressed.stat())  # as if it happened after the file was opened
    with pytest.raises(store.ArtifactFormatError) as caught:
        METHODS[method](tensor)
    assert str(caught.value) == (
        "artifact.h5: sample/embedding ends early: the file was cut off while it was read. Copy it again."
    )


def test_rows_that_are_cut_off_between_two_blocks_are_reported(
    tensor: StoredTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off_after_one(blocks: Iterator[NDArray[Any]]) -> None:
        next(blocks)
        os.truncate(tensor.path, tensor.location.offset + 20)
        list(blocks)

    blocks_of(monkeypatch, 1)
    with pytest.raises(store.ArtifactFormatError) as caught:
        cut_off_after_one(tensor.blocks())
    if tensor.location.chunks:  # the file is opened anew for each block
        assert str(caught.value) == "artifact.h5: was replaced while it was open. Open it again."
    else:
        assert str(caught.value) == (
            "artifact.h5: sample/embedding ends early: the file was cut off while it was read. Copy it again."
        )


def _reason(data: bytes) -> str:
    with pytest.raises(zlib.error) as caught:  # in the words of this machine's zlib
        zlib.decompressobj().decompress(data)
    return str(caught.value)


GOOD = zlib.compress(EMBEDDING[4:8].tobytes())
BROKEN = b"\xff" * 40
WRONG_SUM = GOOD[:-1] + bytes([GOOD[-1] ^ 1])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (BROKEN, _reason(BROKEN)),
        (WRONG_SUM, _reason(WRONG_SUM)),
        (zlib.compress(bytes(CHUNK_BYTES + 1)), f"it inflates to other than {CHUNK_BYTES} bytes"),
        (zlib.compress(bytes(CHUNK_BYTES - 1)), f"it inflates to other than {CHUNK_BYTES} bytes"),
        (zlib.compress(b""), f"it inflates to other than {CHUNK_BYTES} bytes"),
        (GOOD + b"x", f"it inflates to other than {CHUNK_BYTES} bytes"),
        (GOOD + GOOD, f"it inflates to other than {CHUNK_BYTES} bytes"),
        (GOOD[:-1], f"it inflates to other than {CHUNK_BYTES} bytes"),
    ],
    ids=["not zlib", "wrong checksum", "too much", "too little", "nothing", "trailing byte", "twice", "cut off"],
)
def test_a_damaged_chunk_is_reported_by_all_that_read_it(compressed: Path, data: bytes, reason: str) -> None:
    replace_chunk(compressed, 1, data)
    expected = f"artifact.h5: chunk 1 of sample/embedding is damaged ({reason}). Copy or extract the file again."
    with store.open_artifact(compressed) as artifact:
        for read in (
            lambda: artifact[NAME],
            lambda: artifact.verify(NAME),
            lambda: artifact.gather(NAME, ROWS),
            lambda: store.verify_artifact(compressed),
        ):
            with pytest.raises(store.ArtifactFormatError) as caught:
                read()
            assert type(caught.value) is store.ArtifactFormatError
            assert str(caught.value) == expected
        others = np.array([0, 3, 8, 9])
        np.testing.assert_array_equal(artifact.gather(NAME, others), EMBEDDING[others])


def test_another_number_in_a_chunk_is_found_by_the_digest(compressed: Path) -> None:
    with h5py.File(compressed, "r+") as file:
        file[NAME][5, 0, 0] += 1
    message = r"^artifact\.h5: sample/embedding has SHA-256 "
    with store.open_artifact(compressed) as artifact, pytest.raises(store.ArtifactDigestError, match=message):
        artifact[NAME]


def test_a_bomb_in_one_chunk_takes_no_memory(compressed: Path) -> None:
    replace_chunk(compressed, 1, zlib.compress(bytes(50_000_000)))
    tensor = open_stored(compressed)
    tracemalloc.start()
    try:
        with pytest.raises(store.ArtifactFormatError, match=f"it inflates to other than {CHUNK_BYTES} bytes"):
            tensor.gather(ROWS)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 200_000


def test_each_chunk_is_inflated_once_however_its_rows_are_asked_for(
    compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inflated = []
    inflate = StoredTensor._inflate

    def watched(self: StoredTensor, file: Any, chunks: Any, index: int) -> Any:
        inflated.append(index)
        return inflate(self, file, chunks, index)

    monkeypatch.setattr(StoredTensor, "_inflate", watched)
    open_stored(compressed).gather(np.array([9, 0, 8, 1, 9, 0]))
    assert inflated == [0, 2]


def test_gzip_as_this_store_writes_it_is_gathered_row_by_row(tmp_path: Path) -> None:
    embedding = np.random.default_rng(0).normal(size=(600, 1, 200)).astype(np.float16)
    tensors = class_tensors(embed_dim=200) | samples_of(embedding)
    store.write_artifact(tmp_path / "artifact.h5", make_manifest(3, 200, 1), tensors, gzip=True)
    rows = np.random.default_rng(1).integers(0, 600, 300)
    with store.open_artifact(tmp_path / "artifact.h5") as artifact:
        assert artifact.gather(NAME, rows).tobytes() == embedding[rows].tobytes()
        assert artifact[NAME].tobytes() == embedding.tobytes()
