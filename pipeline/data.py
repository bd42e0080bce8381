"""A labelled image data set by hub name or path.

Reads whatever `datasets` loads, finds the columns, decodes to RGB. Augments nothing and resizes nothing.
"""

import errno
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.columns import find_image_column, find_label_column, read_labels
from pipeline.errors import PipelineError, check_utf8, first_line
from pipeline.pixels import to_rgb

Splits = dict[str, datasets.Dataset]
EVALUATION_SPLITS = ("test", "validation", "valid", "val", "dev")
# What the system says of a file that will be as unreadable tomorrow; anything else may pass.
_LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG}


class DataSettings(BaseModel):
    """Which images, and where their labels stand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(min_length=1, description="hub name, or a folder that `datasets` loads")
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    limit: int | None = Field(default=None, ge=1, lt=2**63)

    _names_are_utf8 = field_validator("*")(check_utf8)


class BadImageError(PipelineError):
    """An image that cannot be decoded."""


class UnreadableImageError(BadImageError):
    """An image that could not be read just now, for a reason that may pass: never one to leave out."""


@dataclass(frozen=True)
class Labelled:
    """The rows of one split: images, decoded on demand, and their classes.

    `labels` [N] int64 are indices into `class_names`, `numbers` [N] int64 the rows of the split, which differ
    from 0…N−1 under a limit. Where the data names no classes, the names are the
    indices in decimal and `classes_named` is False.
    """

    rows: datasets.Dataset
    num_rows_before_limit: int
    settings: DataSettings
    image_column: str
    label_column: str
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]
    class_names: tuple[str, ...]
    classes_named: bool

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)

    @property
    def name(self) -> str:
        """The hub name, or the base name of a local folder: never a local path."""
        path = Path(self.settings.dataset)
        return path.resolve().name if path.exists() else self.settings.dataset

    @property
    def revision(self) -> str | None:
        """The hub commit, if the data came from the hub and says it."""
        for source in self.rows.info.download_checksums or ():
            if match := re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", str(source)):
                return match.group(1)
        return self.settings.revision

    @property
    def licence(self) -> str | None:
        """What the data set's own metadata says of its licence."""
        return self.rows.info.license or None

    def of_classes(self, indices: NDArray[np.int64]) -> "Labelled":
        """Keep some classes only; a row of another class stays, with the label −1.

        Args:
            indices: of the classes, ascending.

        Returns:
            The same rows, whose labels are places in `indices`.
        """
        place = np.full(len(self.class_names), -1)
        place[indices] = np.arange(len(indices))
        names = tuple(self.class_names[index] for index in indices.tolist())
        return replace(self, labels=place[self.labels], class_names=names)

    def read(self, indices: Sequence[int]) -> list[Image.Image | BadImageError]:
        """Decode some images.

        Args:
            indices: row numbers.

        Returns:
            For each an RGB image as `to_rgb` makes it, or the error that says why there is none. `raise_bad` tells
            which of these errors stop a run.
        """
        try:
            cells = self.rows[list(indices)][self.image_column]
        except (OSError, MemoryError) as error:  # of the data set's own files
            return [self._unreadable(row, error) for row in indices]
        return [self._decode(row, cell) for row, cell in zip(indices, cells, strict=True)]

    def bad_image(self, row: int, reason: str) -> BadImageError:
        """Make the error of a row whose image is no use, today or tomorrow.

        Args:
            row: its number, as `read` takes it.
            reason: what is wrong with the image.
        """
        return BadImageError(
            f"{self._row(row)}: the image cannot be decoded ({reason}). "
            "Mend or remove it, or pass --skip-bad to leave such images out and count them."
        )

    def _decode(self, row: int, cell: dict[str, Any] | None) -> Image.Image | BadImageError:
        try:
            if cell is None:
                raise ValueError("the cell is empty")
            content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
            # Pillow tries one format after the other, WebP among the last: half of the time that a small image takes.
            is_webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
            with Image.open(BytesIO(content), formats=["WEBP"] if is_webp else None) as image:
                return to_rgb(image)
        except Exception as error:
            return self._unreadable(row, error) if _may_pass(error) else self.bad_image(row, _reason(error))

    def _unreadable(self, row: int, error: BaseException) -> UnreadableImageError:
        return UnreadableImageError(
            f"{self._row(row)}: the image could not be read just now ({_reason(error)}). Give the same command again; "
            "if it fails every time, see to the disk and to free memory."
        )

    def _row(self, row: int) -> str:
        return f"{self.settings.dataset}, split {self.settings.split}, row {self.numbers[row]}"


def load_splits(settings: DataSettings) -> Splits:
    """Load all splits of a data set, which may take minutes where it is a folder of many files.

    Args:
        settings: which data set.

    Returns:
        Them by name.

    Raises:
        PipelineError: it is missing or unreadable.
    """
    datasets.disable_progress_bars()
    path = Path(settings.dataset)
    if not path.exists() and re.match(r"^[./~]", settings.dataset):
        raise PipelineError(f"{settings.dataset}: no such data set folder. Check --dataset.")
    if path.is_file():
        raise PipelineError(f"{settings.dataset}: is a file. Pass the folder that holds it as --dataset.")
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    ignored = ["--dataset-config"] if saved and settings.config is not None else []
    ignored += ["--dataset-revision"] if path.is_dir() and settings.revision is not None else []
    if ignored:
        kind = "saved data set" if saved else "folder"
        raise PipelineError(f"{settings.dataset}: a {kind} has no {' and no '.join(ignored)}. Leave that out.")
    try:
        if saved:
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(settings.dataset, settings.config, revision=settings.revision)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise PipelineError(
            f"{settings.dataset}: the data set cannot be loaded ({_reason(cause or error)}). Pass a hub name, or a "
            "folder of parquet files, of images in a folder each class, or of a saved data set."
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def load_labelled(settings: DataSettings, splits: Splits | None = None) -> Labelled:
    """Load one split of a data set.

    Args:
        settings: which one, and optionally the columns.
        splits: of just this data set, if they were loaded already.

    Returns:
        Its rows; with `limit`, the first rows of every class in turn, so that no class is forgotten.

    Raises:
        PipelineError: missing or unreadable data set, split or column, or labels that are not classes.
    """
    splits = load_splits(settings) if splits is None else splits
    if settings.split not in splits:
        raise PipelineError(f"{settings.dataset}: no split {settings.split!r}. It has {', '.join(map(repr, splits))}.")
    rows = splits[settings.split]
    image_column = find_image_column(rows.features, settings.image_column, settings.dataset)
    label_column = find_label_column(rows.features, settings.label_column, settings.dataset, beside=image_column)
    labels, class_names, named = read_labels(rows, label_column, f"{settings.dataset}, split {settings.split}")
    num_rows = len(rows)
    numbers = np.arange(num_rows)
    rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    if settings.limit is not None and settings.limit < len(labels):
        numbers = _first_of_each_class(labels, settings.limit)
        rows, labels = rows.select(numbers), labels[numbers]
    return Labelled(rows, num_rows, settings, image_column, label_column, labels, numbers, class_names, named)


def evaluation_split(splits: Splits, training_split: str) -> str | None:
    """Name the data set's own evaluation split.

    Args:
        splits: of the data set.
        training_split: the name of the one to train on.

    Returns:
        The first of test, validation, valid, val, dev that exists and is not the training split; else None.
    """
    return next((name for name in EVALUATION_SPLITS if name in splits and name != training_split), None)


def raise_bad(bad: Iterable[BadImageError], *, skip_bad: bool) -> None:
    """Stop for the first image that must not be left out.

    Args:
        bad: errors as `Labelled.read` returns them.
        skip_bad: whether images that cannot be decoded are left out. What may pass is no property of an image: left
            out, it would be missing for good in all that is kept.

    Raises:
        BadImageError: there is such an image.
    """
    for error in bad:
        if not skip_bad or isinstance(error, UnreadableImageError):
            raise error


def _may_pass(error: BaseException) -> bool:
    """Tell a failure of disk or memory from one of the image's own bytes; Pillow's own errors have no number."""
    if isinstance(error, OSError):
        return error.errno not in {None, *_LASTING} or str(error).startswith("out of memory")  # as Pillow's codecs say
    return isinstance(error, MemoryError)


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text has a memory address in it
        return "not an image of a known format"
    return first_line(error)


def _first_of_each_class(labels: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    turn = np.empty(len(labels), np.int64)
    turn[order] = np.arange(len(labels)) - starts
    return np.sort(np.lexsort((np.arange(len(labels)), turn))[:limit])
