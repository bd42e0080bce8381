"""Check an artifact: embed a few of its samples again, or the images of a few of its classes, and compare.

The extraction is done again as the manifest says, by the same code. Nothing is written.
"""

import os
import time
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from pipeline.data import DataSettings, load_labelled
from pipeline.errors import PipelineError, describe_problems
from pipeline.extract.again import Again, classes_again, samples_again
from pipeline.extract.check_result import CheckResult, TeacherFacts, compare_teachers
from pipeline.extract.comparison import tolerance
from pipeline.extract.config import CheckSettings, ExtractSettings
from pipeline.extract.preparation import load_settings_teacher
from pipeline.extract.search import join_classes
from pipeline.runtime import Precision, keep_freed_memory, peak_memory, resolve_device
from pipeline.views import VIEWS_VERSION
from store import Artifact, Manifest, open_artifact

if TYPE_CHECKING:
    from pipeline.extract.teacher import Teacher


def check_artifact(settings: CheckSettings) -> CheckResult:
    """Embed a few of an artifact's samples, or of its classes' images, and compare.

    The teacher is compared first: where it is another one, nothing is embedded. Every tensor that is used is verified.

    Args:
        settings: which artifact, teacher and data, and how much of it.

    Returns:
        What was compared and what differs.

    Raises:
        PipelineError: anything a user can cause: the artifact cannot be checked, or the data shares nothing with it.
        StoreError: the artifact is missing or damaged.
    """
    start = time.monotonic()
    keep_freed_memory()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise PipelineError("--check works in one process: start it without torchrun.")
    with open_artifact(settings.artifact) as artifact:
        _check_possible(artifact)
        device = resolve_device(settings.device)
        extraction = _extraction(settings, artifact)
        data = load_labelled(extraction.data)
        class_rows = join_classes(artifact, data)
        manifest = artifact.manifest
        teacher, facts = load_compared_teacher(extraction, device, manifest)
        relative = tolerance(manifest.teacher.precision, teacher.info.precision)
        work = Again(settings.fraction, extraction, artifact, data, class_rows, teacher, relative)
        compared = None
        if not facts.weights:
            compared = samples_again(work) if "sample/key" in artifact else classes_again(work)
    return CheckResult(
        path=settings.artifact,
        manifest=manifest,
        facts=facts,
        compared=compared,
        precision=teacher.info.precision,
        device=str(device),
        tolerance=relative,
        seconds=time.monotonic() - start,
        memory=peak_memory(device),
    )


def load_compared_teacher(
    extraction: ExtractSettings, device: torch.device, manifest: Manifest
) -> tuple["Teacher", TeacherFacts]:
    """Load the teacher that settings name, and compare it with the one that a manifest names.

    Args:
        extraction: its pooling is the manifest's.
        device: where it runs.
        manifest: of the artifact.

    Returns:
        The teacher, and how it differs.

    Raises:
        PipelineError: it cannot be loaded; or its weights are the manifest's, and it cannot be pooled so.
    """
    try:
        teacher, refused = load_settings_teacher(extraction, device), None
    except PipelineError as error:
        # Perhaps only because another teacher cannot be pooled so: then its weights are what to speak of.
        teacher, refused = load_settings_teacher(extraction.model_copy(update={"pooling": "auto"}), device), error
    facts = compare_teachers(manifest, teacher.info, teacher.preprocess.describe())
    if refused and not facts.weights:
        raise refused
    return teacher, facts


def _check_possible(artifact: Artifact) -> None:
    manifest, name = artifact.manifest, artifact.path.name
    sampling, made_by = manifest.sampling, manifest.software.get("clip-embed-kd", "unknown")
    if "sample/key" not in artifact:
        if manifest.sources or sampling.images_sha256 is None:
            raise PipelineError(
                f"{name}: was made from other artifacts and holds no samples: which images its class means are of is "
                "not known. Check what it was made from."
            )
    elif sampling.views > 1 and (sampling.views_version != VIEWS_VERSION or sampling.view_size is None):
        raise PipelineError(
            f"{name}: its views are of version {sampling.views_version}, this program renders version {VIEWS_VERSION}. "
            f"Check it with clip-embed-kd {made_by[:20]}, which made it."
        )


def _extraction(settings: CheckSettings, artifact: Artifact) -> ExtractSettings:
    """Return the settings that the artifact was extracted with, on this data and machine."""
    manifest, name = artifact.manifest, artifact.path.name
    precision: Precision = settings.precision or ("float32" if manifest.teacher.precision == "float32" else "auto")
    try:
        return ExtractSettings(
            teacher=settings.teacher,
            teacher_revision=settings.teacher_revision,
            data=_data_settings(settings.data, manifest, name, with_samples="sample/key" in artifact),
            out=settings.artifact,
            per_class=manifest.sampling.per_class or "all",
            view_size=manifest.sampling.view_size or 224,
            pooling=manifest.teacher.pooling,
            skip_bad=True,
            batch_size=settings.batch_size,
            precision=precision,
            device=settings.device,
            workers=settings.workers,
            seed=manifest.sampling.seed,
        )
    except ValidationError as error:
        raise PipelineError(
            f"{name}: its manifest asks for what this program cannot do again ({describe_problems(error)}). "
            "Update clip-embed-kd, or extract again."
        ) from None


def _data_settings(given: DataSettings, manifest: Manifest, name: str, *, with_samples: bool) -> DataSettings:
    data_set = manifest.data_set
    split = given.split if "split" in given.model_fields_set else data_set.split
    if split == data_set.split and manifest.sources and " + " in split:
        raise PipelineError(f"{name}: was merged from the splits {split}. Pass one of them as --split.")
    found: dict[str, str | int | None] = {"split": split}
    for field_name in ("image_column", "label_column"):
        value, there = getattr(given, field_name), getattr(data_set, field_name)
        # Of a merge of data sets with different columns nothing can be taken.
        found[field_name] = value or (None if manifest.sources and " + " in there else there)
    found["limit"] = None if with_samples else manifest.sampling.limit
    return given.model_copy(update=found)
