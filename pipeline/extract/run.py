"""Stage one, from settings to artifact: sample rows, embed them in chunks, assemble, write."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data import Labelled, load_labelled
from pipeline.errors import PipelineError
from pipeline.extract.assemble import Assembled, Chunks
from pipeline.extract.batches import Rendering
from pipeline.extract.config import ExtractSettings
from pipeline.extract.embed import Embedder, make_plan
from pipeline.extract.partial import PartialFolder
from pipeline.extract.processes import Processes, ShareDone, join_processes
from pipeline.extract.report_card import ReportCard
from pipeline.extract.report_files import write_report_card
from pipeline.extract.sampling import check_no_empty_class, sample_rows
from pipeline.output import check_output
from pipeline.progress import LOGGER
from pipeline.runtime import PeakMemory, peak_memory, resolve_device, resolve_precision, software_versions
from pipeline.views import VIEWS_VERSION
from store import DataSetInfo, Manifest, SamplingInfo, check_destination, write_artifact

if TYPE_CHECKING:
    from pipeline.extract.teacher import Teacher

SOFTWARE = ("torch", "torchvision", "transformers", "datasets", "numpy", "pillow")


@dataclass(frozen=True)
class ExtractResult:
    """What stage one made and what it took. `num_resumed` images had been embedded by an earlier run."""

    path: Path
    report_card: ReportCard
    manifest: Manifest
    num_images: int
    num_resumed: int
    seconds: float
    images_per_second: float
    artifact_bytes: int
    memory: PeakMemory


@dataclass(frozen=True)
class _Chosen:
    """The rows to embed, ascending, and how many classes have fewer than were asked for."""

    rows: NDArray[np.int64]
    short_classes: int


def extract(settings: ExtractSettings) -> ExtractResult:
    """Embed a data set's images with the teacher and write the artifact.

    Everything that can be checked is checked before the first image is embedded. Finished chunks stay in
    `OUT.partial/` until the artifact is written: the same settings go on where an earlier run stopped. Started
    by torchrun, the processes share the chunks.

    Args:
        settings: what to do.

    Returns:
        Where the artifact is, and figures.

    Raises:
        PipelineError: anything a user can cause; nothing but finished chunks is left behind.
        StoreError: the artifact cannot be written.
        ShareDone: of several processes this is not the one that writes.
    """
    start = time.monotonic()
    check_destination(settings.out, overwrite=settings.overwrite)
    processes, device = join_processes(resolve_device(settings.device))
    data = load_labelled(settings.data)
    per_class = settings.images_per_class()
    chosen = _Chosen(*sample_rows(data.labels, data.class_names, per_class, settings.seed))
    if chosen.short_classes:
        LOGGER.info(
            "%d of %d classes have fewer than %d images; all of theirs are used.",
            *(chosen.short_classes, len(data.class_names), per_class),
        )
    teacher = load_settings_teacher(settings, device)
    _check_room(settings, len(data.class_names), len(chosen.rows), teacher.info.embed_dim)
    rendering = Rendering(teacher.preprocess, settings.views, settings.view_size, settings.seed)
    plan = make_plan(chosen.rows, settings.batch_size)
    embedder = Embedder(settings, data, teacher, rendering, plan, choose_num_workers(settings, device))
    partial = PartialFolder(settings.out)
    with _keep_if_worthwhile(partial, processes):
        num_resumed, embed_seconds = _embed_share(embedder, partial, processes, _what_decides(embedder, chosen))
        if not processes.is_main:
            raise ShareDone
        chunks = Chunks([embedder.load(index, partial) for index in range(len(plan.chunks))], len(data.class_names))
        check_no_empty_class(chunks.count, data.class_names)
        assembled = chunks.assemble(settings.dtype if settings.samples else None)
        manifest = _manifest(embedder, chosen, assembled, len(chosen.rows) - len(chunks))
        manifest = write_artifact(settings.out, manifest, assembled.tensors, overwrite=settings.overwrite)
        card = write_report_card(settings.out, chunks, data, per_class, teacher.info.name)
    partial.remove()
    return ExtractResult(
        path=settings.out,
        report_card=card,
        manifest=manifest,
        num_images=len(chunks),
        num_resumed=num_resumed,
        seconds=time.monotonic() - start,
        images_per_second=(len(chosen.rows) - num_resumed) / embed_seconds,
        artifact_bytes=settings.out.stat().st_size,
        memory=peak_memory(device),
    )


def _embed_share(
    embedder: Embedder, partial: PartialFolder, processes: Processes, decides: dict[str, Any]
) -> tuple[int, float]:
    """Embed this process's share of the missing chunks; returns how many images were there, and the seconds."""
    if processes.is_main:
        partial.open(decides, overwrite=embedder.settings.overwrite)
    processes.wait()
    if not processes.is_main:
        partial.join(decides)
    finished = partial.finished()
    processes.wait()  # nobody adds to the list before all have read it
    indices = range(len(embedder.plan.chunks))
    missing = [index for index in indices if index not in finished]
    num_resumed = embedder.plan.num_images([index for index in indices if index in finished])
    if num_resumed:
        LOGGER.info("%d images were embedded by an earlier run.", num_resumed)
    seconds = embedder.run(missing[processes.rank :: processes.count], partial)
    processes.wait()
    return num_resumed, seconds


@contextmanager
def _keep_if_worthwhile(partial: PartialFolder, processes: Processes) -> Iterator[None]:
    """After a failure, say how to go on, or remove a folder without a finished chunk."""
    if not processes.is_main:  # the others may still be at work in it
        yield
        return
    try:
        yield
    except BaseException:
        if partial.is_empty():
            partial.remove()
        elif partial.path.exists():
            LOGGER.info("What is finished stays in %s: the same command goes on from there.", partial.path)
        raise


def _what_decides(embedder: Embedder, chosen: _Chosen) -> dict[str, Any]:
    """Return all that the chunks' bytes depend on, as plain JSON."""
    settings, data = embedder.settings, embedder.data
    return {
        "teacher": embedder.teacher.info.model_dump(),
        "preprocessing": embedder.teacher.preprocess.describe(),
        "data_set": _data_set_info(data).model_dump(),
        "labels_sha256": hashlib.sha256(np.stack([chosen.rows, data.labels[chosen.rows]]).tobytes()).hexdigest(),
        "classes_sha256": hashlib.sha256(json.dumps(data.class_names).encode()).hexdigest(),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "views": settings.views,
        "view_size": settings.view_size if settings.views > 1 else None,
        "views_version": VIEWS_VERSION,
        "dtype": settings.dtype if settings.samples else None,
        "skip_bad": settings.skip_bad,
        "device": embedder.teacher.model.device.type,
        "software": software_versions(SOFTWARE),
    }


def load_settings_teacher(settings: ExtractSettings, device: torch.device) -> "Teacher":
    """Load the teacher that settings name, and say how its embedding is taken.

    Raises:
        PipelineError: its library is not installed, or it cannot be loaded.
    """
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


def choose_num_workers(settings: ExtractSettings, device: torch.device) -> int:
    """Return how many processes decode images beside this one."""
    if settings.workers is not None:
        return settings.workers
    # On a CPU the teacher itself keeps every core busy, and where processes do not fork (macOS) each would start anew.
    return min(8, len(os.sched_getaffinity(0))) if device.type == "cuda" else 0


def _check_room(settings: ExtractSettings, num_classes: int, num_rows: int, embed_dim: int) -> None:
    needed = num_classes * embed_dim * 12 + num_rows * (settings.views * embed_dim * 4 + 32)  # artifact, chunks
    if settings.samples:
        needed += num_rows * (settings.views * embed_dim * np.dtype(settings.dtype).itemsize + 20)
    check_output(settings.out, needed, replaceable=settings.overwrite)


def _manifest(embedder: Embedder, chosen: _Chosen, assembled: Assembled, num_bad: int) -> Manifest:
    settings, data = embedder.settings, embedder.data
    if num_bad:
        LOGGER.info("%d images could not be decoded and were left out.", num_bad)
    rendered = settings.views > 1
    return Manifest(
        teacher=embedder.teacher.info,
        data_set=_data_set_info(data),
        preprocessing=embedder.teacher.preprocess.describe(),
        sampling=SamplingInfo(
            per_class=settings.images_per_class(),
            limit=settings.data.limit,
            seed=settings.seed,
            batch_size=settings.batch_size,
            views=settings.views,
            view_size=settings.view_size if rendered else None,
            views_version=VIEWS_VERSION if rendered else None,
            short_classes=chosen.short_classes,
            skipped_images=num_bad,
            images_sha256=assembled.images_sha256,
        ),
        head=assembled.head.info(),
        classes=data.class_names,
        software=software_versions(SOFTWARE),
    )


def _data_set_info(data: Labelled) -> DataSetInfo:
    return DataSetInfo(
        name=data.name,
        config=data.settings.config,
        revision=data.revision,
        split=data.settings.split,
        image_column=data.image_column,
        label_column=data.label_column,
        rows=data.num_rows_before_limit,
        classes_named=data.classes_named,
        licence=data.licence,
    )
