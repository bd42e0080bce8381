"""Batches for the step, on its device: pixels, augmented and mixed, and the teacher's side of the same images.

Everything random follows from the seed, the epoch and the step: a resumed run draws what an unbroken one would have.
"""

import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from pipeline.distill.augment import Augmentation, augment
from pipeline.distill.held import Drawn, Held
from pipeline.distill.images import DecodedImages
from pipeline.distill.losses import soft_labels
from pipeline.distill.method import Batch, Samples
from pipeline.distill.mix import Mixed, mix
from pipeline.distill.order import epoch_order, num_batches, step_generator
from pipeline.distill.recipe import Recipe
from pipeline.distill.targets import Targets

_MIXING = ("mixup_alpha", "cutmix_alpha", "mix_probability")


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
        self._pixels = Held(lambda some, views: images.pixels[images.places[some], views], len(images), device)
        self._embeddings = Held(self._read_embeddings, len(images), device) if len(targets.sample_rows) else None
        self.seconds = 0.0

    @property
    def num_images(self) -> int:
        """Images of an epoch."""
        return len(self._images)

    @property
    def num_steps(self) -> int:
        """Batches in an epoch."""
        return num_batches(len(self._images), self._recipe.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Make the batches of one epoch.

        Args:
            epoch: from 1; with the seed it decides the order.
            first_step: leave out those before.

        Yields:
            Batches, of which the last may be smaller.
        """
        size = self._recipe.batch_size
        order = epoch_order(len(self._images), self._seed, epoch)
        for step in range(first_step, self.num_steps):
            start, before = time.perf_counter(), self._queued()
            batch = self._batch(order[step * size : (step + 1) * size], step_generator(self._seed, epoch, step))
            # A GPU works on while a batch is made; where it has nothing left to do by then, it waited.
            if before is None or before.query():  # type: ignore[no-untyped-call]
                self.seconds += time.perf_counter() - start
            yield batch

    def _batch(self, chosen: NDArray[np.int64], generator: torch.Generator) -> Batch:
        views = np.zeros(len(chosen), np.int64)
        if self._replays:
            views = torch.randint(self._targets.num_views, (len(chosen),), generator=generator).numpy()
        drawn = Drawn.of(chosen, views, self._device)
        pixels = augment(self._pixels.take(drawn), self._augmentation, generator)
        mixed = mix(pixels, self._augmentation, generator)
        labels = F.one_hot(self._labels[drawn.index], self._num_classes).float()
        samples = None if self._embeddings is None else self._samples(self._embeddings.take(drawn), drawn, mixed)
        return Batch(mixed.pixels, _blend(labels, mixed), samples)

    def _samples(self, embeddings: Float[Tensor, "batch embed_dim"], drawn: Drawn, mixed: Mixed) -> Samples:
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

    def _read_embeddings(self, images: NDArray[np.int64], views: Any) -> NDArray[np.float32]:
        found = self._targets.sample_embeddings(images)
        return found[:, views] if isinstance(views, slice) else found[np.arange(len(found)), views]

    def _queued(self) -> torch.cuda.Event | None:
        """Mark the end of what a GPU has been given to do so far; there is none elsewhere."""
        return torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None


def _blend(targets: Float[Tensor, "batch values"], mixed: Mixed) -> Float[Tensor, "batch values"]:
    share = mixed.share[:, None]
    return targets * share + targets[mixed.partner] * (1 - share)


def _mixing_only(augmentation: Augmentation) -> Augmentation:
    return Augmentation(**augmentation.model_dump(include={"random_erasing", *_MIXING}))
