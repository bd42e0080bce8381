"""Stage two, from settings to run directory: check, join, train, evaluate, record."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.data import Labelled, evaluation_split, load_labelled
from pipeline.distill.cache import cached_images
from pipeline.distill.config import DistillSettings
from pipeline.distill.evaluate import evaluate_student, student_labels
from pipeline.distill.images import DecodedImages, held_out
from pipeline.distill.loop import Compute, Trainer
from pipeline.distill.record import RunDirectory
from pipeline.distill.student import Student, build_student, student_config
from pipeline.distill.targets import class_rows, join, verify_for
from pipeline.errors import PipelineError
from pipeline.output import check_output
from pipeline.progress import LOGGER, duration
from pipeline.runtime import PeakMemory, peak_memory, resolve_device, resolve_precision
from store import Artifact, open_artifact

_REPORT_SECONDS = 5.0  # between two lines of epochs that are shorter


@dataclass(frozen=True)
class DistillResult:
    """What stage two made and what it took. Accuracies in percent, of the last epoch."""

    run_directory: Path
    top1: float
    top5: float
    num_parameters: int
    num_steps: int
    images_per_second: float
    train_seconds: float
    seconds: float
    memory: PeakMemory


@dataclass(frozen=True)
class _Images:
    train: DecodedImages
    evaluation: DecodedImages
    evaluation_name: str


def distill(settings: DistillSettings) -> DistillResult:
    """Train a student from an artifact.

    Everything that can be checked is checked before the first image is decoded.

    Args:
        settings: what to do.

    Returns:
        Where the student is, and figures.

    Raises:
        PipelineError: anything a user can cause; a run directory stays only where it has a student.
        StoreError: the artifact is missing, damaged or not one.
    """
    start = time.monotonic()
    recipe = settings.resolved_recipe()
    if recipe.cosine_weight > 0 and settings.target == "class":
        raise PipelineError(
            f"recipe {settings.recipe}: cosine_weight {recipe.cosine_weight:g} needs sample embeddings. "
            "Pass --target sample or both, or set it to 0."
        )
    device = resolve_device(settings.device)
    compute = Compute(device, resolve_precision(settings.precision, device), settings.seed)
    directory = RunDirectory(settings.out, overwrite=settings.overwrite)
    with open_artifact(settings.artifact) as artifact:
        verify_for(artifact, settings.target)
        data = load_labelled(settings.data)
        rows = class_rows(artifact, data.class_names, data.classes_named, by_index=settings.join_by_index)
        evaluation = _evaluation_data(settings, data.class_names)
        torch.manual_seed(settings.seed)
        student = build_student(
            student_config(settings.student, settings.image_size, data.class_names, recipe.attention_dropout)
        )
        check_output(settings.out, _needed_bytes(student), replaceable=settings.overwrite)
        images = _decode(settings, data, evaluation)
        targets = join(artifact, images.train, rows, settings.target, settings.max_missing)
        _report_join(artifact, images, targets.num_missing, settings)
        trainer = Trainer(student, targets, settings.target, recipe, compute)
        if recipe.alpha2 == 1:
            LOGGER.info("At α₂ = 1 the classifier is made of the projected class embeddings.")
        with directory.open(settings, recipe, artifact, _describe_data(data, images), compute):
            outcome = _train(trainer, images, directory, settings.max_steps)
            outcome = replace(outcome, seconds=time.monotonic() - start)
            directory.finish(asdict(outcome) | {"run_directory": settings.out.name})
            return outcome


def _train(trainer: Trainer, images: _Images, directory: RunDirectory, max_steps: int | None) -> DistillResult:
    compute, recipe = trainer.compute, trainer.recipe
    start = reported = time.monotonic()
    num_steps, num_images, train_seconds = 0, 0, 0.0
    for epoch in range(1, recipe.epochs + 1):
        result = trainer.run_epoch(images.train, epoch, None if max_steps is None else max_steps - num_steps)
        num_steps += result.num_steps
        num_images += result.num_images
        train_seconds += result.seconds
        trainer.finish_classifier()
        evaluation = evaluate_student(
            trainer.student, images.evaluation, compute.device, compute.precision, recipe.batch_size
        )
        directory.save(trainer.student)
        directory.log_epoch(epoch, num_steps, recipe.learning_rate, result, evaluation)
        last = epoch == recipe.epochs or num_steps == max_steps
        if last or time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            LOGGER.info(
                "Epoch %d of %d: loss %.4f, top-1 %.2f %%, %.0f images/s, %s.",
                *(epoch, recipe.epochs, result.loss, evaluation.top1),
                *(result.num_images / result.seconds, duration(result.seconds + evaluation.seconds)),
            )
        if last:
            break
    return DistillResult(
        run_directory=directory.path,
        top1=evaluation.top1,
        top5=evaluation.top5,
        num_parameters=sum(parameter.numel() for parameter in trainer.student.parameters()),
        num_steps=num_steps,
        images_per_second=num_images / train_seconds,
        train_seconds=train_seconds,
        seconds=time.monotonic() - start,
        memory=peak_memory(compute.device),
    )


def _evaluation_data(settings: DistillSettings, class_names: tuple[str, ...]) -> Labelled | None:
    split = settings.eval_split or evaluation_split(settings.data)
    if split is None:
        return None
    data = load_labelled(settings.data.model_copy(update={"split": split, "limit": None}))
    return replace(data, labels=student_labels(data, class_names), class_names=class_names)


def _decode(settings: DistillSettings, data: Labelled, evaluation: Labelled | None) -> _Images:
    train = cached_images(data, settings.image_size, skip_bad=settings.skip_bad, cache=settings.cache)
    if evaluation is not None:
        test = cached_images(evaluation, settings.image_size, skip_bad=settings.skip_bad, cache=settings.cache)
        images = _Images(train, test, f"split {evaluation.settings.split}")
    else:
        apart = held_out(train.keys)
        images = _Images(train.select(~apart), train.select(apart), "held-out tenth of the training split")
        LOGGER.info(
            "The data has no evaluation split: %d of its %d images are held out by content.",
            *(len(images.evaluation), len(train)),
        )
    if len(images.train) < 2 or len(images.evaluation) == 0:
        raise PipelineError(
            f"{settings.data.dataset}: {len(images.train)} images are left to train on and {len(images.evaluation)} "
            "to evaluate on; at least 2 and 1 are needed."
        )
    return images


def _report_join(artifact: Artifact, images: _Images, num_missing: int, settings: DistillSettings) -> None:
    LOGGER.info(
        "Joined %s: %d classes%s; %d images to train on, %d to evaluate on (%s).",
        artifact.path.name,
        len(artifact.manifest.classes),
        "" if settings.target == "class" else f", {len(images.train) - num_missing} images by content",
        *(len(images.train), len(images.evaluation), images.evaluation_name),
    )
    if num_missing:
        LOGGER.info("%d training images have no sample embedding and take no part in that loss.", num_missing)


def _describe_data(data: Labelled, images: _Images) -> dict[str, Any]:
    return {
        "name": data.name,
        "revision": data.revision,
        "num_classes": len(data.class_names),
        "num_train_images": len(images.train),
        "num_evaluation_images": len(images.evaluation),
        "evaluated_on": images.evaluation_name,
    }


def _needed_bytes(student: Student) -> int:
    weights = sum(parameter.nbytes for parameter in student.parameters())
    return 2 * weights + 10_000_000  # students, metrics
