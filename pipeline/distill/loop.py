"""The training loop: one student, one projection, one optimizer, epoch by epoch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.distill.config import Recipe, Target
from pipeline.distill.images import DecodedImages
from pipeline.distill.losses import (
    class_prototype_loss,
    cosine_regression_loss,
    sample_contrastive_loss,
    total_loss,
)
from pipeline.distill.student import Student
from pipeline.distill.targets import Targets
from pipeline.errors import PipelineError
from pipeline.progress import ProgressBar
from pipeline.runtime import batch_must_fit


@dataclass(frozen=True)
class Compute:
    """Where and how a run computes."""

    device: torch.device
    precision: torch.dtype
    seed: int

    def autocast(self) -> torch.autocast:
        """Return the context in which the student's forward pass runs."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)


@dataclass(frozen=True)
class EpochResult:
    """Means over one epoch's images; `clip` and `cosine` are 0 where they have no weight."""

    loss: float
    ce: float
    clip: float
    cosine: float
    num_images: int
    num_steps: int
    seconds: float


class Trainer:
    """Trains a student on images and targets.

    Everything random (order, flips, dropout) follows from the seed.
    """

    def __init__(self, student: Student, targets: Targets, target: Target, recipe: Recipe, compute: Compute) -> None:
        """Put the student on its device and make projection and optimizer.

        Args:
            student: trained in place.
            targets: the joined artifact.
            target: which of them L_clip is made of.
            recipe: all training settings.
            compute: device, precision and seed.
        """
        with batch_must_fit(recipe.batch_size, "the student", smallest=2):
            self.student = student.to(compute.device)
        self._targets, self._target, self.recipe, self.compute = targets, target, recipe, compute
        self._class_embeddings = targets.class_embeddings.to(compute.device)
        # P of the paper: R^D → R^d with bias, learned. It serves the loss only and is not part of the student.
        self.projection = nn.Linear(self._class_embeddings.shape[1], student.embed_dim).to(compute.device)
        self._optimizer = torch.optim.AdamW(
            [*student.parameters(), *self.projection.parameters()],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def run_epoch(self, images: DecodedImages, epoch: int, max_steps: int | None = None) -> EpochResult:
        """Train on every image once.

        Args:
            images: the training images that `targets` were joined to.
            epoch: from 1; it and the seed decide the order and the flips.
            max_steps: stop after so many steps; none: all images.

        Returns:
            Mean losses and speed.

        Raises:
            PipelineError: the loss is not finite, or memory ran out.
        """
        generator = torch.Generator().manual_seed(self.compute.seed * 1_000_003 + epoch)
        torch.manual_seed(self.compute.seed * 1_000_003 + epoch)
        batches = list(_batches(len(images), self.recipe.batch_size, generator))[:max_steps]
        sums = torch.zeros(4, device=self.compute.device)
        num_images = sum(map(len, batches))
        self.student.train()
        with (
            ProgressBar(f"epoch {epoch}", num_images) as bar,
            batch_must_fit(self.recipe.batch_size, "training", smallest=2),
        ):
            for chosen in batches:
                flips = torch.rand(len(chosen), generator=generator) < self.recipe.horizontal_flip
                sums += self._step(images, chosen, flips) * len(chosen)
                bar.advance(len(chosen))
            means = (sums / num_images).tolist()  # waits for the device
        if not np.isfinite(means).all():
            kept = " The student of the epoch before is kept." if epoch > 1 else ""
            raise PipelineError(
                f"the loss is not finite in epoch {epoch}.{kept} "
                f"Try a lower --lr than {self.recipe.learning_rate:g}, or --precision float32."
            )
        return EpochResult(
            means[0], means[1], means[2], means[3], num_images=num_images, num_steps=len(batches), seconds=bar.seconds
        )

    def finish_classifier(self) -> None:
        """Give the student a classifier where the loss gave it none.

        At α₂ = 1 cross-entropy has no weight and the classifier never learns. The projected class embeddings
        are a linear classifier too: the class whose p̂_c is nearest by cosine.
        """
        if self.recipe.alpha2 < 1:
            return
        with torch.no_grad():
            prototypes = F.normalize(self.projection(self._class_embeddings), dim=1)
            self.student.classifier.weight.copy_(prototypes)
            self.student.classifier.bias.zero_()

    def _step(self, images: DecodedImages, chosen: NDArray[np.int64], flips: Tensor) -> Tensor:
        device = self.compute.device
        pixels = torch.from_numpy(images.pixels[images.places[chosen], 0]).to(device)
        labels = torch.from_numpy(images.labels[chosen]).to(device)
        with self.compute.autocast():
            embeddings, logits = self.student(self.student.normalise(_flip(pixels, flips.to(device))))
        # Cosines of a batch differ in their third digit: the losses are computed in float32.
        ce = F.cross_entropy(logits.float(), labels)
        clip, cosine = self._distillation(embeddings.float(), labels, chosen)
        loss = total_loss(ce, clip, cosine, (self.recipe.alpha2, self.recipe.cosine_weight))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        nothing = torch.zeros_like(ce)
        parts = [loss, ce, nothing if clip is None else clip, nothing if cosine is None else cosine]
        return torch.stack(parts).detach()

    def _distillation(
        self, embeddings: Tensor, labels: Tensor, chosen: NDArray[np.int64]
    ) -> tuple[Tensor | None, Tensor | None]:
        recipe = self.recipe
        clip: list[Tensor] = []
        cosine = None
        if recipe.alpha2 > 0 and self._target != "sample":
            projected = self.projection(self._class_embeddings)
            clip.append(class_prototype_loss(embeddings, projected, labels, recipe.logit_scale))
        if self._target != "class" and (recipe.alpha2 > 0 or recipe.cosine_weight > 0):
            # Images without a stored embedding (under --max-missing) take no part.
            joined = np.flatnonzero(self._targets.sample_rows[chosen] >= 0)
            drawn = embeddings[torch.from_numpy(joined).to(embeddings.device)]
            stored = self._targets.sample_embeddings(chosen[joined]).to(embeddings.device)
            projected = self.projection(stored)
            if recipe.alpha2 > 0 and len(joined):
                ids = torch.from_numpy(self._targets.image_ids[chosen[joined]]).to(embeddings.device)
                clip.append(sample_contrastive_loss(drawn, projected, ids, recipe.logit_scale))
            if recipe.cosine_weight > 0 and len(joined):
                cosine = cosine_regression_loss(drawn, projected)
        return (torch.stack(clip).mean() if clip else None), cosine


def _batches(num_images: int, batch_size: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    order = torch.randperm(num_images, generator=generator).numpy()
    for start in range(0, num_images, batch_size):
        batch = order[start : start + batch_size]
        # One image has no batch statistics (BatchNorm fails) and no negatives: it waits for the next epoch.
        if len(batch) > 1:
            yield batch


def _flip(pixels: UInt8[Tensor, "batch height width 3"], flips: Tensor) -> UInt8[Tensor, "batch height width 3"]:
    return torch.where(flips[:, None, None, None], pixels.flip(2), pixels)
