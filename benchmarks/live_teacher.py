"""A live teacher: it embeds each batch as the student sees it, where stage two would read what an artifact stores.

The paper compares its method with this. It stands here alone: neither stage of the pipeline knows of it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from pipeline.distill.config import DistillSettings
from pipeline.distill.feed import Feed
from pipeline.distill.losses import soft_labels
from pipeline.distill.method import Batch, Samples
from pipeline.distill.recipe import Recipe
from pipeline.distill.targets import Targets
from pipeline.errors import PipelineError
from pipeline.extract import ExtractSettings
from pipeline.extract.check import load_compared_teacher
from pipeline.extract.teacher import Preprocess, Teacher
from pipeline.progress import LOGGER
from pipeline.runtime import batch_must_fit, resolve_device
from store import Artifact


class DeviceClock:
    """Adds up the seconds that a device spends on something; a GPU is not waited for until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        """Begin at 0.

        Args:
            device: the CPU or a CUDA device.
        """
        self._device, self._seconds = device, 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what goes by inside the block."""
        if self._device.type != "cuda":
            before = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - before
            return
        stream = torch.cuda.current_stream(self._device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(stream)
        yield
        end.record(stream)
        self._pending.append((start, end))

    @property
    def seconds(self) -> float:
        """All of them so far."""
        pending, self._pending = self._pending, []
        for start, end in pending:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        return self._seconds


class LiveTeacher:
    """What a teacher has to say of a batch, computed when the batch is there."""

    def __init__(self, teacher: Teacher, targets: Targets, recipe: Recipe) -> None:
        """Bring what the losses need to the teacher's device.

        Args:
            teacher: on its device.
            targets: their centre is taken off its embeddings; with their head, if there is one, it gives soft labels.
            recipe: the temperature of soft labels.
        """
        device = teacher.model.device
        self._teacher, self._temperature = teacher, recipe.soft_label_temperature
        self._centre = targets.centre.to(device)
        self._head = None if targets.head is None else (targets.head[0].to(device), targets.head[1].to(device))
        self._clock = DeviceClock(device)

    @property
    def seconds(self) -> float:
        """What preprocessing and forward passes took so far, on the device."""
        return self._clock.seconds

    def samples(self, pixels: UInt8[Tensor, "batch height width 3"]) -> Samples:
        """Embed a batch.

        Args:
            pixels: as the student is given them, on the teacher's device.

        Returns:
            The sample side of the batch. Every image has an embedding, and its own is its only positive: the
            contrastive loss is the paper's CLIP-Teacher-KD. Soft labels where there is a head.
        """
        size = len(pixels)
        with self._clock.running(), batch_must_fit(size, "the teacher", smallest=2, option="a batch_size of"):
            raw = self._teacher.embed(teacher_pixels(self._teacher.preprocess, pixels))
        probabilities = None if self._head is None else soft_labels(raw, self._head, self._temperature)
        joined = torch.ones(size, dtype=torch.bool, device=raw.device)
        return Samples(raw - self._centre, joined, torch.eye(size, device=raw.device), probabilities)


class LiveFeed:
    """The batches of a feed, with what a live teacher says of each.

    `seconds` is what the teacher took. What the feed beneath took is left out, and shows in the other methods.
    """

    def __init__(self, feed: Feed, live: LiveTeacher) -> None:
        """Lay a teacher around a feed.

        Args:
            feed: makes the pixels; its own samples, if there are any, are replaced.
            live: on the feed's device.
        """
        self._feed, self._live = feed, live

    @property
    def seconds(self) -> float:
        """What the teacher took so far."""
        return self._live.seconds

    @property
    def num_images(self) -> int:
        """Images of an epoch."""
        return self._feed.num_images

    @property
    def num_steps(self) -> int:
        """Batches in an epoch."""
        return self._feed.num_steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Make the batches of one epoch, as `Feed.epoch` does."""
        for batch in self._feed.epoch(epoch, first_step):
            yield batch._replace(samples=self._live.samples(batch.pixels))


def teacher_pixels(
    preprocess: Preprocess, pixels: UInt8[Tensor, "batch height width 3"]
) -> Float[Tensor, "batch 3 side side"]:
    """Resize and normalise a batch by the teacher's own image processor, on the device where the batch is.

    On a CPU this is what an extraction does to images of this size, and the pixels are the same. On a GPU torchvision
    resizes in float32 and rounds once, where its CPU code and Pillow's add up whole numbers in two passes. With such
    a resize, done on a CPU, 15 % of the pixels of 64 CIFAR-100 images (bicubic to 224 px) were another level of 255,
    nearly all by one and none by more than 7; ViT-Ti's embeddings were 1.4 % apart in the median and 4.2 % at most:
    bfloat16 does as much (`pipeline/extract/comparison.py`). An extraction resizes the image as it was stored, this
    what the student's size has left of it.

    Processors that only take Pillow's images (of timm's models) work on the CPU, and a GPU waits for them.

    Args:
        preprocess: the teacher's.
        pixels: RGB.

    Returns:
        What the teacher takes, float32.
    """
    processor = preprocess.processor
    if getattr(processor, "backend", "") != "torchvision":
        return preprocess([Image.fromarray(image) for image in pixels.cpu().numpy()])
    planes = pixels.permute(0, 3, 1, 2)
    options = {"input_data_format": "channels_first", "disable_grouping": False}  # all at once, on a CPU too
    found: Tensor = processor(planes, return_tensors="pt", **options)["pixel_values"]
    return found


def load_live_teacher(name: str, artifact: Artifact, settings: DistillSettings) -> Teacher:
    """Load the teacher that an artifact was made by.

    Args:
        name: hub name, or a folder.
        artifact: open; its manifest says which teacher it must be, and how it is pooled.
        settings: of the run; the teacher computes on its device, in the precision asked for.

    Returns:
        The teacher.

    Raises:
        PipelineError: it cannot be loaded, or it is another one.
    """
    made_by = artifact.manifest.teacher
    given = {"teacher": name, "data": settings.data, "out": settings.out, "pooling": made_by.pooling}
    asked = ExtractSettings.model_validate({**given, "precision": settings.precision})
    teacher, facts = load_compared_teacher(asked, resolve_device(settings.device), artifact.manifest)
    if facts.weights:
        raise PipelineError(
            f"{artifact.path.name}: was not made by {name}: {'; '.join(facts.weights)}. "
            f"Pass the teacher that made it, {made_by.name}."
        )
    for line in facts.lines:
        LOGGER.warning("%s: %s.", artifact.path.name, line)
    return teacher
