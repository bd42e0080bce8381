"""Bounds on what a header may ask for, near enough to be crossed in a test; far ones stand in test_hostile."""

import hashlib
import json
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import store
from store import hdf5_parse, manifest, stored, strict_json
from store.hdf5_parse import parse
from tests.store.examples import all_tensors, class_tensors, encode, make_manifest


def refusal(path: Path) -> str:
    with pytest.raises(store.ArtifactFormatError) as error:
        parse(path, path.stat().st_size)
    return str(error.value)


def test_tensors_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "artifact.h5"
    with h5py.File(path, "w") as file:
        file.attrs["manifest"] = np.bytes_(b"{}")
        file.attrs["manifest_sha256"] = np.bytes_(b"digest")
        file["a/b"] = np.ones((1000, 100), np.float32)
        file["a/c"] = file["a/b"]
    assert refusal(path) == "artifact.h5: a/c overlaps other tensors. The file is damaged or hostile."


def test_a_compressed_chunk_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "artifact.h5"
    store.write_artifact(path, make_manifest(), all_tensors(), gzip=True)
    monkeypatch.setattr(hdf5_parse, "_MAX_CHUNK_BYTES", 5)
    message = refusal(path)
    assert message.startswith("artifact.h5: sample/embedding has a chunk of ")
    assert message.endswith(" bytes, at most 10 are read.")


def test_json_with_too_many_values_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "_MAX_JSON_MARKS", 5)
    assert strict_json.parse_json(b'{"a":[1,2]}', "file") == {"a": [1, 2]}
    with pytest.raises(store.ArtifactFormatError) as error:
        strict_json.parse_json(b'{"a":[1,2,3,4]}', "file")
    assert str(error.value) == "file: header has 6 commas, colons and brackets, at most 5 are read."


@pytest.mark.parametrize("field", ["tensors", "software"])
def test_too_many_members_are_refused_together(field: str) -> None:
    document: dict[str, Any] = json.loads(make_manifest().to_bytes())
    document[field] = {str(number): "x" for number in range(1001)}
    raw = encode(document)
    with pytest.raises(store.ArtifactFormatError) as error:
        manifest.parse_manifest(raw, hashlib.sha256(raw).hexdigest(), "file")
    assert str(error.value) == f"file: manifest field {field} has 1001 members, at most 1000 are read."


def test_a_tensor_that_cannot_be_mapped_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("mmap length is greater than file size")

    path = tmp_path / "artifact.safetensors"
    store.write_artifact(path, make_manifest(), class_tensors())
    monkeypatch.setattr(np, "memmap", fail)
    with store.open_artifact(path) as artifact, pytest.raises(store.ArtifactFormatError) as error:
        artifact.gather("class/mean", np.array([0]))
    assert str(error.value) == (
        "artifact.safetensors: class/mean cannot be mapped (mmap length is greater than file size)."
    )


def test_a_disk_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(FileIO):
        def readinto(self, buffer: Any, /) -> int:
            raise OSError(5, "Input/output error")

    path = tmp_path / "artifact.safetensors"
    store.write_artifact(path, make_manifest(), class_tensors())
    monkeypatch.setattr(stored.StoredTensor, "_open", lambda self: Failing(self.path))
    with store.open_artifact(path) as artifact, pytest.raises(store.ArtifactNotFoundError) as error:
        artifact.verify("class/mean")
    assert str(error.value) == "artifact.safetensors: class/mean cannot be read (Input/output error)."
