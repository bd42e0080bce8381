"""The flow of a run: epochs of steps, checkpoints, an evaluation after each epoch, and a way to stop."""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.distill.evaluate import Evaluation, evaluate_student
from pipeline.distill.feed import Batches
from pipeline.distill.images import DecodedImages
from pipeline.distill.loop import Trainer
from pipeline.distill.method import Batch
from pipeline.distill.optimizer import learning_rate
from pipeline.distill.record import RunDirectory
from pipeline.progress import LOGGER, ProgressBar, duration
from pipeline.stopping import StopRequest

_REPORT_SECONDS = 5.0  # between two lines of epochs that are shorter
# Between two checkpoints of epochs that are shorter and not evaluated: a GPU takes a second or two for an epoch of
# CIFAR-100, and a checkpoint a good part of that.
_SAVE_SECONDS = 10.0


@dataclass(frozen=True)
class Limits:
    """When a run stops early, how often it is saved in the midst of an epoch, and after how many epochs evaluated."""

    max_steps: int | None
    checkpoint_minutes: float
    evaluate_every: int = 1

    def reached(self, trainer: Trainer) -> bool:
        """Tell whether the steps that are allowed are done: by a run before, it may be more of them."""
        return self.max_steps is not None and trainer.progress.num_steps >= self.max_steps


class Training:
    """One run, from where its trainer stands to its end."""

    def __init__(self, trainer: Trainer, feed: Batches, evaluated: DecodedImages, directory: RunDirectory) -> None:
        """Bring together what a run consists of.

        Args:
            trainer: what learns, and where it stands.
            feed: its batches.
            evaluated: images to evaluate on after each epoch.
            directory: open.
        """
        self._trainer, self._feed, self._evaluated, self._directory = trainer, feed, evaluated, directory
        self._reported = self._saved = time.monotonic()
        self._is_saved = False  # by this process: with its first checkpoint a run directory appears

    def run(self, limits: Limits) -> Evaluation:
        """Train until the recipe's epochs, or the steps that are allowed, are done.

        Args:
            limits: when to stop, and when to save.

        Returns:
            How good the student is at the end.

        Raises:
            PipelineError: the loss is not finite, or memory ran out; the last checkpoint stands.
            SystemExit: asked to stop, after a checkpoint.
            KeyboardInterrupt: the same by Ctrl-C.
        """
        trainer = self._trainer
        while True:
            with StopRequest("a checkpoint", (signal.SIGINT, signal.SIGTERM)) as stop:
                self._run_steps(limits, stop)
                last = trainer.progress.epoch >= trainer.recipe.epochs or limits.reached(trainer)
                evaluates = last or trainer.progress.epoch % limits.evaluate_every == 0
                due = not self._is_saved or self._unsaved_seconds() >= _SAVE_SECONDS
                if due or evaluates or stop.requested:
                    self._save()
            stop.obey()
            evaluation = self._close_epoch(evaluates)
            if last and evaluation is not None:
                return evaluation
            trainer.begin_epoch()

    def _run_steps(self, limits: Limits, stop: StopRequest) -> None:
        """Go on with the epoch in hand, to its end or until there is a reason to stop."""
        trainer, feed, progress = self._trainer, self._feed, self._trainer.progress
        if limits.reached(trainer):
            return
        with ProgressBar(f"epoch {progress.epoch}", feed.num_images, done=progress.epoch_images) as bar:
            clock = _Clock(feed, trainer)
            batches = feed.epoch(progress.epoch, progress.steps_done)
            while (batch := self._next(batches)) is not None:
                trainer.step(batch, feed.num_steps)
                bar.advance(len(batch.pixels))
                if stop.requested or limits.reached(trainer):
                    break
                if self._unsaved_seconds() >= 60 * limits.checkpoint_minutes:
                    trainer.check_finite()
                    clock.note()
                    self._save()
                    clock = _Clock(feed, trainer)
            trainer.check_finite()  # waits for the device
            clock.note()

    def _save(self) -> None:
        self._directory.save_checkpoint(self._trainer)
        self._saved, self._is_saved = time.monotonic(), True

    def _unsaved_seconds(self) -> float:
        return time.monotonic() - self._saved

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        with self._trainer.batch_must_fit():
            return next(batches, None)

    def _close_epoch(self, evaluates: bool) -> Evaluation | None:
        """Note how the epoch went; evaluate and keep the student. A run that is stopped here does it again."""
        trainer, compute, progress = self._trainer, self._trainer.compute, self._trainer.progress
        means, evaluation = trainer.finish_epoch(), None
        images_per_second = progress.epoch_images / max(progress.epoch_seconds, 1e-9)
        line = {"epoch": progress.epoch, "step": progress.num_steps, "loss": means["loss"]}
        line |= {f"loss_{name}": value for name, value in means.items() if name != "loss"}
        rate = learning_rate(trainer.recipe, max(progress.num_steps - 1, 0), self._feed.num_steps)
        line |= {"logit_scale": trainer.method.logit_scale_value, "learning_rate": rate}
        line |= {"images_per_second": images_per_second, "seconds": progress.epoch_seconds}
        told = f"Epoch {progress.epoch} of {trainer.recipe.epochs}: loss {means['loss']:.4f}"
        if evaluates:
            size = trainer.evaluation_batch
            with trainer.batch_must_fit("evaluation"):
                evaluation = evaluate_student(trainer.kept, self._evaluated, compute.device, compute.precision, size)
            self._directory.save_student(trainer)
            line |= {"top1": evaluation.top1, "top5": evaluation.top5}
            told += f", top-1 {evaluation.top1:.2f} %"
        self._directory.log_epoch(line)
        last = progress.epoch == trainer.recipe.epochs
        if last or time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._reported = time.monotonic()
            LOGGER.info("%s, %.0f images/s, %s.", told, images_per_second, duration(progress.epoch_seconds))
        return evaluation


class _Clock:
    """Measures time of training, compiling left out, and how much of it went by waiting for batches."""

    def __init__(self, feed: Batches, trainer: Trainer) -> None:
        self._feed, self._trainer = feed, trainer
        self._start, self._fed = self._now(), feed.seconds

    def note(self) -> None:
        """Add to the trainer's progress what went by since the start."""
        trainer, progress = self._trainer, self._trainer.progress
        seconds, fed = self._now() - self._start, self._feed.seconds - self._fed
        trainer.progress = replace(
            progress,
            epoch_seconds=progress.epoch_seconds + seconds,
            seconds=progress.seconds + seconds,
            feed_seconds=progress.feed_seconds + fed,
        )

    def _now(self) -> float:
        return time.monotonic() - self._trainer.forward_backward.compile_seconds
