"""The method: student, projection and losses as one module, from a batch to a loss.

Where batches come from, and what is done with gradients, stands elsewhere.
"""

import math
from collections.abc import Iterator
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
    positives: Float[Tensor, "batch candidates"]
    probabilities: Float[Tensor, "batch classes"] | None


class Batch(NamedTuple):
    """What a step takes, on its device. `class_targets` are the share of each class in each image."""

    pixels: UInt8[Tensor, "batch height width 3"]
    class_targets: Float[Tensor, "batch classes"]
    samples: Samples | None

    def part(self, start: int, stop: int) -> "Batch":
        """Return some of the images, `start` to `stop` − 1; their positives stay those of the whole batch."""
        samples = self.samples
        if samples is not None:
            samples = Samples(
                samples.embeddings[start:stop],
                samples.joined[start:stop],
                samples.positives[start:stop],
                None if samples.probabilities is None else samples.probabilities[start:stop],
            )
        return Batch(self.pixels[start:stop], self.class_targets[start:stop], samples)


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
        # Q, the other way: a projection of the teacher's embeddings could shrink to meet the student's norms, and drop
        # what the student does not meet.
        regresses = recipe.cosine_weight or recipe.direction_weight
        self.regressor = nn.Linear(student.embed_dim, embed_dim) if regresses else None
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

    def forward(self, part: Batch, candidates: Samples | None, size: int) -> Float[Tensor, " losses"]:
        """Compute the losses of some of a batch's images, as their part of the batch's mean.

        Args:
            part: these images.
            candidates: the samples of the whole batch, all candidates of the contrastive loss.
            size: images of the whole batch.

        Returns:
            The losses named in `LOSSES`, of which the first is to be minimised; 0 where one has no weight. Over
            all images, these parts add up to the losses of the batch.
        """
        embeddings, logits = self.student(self.student.normalise(part.pixels))
        # Cosines of a batch differ in their third digit: the losses are computed in float32.
        with torch.autocast(logits.device.type, enabled=False):
            embeddings, logits = embeddings.float(), logits.float()
            found = {name: loss.sum() / size for name, loss in self._class_losses(embeddings, logits, part)}
            if part.samples is not None and candidates is not None:
                # Images without a stored embedding (under --max-missing) take no part.
                num_joined = candidates.joined.sum().clamp(min=1)
                joined = part.samples.joined
                of_samples = {
                    name: torch.where(joined, loss, 0).sum() / num_joined
                    for name, loss in self._sample_losses(embeddings, logits, part.samples, candidates)
                }
                if "clip" in found and "clip" in of_samples:
                    of_samples["clip"] = (found["clip"] + of_samples["clip"]) / 2
                found |= of_samples
            weighted = [self._weights[name] * loss for name, loss in found.items() if self._weights[name]]
            total = torch.stack(weighted).sum()
            # Only the first is learned from: a part of weight 0 would pass gradients of 0 on, and so be decayed.
            told = [found[name].detach() if name in found else torch.zeros_like(total) for name in LOSSES[1:]]
            return torch.stack([total, *told])

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

    def _class_losses(self, embeddings: Tensor, logits: Tensor, part: Batch) -> Iterator[tuple[str, Tensor]]:
        targets = part.class_targets
        yield "ce", cross_entropy_loss(logits, targets, self._recipe.label_smoothing)
        if self._weights["clip"] and self._target != "sample":
            projected = self.projection(self.class_embeddings)
            yield "clip", class_prototype_loss(embeddings, projected, targets, self.logit_scale)
        if self._weights["text"]:
            projected = self.projection(self.class_text)
            yield "text", class_prototype_loss(embeddings, projected, targets, self.logit_scale)
        if self.regressor is not None and self._weights["direction"]:
            means = targets @ self.class_embeddings
            norms = means.norm(dim=1)
            if part.samples is not None:
                norms = torch.where(part.samples.joined, part.samples.embeddings.norm(dim=1), norms)
            yield "direction", direction_norm_loss(self.regressor(embeddings), means, norms)

    def _sample_losses(
        self, embeddings: Tensor, logits: Tensor, samples: Samples, candidates: Samples
    ) -> Iterator[tuple[str, Tensor]]:
        if self._weights["clip"] and self._target != "class":
            projected = self.projection(candidates.embeddings)
            loss = sample_contrastive_loss(
                embeddings, projected, samples.positives, candidates.joined, self.logit_scale
            )
            yield "clip", loss
        if self.regressor is not None and self._weights["cosine"]:
            yield "cosine", cosine_regression_loss(self.regressor(embeddings), samples.embeddings)
        if samples.probabilities is not None:
            yield "soft_label", soft_label_loss(logits, samples.probabilities)
