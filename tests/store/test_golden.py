"""Files of format 1 that were written once: every later version reads them, and others' programs too."""

import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import store
from tests.store.examples import (
    GOLDEN,
    GOLDEN_FILES,
    Tensors,
    assert_same_bits,
    file_names,
    golden_manifest,
    read_all,
)

ALL = pytest.mark.parametrize(("name", "tensors", "gzip"), GOLDEN_FILES, ids=[name for name, *_ in GOLDEN_FILES])
SAFETENSORS = [(name, tensors) for name, tensors, _ in GOLDEN_FILES if name.endswith(".safetensors")]
HDF5 = [(name, tensors) for name, tensors, _ in GOLDEN_FILES if name.endswith(".h5")]


def test_every_golden_file_is_tested() -> None:
    assert file_names(GOLDEN) == sorted(name for name, *_ in GOLDEN_FILES)


@ALL
def test_a_golden_file_has_the_tensors_that_were_written(name: str, tensors: Tensors, gzip: bool) -> None:
    assert_same_bits(read_all(GOLDEN / name), tensors)


@ALL
def test_a_golden_file_has_the_manifest_that_is_written_now(
    name: str, tensors: Tensors, gzip: bool, tmp_path: Path
) -> None:
    with store.open_artifact(GOLDEN / name) as artifact:
        assert artifact.manifest == store.write_artifact(tmp_path / name, golden_manifest(), tensors, gzip=gzip)
        assert artifact.manifest.sha256() == artifact.manifest_sha256


@ALL
def test_a_golden_file_is_verified(name: str, tensors: Tensors, gzip: bool) -> None:
    with store.open_artifact(GOLDEN / name) as artifact:
        assert store.verify_artifact(GOLDEN / name) == artifact.manifest_sha256


@pytest.mark.parametrize(("name", "tensors"), SAFETENSORS)
def test_a_golden_safetensors_file_is_written_byte_for_byte(name: str, tensors: Tensors, tmp_path: Path) -> None:
    store.write_artifact(tmp_path / name, golden_manifest(), tensors)
    assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize(("name", "tensors"), SAFETENSORS)
def test_the_safetensors_library_reads_the_same_bits(name: str, tensors: Tensors) -> None:
    assert_same_bits(safetensors.numpy.load_file(GOLDEN / name), tensors)
    with safetensors.safe_open(GOLDEN / name, "numpy") as file, store.open_artifact(GOLDEN / name) as artifact:
        assert file.metadata() == {
            "manifest": artifact.manifest.to_bytes().decode(),
            "manifest_sha256": artifact.manifest_sha256,
        }


@pytest.mark.parametrize(("name", "tensors"), HDF5)
def test_the_hdf5_library_reads_the_same_bits(name: str, tensors: Tensors) -> None:
    artifact = store.open_artifact(GOLDEN / name)
    with h5py.File(GOLDEN / name) as file:
        assert_same_bits({tensor: file[tensor][()] for tensor in tensors}, tensors)
        assert file.attrs["manifest"] == artifact.manifest.to_bytes()
        assert file.attrs["manifest_sha256"] == artifact.manifest_sha256.encode()


@pytest.mark.parametrize("name", [name for name, _ in HDF5])
def test_only_the_golden_file_with_gzip_has_gzip_chunks(name: str) -> None:
    with h5py.File(GOLDEN / name) as file:
        embedding = file["sample/embedding"]
        expected = ((5, 2, 4), "gzip", True) if "gzip" in name else (None, None, False)
        assert (embedding.chunks, embedding.compression, embedding.shuffle) == expected


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not installed (Debian: hdf5-tools)")
@pytest.mark.parametrize(("name", "tensors"), HDF5)
def test_h5dump_reads_the_same_bits(name: str, tensors: Tensors, tmp_path: Path) -> None:
    dumped = {}
    for tensor, array in tensors.items():
        out = tmp_path / "tensor.bin"
        command = ["h5dump", "-d", tensor, "-b", "FILE", "-o", str(out), str(GOLDEN / name)]
        subprocess.run(command, check=True, capture_output=True)
        dumped[tensor] = np.fromfile(out, array.dtype).reshape(array.shape)
    assert_same_bits(dumped, tensors)
