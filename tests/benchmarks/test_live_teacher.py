"""A live teacher says of a batch what an extraction would have stored of it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from benchmarks.live_teacher import DeviceClock, LiveFeed, LiveTeacher, load_live_teacher, teacher_pixels
from pipeline.data import load_labelled
from pipeline.distill.cache import cached_images
from pipeline.distill.feed import Feed
from pipeline.distill.targets import Targets, class_rows, join
from pipeline.errors import PipelineError
from pipeline.extract.teacher import Preprocess, Teacher
from store import open_artifact, sample_embeddings
from tests.benchmarks.conftest import Start
from tests.conftest import CLASS_NAMES, make_images
from tests.pipeline.distill.examples import CPU, make_recipe

SIDE = 8  # of the saved images: nothing is resized on the student's side


@pytest.fixture
def teacher(extracted: Path, tiny_teacher: Path, start: Start) -> Teacher:
    with open_artifact(extracted) as artifact:
        return load_live_teacher(str(tiny_teacher), artifact, start())


@pytest.fixture
def other_teacher(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A teacher of the same architecture, with other weights."""
    folder = tmp_path / "other-vit"
    config = transformers.ViTConfig.from_pretrained(tiny_teacher)
    torch.manual_seed(1)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor.from_pretrained(tiny_teacher).save_pretrained(folder)
    return folder


def batch_of(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def targets_of(path: Path, start: Start, **fields: Any) -> tuple[Targets, Any]:
    """Return class targets joined to the saved training images, and the images."""
    images = cached_images(load_labelled(start().data), SIDE, skip_bad=False)
    with open_artifact(path) as artifact:
        rows = class_rows(artifact, CLASS_NAMES, True, by_index=False)
        return join(artifact, images, rows, "class", make_recipe(**fields)), images


# Pixels


def test_pixels_are_those_of_the_teachers_own_processor_to_the_bit(teacher: Teacher) -> None:
    images = make_images(5, 3)
    found = teacher_pixels(teacher.preprocess, batch_of(images))
    assert found.shape == (5, 3, 16, 16)
    assert torch.equal(found, teacher.preprocess(images))


def test_a_bilinear_resize_in_float32_is_one_level_off_at_most(teacher: Teacher) -> None:
    # As on a GPU, where torchvision has no whole-number resize.
    pixels = batch_of(make_images(16, 4))
    level = 1 / 255 / 0.5  # of the tiny teacher's normalisation
    exact = torch.nn.functional.interpolate(
        pixels.permute(0, 3, 1, 2).float(), (16, 16), mode="bilinear", antialias=True
    )
    rounded = (exact.round() / 255 - 0.5) / 0.5
    assert (teacher_pixels(teacher.preprocess, pixels) - rounded).abs().max() <= 1.01 * level


def test_a_processor_that_only_takes_pillows_images_gets_them() -> None:
    class Processor:
        backend = "pil"

        def __call__(self, images: list[Image.Image], return_tensors: str) -> dict[str, Tensor]:
            assert all(image.mode == "RGB" for image in images)
            return {"pixel_values": batch_of(images).permute(0, 3, 1, 2).float()}

    pixels = batch_of(make_images(3, 5))
    assert torch.equal(teacher_pixels(Preprocess(Processor()), pixels), pixels.permute(0, 3, 1, 2).float())


# Samples


def test_live_embeddings_of_images_as_they_are_equal_what_extract_stores(
    extracted: Path, teacher: Teacher, start: Start
) -> None:
    targets, images = targets_of(extracted, start)
    found = LiveTeacher(teacher, targets, make_recipe()).samples(torch.from_numpy(np.array(images.pixels[:, 0])))
    with open_artifact(extracted) as artifact:
        rows = class_rows(artifact, CLASS_NAMES, True, by_index=False)
        stored = sample_embeddings(artifact, artifact.find(images.keys, rows[images.labels]))[:, 0]
    # The pixels are the same to the bit; the batch is larger, so sums may differ in their last digits.
    assert found.embeddings.numpy() == pytest.approx(stored, rel=1e-4, abs=1e-5)


def test_every_image_has_an_embedding_and_its_own_is_its_only_positive(
    extracted: Path, teacher: Teacher, start: Start
) -> None:
    targets, _ = targets_of(extracted, start)
    image = make_images(1, 0)[0]
    found = LiveTeacher(teacher, targets, make_recipe()).samples(batch_of([image, image, *make_images(2, 1)]))
    assert found.joined.tolist() == [True] * 4
    assert torch.equal(found.positives, torch.eye(4))  # copies of an image are not: so it is in the paper's code
    assert torch.equal(found.embeddings[0], found.embeddings[1])
    assert found.probabilities is None
    assert not found.embeddings.is_inference()  # else no gradient could pass


def test_the_centre_is_taken_off_and_the_head_gives_soft_labels_of_what_is_not_centred(
    extracted: Path, teacher: Teacher, start: Start
) -> None:
    fields = {"soft_label_weight": 1.0, "soft_label_temperature": 0.5}
    plain, _ = targets_of(extracted, start, **fields)
    centred, _ = targets_of(extracted, start, centre=True, **fields)
    pixels, recipe = batch_of(make_images(4, 1)), make_recipe(**fields)
    raw = LiveTeacher(teacher, plain, recipe).samples(pixels)
    found = LiveTeacher(teacher, centred, recipe).samples(pixels)
    with open_artifact(extracted) as artifact:
        means, weight, bias = (np.array(artifact[name]) for name in ("class/mean", "head/weight", "head/bias"))
    assert found.embeddings.numpy() == pytest.approx(raw.embeddings.numpy() - means.mean(axis=0), abs=1e-5)
    values = np.exp((raw.embeddings.numpy() @ weight.T + bias) / 0.5)
    assert raw.probabilities is not None
    assert found.probabilities is not None
    assert raw.probabilities.numpy() == pytest.approx(values / values.sum(axis=1, keepdims=True), rel=1e-4)
    assert torch.equal(found.probabilities, raw.probabilities)


# Feed


def test_a_live_feed_is_its_feed_but_for_samples(extracted: Path, teacher: Teacher, start: Start) -> None:
    fields = {"batch_size": 8, "augmentation.horizontal_flip": 0.5}
    targets, images = targets_of(extracted, start, **fields)
    recipe = make_recipe(**fields)
    feed = Feed(images, targets, recipe, CPU, 0)
    live = LiveFeed(feed, LiveTeacher(teacher, targets, recipe))
    assert (live.num_images, live.num_steps, live.seconds) == (30, 4, 0.0)
    batches = list(live.epoch(2, first_step=1))
    assert [len(batch.pixels) for batch in batches] == [8, 8, 6]
    for found, expected in zip(batches, Feed(images, targets, recipe, CPU, 0).epoch(2, first_step=1), strict=True):
        assert expected.samples is None
        assert torch.equal(found.pixels, expected.pixels)
        assert torch.equal(found.class_targets, expected.class_targets)
        assert found.samples is not None
        seen = teacher.embed(teacher_pixels(teacher.preprocess, found.pixels))  # flipped as the student sees it
        assert torch.equal(found.samples.embeddings, seen)
    assert live.seconds > 0


def test_a_clock_counts_what_goes_by_inside_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr("benchmarks.live_teacher.time.perf_counter", lambda: next(moments))
    clock = DeviceClock(CPU)
    for _ in range(2):
        with clock.running():
            pass
    assert clock.seconds == 2.5


# Which teacher


def test_another_teacher_is_refused(extracted: Path, other_teacher: Path, start: Start) -> None:
    with open_artifact(extracted) as artifact, pytest.raises(PipelineError) as error:
        load_live_teacher(str(other_teacher), artifact, start())
    assert re.fullmatch(
        r"a\.safetensors: was not made by .*/other-vit: teacher weights differ: the file says [0-9a-f]{12}…, this "
        r"teacher's are [0-9a-f]{12}…\. Pass the teacher that made it, tiny-vit\.",
        str(error.value),
    )


def test_another_preprocessing_is_said(
    extracted: Path, tiny_teacher: Path, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "tiny-vit"
    transformers.ViTForImageClassification.from_pretrained(tiny_teacher).save_pretrained(folder)
    transformers.ViTImageProcessor.from_pretrained(tiny_teacher, image_mean=[0.4] * 3).save_pretrained(folder)
    with open_artifact(extracted) as artifact:
        load_live_teacher(str(folder), artifact, start())
    assert "a.safetensors: preprocessing image_mean differs: the file says [0.5, 0.5, 0.5], this teacher has" in (
        caplog.text
    )
