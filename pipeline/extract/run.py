"""Stage one, from settings to artifact: sample rows, embed them in chunks, assemble, write."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.data import Labelled, load_labelled
from pipeline.errors import PipelineError
from pipeline.extract.assemble import Assembled, Chunks
from pipeline.extract.config import ExtractSettings
from pipeline.extract.embed import Embedder
from pipeline.extract.evaluation import evaluation_embedder, load_evaluation
from pipeline.extract.partial import PartialFolder, partial_path
from pipeline.extract.preparation import load_settings_teacher, make_embedder
from pipeline.extract.processes import ShareDone, join_processes
from pipeline.extract.report_card import ReportCard
from pipeline.extract.report_files import Graded, check_report_paths, write_report_card
from pipeline.extract.sampling import check_no_empty_class, rows_within, sample_rows
from pipeline.extract.share import SOFTWARE, Share, data_set_info
from pipeline.output import check_output
from pipeline.progress import LOGGER
from pipeline.runtime import PeakMemory, keep_freed_memory, peak_memory, resolve_device, software_versions
from pipeline.views import VIEWS_VERSION
from store import Manifest, SamplingInfo, check_destination, write_artifact

if TYPE_CHECKING:
    from pipeline.extract.teacher import Teacher
    from pipeline.extract.text import ClassText


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
        SystemExit: SIGTERM came; the batch in hand was finished, and what is finished stays.
    """
    start = time.monotonic()
    keep_freed_memory()
    partial = PartialFolder(partial_path(settings.out))
    replaceable = settings.overwrite or partial.is_assembled()  # a run that was stopped at the report card goes on
    check_destination(settings.out, overwrite=replaceable)
    check_report_paths(settings.out, replaceable=replaceable)
    processes, device = join_processes(resolve_device(settings.device))
    data = load_labelled(settings.data)
    _check_names(settings, data)
    data, chosen = _choose(settings, data)
    evaluation = load_evaluation(settings, data.class_names)
    teacher = load_settings_teacher(settings, device)
    text = _embed_names(settings, data, teacher)
    _check_room(settings, len(data.class_names), len(chosen.rows), teacher.info.embed_dim)
    embedder = make_embedder(settings, data, chosen.rows, teacher)
    share = Share(partial, processes)
    with share.kept_if_worthwhile():
        embedded = share.embed(embedder)
        held_out = None if evaluation is None else share.embed_evaluation(evaluation_embedder(embedder, evaluation))
        if not processes.is_main:
            raise ShareDone
        chunks = Chunks(embedder.load(partial), len(data.class_names))
        if len(chunks) < len(chosen.rows) and not settings.skip_bad:
            raise PipelineError(
                f"{partial.path}: an earlier run left out {len(chosen.rows) - len(chunks)} images that could not "
                "be decoded. Pass --skip-bad again, or --overwrite to start anew."
            )
        check_no_empty_class(chunks.count, data.class_names)
        assembled = chunks.assemble(settings.dtype if settings.samples else None)
        manifest = _manifest(embedder, chosen, assembled, len(chosen.rows) - len(chunks))
        if text:
            manifest = manifest.model_copy(update={"text": text.info})
            assembled.tensors["class/text"] = text.embeddings
        partial.mark_assembled()
        manifest = write_artifact(settings.out, manifest, assembled.tensors, overwrite=replaceable)
        per_class = settings.images_per_class()
        card = write_report_card(settings.out, Graded(chunks, data, per_class, teacher.info.name, held_out))
    partial.remove()
    return ExtractResult(
        path=settings.out,
        report_card=card,
        manifest=manifest,
        num_images=len(chunks),
        num_resumed=embedded.num_resumed,
        seconds=time.monotonic() - start,
        images_per_second=(len(chosen.rows) - embedded.num_resumed) / embedded.seconds,
        artifact_bytes=settings.out.stat().st_size,
        memory=peak_memory(device),
    )


def _choose(settings: ExtractSettings, data: Labelled) -> tuple[Labelled, _Chosen]:
    """Choose the rows to embed; of a part of the data, only the classes that it has."""
    per_class = settings.images_per_class()
    rows, short_classes = sample_rows(data.labels, data.class_names, per_class, settings.seed)
    if short_classes:
        LOGGER.info(
            "%d of %d classes have fewer than %d images; all of theirs are used.",
            *(short_classes, len(data.class_names), per_class),
        )
    if settings.rows is not None:
        rows = rows_within(data, rows, settings.rows)
        data = data.of_classes(np.unique(data.labels[rows]))
    return data, _Chosen(rows, short_classes)


def _check_names(settings: ExtractSettings, data: Labelled) -> None:
    if settings.class_text and not data.classes_named:
        raise PipelineError(
            f"{data.name}: its labels are numbers without names, and --class-text embeds names. "
            "Leave it out, or choose a --label-column with class names."
        )


def _embed_names(settings: ExtractSettings, data: Labelled, teacher: "Teacher") -> "ClassText | None":
    """Embed the class names, if asked to; before the images, since what is wrong here must not cost hours there."""
    if not settings.class_text:
        return None
    from pipeline.extract.text import embed_class_names

    return embed_class_names(settings, data.class_names, teacher)


def _check_room(settings: ExtractSettings, num_classes: int, num_rows: int, embed_dim: int) -> None:
    needed = num_classes * embed_dim * 12 + num_rows * (settings.views * embed_dim * 4 + 32)  # artifact, chunks
    if settings.class_text:
        needed += num_classes * embed_dim * 4
    if settings.samples:
        needed += num_rows * (settings.views * embed_dim * np.dtype(settings.dtype).itemsize + 20)
    partial = partial_path(settings.out)
    needed -= sum(path.stat().st_size for path in partial.rglob("*.npy")) if partial.is_dir() else 0
    check_output(settings.out, max(0, needed), replaceable=True)  # whether it exists was checked


def _manifest(embedder: Embedder, chosen: _Chosen, assembled: Assembled, num_bad: int) -> Manifest:
    settings, data = embedder.settings, embedder.data
    if num_bad:
        LOGGER.info("%d images could not be decoded and were left out.", num_bad)
    rendered = settings.views > 1
    return Manifest(
        teacher=embedder.teacher.info,
        data_set=data_set_info(data),
        preprocessing=embedder.teacher.preprocess.describe(),
        sampling=SamplingInfo(
            per_class=settings.images_per_class(),
            limit=settings.data.limit,
            seed=settings.seed,
            rows=settings.rows,
            batch_size=embedder.batch_size,
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
