from pathlib import Path
from typing import Any

import numpy as np
import pytest

import store
from pipeline.distill.config import Target
from pipeline.distill.images import DecodedImages
from pipeline.distill.join_report import JoinReport, report_join
from pipeline.distill.targets import class_rows, join
from pipeline.errors import PipelineError
from tests.conftest import CLASS_NAMES
from tests.pipeline.distill.examples import (
    Extras,
    Pair,
    images_of,
    make_recipe,
    noise_images,
    pairs_in,
    write_example,
)


def report(
    images: DecodedImages,
    samples: list[Pair],
    folder: Path,
    target: Target = "both",
    max_missing: float = 0.0,
    **fields: Any,
) -> JoinReport:
    """Join images to an artifact of four classes and these samples."""
    folder.mkdir(exist_ok=True)
    names, num_views = ("dog", *CLASS_NAMES), fields.pop("num_views", 1)
    path = write_example(folder / "a.safetensors", names, samples, Extras(num_views=num_views))
    recipe = make_recipe(**fields)
    with store.open_artifact(path) as artifact:
        rows = class_rows(artifact, CLASS_NAMES, True, by_index=False)
        return report_join(join(artifact, images, rows, target, recipe), images, max_missing)


def refusal(images: DecodedImages, samples: list[Pair], folder: Path, max_missing: float = 0.0) -> str:
    with pytest.raises(PipelineError) as caught:
        report(images, samples, folder, max_missing=max_missing)
    return str(caught.value)


def repeated(rows: list[int], labels: list[int]) -> DecodedImages:
    """Make images of which some are copies, under these labels."""
    return images_of(noise_images(max(rows) + 1, 0).pixels[rows], labels)


# What is told


def test_everything_that_joins_is_told_in_one_line(tmp_path: Path) -> None:
    images = noise_images(12, 0)
    found = report(images, [*pairs_in(images), (bytes(16), "dog")], tmp_path)
    assert (found.num_joined, found.num_missing, found.num_artifact_samples) == (12, 0, 13)
    assert found.lines() == [
        "Joined a.safetensors: 3 of its 4 classes, 12 of 12 images by content; it holds 13.",
    ]


def test_class_targets_are_told_without_samples(tmp_path: Path) -> None:
    images = repeated([0, 1, 0], [0, 1, 2])
    found = report(images, pairs_in(images), tmp_path, "class")
    assert found.lines() == ["Joined a.safetensors: 3 of its 4 classes, 3 images to train on."]
    assert (found.num_artifact_samples, found.num_repeated, found.num_relabelled) == (0, 0, 0)
    assert (found.num_joined, found.num_missing) == (3, 0)


def test_all_of_its_classes_are_told_as_all(tmp_path: Path) -> None:
    images = noise_images(3, 0)
    path = write_example(tmp_path / "a.safetensors")
    with store.open_artifact(path) as artifact:
        targets = join(artifact, images, np.array([2, 1, 0]), "class", make_recipe())
        assert report_join(targets, images, 0.0).lines() == [
            "Joined a.safetensors: all its classes, 3 images to train on."
        ]


def test_missing_images_are_told_with_examples(tmp_path: Path) -> None:
    images = noise_images(12, 0)
    pairs = pairs_in(images)
    found = report(images, pairs[:3] + pairs[5:], tmp_path, max_missing=0.2)
    assert (found.num_joined, found.num_missing, found.num_known_otherwise) == (10, 2, 0)
    assert found.missing_rows == (3, 4)
    assert found.lines() == [
        "Joined a.safetensors: 3 of its 4 classes, 10 of 12 images by content; it holds 10.",
        "2 images have no embedding, and take no part in the losses of samples (rows 3, 4).",
    ]


def test_images_under_another_label_are_told_as_known(tmp_path: Path) -> None:
    images = noise_images(8, 0)
    pairs = pairs_in(images)
    wrong = [(key, "dog") for key, _ in pairs[:6]]
    found = report(images, wrong + pairs[7:], tmp_path, max_missing=1.0)
    assert (found.num_missing, found.num_known_otherwise) == (7, 6)
    assert found.lines()[1] == (
        "7 images have no embedding, 6 of them known under another label, and take no part in the losses of samples "
        "(rows 0, 1, 2, 3, 4, …)."
    )


def test_images_that_stand_in_the_data_twice_are_told(tmp_path: Path) -> None:
    images = repeated([0, 1, 0, 2, 1, 0, 3], [0, 1, 0, 2, 2, 0, 0])
    found = report(images, pairs_in(images), tmp_path)
    assert (found.num_repeated, found.num_relabelled) == (2, 1)
    assert found.lines()[1] == (
        "2 images stand in the data more than once, 1 of them under several labels: each joins by its label, and all "
        "of one image are positives of each other."
    )


def test_several_labels_of_one_image_are_told_of_what_is_missing_too(tmp_path: Path) -> None:
    images = repeated([0, 0, 1], [0, 1, 2])
    found = report(images, [*pairs_in(images)[1:]], tmp_path, max_missing=0.5)
    assert (found.num_missing, found.num_known_otherwise, found.num_relabelled) == (1, 1, 1)


def test_replayed_views_are_told(tmp_path: Path) -> None:
    images = noise_images(4, 0, num_views=3)
    found = report(images, pairs_in(images), tmp_path, num_views=3, replay_views=True)
    assert found.num_views == 3
    assert found.lines()[1:] == ["The student sees the 3 views of each image that the teacher saw."]
    assert report(images, pairs_in(images), tmp_path / "a", num_views=3).lines()[1:] == []


def test_thousands_are_set_apart(tmp_path: Path) -> None:
    found = JoinReport("a.h5", 3, 4, 50_000, 50_000, 48_766, 1_234, 1_000, (7,), 2_000, 1_500, 1)
    assert found.lines() == [
        "Joined a.h5: 3 of its 4 classes, 48,766 of 50,000 images by content; it holds 50,000.",
        "1,234 images have no embedding, 1,000 of them known under another label, and take no part in the losses of "
        "samples (rows 7, …).",
        "2,000 images stand in the data more than once, 1,500 of them under several labels: each joins by its label, "
        "and all of one image are positives of each other.",
    ]


def test_the_record_has_every_figure(tmp_path: Path) -> None:
    images = noise_images(3, 0)
    found = report(images, pairs_in(images), tmp_path)
    assert found.as_json() == {
        "artifact": "a.safetensors",
        "num_classes": 3,
        "num_artifact_classes": 4,
        "num_images": 3,
        "num_artifact_samples": 3,
        "num_joined": 3,
        "num_missing": 0,
        "num_known_otherwise": 0,
        "missing_rows": (),
        "num_repeated": 0,
        "num_relabelled": 0,
        "num_views": 1,
    }


# What is refused


def test_missing_images_are_refused_above_the_share_that_is_allowed(tmp_path: Path) -> None:
    images = noise_images(12, 0)
    pairs = pairs_in(images)
    message = (
        "a.safetensors: 2 of 12 training images have no embedding in it (rows 3, 4). Extract with --samples "
        "--per-class all from this data set, or allow it with --max-missing 0.17."
    )
    assert refusal(images, pairs[:3] + pairs[5:], tmp_path) == message
    assert refusal(images, pairs[:3] + pairs[5:], tmp_path / "again", 0.16) == message
    assert report(images, pairs[:3] + pairs[5:], tmp_path / "last", max_missing=0.17).num_missing == 2


def test_missing_images_are_named_by_their_rows_in_the_split(tmp_path: Path) -> None:
    images = noise_images(12, 0)
    pairs = pairs_in(images)
    assert refusal(images.select(np.arange(4, 12)), pairs[:4] + pairs[11:], tmp_path).startswith(
        "a.safetensors: 7 of 8 training images have no embedding in it (rows 4, 5, 6, 7, 8, …). Extract with "
    )


def test_an_artifact_of_another_data_set_is_suspected(tmp_path: Path) -> None:
    images = noise_images(4, 0)
    assert refusal(images, [(bytes(16), "dog")], tmp_path) == (
        "a.safetensors: 4 of 4 training images have no embedding in it (rows 0, 1, 2, 3). It knows none of them: is "
        "it the artifact of this data set, at its original size? Extract with --samples --per-class all from this "
        "data set, or allow it with --max-missing 1."
    )


def test_another_label_column_is_suspected(tmp_path: Path) -> None:
    images = noise_images(4, 0)
    wrong = [(key, "dog") for key, _ in pairs_in(images)]
    assert refusal(images, wrong, tmp_path) == (
        "a.safetensors: 4 of 4 training images have no embedding in it (rows 0, 1, 2, 3). It knows 4 of them under "
        "another label: is it the same label column? Extract with --samples --per-class all from this data set, or "
        "allow it with --max-missing 1."
    )


@pytest.mark.parametrize(("num_missing", "num_images"), [(29, 50), (1, 3), (57, 100), (7, 25)])
def test_the_share_that_the_message_names_is_enough(num_missing: int, num_images: int, tmp_path: Path) -> None:
    images = noise_images(num_images, 0, image_size=2)
    pairs = pairs_in(images)[num_missing:]
    share = float(refusal(images, pairs, tmp_path).rsplit(" ", 1)[1].removesuffix("."))
    assert num_missing / num_images <= share < num_missing / num_images + 0.011
    assert report(images, pairs, tmp_path / "again", max_missing=share).num_missing == num_missing
