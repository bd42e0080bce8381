"""Real data and real teachers, where they are: see CONTRIBUTING.md."""

from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pytest

import store
from pipeline.data import BadImageError, DataSettings, load_labelled
from pipeline.distill.cache import cached_images
from pipeline.distill.join_report import report_join
from pipeline.distill.recipe import load_recipe
from pipeline.distill.targets import class_rows, join, verify_for
from pipeline.extract import ExtractSettings, extract
from pipeline.pixels import sample_key
from tests.conftest import SHARED

CIFAR100 = SHARED / "data" / "cifar100"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CIFAR100.is_dir(), reason="CIFAR-100 is not here: set CLIP_EMBED_KD_SHARED"),
]


def rows_of_equal_images() -> dict[bytes, list[int]]:
    data = load_labelled(DataSettings(dataset=str(CIFAR100), label_column="fine_label"))
    rows = defaultdict(list)
    for start in range(0, len(data), 1000):
        indices = range(start, min(start + 1000, len(data)))
        for row, image in zip(indices, data.read(indices), strict=True):
            assert not isinstance(image, BadImageError)
            rows[sample_key(image)].append(row)
    return {key: same for key, same in rows.items() if len(same) > 1}


def test_equal_images_under_different_labels_survive_samples_and_join(tmp_path: Path) -> None:
    train = datasets.load_dataset(str(CIFAR100), split="train")
    equal = rows_of_equal_images()
    labels = np.array(train["fine_label"])
    assert any(len(set(labels[same])) > 1 for same in equal.values())
    assert any(len(set(labels[same])) < len(same) for same in equal.values())
    # One image of every class as well, so that none is empty.
    rows = sorted(
        {row for same in equal.values() for row in same} | set(np.unique(labels, return_index=True)[1].tolist())
    )
    train.select(rows).save_to_disk(str(tmp_path / "equal"))
    settings = DataSettings(dataset=str(tmp_path / "equal"), label_column="fine_label")
    teacher = str(SHARED / "teachers" / "vit_tiny_patch16_224")
    out = extract(ExtractSettings(teacher=teacher, data=settings, out=tmp_path / "equal.h5", samples=True)).path

    data = load_labelled(settings)
    images = cached_images(data, 32, skip_bad=False)
    with store.open_artifact(out) as artifact:
        recipe = load_recipe("paper")
        verify_for(artifact, "sample", recipe)
        names = class_rows(artifact, data.class_names, data.classes_named, by_index=False)
        targets = join(artifact, images, names, "sample", recipe)
        assert report_join(targets, images, max_missing=0.0).num_relabelled > 0
        assert (artifact["sample/label"][targets.sample_rows] == images.labels).all()
        assert (artifact["sample/key"][targets.sample_rows] == images.keys).all()
        pairs = {(bytes(key), int(label)) for key, label in zip(images.keys, images.labels, strict=True)}
        assert len(artifact["sample/key"]) == len(pairs) < len(images)
        assert artifact["class/count"].sum() == len(images)


@pytest.mark.parametrize(
    ("name", "embed_dim", "pooling"),
    [
        ("vit_tiny_patch16_224", 192, "cls"),
        ("efficientnet_lite0", 1280, "pooled"),
    ],
)
def test_real_teachers_tell_classes_apart(name: str, embed_dim: int, pooling: str, tmp_path: Path) -> None:
    settings = DataSettings(dataset=str(CIFAR100), label_column="coarse_label", limit=400)
    teacher = str(SHARED / "teachers" / name)
    out = extract(ExtractSettings(teacher=teacher, data=settings, out=tmp_path / "a.safetensors", samples=True)).path
    with store.open_artifact(out) as artifact:
        assert artifact.manifest.teacher.embed_dim == embed_dim
        assert artifact.manifest.teacher.pooling == pooling
        embeddings = artifact["sample/embedding"][:, 0].astype(np.float64)
        means = artifact["class/mean"].astype(np.float64)
        cosines = (embeddings / np.linalg.norm(embeddings, axis=1)[:, None]) @ (
            means / np.linalg.norm(means, axis=1)[:, None]
        ).T
        # Of 20 classes; chance is 5 %. The means hold the image itself, so this says only that they are not mixed up.
        assert (cosines.argmax(axis=1) == artifact["sample/label"]).mean() > 0.4
