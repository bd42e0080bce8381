from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import store
from pipeline.distill.config import Target
from pipeline.distill.images import DecodedImages
from pipeline.distill.targets import Targets, class_rows, join, verify_for
from pipeline.errors import PipelineError
from tests.conftest import CLASS_NAMES, make_images, make_split
from tests.pipeline.distill.examples import (
    EMBED_DIM,
    decoded,
    embedding_of,
    make_rows,
    mean_of,
    pairs_of,
    write_example,
)


def rows_of(path: Path, names: tuple[str, ...], *, named: bool = True, by_index: bool = False) -> list[int]:
    with store.open_artifact(path) as artifact:
        found: list[int] = class_rows(artifact, names, named, by_index=by_index).tolist()
        return found


def rows_refusal(path: Path, names: tuple[str, ...], *, named: bool = True, by_index: bool = False) -> str:
    with pytest.raises(PipelineError) as caught:
        rows_of(path, names, named=named, by_index=by_index)
    return str(caught.value)


@contextmanager
def joined(
    path: Path,
    images: DecodedImages,
    target: Target = "sample",
    names: tuple[str, ...] = CLASS_NAMES,
    max_missing: float = 0.0,
) -> Iterator[Targets]:
    with store.open_artifact(path) as artifact:
        verify_for(artifact, target)
        rows = class_rows(artifact, names, True, by_index=False)
        yield join(artifact, images, rows, target, max_missing)


def join_refusal(path: Path, images: DecodedImages, max_missing: float = 0.0) -> str:
    with pytest.raises(PipelineError) as caught, joined(path, images, max_missing=max_missing):
        pass
    return str(caught.value)


def check_samples(targets: Targets, images: DecodedImages, names: tuple[str, ...] = CLASS_NAMES) -> None:
    chosen = np.arange(len(images))
    pairs = [(key.tobytes(), names[label]) for key, label in zip(images.keys, images.labels, strict=True)]
    expected = np.stack([embedding_of(pair) for pair in pairs]).astype(np.float32)
    found = targets.sample_embeddings(chosen)
    assert found.dtype == torch.float32
    assert found.numpy().tolist() == expected.tolist()


def damage(path: Path, name: str) -> None:
    with store.open_artifact(path) as artifact:
        original = artifact[name].tobytes()
        changed = artifact[name].copy()
    changed.view(np.uint8).reshape(-1)[0] ^= 1
    content = path.read_bytes()
    assert content.count(original) == 1
    path.write_bytes(content.replace(original, changed.tobytes()))


# Classes


def test_classes_join_by_name_in_any_order(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", ("dog", "cat", "ant", "bee", "eel"))
    assert rows_of(path, CLASS_NAMES) == [2, 3, 1]
    images = decoded(make_split(6, 0), tmp_path / "data")
    with joined(path, images, "class") as targets:
        assert targets.class_embeddings.dtype == torch.float32
        assert targets.class_embeddings.tolist() == [mean_of(name).tolist() for name in CLASS_NAMES]
        assert targets.num_missing == 0
        assert len(targets.sample_rows) == len(targets.image_ids) == 0


def test_a_class_that_the_artifact_lacks_is_named(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", ("dog", "cat", "eel", "fly"))
    assert rows_refusal(path, CLASS_NAMES) == (
        "a.safetensors: lacks 2 of the data's 3 classes (ant, bee). It has 4, among them dog, cat, eel. "
        "Is it the artifact of this data set?"
    )


def test_five_of_many_lacking_classes_are_named(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", ("dog",))
    assert rows_refusal(path, tuple("abcdef")) == (
        "a.safetensors: lacks 6 of the data's 6 classes (a, b, c, d, e, …). It has 1, among them dog. "
        "Is it the artifact of this data set?"
    )


def test_classes_without_names_do_not_join_by_name(tmp_path: Path) -> None:
    named = write_example(tmp_path / "named.safetensors", ("0", "1"))
    unnamed = write_example(tmp_path / "unnamed.safetensors", ("0", "1"), classes_named=False)
    advice = "If class i is row i on both sides, pass --join-by-index."
    assert rows_refusal(named, ("0", "1"), named=False) == (
        f"named.safetensors: the data's classes have no names, so they cannot be joined by name. {advice}"
    )
    assert rows_refusal(unnamed, ("0", "1")) == (
        f"unnamed.safetensors: the artifact's classes have no names, so they cannot be joined by name. {advice}"
    )


def test_classes_join_by_index_only_if_asked(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", ("0", "1", "2"), classes_named=False)
    assert rows_of(path, ("0", "1"), named=False, by_index=True) == [0, 1]
    assert rows_of(path, CLASS_NAMES, by_index=True) == [0, 1, 2]
    assert rows_refusal(path, tuple("0123"), named=False, by_index=True) == (
        "a.safetensors: has 3 classes, the data has 4."
    )


# Samples


def shuffled(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.shuffle(seed=5)


def halved(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.select(range(1, len(rows), 2))


def reencoded(rows: datasets.Dataset) -> datasets.Dataset:
    cells = []
    for row in rows:
        file = BytesIO()
        row["image"].save(file, "WEBP", lossless=True)
        cells.append({"bytes": file.getvalue(), "path": None})
    return make_rows(cells, rows["label"])


def renamed(rows: datasets.Dataset) -> datasets.Dataset:
    names = ("cat", "ant", "bee")
    labels = [names.index(CLASS_NAMES[label]) for label in rows["label"]]
    return make_rows(rows["image"], labels, names)


@pytest.mark.parametrize("change", [shuffled, halved, reencoded, renamed])
def test_samples_join_by_content(change: Any, tmp_path: Path) -> None:
    rows = make_split(12, 0)
    names = ("dog", "cat", "ant", "bee")
    path = write_example(tmp_path / "a.safetensors", names, pairs_of(rows))
    changed = change(rows)
    images = decoded(changed, tmp_path / "data", image_size=16)
    data_names = tuple(changed.features["label"].names)
    with joined(path, images, names=data_names) as targets:
        assert targets.num_missing == 0
        check_samples(targets, images, data_names)


def test_one_image_under_two_labels_joins_to_a_row_for_each(tmp_path: Path) -> None:
    image, other = make_images(2, 0)
    rows = make_rows([image, other, image, image], [0, 1, 1, 0])
    path = write_example(tmp_path / "a.safetensors", samples=pairs_of(rows))
    images = decoded(rows, tmp_path / "data")
    with joined(path, images, "both") as targets:
        check_samples(targets, images)
        assert len(set(targets.sample_rows.tolist())) == 3
        first, second, third, fourth = targets.image_ids.tolist()
        assert first == third == fourth != second


def test_an_image_under_a_label_that_the_artifact_does_not_have_is_missing(tmp_path: Path) -> None:
    image, other = make_images(2, 0)
    path = write_example(tmp_path / "a.safetensors", samples=pairs_of(make_rows([image, other], [0, 1])))
    images = decoded(make_rows([image, image], [0, 1]), tmp_path / "data")
    with joined(path, images, max_missing=0.5) as targets:
        assert targets.num_missing == 1
        assert (targets.sample_rows >= 0).tolist() == [True, False]


def test_missing_samples_are_counted_and_shown(tmp_path: Path) -> None:
    rows = make_split(12, 0)
    images = decoded(rows, tmp_path / "data")
    path = write_example(tmp_path / "a.safetensors", samples=pairs_of(rows)[:3] + pairs_of(rows)[5:])
    message = (
        "a.safetensors: 2 of 12 training images have no embedding in it (rows 3, 4). Extract with --samples "
        "--per-class all from this data set, or allow it with --max-missing 0.17."
    )
    assert join_refusal(path, images) == message
    assert join_refusal(path, images, 0.16) == message
    with joined(path, images, max_missing=0.17) as targets:
        assert targets.num_missing == 2
        assert np.flatnonzero(targets.sample_rows < 0).tolist() == [3, 4]
        assert targets.sample_embeddings(np.array([0, 11])).shape == (2, EMBED_DIM)


def test_missing_samples_are_named_by_their_rows_in_the_split(tmp_path: Path) -> None:
    rows = make_split(12, 0)
    path = write_example(tmp_path / "a.safetensors", samples=pairs_of(make_split(3, 9)))
    images = decoded(rows, tmp_path / "data").select(np.arange(4, 12))
    assert join_refusal(path, images).startswith(
        "a.safetensors: 8 of 8 training images have no embedding in it (rows 4, 5, 6, 7, 8, …). "
    )
    assert join_refusal(path, images).endswith("--max-missing 1.")


@pytest.mark.parametrize(("num_missing", "num_images"), [(29, 50), (1, 3), (57, 100)])
def test_the_share_that_the_message_names_is_enough(num_missing: int, num_images: int, tmp_path: Path) -> None:
    keys = np.random.default_rng(0).integers(0, 256, (num_images, 16), dtype=np.uint8)
    numbers = np.arange(num_images)
    images = DecodedImages(np.zeros((num_images, 8, 8, 3), np.uint8), numbers, numbers, keys, numbers % 3)
    pairs = [(key.tobytes(), CLASS_NAMES[row % 3]) for row, key in enumerate(keys)]
    path = write_example(tmp_path / "a.safetensors", samples=pairs[num_missing:])
    share = float(join_refusal(path, images).rsplit(" ", 1)[1].removesuffix("."))
    with joined(path, images, max_missing=share) as targets:
        assert targets.num_missing == num_missing


# What the artifact must have


@pytest.mark.parametrize("target", ["sample", "both"])
def test_an_artifact_without_samples_has_no_sample_targets(target: Target, tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors")
    with store.open_artifact(path) as artifact, pytest.raises(PipelineError) as caught:
        verify_for(artifact, target)
    assert str(caught.value) == (
        f"a.safetensors: has no sample embeddings, which --target {target} needs. "
        "Pass --target class, or extract with --samples."
    )


@pytest.mark.parametrize("name", ["class/mean", "sample/key", "sample/label", "sample/embedding"])
def test_a_damaged_tensor_is_refused(name: str, tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", samples=[(bytes([row] * 16), "cat") for row in range(2, 22)])
    damage(path, name)
    with (
        store.open_artifact(path) as artifact,
        pytest.raises(store.ArtifactDigestError, match=rf"^a\.safetensors: {name} has SHA-256 "),
    ):
        verify_for(artifact, "both")


def test_samples_are_not_read_for_class_targets(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", samples=[(bytes([row] * 16), "cat") for row in range(2, 22)])
    damage(path, "sample/embedding")
    with store.open_artifact(path) as artifact:
        verify_for(artifact, "class")


def test_only_the_clean_view_is_a_target(tmp_path: Path) -> None:
    rows = make_split(3, 0)
    path = write_example(tmp_path / "one.safetensors", samples=pairs_of(rows))
    images = decoded(rows, tmp_path / "data")
    with store.open_artifact(path) as artifact:
        tensors = {name: artifact[name].copy() for name in artifact.manifest.tensors}
        sampling = artifact.manifest.sampling.model_copy(update={"views": 2})
        manifest = artifact.manifest.model_copy(update={"sampling": sampling})
    clean = tensors["sample/embedding"]
    tensors["sample/embedding"] = np.concatenate([clean, -clean], axis=1)
    store.write_artifact(tmp_path / "two.safetensors", manifest, tensors)
    with joined(tmp_path / "two.safetensors", images) as targets:
        check_samples(targets, images)


def test_quantised_samples_are_scaled_back(tmp_path: Path) -> None:
    rows = make_split(3, 0)
    path = write_example(tmp_path / "half.safetensors", samples=pairs_of(rows))
    images = decoded(rows, tmp_path / "data")
    with store.open_artifact(path) as artifact:
        tensors = {name: artifact[name].copy() for name in artifact.manifest.tensors}
        manifest = artifact.manifest
    scale = np.array([[0.5], [0.25], [2.0]], np.float32)
    quantised = np.arange(3 * EMBED_DIM, dtype=np.int8).reshape(3, 1, EMBED_DIM)
    tensors |= {"sample/embedding": quantised, "sample/scale": scale}
    store.write_artifact(tmp_path / "int8.safetensors", manifest, tensors)
    with joined(tmp_path / "int8.safetensors", images) as targets:
        expected = (quantised[:, 0] * scale)[targets.sample_rows]
        assert targets.sample_embeddings(np.arange(3)).numpy().tolist() == expected.tolist()


def test_images_of_any_mode_join_as_the_rgb_that_they_show(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    path = write_example(tmp_path / "a.safetensors", samples=pairs_of(make_rows([grey.convert("RGB")], [2])))
    images = decoded(make_rows([grey], [2]), tmp_path / "data")
    with joined(path, images) as targets:
        check_samples(targets, images)
