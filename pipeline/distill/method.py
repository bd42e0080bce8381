"""The method: student, projection and losses as one module, from a batch to a loss.

Where batches come from, and what is done with gradients, stands elsewhere.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from pipeline.distill.config import Target
from pipeline.distill.losses import (
    class_prototype_loss,
    cosine_regression_loss,
    cross_entropy_loss,
    direction_norm_loss,
    sample_contrastive_loss,
    soft_label_loss,
)
from pipeline.distill.recipe import Recipe
from pipeline.distill.student import Student
from pipeline.distill.targets import Targets

LOSSES = ("loss", "ce", "clip", "cosine", "soft_label", "direction", "text")
_LARGEST_LOGIT_SCALE = 100.0  # as in CLIP (arXiv 2103.00020, section 2.5)


class Samples(NamedTuple):
    """The sample side of a batch; mixed as its pixels are.

    `embeddings` are the teacher's, centred where the recipe says so, and 0 where an image is not `joined`.
    `positives` [i, j]: how much image i is drawn to embedding j: to its own, and to its copies'. `probabilities`: soft
    labels, if there are any.
    """

    embeddings: Float[Tensor, "batch embed_dim"]
    joined: Bool[Tensor, " batch"]
    positives: Float[Tensor, "batch batch"]
    probabilities: Float[Tensor, "batch classes"] | None


class Batch(NamedTuple):
    """What a step takes, on its device. `class_targets` are the share of each class in each image."""

    pixels: UInt8[Tensor, "batch height width 3"]
    class_targets: Float[Tensor, "batch classes"]
    samples: Samples | None


class Method(nn.Module):
    """Student, projection P and what else is learned with them."""

    class_embeddings: Float[Tensor, "classes embed_dim"]
    class_text: Float[Tensor, "classes embed_dim"]

    def __init__(self, student: Student, targets: Targets, target: Target, recipe: Recipe) -> None:
        """Make what the losses of this recipe need.

        Args:
            student: trained in place.
            targets: the joined artifact.
            target: which embeddings L_clip is made of.
            recipe: the losses and their weights.
        """
        super().__init__()
        self.student, self._target, self._recipe = student, target, recipe
        embed_dim = targets.class_embeddings.shape[1]
        # P of the paper: R^D → R^d with bias, learned. It serves the loss only and is not part of the student.
        self.projection = nn.Linear(embed_dim, student.embed_dim)
        # Q, the other way: a projection of the teacher's embeddings could shrink to meet the student's norms.
        self.regressor = nn.Linear(student.embed_dim, embed_dim) if recipe.direction_weight else None
        scale = torch.tensor(math.log(recipe.logit_scale))
        self.log_logit_scale = nn.Parameter(scale) if recipe.learn_logit_scale else None
        self.register_buffer("class_embeddings", targets.class_embeddings, persistent=False)
        self.register_buffer("class_text", targets.class_text, persistent=False)
        self._weights = {
            "ce": 1 - recipe.alpha2,
            "clip": recipe.alpha2,
            "cosine": recipe.cosine_weight,
            "soft_label": recipe.soft_label_weight,
            "direction": recipe.direction_weight,
            "text": recipe.text_weight,
        }

    @property
    def logit_scale(self) -> float | Tensor:
        """κ, as the losses take it."""
        return self._recipe.logit_scale if self.log_logit_scale is None else self.log_logit_scale.exp()

    @property
    def logit_scale_value(self) -> float:
        """κ, as it is told."""
        return self._recipe.logit_scale if self.log_logit_scale is None else math.exp(self.log_logit_scale.item())

    def forward(self, batch: Batch, start: int, stop: int) -> Float[Tensor, " losses"]:
        """Compute the losses of some of a batch's images, as their part of the batch's mean.

        Args:
            batch: the whole batch: the teacher embeddings of all its images are candidates of the contrastive loss.
            start: the first of these images.
            stop: the one after the last.

        Returns:
            The losses named in `LOSSES`, of which the first is to be minimised; 0 where one has no weight. Over
            all images, these parts add up to the losses of the batch.
        """
        embeddings, logits = self.student(self.student.normalise(batch.pixels[start:stop]))
        # Cosines of a batch differ in their third digit: the losses are computed in float32.
        with torch.autocast(logits.device.type, enabled=False):
            found = self._class_losses(embeddings.float(), logits.float(), batch, slice(start, stop))
            if batch.samples is not None:
                of_samples = self._sample_losses(embeddings.float(), logits.float(), batch.samples, slice(start, stop))
                if "clip" in found and "clip" in of_samples:
                    of_samples["clip"] = (found["clip"] + of_samples["clip"]) / 2
                found |= of_samples
            total = sum(self._weights[name] * loss for name, loss in found.items() if self._weights[name])
            nothing = torch.zeros_like(found["ce"])
            return torch.stack([total, *(found.get(name, nothing) for name in LOSSES[1:])])  # type: ignore[list-item]

    def classifier_from_prototypes(self) -> None:
        """Make the student's classifier of the projected class embeddings, where no loss has taught it anything.

        At α₂ = 1 cross-entropy has no weight. The projected class embeddings are a linear classifier too: the class
        whose p̂_c is nearest by cosine.
        """
        if self._weights["ce"] or self._weights["soft_label"]:
            return
        with torch.no_grad():
            self.student.classifier.weight.copy_(F.normalize(self.projection(self.class_embeddings), dim=1))
            self.student.classifier.bias.zero_()

    def limit_logit_scale(self) -> None:
        """Keep κ at 100 or below."""
        if self.log_logit_scale is not None:
            with torch.no_grad():
                self.log_logit_scale.clamp_(max=math.log(_LARGEST_LOGIT_SCALE))

    def _class_losses(self, embeddings: Tensor, logits: Tensor, batch: Batch, rows: slice) -> dict[str, Tensor]:
        targets, size = batch.class_targets[rows], len(batch.pixels)
        found = {"ce": cross_entropy_loss(logits, targets, self._recipe.label_smoothing)}
        if self._weights["clip"] and self._target != "sample":
            projected = self.projection(self.class_embeddings)
            found["clip"] = class_prototype_loss(embeddings, projected, targets, self.logit_scale)
        if self._weights["text"]:
            projected = self.projection(self.class_text)
            found["text"] = class_prototype_loss(embeddings, projected, targets, self.logit_scale)
        if self.regressor is not None:
            means = targets @ self.class_embeddings
            norms = means.norm(dim=1)
            if batch.samples is not None:
                stored = batch.samples.embeddings[rows].norm(dim=1)
                norms = torch.where(batch.samples.joined[rows], stored, norms)
            found["direction"] = direction_norm_loss(self.regressor(embeddings), means, norms)
        return {name: loss.sum() / size for name, loss in found.items()}

    def _sample_losses(self, embeddings: Tensor, logits: Tensor, samples: Samples, rows: slice) -> dict[str, Tensor]:
        found = {}
        projected = self.projection(samples.embeddings)
        joined = samples.joined[rows]
        if self._weights["clip"] and self._target != "class":
            found["clip"] = sample_contrastive_loss(
                embeddings, projected, samples.positives[rows], samples.joined, self.logit_scale
            )
        if self._weights["cosine"]:
            found["cosine"] = cosine_regression_loss(embeddings, projected[rows])
        if samples.probabilities is not None:
            found["soft_label"] = soft_label_loss(logits, samples.probabilities[rows])
        # Images without a stored embedding (under --max-missing) take no part.
        num_joined = samples.joined.sum().clamp(min=1)
        return {name: torch.where(joined, loss, 0).sum() / num_joined for name, loss in found.items()}
