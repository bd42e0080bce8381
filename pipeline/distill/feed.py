"""Batches for the step, on its device: pixels, augmented and mixed, and the teacher's side of the same images.

Everything random follows from the seed, the epoch and the step: a resumed run draws what an unbroken one would have.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
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
_BLOCK = 4096  # images
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
        # On a GPU everything lives there, if it fits.
        self._pixels: Tensor | None = None
        self._embeddings: Tensor | None = None
        num_images, view_bytes = len(images), images.pixels[:1].nbytes
        if fits_device(num_images * view_bytes, device):
            self._pixels = _held(lambda some: images.pixels[images.places[some]], num_images, device)
        embedding_bytes = 4 * targets.num_views * targets.class_embeddings.shape[1]
        if len(targets.sample_rows) and fits_device(num_images * embedding_bytes, device):
            self._embeddings = _held(targets.sample_embeddings, num_images, device)
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
            start, before = time.perf_counter(), self._queued()
            batch = self._batch(order[step * size : (step + 1) * size], self.generator(epoch, step))
            # A GPU works on while a batch is made; where it has nothing left to do by then, it waited.
            if before is None or before.query():  # type: ignore[no-untyped-call]
                self.seconds += time.perf_counter() - start
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
            return send(torch.from_numpy(pixels), self._device)
        return self._pixels[drawn.index, send(torch.from_numpy(drawn.views), self._device)]

    def _samples(self, drawn: _Drawn, mixed: Mixed) -> Samples:
        embeddings = self._embeddings_of(drawn)
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

    def _embeddings_of(self, drawn: _Drawn) -> Tensor:
        if self._embeddings is None:
            views = self._targets.sample_embeddings(drawn.images)
            return send(torch.from_numpy(views[np.arange(len(views)), drawn.views]), self._device)
        return self._embeddings[drawn.index, send(torch.from_numpy(drawn.views), self._device)]

    def _queued(self) -> torch.cuda.Event | None:
        """Mark the end of what a GPU has been given to do so far; there is none elsewhere."""
        return torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None


def step_seed(seed: int, epoch: int, step: int, purpose: int = 0) -> int:
    """Return the seed of something random in one step, without a relation to the seeds of others.

    Args:
        seed: of the run.
        epoch: from 1; 0 is before the run.
        step: of the epoch, from 0.
        purpose: 0 for the batch, 1 for what the student drops.
    """
    return int(np.random.SeedSequence([seed, epoch, step, purpose]).generate_state(1, np.uint64)[0] >> 1)


def _held(
    read: Callable[[NDArray[np.int64]], NDArray[Any]], num_images: int, device: torch.device
) -> Shaped[Tensor, "num_images ..."]:
    """Bring something of all images to a device, in blocks, so that memory never holds all of it."""
    first = read(np.arange(1))
    found = torch.empty((num_images, *first.shape[1:]), dtype=torch.from_numpy(first).dtype, device=device)
    for start in range(0, num_images, _BLOCK):
        block = read(np.arange(start, min(start + _BLOCK, num_images)))
        found[start : start + len(block)] = torch.from_numpy(block).to(device)
    return found


def _blend(targets: Float[Tensor, "batch values"], mixed: Mixed) -> Float[Tensor, "batch values"]:
    share = mixed.share[:, None]
    return targets * share + targets[mixed.partner] * (1 - share)


def _mixing_only(augmentation: Augmentation) -> Augmentation:
    return Augmentation(**augmentation.model_dump(include={"random_erasing", *_MIXING}))
