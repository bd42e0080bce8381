"""The training loop's state and its step: what a run has learnt, and how one batch changes that."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.distill.attention import ExplicitAttention
from pipeline.distill.config import Target
from pipeline.distill.fused_block import use_faster_parts
from pipeline.distill.method import LOSSES, Batch, Method
from pipeline.distill.optimizer import WeightAverage, learning_rate, make_optimizer
from pipeline.distill.order import step_seed
from pipeline.distill.recipe import Recipe
from pipeline.distill.step import ForwardBackward
from pipeline.distill.student import Student
from pipeline.distill.targets import Targets
from pipeline.errors import PipelineError
from pipeline.runtime import batch_must_fit, seed_device

# Another number with every change of what a step computes, last bits and random numbers included.
ARITHMETIC = 2
_CHECK_STEPS = 50  # a GPU is asked for its losses this often, for then it must have finished


@dataclass(frozen=True)
class Compute:
    """Where and how a run computes. `micro_batch`: images in memory at once; none: the whole batch."""

    device: torch.device
    precision: torch.dtype
    seed: int
    micro_batch: int | None = None
    compile: bool = False


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `steps_done` of `epoch` (from 1) are done, `num_steps` in all.

    Seconds are of training alone, over all parts of the run; `feed_seconds` of them the step waited for its batch.
    """

    epoch: int = 1
    steps_done: int = 0
    num_steps: int = 0
    epoch_images: int = 0
    epoch_seconds: float = 0.0
    num_images: int = 0
    seconds: float = 0.0
    feed_seconds: float = 0.0

    def after_step(self, num_images: int) -> "Progress":
        """Return where a run stands one step later."""
        return replace(
            self,
            steps_done=self.steps_done + 1,
            num_steps=self.num_steps + 1,
            epoch_images=self.epoch_images + num_images,
            num_images=self.num_images + num_images,
        )

    def after_epoch(self) -> "Progress":
        """Return where a run stands before its next epoch."""
        return replace(self, epoch=self.epoch + 1, steps_done=0, epoch_images=0, epoch_seconds=0.0)


class Trainer:
    """A student, what is learned with it, and where its training stands."""

    def __init__(self, student: Student, targets: Targets, target: Target, recipe: Recipe, compute: Compute) -> None:
        """Put everything that is learned on its device.

        Args:
            student: trained in place.
            targets: the joined artifact.
            target: which embeddings L_clip is made of.
            recipe: all training settings.
            compute: device, precision, seed, and how steps are cut and compiled.
        """
        torch.manual_seed(step_seed(compute.seed, 0, 0))  # not the one that the student's weights were drawn by
        self._images_at_once = min(compute.micro_batch or recipe.batch_size, recipe.batch_size)
        with batch_must_fit(self._images_at_once, "the student", smallest=2, option="--micro-batch"):
            use_faster_parts(student.model, compute.device)
            self.method = Method(student, targets, target, recipe).to(compute.device)
            self.average = WeightAverage(self.method, recipe.average_decay) if recipe.average_decay else None
        self.recipe, self.compute = recipe, compute
        self.optimizer = make_optimizer(self.method, recipe)
        self._explicit_attention = ExplicitAttention(student.model, compute.device)
        self.progress = Progress()
        self._sums = torch.zeros(len(LOSSES), device=compute.device)
        self._unchecked: list[tuple[int, Tensor]] = []  # numbers of steps, from 1, and their losses
        compiled_size = recipe.batch_size if compute.compile else None
        self.forward_backward = ForwardBackward(self.method, compute.precision, compute.micro_batch, compiled_size)

    @property
    def kept(self) -> Student:
        """The student that is evaluated and kept: of the average, where there is one."""
        return self.method.student if self.average is None else self.average.method.student

    @property
    def evaluation_batch(self) -> int:
        """Images to evaluate at once. Without gradients more of them fit, and a GPU has less to wait for."""
        return (4 if self.compute.device.type == "cuda" else 1) * self._images_at_once

    def batch_must_fit(self, what: str = "training") -> AbstractContextManager[None]:
        """Return a context that turns a failed allocation into advice: a smaller `--micro-batch` learns the same."""
        return batch_must_fit(self._images_at_once, what, smallest=2, option="--micro-batch")

    def step(self, batch: Batch, steps_per_epoch: int) -> None:
        """Learn from one batch.

        Args:
            batch: the next one, on the device.
            steps_per_epoch: of this data; the schedule goes by it.

        Raises:
            PipelineError: the loss is not finite, or memory ran out.
        """
        progress, recipe = self.progress, self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, progress.num_steps, steps_per_epoch)
        seed_device(step_seed(self.compute.seed, progress.epoch, progress.steps_done, purpose=1), self.compute.device)
        if not self.method.student.training:  # after an evaluation
            self.method.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.batch_must_fit():
            with self._explicit_attention:
                losses = self.forward_backward(batch)
            self._unchecked.append((progress.num_steps + 1, losses))
            if self.compute.device.type == "cpu" or len(self._unchecked) >= _CHECK_STEPS:
                self.check_finite()
            if recipe.gradient_clip:
                torch.nn.utils.clip_grad_norm_(self.method.parameters(), recipe.gradient_clip)
            self.optimizer.step()  # the first makes room for its moments
        self.method.limit_logit_scale()
        if self.average is not None:
            self.average.update(progress.num_steps)
        self._sums += losses * len(batch.pixels)
        self.progress = progress.after_step(len(batch.pixels))

    def finish_epoch(self) -> dict[str, float]:
        """Return the means of the losses over the epoch's images so far, by name, and make the kept student whole.

        Raises:
            PipelineError: a loss was not finite.
        """
        self.check_finite()
        for method in (self.method, *([] if self.average is None else [self.average.method])):
            method.classifier_from_prototypes()
        means = (self._sums / max(self.progress.epoch_images, 1)).tolist()
        return dict(zip(LOSSES, means, strict=True))

    def begin_epoch(self) -> None:
        """Go on to the next epoch."""
        self.progress = self.progress.after_epoch()
        self._sums.zero_()

    def check_finite(self) -> None:
        """Stop where a loss since the last time was not finite, before it can spoil what is kept.

        Raises:
            PipelineError: it says which loss, at which step, and the likely cause.
        """
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked or bool(torch.stack([losses for _, losses in unchecked]).isfinite().all()):
            return
        number, losses = next(each for each in unchecked if not bool(each[1].isfinite().all()))
        values = dict(zip(LOSSES, losses.tolist(), strict=True))
        parts = [f"{name} is {value}" for name, value in values.items() if name != "loss" and not math.isfinite(value)]
        raise PipelineError(
            f"the loss is not finite at step {number:,}, in epoch {self.progress.epoch} "
            f"({', '.join(parts) or 'their sum'}). {self._likely_cause()}"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a run has learnt, by name: the tensors themselves, not copies."""
        found = {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}
        if self.average is not None:
            found |= {f"average.{name}": tensor for name, tensor in self.average.method.state_dict().items()}
        for name, parameter in self.method.named_parameters():
            for kind, tensor in self.optimizer.state[parameter].items():
                found[f"optimizer.{kind}.{name}"] = tensor
        return found | {"sums": self._sums}

    def restore(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Go back to where a run stood.

        Args:
            tensors: as `tensors` returned them.
            progress: of that moment.

        Raises:
            ValueError: the tensors are of another student, or recipe.
        """
        self.optimizer.state.clear()
        for name, parameter in self.method.named_parameters():
            if f"optimizer.step.{name}" in tensors:  # else no loss has reached it
                step = torch.zeros((), device=parameter.device)  # fused AdamW wants it there
                moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": step, **moments}
        mine = self.tensors()
        for name in mine.keys() | tensors.keys():
            if name not in mine or name not in tensors:
                raise ValueError(f"{name} is {'unknown' if name in tensors else 'missing'}")
            if tensors[name].shape != mine[name].shape or tensors[name].dtype != mine[name].dtype:
                raise ValueError(
                    f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}, "
                    f"expected {mine[name].dtype} {list(mine[name].shape)}"
                )
        with torch.no_grad():
            for name, tensor in tensors.items():
                mine[name].copy_(tensor)
        self.progress = progress

    def _likely_cause(self) -> str:
        recipe = self.recipe
        calmer = f"a lower --lr than {recipe.learning_rate:g}"
        calmer += "" if recipe.gradient_clip else ", or --set gradient_clip=1"
        finite = all(bool(parameter.isfinite().all()) for parameter in self.method.parameters())
        if self.compute.precision == torch.float32 or (not finite and self.compute.device.type == "cpu"):
            return f"It is likely that a step was too long: try {calmer}."
        # A GPU is asked many steps later, when such a loss has spoilt the weights in any case.
        cause = "The weights are finite" if finite else "A step was too long, or bfloat16 too coarse"
        return f"{cause}: try {calmer}, then --precision float32."
