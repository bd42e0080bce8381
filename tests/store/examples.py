"""Small valid artifacts, and files that other programs could have written in their place.

`python -m tests.store.examples` writes the golden files anew. Do that only together with a new format version.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

import store
from store import hdf5_backend, hdf5_parse

Tensors = dict[str, NDArray[Any]]

SUFFIXES = (".safetensors", ".h5")
STORAGES = ((".safetensors", False), (".h5", False), (".h5", True))  # suffix, gzip
GOLDEN = Path(__file__).parent / "golden"
# Files are written and synced: neither an example nor the search for one has a time limit.
SEARCH = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def make_manifest(num_classes: int = 3, embed_dim: int = 4, views: int = 2, **fields: Any) -> store.Manifest:
    """Build a valid manifest without tensors; `fields` replace whole fields."""
    return store.Manifest(
        **{
            "teacher": store.TeacherInfo(
                name="owner/teacher",
                weights_sha256="a" * 64,
                architecture="vit",
                pooling="cls",
                embed_dim=embed_dim,
                precision="float32",
            ),
            "data_set": store.DataSetInfo(
                name="owner/images",
                split="train",
                image_column="image",
                label_column="label",
                rows=10,
                classes_named=True,
            ),
            "preprocessing": {"size": 224, "mean": [0.5, 0.25, 0.125], "resample": None},
            "sampling": store.SamplingInfo(per_class=None, seed=0, batch_size=4, views=views, images_sha256=None),
            "classes": tuple(f"class {index}" for index in range(num_classes)),
            "software": {"clip-embed-kd": "0.1.0"},
            **fields,
        }
    )


def class_tensors(num_classes: int = 3, embed_dim: int = 4) -> Tensors:
    """Build the three tensors that every artifact has; the same numbers on every machine."""
    numbers = np.arange(num_classes * embed_dim, dtype=np.float32).reshape(num_classes, embed_dim)
    return {
        "class/mean": numbers / 8 - 1,
        "class/count": np.arange(4, num_classes + 4, dtype=np.int64),
        "class/m2": numbers / 4,
    }


def sample_tensors(num_samples: int = 5, views: int = 2, embed_dim: int = 4) -> Tensors:
    """Build samples, rows sorted by key; rows 1 and 2 have equal keys and the labels 0 and 2."""
    keys = np.zeros((num_samples, 16), np.uint8)
    keys[:, 0] = np.arange(num_samples)
    labels = np.zeros(num_samples, np.int32)
    keys[2:3], labels[2:3] = keys[1:2], 2
    numbers = np.arange(num_samples * views * embed_dim, dtype=np.float16)
    return {
        "sample/key": keys,
        "sample/label": labels,
        "sample/embedding": (numbers / 16 - 1).reshape(num_samples, views, embed_dim),
    }


def all_tensors() -> Tensors:
    """Build an example of every tensor that format 1 has together, sizes as in `make_manifest`."""
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    return {
        **class_tensors(),
        **sample_tensors(),
        "head/weight": 1 - numbers,
        "head/bias": np.array([0.5, -0.0, -2], np.float32),
        "class/text": numbers / 1024,
    }


def int8_tensors() -> Tensors:
    """Build an artifact with samples in int8, sizes as in `make_manifest`."""
    steps = np.arange(-20, 20, dtype=np.int8).reshape(5, 2, 4) * np.int8(5)
    scales = np.arange(10, dtype=np.float32).reshape(5, 2) / 64
    return {**class_tensors(), **sample_tensors(), "sample/embedding": steps, "sample/scale": scales}


def samples_of(embedding: NDArray[Any]) -> Tensors:
    """Build samples with these embeddings [S, V, D]: distinct keys in order, labels 0."""
    keys = np.zeros((len(embedding), 16), np.uint8)
    keys[:, :4] = np.arange(len(embedding), dtype=">u4").view(np.uint8).reshape(-1, 4)
    return {"sample/key": keys, "sample/label": np.zeros(len(embedding), np.int32), "sample/embedding": embedding}


def golden_manifest() -> store.Manifest:
    """Build the manifest of the golden files: their samples are all images that were embedded."""
    pairs = sample_tensors()
    digest = store.pairs_sha256(pairs["sample/key"], pairs["sample/label"])
    return make_manifest(
        sampling=store.SamplingInfo(per_class=None, seed=0, batch_size=4, views=2, images_sha256=digest)
    )


def document_of(tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Return the JSON document of a manifest that describes these tensors rightly."""
    infos = {
        name: store.TensorInfo(
            dtype=array.dtype.name, shape=array.shape, sha256=hashlib.sha256(array.tobytes()).hexdigest()
        )
        for name, array in tensors.items()
    }
    document: dict[str, Any] = json.loads(make_manifest(tensors=infos).to_bytes())
    return document


def encode(document: object) -> bytes:
    """Encode a manifest's document in the canonical way."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def save_foreign(
    path: Path, document: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], sha256: str | None = None
) -> None:
    """Write any manifest beside any tensors, right or wrong, with the containers' own libraries."""
    raw = encode(document)
    sha256 = sha256 or hashlib.sha256(raw).hexdigest()
    if path.suffix == ".safetensors":
        metadata = {"manifest": raw.decode(), "manifest_sha256": sha256}
        safetensors.numpy.save_file(dict(tensors), path, metadata)
        return
    with h5py.File(path, "w") as file:
        file.attrs["manifest"] = np.bytes_(raw)
        file.attrs["manifest_sha256"] = np.bytes_(sha256.encode())
        for name, array in tensors.items():
            file[name] = array


def save_gzip(path: Path, embedding: NDArray[Any], chunk_rows: int, **options: Any) -> None:
    """Write an artifact with h5py, its sample embeddings in gzip chunks; `options` are those of `create_dataset`."""
    _, views, embed_dim = embedding.shape
    classes, samples = class_tensors(embed_dim=embed_dim), samples_of(embedding)
    document = document_of(classes | samples)
    document["teacher"]["embed_dim"], document["sampling"]["views"] = embed_dim, views
    save_foreign(path, document, classes)
    options = {"chunks": (chunk_rows, views, embed_dim), "compression": "gzip", "shuffle": True, **options}
    with h5py.File(path, "r+") as file:
        for name, array in samples.items():
            file.create_dataset(name, data=array, **(options if name == "sample/embedding" else {}))


def replace_chunk(path: Path, index: int, data: bytes, filter_mask: int = 0) -> None:
    """Put other compressed bytes in the place of a chunk of `sample/embedding`."""
    with h5py.File(path, "r+") as file:
        dataset = file["sample/embedding"]
        dataset.id.write_direct_chunk((index * dataset.chunks[0], 0, 0), data, filter_mask)


def read_all(path: Path) -> Tensors:
    """Open an artifact and read every tensor, digests checked."""
    with store.open_artifact(path) as artifact:
        return {name: artifact[name].copy() for name in artifact.manifest.tensors}


def refusal(path: Path, kind: type[store.StoreError] = store.ArtifactFormatError) -> str:
    """Return the message with which reading an artifact fails."""
    with pytest.raises(store.StoreError) as caught:
        read_all(path)
    assert type(caught.value) is kind
    return str(caught.value)


def header_refusal(path: Path) -> str:
    """Return the message with which an HDF5 header is refused, in this process and from the child."""
    with pytest.raises(store.ArtifactFormatError) as caught:
        hdf5_parse.parse(path, path.stat().st_size)
    assert type(caught.value) is store.ArtifactFormatError
    with pytest.raises(store.ArtifactFormatError, match=f"^{re.escape(str(caught.value))}$"):
        hdf5_backend.read_header(path)
    return str(caught.value)


def write_refusal(
    path: Path,
    tensors: Mapping[str, NDArray[Any] | store.RowBlocks],
    kind: type[store.StoreError] = store.ArtifactWriteError,
    *,
    overwrite: bool = False,
) -> str:
    """Return the message with which writing an artifact fails."""
    with pytest.raises(store.StoreError) as caught:
        store.write_artifact(path, make_manifest(), tensors, overwrite=overwrite)
    assert type(caught.value) is kind
    return str(caught.value)


def file_names(folder: Path) -> list[str]:
    """Return the names of everything in a folder, hidden files too, sorted."""
    return sorted(entry.name for entry in folder.iterdir())


def assert_same_bits(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
    """Compare tensors by name, dtype, shape and bytes: −0.0 differs from 0.0 here."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


GOLDEN_FILES = (
    ("format-1.safetensors", all_tensors(), False),
    ("format-1.h5", all_tensors(), False),
    ("format-1-gzip.h5", all_tensors(), True),
    ("format-1-int8.safetensors", int8_tensors(), False),
    ("format-1-int8.h5", int8_tensors(), False),
)


if __name__ == "__main__":
    for name, tensors, gzip in GOLDEN_FILES:
        store.write_artifact(GOLDEN / name, golden_manifest(), tensors, overwrite=True, gzip=gzip)
