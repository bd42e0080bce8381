"""The report card beside the artifact: measured from the finished chunks, as JSON and as a page."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pipeline.data import Labelled
from pipeline.extract.assemble import Chunks
from pipeline.extract.grading import MAX_IMAGES, grade
from pipeline.extract.report_card import ReportCard
from pipeline.extract.report_page import draw_class_map, report_card_page
from pipeline.report import write_report


def report_paths(artifact: Path) -> tuple[Path, Path]:
    """Return where an artifact's report card goes, as JSON and as a page."""
    return artifact.with_suffix(".report.json"), artifact.with_suffix(".report.html")


def write_report_card(
    artifact: Path, chunks: Chunks, data: Labelled, per_class: int | None, teacher: str
) -> ReportCard:
    """Grade the embedded images and write both files, replacing older ones.

    Args:
        artifact: the artifact, which is written already.
        chunks: all that was embedded.
        data: the images.
        per_class: images that were asked for in each class; none: all.
        teacher: its name.

    Returns:
        The card.

    Raises:
        PipelineError: a file cannot be written.
    """
    card = grade(chunks.unique_images(MAX_IMAGES), data.class_names, per_class=per_class)
    as_json, as_page = report_paths(artifact)
    write_report(json.dumps(card.as_json(), indent=2, ensure_ascii=False) + "\n", as_json, overwrite=True)
    thumbnails = _images(data, [label.row for label in card.doubtful])
    page = report_card_page(card, f"{teacher} on {data.name}", draw_class_map(artifact), thumbnails)
    write_report(page, as_page, overwrite=True)
    return card


def _images(data: Labelled, numbers: Sequence[int]) -> dict[int, Image.Image]:
    """Read images by the number of their row in the split; one that cannot be read any more is left out."""
    place = {int(number): index for index, number in enumerate(data.numbers)}
    read = data.read([place[number] for number in numbers])
    return {number: image for number, image in zip(numbers, read, strict=True) if isinstance(image, Image.Image)}
