"""Stage one, from settings to artifact: sample rows, embed them, accumulate, write."""

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data import Labelled, load_labelled
from pipeline.errors import PipelineError
from pipeline.extract.batches import read_batches
from pipeline.extract.config import ExtractSettings
from pipeline.extract.samples import SampleSpool
from pipeline.extract.sampling import check_no_empty_class, sample_rows
from pipeline.output import check_output
from pipeline.progress import LOGGER, ProgressBar
from pipeline.runtime import (
    PeakMemory,
    batch_must_fit,
    peak_memory,
    resolve_device,
    resolve_precision,
    software_versions,
)
from store import ClassStatistics, DataSetInfo, Manifest, SamplingInfo, check_destination, write_artifact

if TYPE_CHECKING:
    from pipeline.extract.teacher import Teacher

_SOFTWARE = ("torch", "torchvision", "transformers", "datasets", "numpy", "pillow")


@dataclass(frozen=True)
class ExtractResult:
    """What stage one made and what it took."""

    path: Path
    manifest: Manifest
    num_images: int
    seconds: float
    images_per_second: float
    artifact_bytes: int
    memory: PeakMemory


def extract(settings: ExtractSettings) -> ExtractResult:
    """Embed a data set's images with the teacher and write the artifact.

    Everything that can be checked is checked before the first image is embedded.

    Args:
        settings: what to do.

    Returns:
        Where the artifact is, and figures.

    Raises:
        PipelineError: anything a user can cause; nothing is left behind.
        StoreError: the artifact cannot be written; nothing is left behind.
    """
    start = time.monotonic()
    check_destination(settings.out, overwrite=settings.overwrite)
    check_output(settings.out, 0, replaceable=settings.overwrite)
    device = resolve_device(settings.device)
    data = load_labelled(settings.data)
    per_class = settings.images_per_class()
    rows, short_classes = sample_rows(data.labels, data.class_names, per_class, settings.seed)
    if short_classes:
        LOGGER.info(
            "%d of %d classes have fewer than %d images; all of theirs are used.",
            *(short_classes, len(data.class_names), per_class),
        )
    teacher = _load_teacher(settings, device)
    embed_dim = teacher.info.embed_dim
    _check_room(settings, len(data.class_names), len(rows), embed_dim)
    statistics = ClassStatistics(len(data.class_names), embed_dim)
    dtype = settings.dtype if settings.samples else None
    with closing(SampleSpool(settings.out.absolute().parent, embed_dim, dtype)) as spool:
        num_bad, embed_seconds = _embed(settings, data, rows, teacher, (statistics, spool))
        check_no_empty_class(statistics.count, data.class_names)
        images_sha256, samples = spool.finish()
        sampling = SamplingInfo(
            per_class=per_class,
            limit=settings.data.limit,
            seed=settings.seed,
            batch_size=settings.batch_size,
            short_classes=short_classes,
            skipped_images=num_bad,
            images_sha256=images_sha256,
        )
        tensors = statistics.tensors() | samples
        manifest = _manifest(teacher, data, sampling)
        manifest = write_artifact(settings.out, manifest, tensors, overwrite=settings.overwrite)
    return ExtractResult(
        path=settings.out,
        manifest=manifest,
        num_images=int(statistics.count.sum()),
        seconds=time.monotonic() - start,
        images_per_second=len(rows) / embed_seconds,
        artifact_bytes=settings.out.stat().st_size,
        memory=peak_memory(device),
    )


def _embed(
    settings: ExtractSettings,
    data: Labelled,
    rows: NDArray[np.int64],
    teacher: "Teacher",
    sinks: tuple[ClassStatistics, SampleSpool],
) -> tuple[int, float]:
    """Embed rows into the sinks; returns how many images were bad, and the seconds."""
    statistics, spool = sinks
    num_bad = 0
    workers = _num_workers(settings, teacher.model.device)
    fits = batch_must_fit(settings.batch_size, "the teacher")
    with ProgressBar("embedding", len(rows)) as bar, _workers_must_live(), fits:
        for batch in read_batches(data, rows, teacher.preprocess, settings.batch_size, workers):
            if batch.bad and not settings.skip_bad:
                raise batch.bad[0]
            num_bad += len(batch.bad)
            if batch.pixels is not None:
                embeddings = teacher.embed(batch.pixels).cpu().numpy()
                _check_finite(embeddings, data.numbers[batch.rows], settings)
                statistics.add(embeddings, data.labels[batch.rows])
                spool.add(batch.keys, data.labels[batch.rows], embeddings)
            bar.advance(len(batch.rows) + len(batch.bad))
    if num_bad:
        LOGGER.info("%d images could not be decoded and were left out.", num_bad)
    return num_bad, bar.seconds


@contextmanager
def _workers_must_live() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) and "shared memory" not in str(error):
            raise
        raise PipelineError(
            "a decoding process died, for want of memory or of shared memory (/dev/shm). "
            "Try --workers 0, or a smaller --batch-size."
        ) from None


def _load_teacher(settings: ExtractSettings, device: torch.device) -> "Teacher":
    try:
        from pipeline.extract.teacher import load_teacher
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"extract needs {error.name}, which is not installed: pip install 'clip-embed-kd[extract]'"
        ) from None
    precision = resolve_precision(settings.precision, device)
    teacher = load_teacher(settings.teacher, settings.teacher_revision, settings.pooling, device, precision)
    info = teacher.info
    taken = {
        "cls": "[CLS] after the last norm",
        "pooled": "its own pooled output",
        "mean": "the mean of its tokens",
    }
    LOGGER.info(
        "Teacher %s (%s): the embedding is %s, %d values, in %s on %s.",
        *(info.name, info.architecture, taken[info.pooling], info.embed_dim, info.precision, device),
    )
    return teacher


def _num_workers(settings: ExtractSettings, device: torch.device) -> int:
    if settings.workers is not None:
        return settings.workers
    # On a CPU the teacher itself keeps every core busy, and where processes do not fork (macOS) each would start anew.
    return min(8, len(os.sched_getaffinity(0))) if device.type == "cuda" else 0


def _check_room(settings: ExtractSettings, num_classes: int, num_rows: int, embed_dim: int) -> None:
    needed = num_classes * embed_dim * 8
    if settings.samples:
        needed += 2 * num_rows * (embed_dim * np.dtype(settings.dtype).itemsize + 20)  # spool and artifact
    check_output(settings.out, needed, replaceable=settings.overwrite)


def _check_finite(embeddings: NDArray[np.float32], rows: NDArray[np.int64], settings: ExtractSettings) -> None:
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        raise PipelineError(
            f"{settings.teacher}: the embedding of row {rows[~finite][0]} has values that are not finite. "
            "Try --precision float32; if that does not help, the teacher's weights are damaged."
        )


def _manifest(teacher: "Teacher", data: Labelled, sampling: SamplingInfo) -> Manifest:
    return Manifest(
        teacher=teacher.info,
        data_set=DataSetInfo(
            name=data.name,
            config=data.settings.config,
            revision=data.revision,
            split=data.settings.split,
            image_column=data.image_column,
            label_column=data.label_column,
            rows=data.num_rows_before_limit,
            classes_named=data.classes_named,
            licence=data.licence,
        ),
        preprocessing=teacher.preprocess.describe(),
        sampling=sampling,
        classes=data.class_names,
        software=software_versions(_SOFTWARE),
    )
