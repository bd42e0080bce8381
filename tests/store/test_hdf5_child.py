"""HDF5 headers come from a child process: what it answers, and what its death means."""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

import store
from store import hdf5_backend
from store.hdf5_backend import read_header
from store.hdf5_parse import parse
from store.isolation import ChildError, run_isolated
from tests.store.examples import GOLDEN, class_tensors, header_refusal, make_manifest

WHOLE = (GOLDEN / "format-1.h5").read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "artifact.h5"


@pytest.mark.parametrize("name", ["format-1.h5", "format-1-gzip.h5"])
def test_the_child_says_what_parsing_in_this_process_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = parse(GOLDEN / name, (GOLDEN / name).stat().st_size)
    for run in (run_isolated, lambda function, cpu_seconds: function()):
        monkeypatch.setattr(hdf5_backend, "run_isolated", run)
        header = read_header(GOLDEN / name)
        assert (header.manifest, header.manifest_sha256) == (expected.manifest, expected.manifest_sha256)
        assert set(header.locations) == set(expected.locations)
        for tensor, place in expected.locations.items():
            found = header.locations[tensor]
            assert (found.dtype, found.shape, found.offset) == (place.dtype, place.shape, place.offset)
            assert (found.chunks is None) == (place.chunks is None)
            if found.chunks and place.chunks:
                assert (found.chunks.rows, found.chunks.shuffled) == (place.chunks.rows, place.chunks.shuffled)
                np.testing.assert_array_equal(found.chunks.spans, place.chunks.spans)


def test_what_the_child_refuses_is_refused_in_its_words(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["manifest"] = file.attrs["manifest_sha256"] = np.bytes_(b"x")
        file["a"] = np.zeros(3)
    monkeypatch.setattr(hdf5_backend, "run_isolated", lambda function, cpu_seconds: function())
    assert header_refusal(path) == "artifact.h5: a is not a group of tensors."


def test_a_file_that_may_not_be_read_is_no_damaged_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path.write_bytes(WHOLE)
    monkeypatch.setattr(h5py, "File", deny)
    for run in (run_isolated, lambda function, cpu_seconds: function()):
        monkeypatch.setattr(hdf5_backend, "run_isolated", run)
        with pytest.raises(PermissionError):
            read_header(path)


def test_a_crash_of_the_hdf5_library_is_a_refusal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(function: object, cpu_seconds: float) -> bytes:
        raise ChildError("it crashed with SIGSEGV")

    path.write_bytes(WHOLE)
    monkeypatch.setattr(hdf5_backend, "run_isolated", crash)
    with pytest.raises(store.ArtifactFormatError) as caught:
        read_header(path)
    assert str(caught.value) == (
        "artifact.h5: the HDF5 library could not read it: it crashed with SIGSEGV. "
        "The file is damaged or hostile: copy it again."
    )


def test_the_child_may_work_longer_on_a_larger_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    granted = []

    def watched(function: Callable[[], bytes], cpu_seconds: float) -> bytes:
        granted.append(cpu_seconds)
        return function()

    monkeypatch.setattr(hdf5_backend, "run_isolated", watched)
    path.write_bytes(WHOLE)
    read_header(path)
    os.truncate(path, 10**10)  # a sparse file
    read_header(path)
    assert granted == pytest.approx([0.8, 1.8], abs=0.001)


@pytest.mark.parametrize(("letter", "num_bytes"), [("x", 1), ("猫", 3), ("\0", 6)], ids=["ascii", "utf-8", "escaped"])
def test_a_manifest_of_nearly_the_largest_size_is_read(path: Path, letter: str, num_bytes: int) -> None:
    manifest = make_manifest(1, 1, classes=(letter * (31 * 1024 * 1024 // num_bytes),))
    written = store.write_artifact(path, manifest, class_tensors(1, 1))
    with store.open_artifact(path) as artifact:
        assert artifact.manifest == written
