"""What the paper compares itself with: each method as settings of a run, and what of its loop is another one.

Everything else is stage two's own: data, student, optimizer, checkpoints, evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.live_teacher import LiveFeed, LiveTeacher
from pipeline.distill.config import Target
from pipeline.distill.feed import Batches
from pipeline.distill.loop import Trainer
from pipeline.distill.method import LOSSES, Batch, Method, Samples
from pipeline.distill.preparation import Prepared
from pipeline.distill.recipe import SAMPLE_LOSSES
from pipeline.distill.step import ForwardBackward
from pipeline.errors import PipelineError
from pipeline.extract.teacher import Teacher
from pipeline.runtime import Precision

# Losses that none of these methods has.
_WITHOUT = dict.fromkeys(("direction_weight", "text_weight", *SAMPLE_LOSSES), 0.0) | {"replay_views": False}
_RELEASED_CLIP_WEIGHT = 0.5


@dataclass(frozen=True)
class BaselineMethod:
    """One method: the settings of the recipe that it fixes, and whether it needs a live teacher.

    `target` is what L_clip is made of; `precision` the only one that it computes in, if there is one.
    """

    fixed: Mapping[str, Any]
    target: Target = "class"
    is_live: bool = False
    precision: Precision | None = None


METHODS = {
    "teacher-kd": BaselineMethod(_WITHOUT, target="sample", is_live=True),
    # The in21k teachers have no head for this data: the artifact's ridge head says what they think of it.
    "logits": BaselineMethod(_WITHOUT | {"alpha2": 0.0, "soft_label_weight": 0.5}, is_live=True),
    "released": BaselineMethod(
        {
            **_WITHOUT,
            **{"alpha2": _RELEASED_CLIP_WEIGHT, "logit_scale": 1.0, "learn_logit_scale": False, "centre": False},
            **{"schedule": "constant", "warmup": 0.0, "decay_all": True, "label_smoothing": 0.0},
            **{"gradient_clip": 0.0, "average_decay": 0.0},
        },
        precision="float32",
    ),
    "supervised": BaselineMethod(_WITHOUT | {"alpha2": 0.0}),
}


class ReleasedLoss(nn.Module):
    """The loss of the code that was released with the paper, with class embeddings; the words are ours.

    The classifier's output passes a softmax before cross-entropy takes another; cross-entropy has weight 1, L_class
    0.5 and no temperature. The text says otherwise: one softmax, and weights that add up to 1.
    """

    def __init__(self, method: Method) -> None:
        """Take student, projection and class embeddings from the method; nothing is copied."""
        super().__init__()
        self.method = method

    def forward(self, part: Batch, candidates: Samples | None, size: int) -> Float[Tensor, " losses"]:
        """Compute the losses of some of a batch's images, as their part of the batch's mean.

        Args:
            part: these images.
            candidates: not looked at.
            size: images of the whole batch.

        Returns:
            The losses named in `LOSSES`, as `Method` returns them.
        """
        student = self.method.student
        embeddings, logits = student(student.normalise(part.pixels))
        projected = self.method.projection(self.method.class_embeddings)
        cosines = F.normalize(embeddings, dim=1) @ F.normalize(projected, dim=1).T
        found = {
            "ce": F.cross_entropy(logits.softmax(dim=1), part.class_targets, reduction="sum") / size,
            "clip": F.cross_entropy(cosines, part.class_targets, reduction="sum") / size,
        }
        total = found["ce"] + _RELEASED_CLIP_WEIGHT * found["clip"]
        told = [found[name].detach() if name in found else torch.zeros_like(total) for name in LOSSES[1:]]
        return torch.stack([total, *told])


def method_overrides(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Lay what a method fixes over what the user asks of the recipe.

    Args:
        name: of the method.
        given: settings by name.

    Returns:
        All of them.

    Raises:
        PipelineError: the user asks for something else than what the method fixes.
    """
    fixed = METHODS[name].fixed
    if wrong := [f"{key}={given[key]}" for key in fixed if given.get(key, fixed[key]) != fixed[key]]:
        told = ", ".join(f"{key}={value}" for key, value in fixed.items() if key in given)
        raise PipelineError(
            f"--set {', '.join(wrong)}: method {name} has {told}. Leave it out, or take another method."
        )
    return {**given, **fixed}


def arrange(prepared: Prepared, name: str, teacher: Teacher | None) -> tuple[Trainer, Batches]:
    """Make a prepared run one of this method.

    Args:
        prepared: with the settings of the method; its student is trained.
        name: of the method.
        teacher: for a method that needs one.

    Returns:
        Its trainer, and its batches.
    """
    trainer, recipe = prepared.trainer, prepared.trainer.recipe
    if name == "released":
        compute, loss = trainer.compute, ReleasedLoss(trainer.method)
        size = recipe.batch_size if compute.compile else None
        trainer.forward_backward = ForwardBackward(loss, compute.precision, compute.micro_batch, size)
    if teacher is None:
        return trainer, prepared.feed
    live = LiveTeacher(teacher, prepared.targets, recipe)
    if METHODS[name].target != "class":
        trainer = Trainer(trainer.method.student, prepared.targets, METHODS[name].target, recipe, trainer.compute)
    return trainer, LiveFeed(prepared.feed, live)
