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
from pipeline.distill.decoding import ReplayedViews
from pipeline.distill.images import DecodedImages
from pipeline.distill.recipe import Recipe
from pipeline.distill.targets import Targets, class_rows, join, replayed_views, verify_for
from pipeline.errors import PipelineError
from pipeline.views import VIEWS_VERSION
from tests.conftest import CLASS_NAMES, make_images, make_split
from tests.pipeline.distill.examples import (
    EMBED_DIM,
    EVERYTHING,
    PLAIN,
    Extras,
    decoded,
    embedding_of,
    head_of,
    make_recipe,
    make_rows,
    mean_of,
    noise_images,
    pairs_in,
    pairs_of,
    text_of,
    write_example,
)

UNNAMED = Extras(text=False, head=False, classes_named=False)
PAIRS = [(bytes([row] * 16), "cat") for row in range(2, 22)]


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
    recipe: Recipe | None = None,
    names: tuple[str, ...] = CLASS_NAMES,
) -> Iterator[Targets]:
    recipe = make_recipe() if recipe is None else recipe
    with store.open_artifact(path) as artifact:
        verify_for(artifact, target, recipe)
        rows = class_rows(artifact, names, True, by_index=False)
        yield join(artifact, images, rows, target, recipe)


def verify(path: Path, target: Target, **fields: Any) -> None:
    with store.open_artifact(path) as artifact:
        verify_for(artifact, target, make_recipe(**fields))


def verify_refusal(path: Path, target: Target, **fields: Any) -> str:
    with pytest.raises(PipelineError) as caught:
        verify(path, target, **fields)
    return str(caught.value)


def clean(targets: Targets, images: DecodedImages) -> list[list[float]]:
    """Return the embeddings of view 0 of every image."""
    chosen = np.arange(len(images))
    found = targets.sample_embeddings(chosen)[:, 0]
    assert found.dtype == np.float32
    values: list[list[float]] = found.tolist()
    return values


def expected(images: DecodedImages, names: tuple[str, ...] = CLASS_NAMES) -> list[list[float]]:
    values: list[list[float]] = [embedding_of(pair).astype(np.float32).tolist() for pair in pairs_in(images, names)]
    return values


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
        assert targets.centre.tolist() == [0] * EMBED_DIM
        assert (targets.class_text, targets.head, targets.num_views) == (None, None, 1)
        assert len(targets.sample_rows) == len(targets.image_ids) == 0


def test_centring_takes_the_mean_of_the_datas_classes_off(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", ("dog", "cat", "ant", "bee", "eel"), extras=EVERYTHING)
    recipe = make_recipe(centre=True, text_weight=1.0, soft_label_weight=1.0)
    with joined(path, decoded(make_split(6, 0), tmp_path / "data"), "class", recipe) as targets:
        means = np.stack([mean_of(name) for name in CLASS_NAMES])
        texts = np.stack([text_of(name) for name in CLASS_NAMES])
        assert torch.allclose(targets.centre, torch.from_numpy(means.mean(axis=0)))
        assert torch.allclose(targets.class_embeddings, torch.from_numpy(means - means.mean(axis=0)), atol=1e-6)
        assert targets.class_text is not None
        assert torch.allclose(targets.class_text, torch.from_numpy(texts - texts.mean(axis=0)), atol=1e-6)


def test_text_and_head_are_joined_where_a_loss_needs_them(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", ("dog", "cat", "ant", "bee"), extras=EVERYTHING)
    images = decoded(make_split(6, 0), tmp_path / "data")
    with joined(path, images, "class", make_recipe(text_weight=0.1)) as targets:
        assert targets.class_text is not None
        assert targets.class_text.tolist() == [text_of(name).tolist() for name in CLASS_NAMES]
        assert targets.head is None
    with joined(path, images, "class", make_recipe(soft_label_weight=0.1)) as targets:
        assert targets.class_text is None
        assert targets.head is not None
        weight, bias = targets.head
        assert weight.tolist() == [head_of(name)[0].tolist() for name in CLASS_NAMES]
        assert bias.tolist() == pytest.approx([head_of(name)[1] for name in CLASS_NAMES])


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
    unnamed = write_example(tmp_path / "unnamed.safetensors", ("0", "1"), extras=UNNAMED)
    advice = "If class i is row i on both sides, pass --join-by-index."
    assert rows_refusal(named, ("0", "1"), named=False) == (
        f"named.safetensors: the data's classes have no names, so they cannot be joined by name. {advice}"
    )
    assert rows_refusal(unnamed, ("0", "1")) == (
        f"unnamed.safetensors: the artifact's classes have no names, so they cannot be joined by name. {advice}"
    )


def test_classes_join_by_index_only_if_asked(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", ("0", "1", "2"), extras=UNNAMED)
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
        assert (targets.sample_rows >= 0).all()
        assert clean(targets, images) == expected(images, data_names)


@pytest.mark.parametrize("change", [shuffled, halved, reencoded])
def test_an_image_has_the_same_targets_wherever_it_stands_and_however_it_is_encoded(
    change: Any, tmp_path: Path
) -> None:
    rows = make_split(12, 0)
    path = write_example(tmp_path / "a.safetensors", samples=pairs_of(rows))
    tables = []
    for name, split in (("before", rows), ("after", change(rows))):
        images = decoded(split, tmp_path / name)
        with joined(path, images, "both", make_recipe(centre=True)) as targets:
            tables.append(dict(zip(map(bytes, images.keys), clean(targets, images), strict=True)))
    before, after = tables
    assert after.items() <= before.items()
    assert len(after) == {"halved": 6}.get(change.__name__, 12)


def test_one_image_under_two_labels_joins_to_a_row_for_each(tmp_path: Path) -> None:
    image, other = make_images(2, 0)
    rows = make_rows([image, other, image, image], [0, 1, 1, 0])
    path = write_example(tmp_path / "a.safetensors", samples=pairs_of(rows))
    images = decoded(rows, tmp_path / "data")
    with joined(path, images, "both") as targets:
        assert clean(targets, images) == expected(images)
        assert len(set(targets.sample_rows.tolist())) == 3
        first, second, third, fourth = targets.image_ids.tolist()
        assert first == third == fourth != second


def test_an_image_under_a_label_that_the_artifact_does_not_have_is_missing(tmp_path: Path) -> None:
    image, other = make_images(2, 0)
    path = write_example(tmp_path / "a.safetensors", samples=pairs_of(make_rows([image, other], [0, 1])))
    images = decoded(make_rows([image, image], [0, 1]), tmp_path / "data")
    with joined(path, images) as targets:
        assert (targets.sample_rows >= 0).tolist() == [True, False]
        assert clean(targets, images) == [expected(images)[0], [0] * EMBED_DIM]


def test_selected_images_keep_their_own_targets(tmp_path: Path) -> None:
    rows = make_split(12, 0)
    path = write_example(tmp_path / "a.safetensors", samples=pairs_of(rows))
    images = decoded(rows, tmp_path / "data").select(np.array([7, 2, 11]))
    with joined(path, images) as targets:
        assert clean(targets, images) == expected(images)
        assert clean(targets, images)[1] == embedding_of(pairs_of(rows)[2]).astype(np.float32).tolist()


# Views


def test_each_view_has_its_own_embedding(tmp_path: Path) -> None:
    images = noise_images(5, 0, num_views=3)
    path = write_example(tmp_path / "a.safetensors", samples=pairs_in(images), extras=Extras(num_views=3))
    with joined(path, images, "both", make_recipe(replay_views=True)) as targets:
        assert targets.num_views == 3
        chosen, views = np.array([4, 0, 4, 2]), np.array([2, 0, 1, 1])
        found = targets.sample_embeddings(chosen)[np.arange(4), views]
        pairs = pairs_in(images)
        assert found.tolist() == [
            embedding_of(pairs[row], view).astype(np.float32).tolist() for row, view in zip(chosen, views, strict=True)
        ]


@pytest.mark.parametrize(("target", "replayed"), [("sample", False), ("class", True)])
def test_only_the_clean_view_is_a_target_unless_views_are_replayed(
    target: Target, replayed: bool, tmp_path: Path
) -> None:
    images = noise_images(5, 0)
    path = write_example(tmp_path / "a.safetensors", samples=pairs_in(images), extras=Extras(num_views=3))
    with joined(path, images, target, make_recipe(replay_views=replayed)) as targets:
        assert targets.num_views == 1
        if target == "sample":
            assert clean(targets, images) == expected(images)


@pytest.mark.parametrize(("replayed", "target"), [(False, "both"), (True, "class")])
def test_views_are_shown_only_where_they_are_targets(replayed: bool, target: Target, tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", samples=PAIRS, extras=Extras(num_views=3))
    with store.open_artifact(path) as artifact:
        assert replayed_views(artifact, target, make_recipe(replay_views=replayed)) is None
        assert replayed_views(artifact, "both", make_recipe(replay_views=True)) == ReplayedViews(3, 0, 8)


def test_an_artifact_of_view_0_alone_has_none_to_show(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", samples=PAIRS)
    with store.open_artifact(path) as artifact:
        assert replayed_views(artifact, "both", make_recipe(replay_views=True)) is None


def test_views_of_unknown_size_are_not_replayed(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", samples=PAIRS, extras=Extras(num_views=3, view_size=None))
    with store.open_artifact(path) as artifact, pytest.raises(PipelineError) as caught:
        replayed_views(artifact, "both", make_recipe(replay_views=True))
    assert str(caught.value) == (
        "a.safetensors: its manifest does not say how large its 3 views are. Extract again, or train on the images "
        "themselves with --set replay_views=false."
    )


# What the artifact must have


@pytest.mark.parametrize("target", ["sample", "both"])
def test_an_artifact_without_samples_has_no_sample_targets(target: Target, tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors")
    assert verify_refusal(path, target) == (
        f"a.safetensors: has no sample embeddings, which --target {target} needs. "
        "Pass --target class, or extract with --samples."
    )


def test_an_artifact_without_text_or_head_does_not_serve_their_losses(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", samples=PAIRS, extras=PLAIN)
    assert verify_refusal(path, "class", text_weight=0.25) == (
        "a.safetensors: has no text embeddings, which text_weight 0.25 needs. "
        "Set it to 0, or extract with --class-text from a teacher like CLIP."
    )
    assert verify_refusal(path, "both", soft_label_weight=1) == (
        "a.safetensors: has no ridge head, which soft_label_weight 1 needs. Set it to 0, or extract again."
    )
    verify(path, "both")


def test_views_of_another_version_are_not_replayed(tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", samples=PAIRS, extras=Extras(num_views=2, views_version=7))
    assert verify_refusal(path, "both", replay_views=True) == (
        f"a.safetensors: its views are of version 7, this program renders version {VIEWS_VERSION}: the student would "
        "not see what the teacher saw. Extract again, or train on the images themselves with --set "
        "replay_views=false."
    )
    verify(path, "both")


def test_without_views_their_version_does_not_matter(tmp_path: Path) -> None:
    verify(write_example(tmp_path / "a.safetensors", samples=PAIRS), "both", replay_views=True)


NEEDED: list[tuple[str, Target, dict[str, float]]] = [
    ("class/mean", "class", {}),
    ("class/text", "class", {"text_weight": 1}),
    ("head/weight", "both", {"soft_label_weight": 1}),
    ("head/bias", "both", {"soft_label_weight": 1}),
    ("sample/key", "both", {}),
    ("sample/label", "sample", {}),
    ("sample/embedding", "both", {}),
]


@pytest.mark.parametrize(("name", "target", "fields"), NEEDED, ids=[row[0] for row in NEEDED])
def test_a_damaged_tensor_is_refused(name: str, target: Target, fields: dict[str, float], tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", samples=PAIRS, extras=EVERYTHING)
    damage(path, name)
    with pytest.raises(store.ArtifactDigestError, match=rf"^a\.safetensors: {name} has SHA-256 "):
        verify(path, target, **fields)


@pytest.mark.parametrize("name", ["sample/embedding", "class/text", "head/weight"])
def test_what_no_loss_needs_is_not_read(name: str, tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors", samples=PAIRS, extras=EVERYTHING)
    damage(path, name)
    verify(path, "class")


# How samples are stored


def test_quantised_samples_are_scaled_back_and_their_scales_checked(tmp_path: Path) -> None:
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
        assert clean(targets, images) == (quantised[:, 0] * scale)[targets.sample_rows].tolist()
    damage(tmp_path / "int8.safetensors", "sample/scale")
    with pytest.raises(store.ArtifactDigestError, match=r"^int8\.safetensors: sample/scale has SHA-256 "):
        verify(tmp_path / "int8.safetensors", "sample")


def test_images_of_any_mode_join_as_the_rgb_that_they_show(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    path = write_example(tmp_path / "a.safetensors", samples=pairs_of(make_rows([grey.convert("RGB")], [2])))
    images = decoded(make_rows([grey], [2]), tmp_path / "data")
    with joined(path, images) as targets:
        assert clean(targets, images) == expected(images)
