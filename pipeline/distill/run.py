"""Stage two, from settings to run directory."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.distill.alignment import measure_alignment
from pipeline.distill.config import DistillSettings
from pipeline.distill.evaluate import Evaluation
from pipeline.distill.images import DecodedImages
from pipeline.distill.loop import Compute, Trainer
from pipeline.distill.model_card import write_model_card
from pipeline.distill.outcome import mistaken_images, outcome_of
from pipeline.distill.preparation import Prepared, compute_for, prepare
from pipeline.distill.recipe import Recipe
from pipeline.distill.record import RunDirectory
from pipeline.distill.report_page import write_run_page
from pipeline.distill.training import Limits, Training
from pipeline.errors import PipelineError
from pipeline.progress import LOGGER
from pipeline.runtime import PeakMemory, keep_freed_memory, peak_memory
from store import Artifact, open_artifact

# What may be another one when a run is gone on with; paths may differ where digests tell what they lead to.
_LIMITS = {"checkpoint_minutes", "evaluate_every", "max_steps"}
_UNSHARED = {"artifact", "out", "overwrite", "resume", "device", "precision", "cache"} | _LIMITS


@dataclass(frozen=True)
class DistillResult:
    """What stage two made and what it took.

    Accuracies in percent, of the last epoch. `train_seconds` of all parts of the run; for `feed_share` of them the step
    waited for its batch. `compiled`: whether steps were, at the end of the run.
    """

    run_directory: Path
    top1: float
    top5: float
    num_parameters: int
    num_steps: int
    images_per_second: float
    train_seconds: float
    feed_share: float
    compiled: bool
    seconds: float
    memory: PeakMemory
    report: Path | None


def distill(settings: DistillSettings) -> DistillResult:
    """Train a student from an artifact.

    Args:
        settings: what to do.

    Returns:
        Where the student is, and figures.

    Raises:
        PipelineError: anything a user can cause; a run directory stays only where a run can be gone on with.
        StoreError: the artifact is missing, damaged or not one.
    """
    start = time.monotonic()
    keep_freed_memory()
    recipe = settings.resolved_recipe()
    compute = compute_for(settings)
    directory = RunDirectory(settings.out, overwrite=settings.overwrite, resume=settings.resume)
    with (
        open_artifact(settings.artifact) as artifact,
        directory.claim(told_of_run(settings, recipe, artifact, compute)),
    ):
        prepared = prepare(settings, recipe, compute, artifact)
        trainer = prepared.trainer
        with directory.open(found_for_run(prepared), trainer):
            training = Training(trainer, prepared.feed, prepared.images.evaluation, directory)
            evaluation = training.run(Limits(settings.max_steps, settings.checkpoint_minutes, settings.evaluate_every))
            images = prepared.images.evaluation
            outcome = outcome_of(evaluation, images, measure_alignment(prepared, evaluation))
            result = _result(directory.path, trainer, evaluation, time.monotonic() - start)
            noted = asdict(result) | {"run_directory": settings.out.name}
            del noted["report"]
            directory.note({"result": noted, "outcome": asdict(outcome)})
            report = _write_pages(directory.path, mistaken_images(outcome, images))
            directory.finish()
            return replace(result, report=report)


def told_of_run(settings: DistillSettings, recipe: Recipe, artifact: Artifact, compute: Compute) -> dict[str, Any]:
    """Say what a run was told; with what is found later, two runs of which this is equal end in the same student.

    Args:
        settings: of the run.
        recipe: with the settings laid over it.
        artifact: open.
        compute: its device; the precision may still be chosen by the student.

    Returns:
        The parts of its record that are known before it is prepared.
    """
    return {
        "settings": settings.model_dump(mode="json", exclude=_UNSHARED),
        "limits": settings.model_dump(mode="json", include=_LIMITS),
        "recipe": recipe.model_dump(),
        "artifact": {
            "file": artifact.path.name,
            "manifest_sha256": artifact.manifest_sha256,
            "teacher": artifact.manifest.teacher.model_dump(),
        },
        "compute": {"device": compute.device.type},
    }


def found_for_run(prepared: Prepared) -> dict[str, Any]:
    """Say what was found on the way to the first step.

    Args:
        prepared: what the run consists of.

    Returns:
        The other parts of its record.
    """
    images, data, compute = prepared.images, prepared.data, prepared.trainer.compute
    initial = {} if prepared.initial_sha256 is None else {"initial": {"weights_sha256": prepared.initial_sha256}}
    return initial | {
        "data": {
            "name": data.name,
            "revision": data.revision,
            "licence": data.licence,
            "num_classes": len(data.class_names),
            "classes_sha256": hashlib.sha256(json.dumps(data.class_names).encode()).hexdigest(),
            "train_sha256": _digest(images.train),
            "evaluation_sha256": _digest(images.evaluation),
            "evaluated_on": images.evaluation_name,
            "num_evaluation_images": len(images.evaluation),
            "join": prepared.join_report.as_json(),
        },
        "compute": {
            "device": compute.device.type,
            "precision": str(compute.precision).removeprefix("torch."),
        },
    }


def _result(folder: Path, trainer: Trainer, evaluation: Evaluation, seconds: float) -> DistillResult:
    progress = trainer.progress
    return DistillResult(
        run_directory=folder,
        top1=evaluation.top1,
        top5=evaluation.top5,
        num_parameters=sum(parameter.numel() for parameter in trainer.kept.parameters()),
        num_steps=progress.num_steps,
        images_per_second=progress.num_images / max(progress.seconds, 1e-9),
        train_seconds=progress.seconds,
        feed_share=progress.feed_seconds / max(progress.seconds, 1e-9),
        compiled=trainer.forward_backward.compiled,
        seconds=seconds,
        memory=peak_memory(trainer.compute.device),
        report=None,
    )


def _write_pages(folder: Path, pictures: Mapping[int, Image.Image]) -> Path | None:
    """Write model card and report; a run that has come so far does not fail for want of them."""
    try:
        write_model_card(folder)
    except PipelineError as error:
        LOGGER.warning("There is no model card: %s", error)
    try:
        return write_run_page(folder, pictures)
    except PipelineError as error:
        LOGGER.warning("There is no report: %s", error)
        return None


def _digest(images: DecodedImages) -> str:
    """Who the images are, and in which order."""
    return hashlib.sha256(images.keys.tobytes() + images.labels.tobytes()).hexdigest()
