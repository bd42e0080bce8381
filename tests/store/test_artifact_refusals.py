import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

import store
from tests.store.examples import (
    all_tensors,
    class_tensors,
    document_of,
    make_manifest,
    read_all,
    refusal,
    save_foreign,
    write_refusal,
)


def test_a_missing_file_is_not_found(path: Path) -> None:
    assert refusal(path, store.ArtifactNotFoundError) == (
        f"{path}: artifact does not exist. Make one with `clip-embed-kd extract`."
    )


def test_a_folder_is_not_an_artifact(path: Path) -> None:
    path.mkdir()
    assert refusal(path, store.ArtifactNotFoundError) == (
        f"{path}: artifact is a folder. Make one with `clip-embed-kd extract`."
    )


def test_a_name_that_the_file_system_refuses_is_not_found(path: Path) -> None:
    path = path.with_name("x" * 300 + path.suffix)
    assert refusal(path, store.ArtifactNotFoundError) == f"{path}: cannot be read (File name too long)."


def test_a_file_that_vanishes_while_it_is_opened_is_not_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    assert refusal(path, store.ArtifactNotFoundError) == f"{path}: cannot be read (No such file or directory)."


@pytest.mark.parametrize("name", ["artifact.pt", "artifact", "artifact.h5.gz", "artifact.H5"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    expected = f"{path}: an artifact's name ends in .safetensors, .h5, .hdf5, found {Path(name).suffix!r}."
    assert refusal(path, store.StoreError) == expected
    assert write_refusal(path, class_tensors(), store.StoreError, overwrite=True) == expected


@pytest.mark.parametrize("smallest", [0, -(2**63)])
def test_a_class_without_images_is_refused_when_the_counts_are_read(path: Path, smallest: int) -> None:
    tensors = class_tensors() | {"class/count": np.array([4, smallest, 6])}
    save_foreign(path, document_of(tensors), tensors)
    with store.open_artifact(path) as artifact:
        assert artifact["class/mean"].shape == (3, 4)
        for _ in range(2):
            with pytest.raises(store.ArtifactFormatError) as caught:
                artifact["class/count"]
            assert str(caught.value) == (
                f"{path.name}: class/count has a value of {smallest}, expected at least 1. "
                "The file is damaged: extract it again."
            )


def test_another_manifest_digest_is_refused(path: Path) -> None:
    save_foreign(path, document_of(class_tensors()), class_tensors(), sha256="0" * 64)
    message = refusal(path, store.ArtifactDigestError)
    assert message.startswith(f"{path.name}: manifest has SHA-256 ")
    assert message.endswith("…, '000000000000'… is stored beside it. The file is damaged: extract it again.")


def test_another_format_is_refused(path: Path) -> None:
    document = document_of(class_tensors()) | {"format": {"name": "other", "major": 1, "minor": 0}}
    save_foreign(path, document, class_tensors())
    assert refusal(path, store.ArtifactVersionError) == (
        f"{path.name}: manifest format is 'other', expected 'clip-embed-kd'."
    )


def test_a_newer_major_version_is_refused(path: Path) -> None:
    document = document_of(class_tensors())
    document["format"]["major"] = 2
    save_foreign(path, document, class_tensors())
    assert refusal(path, store.ArtifactVersionError) == (
        f"{path.name}: artifact format 2, this program reads format 1. Update clip-embed-kd, or extract again."
    )


def test_a_manifest_without_a_field_is_refused(path: Path) -> None:
    document = document_of(class_tensors())
    del document["teacher"]["embed_dim"]
    save_foreign(path, document, class_tensors())
    assert refusal(path) == (
        f"{path.name}: manifest field teacher.embed_dim: Field required. The file is damaged: extract it again."
    )


def test_a_class_name_that_stands_twice_is_refused(path: Path) -> None:
    document = document_of(class_tensors()) | {"classes": ["a", "b", "a"]}
    save_foreign(path, document, class_tensors())
    assert refusal(path) == (
        f"{path.name}: manifest field classes: Value error, class name 'a' stands twice. "
        "The file is damaged: extract it again."
    )


@pytest.mark.parametrize("missing", ["class/count", "class/mean", "class/m2", "head/bias", "sample/label"])
def test_a_missing_tensor_is_refused(path: Path, missing: str) -> None:
    tensors = all_tensors()
    del tensors[missing]
    save_foreign(path, document_of(tensors), tensors)
    assert refusal(path) == f"{path.name}: {missing} is missing. Extract the artifact again."


def test_a_tensor_in_the_manifest_only_is_refused(path: Path) -> None:
    tensors = all_tensors()
    document = document_of(tensors)
    del tensors["class/text"]
    save_foreign(path, document, tensors)
    assert refusal(path) == (
        f"{path.name}: 'class/text' stands in the manifest only. The file is damaged: extract it again."
    )


def test_a_tensor_in_the_file_only_is_refused(path: Path) -> None:
    save_foreign(path, document_of(class_tensors()), all_tensors())
    assert refusal(path) == (
        f"{path.name}: 'class/text' stands in the file only. The file is damaged: extract it again."
    )


@pytest.mark.parametrize(
    ("replacement", "found"),
    [
        (np.zeros((3, 4), np.int32), "int32 [3, 4]"),
        (np.zeros((4, 3), np.float32), "float32 [4, 3]"),
        (np.zeros(12, np.float32), "float32 [12]"),
        (np.zeros((2, 4), np.float32), "float32 [2, 4]"),
    ],
)
def test_a_tensor_that_is_not_as_the_manifest_says_is_refused(
    path: Path, replacement: NDArray[Any], found: str
) -> None:
    save_foreign(path, document_of(class_tensors()), class_tensors() | {"class/mean": replacement})
    assert refusal(path) == (
        f"{path.name}: class/mean is {found}, the manifest says float32 [3, 4]. The file is damaged: extract it again."
    )


def test_shapes_that_disagree_with_the_class_names_are_refused(path: Path) -> None:
    tensors = class_tensors() | {"class/mean": np.zeros((2, 4), np.float32)}
    save_foreign(path, document_of(tensors), tensors)
    assert refusal(path) == (
        f"{path.name}: class/mean has shape [2, 4], expected [3, 4] (C × D: 3 classes, embed_dim 4). "
        "The file is damaged: extract it again."
    )


def test_a_file_without_permission_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "artifact.safetensors"
    store.write_artifact(path, make_manifest(), class_tensors())
    monkeypatch.setattr(Path, "open", _deny)
    assert refusal(path, store.ArtifactNotFoundError) == f"{path}: no permission to read the artifact."


def test_an_hdf5_file_without_permission_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "artifact.h5"
    store.write_artifact(path, make_manifest(), class_tensors())
    monkeypatch.setattr(h5py, "File", _deny)
    assert refusal(path, store.ArtifactNotFoundError) == f"{path}: no permission to read the artifact."


def test_a_file_in_a_closed_folder_is_not_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", _deny)
    with pytest.raises(store.ArtifactNotFoundError):
        store.open_artifact(path)


def _deny(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_rows_never_come_from_a_file_that_took_the_place_of_the_open_one(path: Path) -> None:
    store.write_artifact(path, make_manifest(), class_tensors())
    with store.open_artifact(path) as artifact:
        store.write_artifact(path, make_manifest(30), class_tensors(30), overwrite=True)
        with suppress(store.StoreError):
            gathered = artifact.gather("class/mean", np.arange(3))
            np.testing.assert_array_equal(gathered, class_tensors()["class/mean"])


def test_an_artifact_goes_to_another_process_without_its_tensors(path: Path) -> None:
    store.write_artifact(path, make_manifest(3, 2000), class_tensors(3, 2000))
    with store.open_artifact(path) as artifact:
        artifact["class/mean"]
        pickled = pickle.dumps(artifact)
    assert len(pickled) < 10_000
    np.testing.assert_array_equal(pickle.loads(pickled)["class/m2"], class_tensors(3, 2000)["class/m2"])


def test_a_tensor_without_axes_is_refused(path: Path) -> None:
    tensors = class_tensors() | {"future/x": np.array(1, np.float32)}
    save_foreign(path, document_of(tensors), tensors)
    with pytest.raises(store.ArtifactFormatError):
        read_all(path)
