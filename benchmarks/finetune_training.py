"""The fine-tuning itself: steps, epochs that can be stopped anywhere, and an evaluation.

Random numbers follow from the seed, the epoch and the step. On a CPU, a run that was stopped and goes on learns what an
unbroken one would have, to the bit.
"""

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.finetune_images import DeviceImages
from benchmarks.finetune_model import TeacherClassifier
from benchmarks.finetune_setup import FinetuneSettings, Setup
from pipeline.distill.augment import Augmentation, augment
from pipeline.distill.checkpoint import Checkpoints
from pipeline.distill.loop import Progress
from pipeline.distill.optimizer import rate_share
from pipeline.distill.order import num_batches, step_seed
from pipeline.errors import PipelineError
from pipeline.progress import LOGGER, ProgressBar, duration
from pipeline.runtime import batch_must_fit
from pipeline.stopping import StopRequest

LABEL_SMOOTHING = 0.1  # arXiv 1512.00567, section 7
WEIGHT_DECAY = 0.05
GRADIENT_CLIP = 1.0
WARMUP_SHARE = 0.1  # of all steps
# The encoder has one rate, as the authors of the vision transformer fine-tune it (arXiv 2010.11929, appendix B.1.1):
# rates that fall from layer to layer (arXiv 2106.08254) are for encoders that learned without labels, and which layer
# is deeper than which is said differently in each architecture. AdamW moves a weight by about its rate in each step,
# whatever the gradient: a classifier that begins at 0 would not arrive within a few epochs at the encoder's rate.
CLASSIFIER_RATE = 10.0  # times the encoder's
_CHECK_STEPS = 50  # a GPU is asked for its loss this often, for then it must have finished


class FineTuning:
    """A teacher that learns, and where that stands; `progress.epoch` is one more than the epochs when it is done."""

    def __init__(self, model: TeacherClassifier, setup: Setup) -> None:
        """Stand at the start.

        Args:
            model: on its device.
            setup: images and settings.
        """
        self.model, self.recipe, self._compute = model, setup.settings, setup.compute
        self.images = DeviceImages(setup.train, setup.compute.device)
        self._steps_per_epoch = num_batches(len(self.images), self.recipe.batch_size)
        self.progress = Progress()
        self._augmentation = Augmentation(
            horizontal_flip=0.5, random_crop_px=setup.image_size // 8, operations=self.recipe.operations
        )
        self._optimizer = _optimizer(model, self.recipe)
        self._sum = torch.zeros((), device=setup.compute.device)  # of the epoch's losses

    def run(self, checkpoints: Checkpoints, deadline: float | None) -> bool:
        """Learn until all epochs are done or time is up, with a checkpoint after each epoch and where it stops.

        Args:
            checkpoints: where they are kept.
            deadline: stop after the step in which `time.monotonic()` reaches it.

        Returns:
            Whether all epochs are done.

        Raises:
            PipelineError: the loss is not finite, or memory ran out; the last checkpoint stands.
            SystemExit: asked to stop, after a checkpoint.
            KeyboardInterrupt: the same by Ctrl-C.
        """
        late = False
        while self.progress.epoch <= self.recipe.epochs and not late:
            with StopRequest("a checkpoint", (signal.SIGINT, signal.SIGTERM)) as stop:
                self._run_steps(lambda: stop.requested or _is_late(deadline))
                checkpoints.save(self)
            stop.obey()
            late = _is_late(deadline)
        return self.progress.epoch > self.recipe.epochs

    def step(self, chosen: NDArray[np.int64], generator: torch.Generator) -> None:
        """Learn from one batch.

        Args:
            chosen: which images.
            generator: of their augmentation, on the CPU.

        Raises:
            PipelineError: the loss is not finite, or memory ran out.
        """
        progress, recipe = self.progress, self.recipe
        share = rate_share(progress.num_steps, recipe.epochs * self._steps_per_epoch, WARMUP_SHARE)
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest_lr"] * share
        # What the teacher drops, where it drops anything.
        torch.manual_seed(step_seed(recipe.seed, progress.epoch, progress.steps_done, purpose=1))
        self.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        pixels, labels = self.images.take(chosen)
        augmented = augment(pixels, self._augmentation, generator)
        with batch_must_fit(recipe.batch_size, "fine-tuning", smallest=2):
            pixels = self.model.preprocess(augmented.permute(0, 3, 1, 2))
            with self._autocast():
                logits = self.model(pixels)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
            self._optimizer.step()
        self._sum += loss.detach() * len(chosen)
        self.progress = progress.after_step(len(chosen))
        if self.progress.num_steps % _CHECK_STEPS == 0:
            self.check_finite()

    def check_finite(self) -> None:
        """Stop where a loss of this epoch was not finite, before it can spoil what is kept.

        Raises:
            PipelineError: it was not.
        """
        if not math.isfinite(self._sum.item()):
            raise PipelineError(
                f"the loss is not finite in epoch {self.progress.epoch}, by step {self.progress.num_steps:,}. "
                f"Try a lower --lr than {self.recipe.learning_rate:g}, or --precision float32."
            )

    def evaluate(self, images: DeviceImages) -> tuple[float, float]:
        """Classify images as they are, and compare with their labels.

        Args:
            images: of the same classes.

        Returns:
            Top-1 and top-5 accuracy in percent.
        """
        self.model.eval()
        right = torch.zeros(2, device=self._compute.device)
        with (
            ProgressBar("evaluating", len(images)) as bar,
            torch.inference_mode(),
            batch_must_fit(self.recipe.batch_size, "evaluation"),
        ):
            for start in range(0, len(images), self.recipe.batch_size):
                chosen = np.arange(start, min(start + self.recipe.batch_size, len(images)))
                pixels, labels = images.take(chosen)
                pixels = self.model.preprocess(pixels.permute(0, 3, 1, 2))
                with self._autocast():
                    logits = self.model(pixels).float()
                hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
                right += torch.stack([hits[:, 0].sum(), hits.sum()])
                bar.advance(len(chosen))
            top1, top5 = (100 * number / len(images) for number in right.tolist())
        return top1, top5

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that has been learnt, by name: the tensors themselves, not copies."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for kind, tensor in self._optimizer.state[parameter].items():
                found[f"optimizer.{kind}.{name}"] = tensor
        return found | {"sum": self._sum}

    def restore(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Go back to where a run stood.

        Args:
            tensors: as `tensors` returned them.
            progress: of that moment.
        """
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        for name, parameter in self.model.named_parameters():
            kept = {kind: f"optimizer.{kind}.{name}" for kind in ("step", "exp_avg", "exp_avg_sq")}
            if kept["step"] in tensors:  # else no loss has reached it
                moments = {kind: tensors[full].to(parameter.device, copy=True) for kind, full in kept.items()}
                self._optimizer.state[parameter] = moments
        self._sum.copy_(tensors["sum"])
        self.progress = progress

    def _run_steps(self, stops: Callable[[], bool]) -> None:
        """Go on with the epoch in hand, to its end or until there is a reason to stop."""
        start, epoch = time.monotonic(), self.progress.epoch
        batches = self.images.batches(self.recipe.batch_size, self.recipe.seed, epoch, self.progress.steps_done)
        with ProgressBar(f"epoch {epoch}", len(self.images), done=self.progress.epoch_images) as bar:
            for chosen, generator in batches:
                self.step(chosen, generator)
                bar.advance(len(chosen))
                if stops():
                    break
            self.check_finite()  # waits for the device
        seconds, progress = time.monotonic() - start, self.progress
        self.progress = progress = replace(
            progress, epoch_seconds=progress.epoch_seconds + seconds, seconds=progress.seconds + seconds
        )
        if progress.steps_done < self._steps_per_epoch:
            return
        LOGGER.info(
            "Epoch %d of %d: loss %.4f, %.0f images/s, %s.",
            *(progress.epoch, self.recipe.epochs, self._sum.item() / progress.epoch_images),
            *(progress.epoch_images / progress.epoch_seconds, duration(progress.epoch_seconds)),
        )
        self.progress = progress.after_epoch()
        self._sum.zero_()

    def _autocast(self) -> torch.autocast:
        precision = self._compute.precision
        return torch.autocast(self._compute.device.type, precision, enabled=precision != torch.float32)


def _optimizer(model: TeacherClassifier, recipe: FinetuneSettings) -> torch.optim.AdamW:
    """Make AdamW over all weights; those of linear and convolutional layers decay, and no others."""
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    decaying = {id(layer.weight) for layer in layers}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((name.startswith("classifier."), id(parameter) in decaying), []).append(parameter)
    options: list[dict[str, Any]] = [
        {
            "params": parameters,
            "highest_lr": recipe.learning_rate * (CLASSIFIER_RATE if is_new else 1.0),
            "weight_decay": WEIGHT_DECAY if decays else 0.0,
        }
        for (is_new, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(options, lr=recipe.learning_rate, fused=True)


def _is_late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
