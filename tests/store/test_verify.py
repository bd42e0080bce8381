"""Every rule that the numbers of an artifact must obey, broken in turn, in each container."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import store
from store import verify
from tests.store.examples import (
    GOLDEN,
    Tensors,
    class_tensors,
    document_of,
    golden_manifest,
    int8_tensors,
    make_manifest,
    sample_tensors,
    save_foreign,
)

DAMAGED = "The file is damaged: extract it again."


def refusal(path: Path, kind: type[store.StoreError] = store.ArtifactFormatError) -> str:
    with pytest.raises(store.StoreError) as caught:
        store.verify_artifact(path)
    assert type(caught.value) is kind
    return str(caught.value)


def save(path: Path, tensors: Tensors, images_sha256: str | None = None) -> None:
    """Write an artifact whose digests are right, whatever its numbers are."""
    document = document_of(tensors)
    document["sampling"]["images_sha256"] = images_sha256
    save_foreign(path, document, tensors)


def samples(**changes: Any) -> Tensors:
    tensors = class_tensors() | sample_tensors()
    for name, value in changes.items():
        tensors[name.replace("_", "/", 1)] = value
    return tensors


def test_what_was_written_is_verified(storage: tuple[Path, dict[str, bool]]) -> None:
    path, how = storage
    for tensors in (class_tensors(), class_tensors() | sample_tensors(), int8_tensors()):
        manifest = store.write_artifact(path, make_manifest(), tensors, overwrite=True, **how)
        assert store.verify_artifact(path) == manifest.sha256()
    manifest = store.write_artifact(path, golden_manifest(), class_tensors() | sample_tensors(), overwrite=True, **how)
    assert store.verify_artifact(str(path)) == manifest.sha256()


def test_progress_is_told_of_every_byte_once(storage: tuple[Path, dict[str, bool]]) -> None:
    path, how = storage
    tensors = int8_tensors()
    store.write_artifact(path, make_manifest(), tensors, **how)
    reported: list[int] = []
    store.verify_artifact(path, progress=reported.append)
    assert sum(reported) == sum(array.nbytes for array in tensors.values())
    assert len(reported) == len(tensors)


def test_a_missing_artifact_is_not_verified(path: Path) -> None:
    assert refusal(path, store.ArtifactNotFoundError).startswith(f"{path}: artifact does not exist.")


@pytest.mark.parametrize("name", list(int8_tensors()))
def test_a_changed_bit_of_any_tensor_is_found(path: Path, name: str) -> None:
    tensors = int8_tensors()
    document = document_of(tensors)
    tensors[name] = tensors[name].copy()
    tensors[name].view(np.uint8).reshape(-1)[0] ^= 1
    save_foreign(path, document, tensors)
    message = refusal(path, store.ArtifactDigestError)
    assert message.startswith(f"{path.name}: {name} has SHA-256 ")
    assert message.endswith("…. The file is damaged: copy or extract it again.")


def test_values_that_are_not_finite_are_refused(path: Path) -> None:
    embedding = sample_tensors()["sample/embedding"]
    embedding[4, 1, 3] = np.inf
    save(path, samples(sample_embedding=embedding))
    assert refusal(path) == f"{path.name}: sample/embedding has values that are not finite (NaN or infinity)."


@pytest.mark.parametrize("smallest", [0, -1, -(2**63)])
def test_a_class_without_images_is_refused(path: Path, smallest: int) -> None:
    save(path, samples(class_count=np.array([4, smallest, 6])))
    assert refusal(path) == f"{path.name}: class/count has a value of {smallest}, expected at least 1. {DAMAGED}"


def test_negative_sums_of_squares_are_refused(path: Path) -> None:
    squares = class_tensors()["class/m2"]
    squares[1, 2] = -0.5
    save(path, samples(class_m2=squares))
    assert refusal(path) == f"{path.name}: class/m2 has a value of -0.5, expected at least 0. {DAMAGED}"


def test_a_negative_scale_is_refused(path: Path) -> None:
    tensors = int8_tensors()
    tensors["sample/scale"][4, 1] = -0.25
    save(path, tensors)
    assert refusal(path) == f"{path.name}: sample/scale has a value of -0.25, expected at least 0. {DAMAGED}"


@pytest.mark.parametrize("block_rows", [1, 2, 65536])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_without_a_class_is_refused(
    path: Path, label: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_BLOCK_ROWS", block_rows)
    labels = np.full(5, label, np.int32)
    save(path, samples(sample_label=labels))
    assert refusal(path) == (f"{path.name}: sample/label reaches from {label} to {label}, expected 0 to 2. {DAMAGED}")


def test_a_label_without_a_class_is_found_in_any_block(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_BLOCK_ROWS", 2)
    save(path, samples(sample_label=np.array([0, 0, 2, 9, 0], np.int32)))
    assert refusal(path) == f"{path.name}: sample/label reaches from 2 to 9, expected 0 to 2. {DAMAGED}"


@pytest.mark.parametrize(
    ("keys", "rows"),
    [(sample_tensors()["sample/key"][[0, 1, 1, 3, 4]], "1 and 2"), (sample_tensors()["sample/key"][::-1], "0 and 1")],
    ids=["twice", "unsorted"],
)
def test_pairs_that_are_not_sorted_and_unique_are_refused(path: Path, keys: Any, rows: str) -> None:
    save(path, samples(sample_key=np.ascontiguousarray(keys), sample_label=np.zeros(5, np.int32)))
    assert refusal(path) == (
        f"{path.name}: sample/key and sample/label are not sorted and unique (rows {rows}). {DAMAGED}"
    )


@pytest.mark.parametrize("block_rows", [2, 65536])
def test_more_samples_than_images_in_a_class_are_refused(
    path: Path, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_BLOCK_ROWS", block_rows)
    save(path, samples(class_count=np.array([3, 1, 1])))  # four of the five samples are of class 0
    assert refusal(path) == f"{path.name}: class 0 has 4 samples, but class/count says 3 images. {DAMAGED}"
    save(path, samples(class_count=np.array([4, 1, 1])))
    store.verify_artifact(path)


def test_samples_of_other_images_than_the_manifest_says_are_refused(path: Path) -> None:
    save(path, samples(), images_sha256="b" * 64)
    assert refusal(path) == (
        f"{path.name}: the pairs of sample/key and sample/label are not those of sampling.images_sha256. {DAMAGED}"
    )
    tensors = samples()
    save(path, tensors, images_sha256=store.pairs_sha256(tensors["sample/key"], tensors["sample/label"]))
    store.verify_artifact(path)


def test_without_samples_the_digest_of_the_images_cannot_be_checked(path: Path) -> None:
    save(path, class_tensors(), images_sha256="b" * 64)
    store.verify_artifact(path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    for name in ("format-1.safetensors", "format-1-gzip.h5"):
        path = tmp_path / name
        path.write_bytes((GOLDEN / name).read_bytes()[:-1])
        assert refusal(path).endswith("copy it again.")
