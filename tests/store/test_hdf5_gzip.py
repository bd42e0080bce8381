"""Gzip chunks in HDF5: how they are written, and what of others' files is refused."""

import struct
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import store
from store import hdf5_backend, hdf5_parse
from store.stored import StoredTensor, identity_of
from tests.store.examples import (
    Tensors,
    all_tensors,
    class_tensors,
    file_names,
    header_refusal,
    int8_tensors,
    make_manifest,
    read_all,
    replace_chunk,
    samples_of,
    save_gzip,
)

NAME = "sample/embedding"
EMBEDDING = np.random.default_rng(0).normal(size=(10, 2, 4)).astype(np.float32)
CHUNK_BYTES = 4 * 2 * 4 * 4  # four rows to a chunk: ten rows are three chunks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "artifact.h5"


def spans_of(path: Path) -> list[tuple[int, int]]:
    """Return offset and size of each chunk, as the HDF5 library sees them."""
    with h5py.File(path) as file:
        dataset = file[NAME].id
        chunks = [dataset.get_chunk_info(index) for index in range(dataset.get_num_chunks())]
    return [(chunk.byte_offset, chunk.size) for chunk in chunks]


def move_chunk(path: Path, old: int, new: int) -> None:
    """Overwrite the address of a chunk, which stands once in the file."""
    data = path.read_bytes()
    assert data.count(struct.pack("<Q", old)) == 1
    path.write_bytes(data.replace(struct.pack("<Q", old), struct.pack("<Q", new)))


@pytest.mark.parametrize(
    ("options", "filters"),
    [
        ({"compression": "lzf", "shuffle": False}, [h5py.h5z.FILTER_LZF]),
        ({"compression": "lzf"}, [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_LZF]),
        ({"compression": None}, [h5py.h5z.FILTER_SHUFFLE]),
        ({"compression": None, "shuffle": False}, []),
        ({"fletcher32": True}, [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32]),
        ({"scaleoffset": 3, "shuffle": False}, [h5py.h5z.FILTER_SCALEOFFSET, h5py.h5z.FILTER_DEFLATE]),
    ],
    ids=["lzf", "shuffle and lzf", "shuffle", "none", "checksum", "scale and offset"],
)
def test_other_filters_are_refused(path: Path, options: dict[str, Any], filters: list[int]) -> None:
    save_gzip(path, EMBEDDING, 4, **options)
    assert header_refusal(path) == (
        f"artifact.h5: sample/embedding has HDF5 filters {filters}, expected gzip, or shuffle and gzip."
    )


@pytest.mark.parametrize(
    "options", [{"chunks": (4, 1, 4)}, {"chunks": (4, 2, 3)}, {"chunks": (4, 2, 4), "maxshape": (None, 2, 4)}], ids=str
)
def test_chunks_that_are_not_whole_rows_of_a_fixed_number_are_refused(path: Path, options: dict[str, Any]) -> None:
    save_gzip(path, EMBEDDING, 4, **options)
    assert header_refusal(path) == (
        f"artifact.h5: sample/embedding has chunks of {options['chunks']} in [10, 2, 4], not whole rows."
    )


@pytest.mark.parametrize("name", ["sample/key", "class/mean", "a/b"])
def test_gzip_chunks_of_other_tensors_are_refused(path: Path, name: str) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["manifest"] = file.attrs["manifest_sha256"] = np.bytes_(b"x")
        file.create_dataset(name, data=EMBEDDING, chunks=(4, 2, 4), compression="gzip")
    assert header_refusal(path) == (
        f"artifact.h5: {name} is neither contiguous in this file nor, as sample embeddings may be, in gzip chunks."
    )


@pytest.mark.parametrize("written", [(), (0, 1), (0, 2)])
def test_a_missing_chunk_is_refused(path: Path, written: tuple[int, ...]) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["manifest"] = file.attrs["manifest_sha256"] = np.bytes_(b"x")
        file.create_dataset(NAME, (10, 2, 4), "f4", chunks=(4, 2, 4), compression="gzip")
    for index in written:
        replace_chunk(path, index, zlib.compress(bytes(CHUNK_BYTES)))
    assert header_refusal(path) == f"artifact.h5: sample/embedding has {len(written)} chunks, 3 are needed."


@pytest.mark.parametrize("filter_mask", [1, 2, 3])
def test_a_chunk_that_skips_a_filter_is_refused(path: Path, filter_mask: int) -> None:
    save_gzip(path, EMBEDDING, 4)
    replace_chunk(path, 1, bytes(CHUNK_BYTES), filter_mask)
    assert header_refusal(path) == "artifact.h5: sample/embedding has a chunk that is not gzip, or not whole rows."


@pytest.mark.parametrize("beyond", ["one byte", "far", "at the end of all numbers"])
def test_a_chunk_beyond_the_end_of_the_file_is_refused(path: Path, beyond: str) -> None:
    save_gzip(path, EMBEDDING, 4)
    (_, (offset, size), _), file_bytes = spans_of(path), path.stat().st_size
    places = {"one byte": file_bytes - size + 1, "far": 2**40, "at the end of all numbers": 2**63 - 2}
    move_chunk(path, offset, places[beyond])
    assert header_refusal(path) == (
        f"artifact.h5: sample/embedding ends beyond the end of the file ({file_bytes} bytes). "
        "It is cut off: copy it again."
    )


def test_a_chunk_at_no_place_is_refused(path: Path) -> None:
    save_gzip(path, EMBEDDING, 4)
    move_chunk(path, spans_of(path)[1][0], 2**64 - 1)
    message = header_refusal(path)  # in the words of the HDF5 library
    assert message.startswith("artifact.h5: not a readable HDF5 file (")
    assert message.endswith("). It is cut off or damaged: copy it again.")


@pytest.mark.parametrize("distance", [0, 1, -1])
def test_chunks_that_overlap_are_refused(path: Path, distance: int) -> None:
    save_gzip(path, EMBEDDING, 4)  # a small file could claim a tensor of any size, chunk after chunk in one place
    spans = spans_of(path)
    move_chunk(path, spans[1][0], spans[0][0] + distance)
    assert header_refusal(path) == (
        "artifact.h5: sample/embedding has chunks that overlap. The file is damaged or hostile."
    )


@pytest.mark.parametrize(("at_most", "accepted"), [(CHUNK_BYTES, True), (CHUNK_BYTES - 1, False)])
def test_chunks_that_are_too_large_are_refused(
    path: Path, at_most: int, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_gzip(path, EMBEDDING, 4)
    monkeypatch.setattr(hdf5_parse, "_MAX_CHUNK_BYTES", at_most)
    if accepted:
        assert read_all(path)[NAME].tobytes() == EMBEDDING.tobytes()
    else:
        assert header_refusal(path) == (
            f"artifact.h5: sample/embedding has chunks of {CHUNK_BYTES} bytes, at most {at_most} are read."
        )


@pytest.mark.parametrize(("any_ratio_bytes", "accepted"), [(3 * CHUNK_BYTES, True), (3 * CHUNK_BYTES - 1, False)])
def test_a_compression_bomb_is_refused(
    path: Path, any_ratio_bytes: int, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_gzip(path, np.zeros_like(EMBEDDING), 4)
    monkeypatch.setattr(hdf5_parse, "_MAX_RATIO", 2)
    monkeypatch.setattr(hdf5_parse, "_ANY_RATIO_BYTES", any_ratio_bytes)
    if accepted:
        assert not read_all(path)[NAME].any()
    else:
        assert header_refusal(path) == (
            f"artifact.h5: sample/embedding would grow from {sum(size for _, size in spans_of(path))} to "
            f"{3 * CHUNK_BYTES} bytes, as no embeddings do: a compression bomb, or to be stored without gzip."
        )


def test_zeros_that_no_reader_would_take_are_not_written_with_gzip(path: Path) -> None:
    num_rows = 18
    block = np.zeros((1, 256, 1024), np.float32)  # 1 MiB
    samples: dict[str, Any] = samples_of(np.zeros((num_rows, 1, 1), np.float32))
    samples[NAME] = store.RowBlocks((num_rows, 256, 1024), "float32", (block for _ in range(num_rows)))
    with pytest.raises(store.ArtifactFormatError) as caught:
        store.write_artifact(path, make_manifest(1, 1024, 256), class_tensors(1, 1024) | samples, gzip=True)
    message = str(caught.value)
    assert message.startswith("artifact: sample/embedding would grow from ")
    assert message.endswith(
        f" to {num_rows << 20} bytes, as no embeddings do: a compression bomb, or to be stored without gzip."
    )
    assert file_names(path.parent) == []


def test_rows_that_are_too_large_for_a_chunk_are_not_written(path: Path) -> None:
    tensors = class_tensors(1, 1024) | samples_of(np.ones((1, 4097, 1024), np.float32))
    with pytest.raises(store.ArtifactFormatError) as caught:
        store.write_artifact(path, make_manifest(1, 1024, 4097), tensors, gzip=True)
    assert str(caught.value) == "artifact.h5: sample/embedding has rows of 16781312 bytes, at most 16777216 are read."
    assert file_names(path.parent) == []


@pytest.mark.parametrize(("tensors", "shuffled"), [(all_tensors(), True), (int8_tensors(), False)])
def test_only_sample_embeddings_are_compressed(path: Path, tensors: Tensors, shuffled: bool) -> None:
    store.write_artifact(path, make_manifest(), tensors, gzip=True)
    with h5py.File(path) as file:
        for name in tensors:
            dataset = file[name]
            expected = ((5, 2, 4), "gzip", 4, shuffled) if name == NAME else (None, None, None, False)
            assert (dataset.chunks, dataset.compression, dataset.compression_opts, dataset.shuffle) == expected


def test_an_artifact_without_samples_has_nothing_to_compress(path: Path) -> None:
    other = path.with_name("other.h5")
    store.write_artifact(path, make_manifest(), class_tensors(), gzip=True)
    store.write_artifact(other, make_manifest(), class_tensors())
    assert path.read_bytes() == other.read_bytes()


def test_chunks_are_whole_rows_of_about_64_kib(path: Path) -> None:
    embedding = np.zeros((100, 3, 1000), np.float16)
    store.write_artifact(path, make_manifest(1, 1000, 3), class_tensors(1, 1000) | samples_of(embedding), gzip=True)
    with h5py.File(path) as file:
        assert file[NAME].chunks == (10, 3, 1000)


@pytest.mark.parametrize("block_rows", [1, 3, 32, 1000])
def test_the_blocks_in_which_rows_come_do_not_change_the_file(path: Path, block_rows: int) -> None:
    embedding = np.random.default_rng(0).normal(size=(1500, 1, 1024)).astype(np.float16)  # 47 chunks
    samples = samples_of(embedding)
    whole = path.with_name("whole.h5")
    store.write_artifact(whole, make_manifest(1, 1024, 1), class_tensors(1, 1024) | samples, gzip=True)
    blocks = (embedding[start : start + block_rows] for start in range(0, 1500, block_rows))
    streamed: dict[str, Any] = {
        **class_tensors(1, 1024),
        **samples,
        NAME: store.RowBlocks(embedding.shape, "float16", blocks),
    }
    store.write_artifact(path, make_manifest(1, 1024, 1), streamed, gzip=True)
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("options", [{"userblock_size": 512}, {"libver": "latest"}, {"libver": "v108"}])
def test_chunks_are_found_in_files_of_other_forms(path: Path, options: dict[str, Any]) -> None:
    with h5py.File(path, "w", **options) as file:
        file.attrs["manifest"] = file.attrs["manifest_sha256"] = np.bytes_(b"x")
        file.create_dataset(NAME, data=EMBEDDING, chunks=(4, 2, 4), compression="gzip", shuffle=True)
    place = hdf5_backend.read_header(path).locations[NAME]
    whole = StoredTensor(path, identity_of(path.stat()), NAME, place).whole()
    assert whole.tobytes() == EMBEDDING.tobytes()
