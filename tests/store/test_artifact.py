"""What both containers share: the same tests, one path for each."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import store
from store import hdf5_backend, safetensors_backend
from tests.store.examples import (
    SEARCH,
    STORAGES,
    Tensors,
    all_tensors,
    assert_same_bits,
    class_tensors,
    document_of,
    file_names,
    int8_tensors,
    make_manifest,
    read_all,
    refusal,
    sample_tensors,
    save_foreign,
)


@pytest.mark.parametrize(
    "tensors",
    [class_tensors(), class_tensors() | sample_tensors(), all_tensors(), int8_tensors()],
    ids=["class-only", "samples", "everything", "int8"],
)
def test_tensors_come_back_bit_for_bit(storage: tuple[Path, dict[str, bool]], tensors: Tensors) -> None:
    path, how = storage
    written = store.write_artifact(path, make_manifest(), tensors, **how)
    assert_same_bits(read_all(path), tensors)
    with store.open_artifact(path) as artifact:
        assert artifact.manifest == written
    assert {name: info.sha256 for name, info in written.tensors.items()} == {
        name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in tensors.items()
    }
    assert file_names(path.parent) == [path.name]


@pytest.mark.parametrize(("suffix", "gzip"), STORAGES)
@settings(SEARCH, max_examples=20)
@given(data=st.data())
def test_any_tensors_come_back_bit_for_bit(suffix: str, gzip: bool, data: st.DataObject) -> None:
    num_classes, embed_dim, views = (data.draw(st.integers(1, 4)) for _ in range(3))
    rows = data.draw(hnp.arrays(np.float32, (3, num_classes, embed_dim), elements=_finite(32)))
    tensors: Tensors = {
        "class/count": data.draw(hnp.arrays(np.int64, num_classes, elements=st.integers(1, 2**63 - 1))),
        "class/mean": rows[0],
        "class/m2": rows[1],
    }
    if data.draw(st.booleans()):
        tensors["class/text"] = rows[2]
    num_samples = data.draw(st.integers(0, 4))
    if num_samples:
        dtype = data.draw(st.sampled_from(["float32", "float16", "int8"]))
        elements = {"float32": _finite(32), "float16": _finite(16)}.get(dtype)
        shape = (num_samples, views, embed_dim)
        tensors["sample/embedding"] = data.draw(hnp.arrays(dtype, shape, elements=elements))
        if dtype == "int8":
            tensors["sample/scale"] = data.draw(hnp.arrays(np.float32, shape[:2], elements=_finite(32)))
        tensors["sample/key"] = data.draw(hnp.arrays(np.uint8, (num_samples, 16)))
        tensors["sample/label"] = data.draw(hnp.arrays(np.int32, num_samples))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"artifact{suffix}"
        store.write_artifact(path, make_manifest(num_classes, embed_dim, views), tensors, gzip=gzip)
        assert_same_bits(read_all(path), tensors)


def _finite(width: Literal[16, 32]) -> st.SearchStrategy[float]:
    return st.floats(width=width, allow_nan=False, allow_infinity=False)


def test_the_manifest_has_one_digest_however_it_is_stored(tmp_path: Path) -> None:
    digests = set()
    for suffix, gzip in (*STORAGES, (".hdf5", False), (".hdf5", True)):
        path = tmp_path / f"artifact{gzip}{suffix}"
        digests.add(store.write_artifact(path, make_manifest(), all_tensors(), gzip=gzip).sha256())
        with store.open_artifact(path) as artifact:
            digests.add(artifact.manifest.sha256())
    assert len(digests) == 1


def test_the_same_input_gives_the_same_bytes(storage: tuple[Path, dict[str, bool]]) -> None:
    path, how = storage
    other = path.with_name(f"other{path.suffix}")
    tensors = all_tensors()
    store.write_artifact(path, make_manifest(), tensors, **how)
    store.write_artifact(other, make_manifest(), dict(reversed(tensors.items())), **how)
    assert path.read_bytes() == other.read_bytes()


def test_blocks_give_the_same_bytes_as_arrays(storage: tuple[Path, dict[str, bool]]) -> None:
    path, how = storage
    other = path.with_name(f"other{path.suffix}")
    tensors = all_tensors()
    blocks = {
        name: store.RowBlocks(array.shape, array.dtype.name, [array[:0], array[:1], array[1:1], array[1:]])
        for name, array in tensors.items()
    }
    store.write_artifact(path, make_manifest(), tensors, **how)
    store.write_artifact(other, make_manifest(), blocks, **how)
    assert path.read_bytes() == other.read_bytes()


def test_strided_arrays_are_written_in_row_order(storage: tuple[Path, dict[str, bool]]) -> None:
    path, how = storage
    tensors = all_tensors()
    strided = {name: np.asfortranarray(np.repeat(array, 2, axis=0)[::2]) for name, array in tensors.items()}
    store.write_artifact(path, make_manifest(), strided, **how)
    assert_same_bits(read_all(path), tensors)


def test_an_artifact_of_the_containers_own_libraries_is_read(path: Path) -> None:
    save_foreign(path, document_of(all_tensors()), all_tensors())
    assert_same_bits(read_all(path), all_tensors())


def test_class_names_of_every_script_come_back(path: Path) -> None:
    classes = ("é", "猫 \N{CAT}", '"\\\n\0\u2028')
    store.write_artifact(path, make_manifest(classes=classes), class_tensors())
    with store.open_artifact(path) as artifact:
        assert artifact.manifest.classes == classes


def test_a_manifest_larger_than_64_kib_comes_back(path: Path) -> None:
    classes = tuple(f"class with a rather long name {index}" for index in range(3000))
    store.write_artifact(path, make_manifest(3000, 1, classes=classes), class_tensors(3000, 1))
    with store.open_artifact(path) as artifact:
        assert artifact.manifest.classes == classes


def test_a_tensor_is_a_read_only_map_that_outlives_the_artifact(path: Path) -> None:
    store.write_artifact(path, make_manifest(), all_tensors())
    with store.open_artifact(path) as artifact:
        mean = artifact["class/mean"]
        assert artifact["class/mean"] is mean
    assert isinstance(mean, np.memmap)
    assert not mean.flags.writeable
    np.testing.assert_array_equal(mean, all_tensors()["class/mean"])


def test_the_artifact_knows_its_tensors(path: Path) -> None:
    store.write_artifact(path, make_manifest(), class_tensors())
    with store.open_artifact(str(path)) as artifact:
        assert artifact.path == path
        assert "class/mean" in artifact
        assert "sample/key" not in artifact
        with pytest.raises(KeyError) as caught:
            artifact["sample/key"]
    assert caught.value.args == (
        f"{path.name} has no tensor 'sample/key'; it has ['class/count', 'class/m2', 'class/mean']",
    )


def test_compressed_embeddings_are_a_read_only_array_that_outlives_the_artifact(tmp_path: Path) -> None:
    store.write_artifact(tmp_path / "artifact.h5", make_manifest(), all_tensors(), gzip=True)
    with store.open_artifact(tmp_path / "artifact.h5") as artifact:
        embedding = artifact["sample/embedding"]
    assert type(embedding) is np.ndarray
    assert not embedding.flags.writeable
    np.testing.assert_array_equal(embedding, all_tensors()["sample/embedding"])


def test_gather_reads_rows_in_any_order_and_repeats_them(storage: tuple[Path, dict[str, bool]]) -> None:
    path, how = storage
    embedding = sample_tensors()["sample/embedding"]
    store.write_artifact(path, make_manifest(), class_tensors() | sample_tensors(), **how)
    with store.open_artifact(path) as artifact:
        for rows in ([4, 0, 2, 2, 4], [1], list(range(5)), []):
            gathered = artifact.gather("sample/embedding", np.array(rows, np.int64))
            assert type(gathered) is np.ndarray
            assert gathered.dtype == np.float16
            np.testing.assert_array_equal(gathered, embedding[rows] if rows else embedding[:0])
        gathered[...] = 0
        np.testing.assert_array_equal(artifact["sample/embedding"], embedding)


@pytest.mark.parametrize(("rows", "asked"), [([0, 5], "0 to 5"), ([-1, 2], "-1 to 2"), ([9], "9 to 9")])
def test_gather_refuses_rows_out_of_bounds(storage: tuple[Path, dict[str, bool]], rows: list[int], asked: str) -> None:
    path, how = storage
    store.write_artifact(path, make_manifest(), class_tensors() | sample_tensors(), **how)
    with store.open_artifact(path) as artifact, pytest.raises(IndexError) as caught:
        artifact.gather("sample/embedding", np.array(rows))
    assert str(caught.value) == f"sample/embedding has rows 0 to 4, asked for {asked}"


def test_a_flipped_bit_is_found_when_its_tensor_is_read_and_not_before(path: Path) -> None:
    manifest = store.write_artifact(path, make_manifest(), all_tensors())
    damaged = all_tensors()["class/mean"]
    damaged.view(np.uint32)[1, 2] ^= 1
    _overwrite(path, "class/mean", damaged)
    with store.open_artifact(path) as artifact:
        assert_same_bits({"class/m2": artifact["class/m2"]}, {"class/m2": all_tensors()["class/m2"]})
        np.testing.assert_array_equal(artifact.gather("class/mean", np.array([1])), damaged[1:2])
        for _ in range(2):
            with pytest.raises(store.ArtifactDigestError) as caught:
                artifact["class/mean"]
    found = hashlib.sha256(damaged.tobytes()).hexdigest()
    expected = manifest.tensors["class/mean"].sha256
    assert str(caught.value) == (
        f"{path.name}: class/mean has SHA-256 {found[:12]}…, the manifest says {expected[:12]}…. "
        "The file is damaged: copy or extract it again."
    )


def _overwrite(path: Path, name: str, array: NDArray[Any]) -> None:
    offset = _backend(path).read_header(path).locations[name].offset
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(array.tobytes())


def _backend(path: Path) -> Any:
    return safetensors_backend if path.suffix == ".safetensors" else hdf5_backend


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_though_the_digest_is_right(path: Path, value: float) -> None:
    tensors = class_tensors()
    tensors["class/m2"][2, 3] = value
    save_foreign(path, document_of(tensors), tensors)
    assert refusal(path) == f"{path.name}: class/m2 has values that are not finite (NaN or infinity)."


def test_tensors_of_a_newer_minor_version_are_accepted(path: Path) -> None:
    tensors = class_tensors() | {"future/x": np.arange(6, dtype=np.uint8).reshape(1, 2, 3)}
    document = document_of(tensors)
    document["format"]["minor"] = 1
    save_foreign(path, document, tensors)
    assert_same_bits(read_all(path), tensors)
