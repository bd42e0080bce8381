"""How long a run will take here, and how much memory and disk: a few real steps are taken and timed."""

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.distill.checkpoint import Checkpoints
from pipeline.distill.config import DistillSettings
from pipeline.distill.evaluate import evaluate_student
from pipeline.distill.feed import Feed
from pipeline.distill.loop import Trainer
from pipeline.distill.method import Batch
from pipeline.distill.preparation import Prepared, compute_for, is_sound_in_bfloat16, prepare
from pipeline.distill.student import save_student
from pipeline.errors import PipelineError
from pipeline.progress import ProgressBar, duration, size
from pipeline.runtime import keep_freed_memory, peak_memory
from store import open_artifact

_WARM_STEPS, _MIN_STEPS, _MIN_SECONDS = 2, 8, 20.0
_EVALUATED = 1024  # images
_SMALLEST_MICRO_BATCH = 2
_FASTER = 0.95  # of the time: less of a gain is noise


@dataclass(frozen=True)
class Plan:
    """What a run will take, in seconds and bytes. `suggestions` are options, each with what it brings."""

    batch_size: int
    micro_batch: int
    precision: str
    device: str
    image_seconds: float
    images_per_epoch: int
    feed_share: float
    evaluation_seconds: float
    saving_seconds: float
    epochs: int
    memory_bytes: int
    image_bytes: int
    device_memory_bytes: int
    run_bytes: int
    suggestions: tuple[str, ...] = ()

    @property
    def step_seconds(self) -> float:
        """One step of a whole batch."""
        return self.image_seconds * self.batch_size

    @property
    def epoch_seconds(self) -> float:
        """One epoch, with its evaluation and what is saved."""
        return self.image_seconds * self.images_per_epoch + self.evaluation_seconds + self.saving_seconds

    @property
    def seconds(self) -> float:
        """All epochs."""
        return self.epochs * self.epoch_seconds

    def as_json(self) -> dict[str, Any]:
        """Return everything for machines."""
        totals = {"step_seconds": self.step_seconds, "epoch_seconds": self.epoch_seconds, "seconds": self.seconds}
        return asdict(self) | totals

    def rows(self) -> list[tuple[str, str]]:
        """Return everything in words, with a label each."""
        cut = f" by {self.micro_batch}" if self.micro_batch < self.batch_size else ""
        step = (
            f"{1000 * self.step_seconds:,.1f} ms for {self.batch_size} images{cut}, {self.precision} on {self.device}"
        )
        around = duration(self.evaluation_seconds + self.saving_seconds)
        epoch = (
            f"{duration(self.epoch_seconds)} for {self.images_per_epoch:,} images, {around} of it to evaluate and save"
        )
        rows = [
            ("step", f"{step}, {100 * self.feed_share:.1f} % of it waiting for data"),
            ("epoch", epoch),
            ("in all", f"{duration(self.seconds)} for {self.epochs:,} epochs"),
            ("memory", f"{size(self.memory_bytes)} at the peak, libraries included"),
            ("images", f"{size(self.image_bytes)}, mapped from the cache: beside it in memory as far as there is room"),
        ]
        if self.device_memory_bytes:
            rows.append(("GPU", f"{size(self.device_memory_bytes)} at the peak"))
        rows.append(("disk", f"{size(self.run_bytes)} for the run directory"))
        return rows + [("try", suggestion) for suggestion in self.suggestions]


def plan(settings: DistillSettings, *, ram_bytes: int | None = None, hours: float | None = None) -> Plan:
    """Measure what a run of these settings takes on this machine. It writes nothing that stays, but the image cache.

    Args:
        settings: of the run; `out` names the disk that is tried.
        ram_bytes: memory that the run may hold, libraries included; on a GPU, of its memory.
        hours: how long it may take.

    Returns:
        The plan.

    Raises:
        PipelineError: anything a user can cause.
        StoreError: the artifact is missing or damaged.
    """
    keep_freed_memory()
    recipe = settings.resolved_recipe()
    compute = compute_for(settings)
    with open_artifact(settings.artifact) as artifact:
        prepared = prepare(settings, recipe, compute, artifact)
        trainer = prepared.trainer
        micro_batch = settings.micro_batch or recipe.batch_size
        fewer = max(micro_batch // 4, _SMALLEST_MICRO_BATCH)
        with ProgressBar("measuring", 4, "parts") as bar:
            # What is compiled is compiled for its own micro-batch, once.
            held_by_fewer = None if settings.compile else _warm(fewer, prepared)
            held = _warm(micro_batch, prepared)
            bytes_each = None if held_by_fewer is None else max(held - held_by_fewer, 0) / max(micro_batch - fewer, 1)
            bar.advance(1)
            image_seconds, feed_share = _image_seconds(prepared, _MIN_SECONDS)
            bar.advance(1)
            evaluation_seconds = _evaluation_seconds(prepared)
            bar.advance(1)
            saving_seconds, run_bytes = _try_saving(trainer, settings.out)
            bar.advance(1)
        memory = peak_memory(compute.device)
        found = Plan(
            batch_size=recipe.batch_size,
            micro_batch=micro_batch,
            precision=str(trainer.compute.precision).removeprefix("torch."),
            device=str(compute.device),
            image_seconds=image_seconds,
            images_per_epoch=prepared.feed.num_images,
            feed_share=feed_share,
            evaluation_seconds=evaluation_seconds / settings.evaluate_every,
            saving_seconds=saving_seconds,
            epochs=recipe.epochs,
            memory_bytes=memory.resident_bytes,
            image_bytes=_image_bytes(prepared),
            device_memory_bytes=memory.device_bytes,
            run_bytes=run_bytes,
        )
        suggestions = [] if ram_bytes is None else _for_memory(found, _may_be_reduced(prepared), bytes_each, ram_bytes)
        suggestions += [] if hours is None else _for_time(found, prepared, settings, hours)
        return replace(found, suggestions=tuple(suggestions))


def _batches(feed: Feed) -> Iterator[Batch]:
    for epoch in itertools.count(1):
        yield from feed.epoch(epoch)


def _warm(micro_batch: int, prepared: Prepared) -> int:
    """Take the first steps, and return the bytes that are held then."""
    trainer, feed = prepared.trainer, prepared.feed
    trainer.forward_backward.micro_batch = micro_batch
    for batch in itertools.islice(_batches(feed), _WARM_STEPS):
        trainer.step(batch, feed.num_steps)
    memory = peak_memory(trainer.compute.device)
    return memory.device_bytes or memory.resident_bytes


def _image_seconds(prepared: Prepared, min_seconds: float) -> tuple[float, float]:
    """Take steps as a run does; return the seconds an image takes, and the share of waiting for batches."""
    trainer, feed = prepared.trainer, prepared.feed
    start, fed, num_images = time.perf_counter(), feed.seconds, 0
    for number, batch in enumerate(_batches(feed), 1):
        trainer.step(batch, feed.num_steps)
        num_images += len(batch.pixels)
        if number >= _MIN_STEPS and time.perf_counter() - start >= min_seconds:
            trainer.check_finite()  # waits for the device
            seconds = time.perf_counter() - start
            return seconds / num_images, (feed.seconds - fed) / seconds
    raise AssertionError("the batches have no end")


def _image_bytes(prepared: Prepared) -> int:
    """Return the bytes of all images. A run maps them: what memory there is holds them, and they need none."""
    parts = (prepared.images.train, prepared.images.evaluation)
    return sum(images.pixels.nbytes for images in {id(each.pixels): each for each in parts}.values())


def _evaluation_seconds(prepared: Prepared) -> float:
    trainer, images = prepared.trainer, prepared.images.evaluation
    few = images.select(np.arange(min(len(images), _EVALUATED)))
    compute, size = trainer.compute, trainer.evaluation_batch
    with trainer.batch_must_fit("evaluation"):
        found = evaluate_student(trainer.kept, few, compute.device, compute.precision, size)
    return found.seconds / len(few) * len(images)


def _try_saving(trainer: Trainer, out: Path) -> tuple[float, int]:
    """Save once where the run would be; return seconds an epoch, and what a run directory comes to."""
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".plan-") as folder:
            Checkpoints(Path(folder) / "checkpoints").save(trainer)
            save_student(trainer.kept, Path(folder) / "student")
            seconds = time.perf_counter() - start
            sizes = {path.parent.name: path.stat().st_size for path in Path(folder).rglob("*.safetensors")}
    except OSError as error:
        raise PipelineError(
            f"{out.absolute().parent}: cannot be written ({error.strerror or error}). Choose another --out."
        ) from None
    student = sizes.pop("student")
    return seconds, 3 * sum(sizes.values()) + 2 * student  # while the third checkpoint is written


def _may_be_reduced(prepared: Prepared) -> bool:
    trainer = prepared.trainer
    is_whole = trainer.compute.precision == torch.float32
    return is_whole and is_sound_in_bfloat16(trainer.kept.model, trainer.compute.device)


def _for_memory(found: Plan, may_be_reduced: bool, bytes_each: float | None, ram_bytes: int) -> list[str]:
    """Suggest bfloat16 if that may be, and the largest micro-batch, a half of a half … of the batch, that fits."""
    held = found.device_memory_bytes or found.memory_bytes
    if held <= ram_bytes:
        return []
    # What this process held before cannot be told from what it would need: another precision wants another process.
    reduced = ["--precision bfloat16: see what `plan --precision bfloat16` says"] if may_be_reduced else []
    return [*reduced, _micro_batch_for(found, held, bytes_each, ram_bytes)]


def _micro_batch_for(found: Plan, held: int, bytes_each: float | None, ram_bytes: int) -> str:
    if bytes_each is None:
        return "--micro-batch: see what `plan --no-compile` says"
    micro_batch = found.micro_batch
    while micro_batch > _SMALLEST_MICRO_BATCH and held - (found.micro_batch - micro_batch) * bytes_each > ram_bytes:
        micro_batch = max(micro_batch // 2, _SMALLEST_MICRO_BATCH)
    needed = held - (found.micro_batch - micro_batch) * bytes_each
    if needed > ram_bytes:
        return f"a smaller student: with --micro-batch {micro_batch} this one still takes about {size(needed)}"
    return f"--micro-batch {micro_batch}: about {size(needed)}"


def _for_time(found: Plan, prepared: Prepared, settings: DistillSettings, hours: float) -> list[str]:
    """Suggest what makes the run short enough: another precision if that is faster here, compilation, fewer epochs."""
    wanted = 3600 * hours
    if found.seconds <= wanted:
        return []
    suggestions, image_seconds = [], found.image_seconds
    step = prepared.trainer.forward_backward
    other = torch.float32 if step.precision == torch.bfloat16 else torch.bfloat16
    sound = other == torch.float32 or is_sound_in_bfloat16(prepared.trainer.kept.model, prepared.trainer.compute.device)
    if sound and not step.compiled:  # it would be compiled again
        step.precision = other
        _warm(found.micro_batch, prepared)
        image_seconds, _ = _image_seconds(prepared, _MIN_SECONDS / 2)
    if image_seconds < _FASTER * found.image_seconds:
        name = str(other).removeprefix("torch.")
        faster = replace(found, image_seconds=image_seconds)
        suggestions.append(f"--precision {name}: {duration(faster.seconds)} in all")
        found = faster
    if not settings.compile:
        suggestions.append("--compile: see what `plan --compile` says")
    if found.seconds > wanted:
        epochs = int(wanted / found.epoch_seconds)
        suggestions.append(
            f"--epochs {epochs}: {duration(epochs * found.epoch_seconds)}"
            if epochs
            else "a smaller student, or fewer images: not one epoch fits"
        )
    return suggestions
