"""The report card beside the artifact: measured from the finished chunks, as JSON and as a page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data import Labelled
from pipeline.errors import PipelineError
from pipeline.extract.assemble import Chunks
from pipeline.extract.grading import MAX_IMAGES, grade
from pipeline.extract.measures import Embedded
from pipeline.extract.report_card import ReportCard
from pipeline.extract.report_page import draw_class_map, report_card_page
from pipeline.output import check_output
from pipeline.report import write_report


def report_paths(artifact: Path) -> tuple[Path, Path]:
    """Return where an artifact's report card goes, as JSON and as a page."""
    return artifact.with_suffix(".report.json"), artifact.with_suffix(".report.html")


def check_report_paths(artifact: Path, *, replaceable: bool) -> None:
    """Check that an artifact's report card can be written, before there is anything to report.

    Args:
        artifact: the artifact to make.
        replaceable: whether an existing card may be replaced.

    Raises:
        PipelineError: a file exists, or a folder is in its place.
    """
    for path in report_paths(artifact):
        if path.is_dir():
            raise PipelineError(f"{path}: is a folder, and the report card goes there. Choose another --out.")
        check_output(path, 0, replaceable=replaceable)


@dataclass(frozen=True)
class Graded:
    """What is graded: all that was embedded, of which data, how many a class were asked for (none: all), by whom.

    Accuracies are measured on `held_out` images, or where there are none on a fifth of the embedded ones.
    """

    chunks: Chunks
    data: Labelled
    per_class: int | None
    teacher: str
    held_out: Embedded | None = None


def write_report_card(artifact: Path, graded: Graded) -> ReportCard:
    """Grade the embedded images and write both files, replacing older ones.

    Args:
        artifact: the artifact, which is written already.
        graded: what to grade.

    Returns:
        The card.

    Raises:
        PipelineError: a file cannot be written.
    """
    data = graded.data
    images = graded.chunks.unique_images(MAX_IMAGES)
    card = grade(images, data.class_names, evaluation=graded.held_out, per_class=graded.per_class)
    as_json, as_page = report_paths(artifact)
    write_report(json.dumps(card.as_json(), indent=2, ensure_ascii=False) + "\n", as_json, overwrite=True)
    thumbnails = _images(data, [label.row for label in card.doubtful])
    page = report_card_page(card, f"{graded.teacher} on {data.name}", draw_class_map(artifact), thumbnails)
    write_report(page, as_page, overwrite=True)
    return card


def _images(data: Labelled, numbers: Sequence[int]) -> dict[int, Image.Image]:
    """Read images by the number of their row in the split; one that cannot be read any more is left out."""
    read = data.read(np.searchsorted(data.numbers, np.asarray(numbers, np.int64)).tolist())  # they ascend
    return {number: image for number, image in zip(numbers, read, strict=True) if isinstance(image, Image.Image)}
