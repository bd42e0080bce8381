"""Batches for the step, on its device: pixels, augmented and mixed, and the teacher's side of the same images.

Everything random follows from the seed, the epoch and the step: a resumed run draws what an unbroken one would have.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from pipeline.distill.augment import Augmentation, augment, send
from pipeline.distill.images import DecodedImages
from pipeline.distill.losses import soft_labels
from pipeline.distill.method import Batch, Samples
from pipeline.distill.mix import Mixed, mix
from pipeline.distill.recipe import Recipe
from pipeline.distill.targets import Targets
from pipeline.runtime import fits_device

_MIXING = ("mixup_alpha", "cutmix_alpha", "mix_probability")
_ORDER = 2**32 - 1  # a step that never comes: its seed is the order's


class Batches(Protocol):
    """Where the batches of a run come from: a `Feed`, or what is laid around one."""

    @property
    def seconds(self) -> float:
        """What they took so far, where the device had to wait for them."""

    @property
    def num_images(self) -> int:
        """Images of an epoch."""

    @property
    def num_steps(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Make the batches of one epoch, as `Feed.epoch` does."""


@dataclass(frozen=True)
class _Drawn:
    """Which images a batch has, and which view of each."""

    images: NDArray[np.int64]
    views: NDArray[np.int64]
    index: Int[Tensor, " batch"]


class Feed:
    """Makes the batches of a run. `seconds` is what that took so far, where the device had to wait for it."""

    def __init__(
        self, images: DecodedImages, targets: Targets, recipe: Recipe, device: torch.device, seed: int
    ) -> None:
        """Bring to the device what fits there.

        Args:
            images: the training images, that `targets` were joined to.
            targets: the teacher's side.
            recipe: batch size, augmentation and losses.
            device: where batches are wanted.
            seed: of the run.
        """
        self._images, self._targets, self._recipe, self._device, self._seed = images, targets, recipe, device, seed
        self._replays = targets.num_views > 1
        # A view was augmented when the teacher saw it; what it saw, the student sees.
        self._augmentation = _mixing_only(recipe.augmentation) if self._replays else recipe.augmentation
        self._num_classes = len(targets.class_embeddings)
        self._labels = torch.from_numpy(images.labels).to(device)
        self._image_ids = torch.from_numpy(targets.image_ids).to(device)
        self._joined = torch.from_numpy(targets.sample_rows >= 0).to(device)
        self._centre = targets.centre.to(device)
        self._head = None if targets.head is None else (targets.head[0].to(device), targets.head[1].to(device))
        self._pixels: Tensor | None = None
        if device.type != "cpu" and fits_device(images.pixels.nbytes, device):
            self._pixels = torch.from_numpy(images.pixels[images.places]).to(device)
        self.seconds = 0.0

    @property
    def num_images(self) -> int:
        """Images of an epoch."""
        return len(self._images)

    @property
    def num_steps(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self._images), self._recipe.batch_size)
        # One image has no batch statistics (BatchNorm fails) and no negatives: it waits for the next epoch.
        return full + (rest > 1)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Make the batches of one epoch.

        Args:
            epoch: from 1; with the seed it decides the order.
            first_step: leave out those before.

        Yields:
            Batches, of which the last may be smaller.
        """
        size = self._recipe.batch_size
        order = torch.randperm(len(self._images), generator=self.generator(epoch, _ORDER)).numpy()
        for step in range(first_step, self.num_steps):
            start, waited = time.perf_counter(), self._device_is_idle()
            batch = self._batch(order[step * size : (step + 1) * size], self.generator(epoch, step))
            self.seconds += (time.perf_counter() - start) * waited
            yield batch

    def generator(self, epoch: int, step: int) -> torch.Generator:
        """Return the randomness of one step."""
        return torch.Generator().manual_seed(step_seed(self._seed, epoch, step))

    def _batch(self, chosen: NDArray[np.int64], generator: torch.Generator) -> Batch:
        views = np.zeros(len(chosen), np.int64)
        if self._replays:
            views = torch.randint(self._targets.num_views, (len(chosen),), generator=generator).numpy()
        drawn = _Drawn(chosen, views, send(torch.from_numpy(chosen), self._device))
        pixels = augment(self._pixels_of(drawn), self._augmentation, generator)
        mixed = mix(pixels, self._augmentation, generator)
        labels = F.one_hot(self._labels[drawn.index], self._num_classes).float()
        samples = self._samples(drawn, mixed) if len(self._targets.sample_rows) else None
        return Batch(mixed.pixels, _blend(labels, mixed), samples)

    def _pixels_of(self, drawn: _Drawn) -> Tensor:
        if self._pixels is None:
            pixels = self._images.pixels[self._images.places[drawn.images], drawn.views]
            return torch.from_numpy(pixels).to(self._device)
        return self._pixels[drawn.index, send(torch.from_numpy(drawn.views), self._device)]

    def _samples(self, drawn: _Drawn, mixed: Mixed) -> Samples:
        stored = self._targets.sample_embeddings(drawn.images, drawn.views)
        embeddings = torch.from_numpy(stored).to(self._device)
        joined = self._joined[drawn.index]
        probabilities = None
        if self._head is not None:
            probabilities = _blend(soft_labels(embeddings, self._head, self._recipe.soft_label_temperature), mixed)
        embeddings = torch.where(joined[:, None], embeddings - self._centre, 0)
        # A mixture of an image with an embedding and one without has no target.
        unmixed = mixed.share == 1
        both = joined & (joined[mixed.partner] | unmixed)
        # A mixed image is drawn to its own mixture of embeddings; an unmixed one to those of its copies, too.
        ids = torch.where(unmixed, self._image_ids[drawn.index], -1 - torch.arange(len(joined), device=self._device))
        positives = F.normalize(((ids[:, None] == ids[None, :]) & both).float(), p=1, dim=1)
        return Samples(_blend(embeddings, mixed), both, positives, probabilities)

    def _device_is_idle(self) -> bool:
        # A GPU works on while the next batch is made; only where it has nothing left to do, it waits.
        return self._device.type != "cuda" or torch.cuda.current_stream(self._device).query()


def step_seed(seed: int, epoch: int, step: int, purpose: int = 0) -> int:
    """Return the seed of something random in one step, without a relation to the seeds of others.

    Args:
        seed: of the run.
        epoch: from 1; 0 is before the run.
        step: of the epoch, from 0.
        purpose: 0 for the batch, 1 for what the student drops.
    """
    return int(np.random.SeedSequence([seed, epoch, step, purpose]).generate_state(1, np.uint64)[0] >> 1)


def _blend(targets: Float[Tensor, "batch values"], mixed: Mixed) -> Float[Tensor, "batch values"]:
    share = mixed.share[:, None]
    return targets * share + targets[mixed.partner] * (1 - share)


def _mixing_only(augmentation: Augmentation) -> Augmentation:
    return Augmentation(**augmentation.model_dump(include={"random_erasing", *_MIXING}))
