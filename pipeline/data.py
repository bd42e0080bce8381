"""A labelled image data set by hub name or path, and who each image is: its sample key.

Reads whatever `datasets` loads, finds the columns, decodes to RGB. Augments nothing and resizes nothing.
"""

import errno
import hashlib
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.errors import PipelineError, check_utf8, first_line

SAMPLE_KEY_VERSION = 1
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


def load_labelled(settings: DataSettings) -> Labelled:
    """Load one split of a data set.

    Args:
        settings: which one, and optionally the columns.

    Returns:
        Its rows; with `limit`, the first rows of every class in turn, so that no class is forgotten.

    Raises:
        PipelineError: missing or unreadable data set, split or column, or labels that are not classes.
    """
    splits = _load_splits(settings)
    if settings.split not in splits:
        raise PipelineError(f"{settings.dataset}: no split {settings.split!r}. It has {', '.join(map(repr, splits))}.")
    rows = splits[settings.split]
    image_column = _image_column(rows.features, settings)
    label_column = _label_column(rows.features, settings, image_column)
    labels, class_names, named = _labels(rows, label_column, settings)
    num_rows = len(rows)
    numbers = np.arange(num_rows)
    rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    if settings.limit is not None and settings.limit < len(labels):
        numbers = _first_of_each_class(labels, settings.limit)
        rows, labels = rows.select(numbers), labels[numbers]
    return Labelled(rows, num_rows, settings, image_column, label_column, labels, numbers, class_names, named)


def evaluation_split(settings: DataSettings) -> str | None:
    """Name the data set's own evaluation split.

    Args:
        settings: the data set; its split is the training split.

    Returns:
        The first of test, validation, valid, val, dev that exists and is not the training split; else None.
    """
    splits = _load_splits(settings)
    return next((name for name in EVALUATION_SPLITS if name in splits and name != settings.split), None)


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring an image of any kind to 8-bit RGB, in one defined way.

    EXIF orientation is applied, alpha is composited on white, 16 bits are scaled to 8 (rounded to nearest),
    grey is repeated.

    Args:
        image: an opened image; it is decoded here.

    Returns:
        Mode RGB, without metadata.

    Raises:
        ValueError: floating-point pixels.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; 8 or 16 bits are expected")
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    image.info = {}
    return image


def sample_key(image: Image.Image) -> bytes:
    """Compute who an image is, whatever its position, file format or compression.

    Args:
        image: mode RGB, as `to_rgb` makes it.

    Returns:
        16 bytes: BLAKE2b-128 over a version byte, height and width (u32, little-endian) and the RGB bytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(struct.pack("<BII", SAMPLE_KEY_VERSION, image.height, image.width))
    digest.update(image.tobytes())
    return digest.digest()


def _load_splits(settings: DataSettings) -> dict[str, datasets.Dataset]:
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


def _image_column(features: datasets.Features, settings: DataSettings) -> str:
    candidates = [name for name, feature in features.items() if _holds_images(feature)]
    return _choose("image", settings.image_column, candidates, features, settings.dataset)


def _label_column(features: datasets.Features, settings: DataSettings, image_column: str) -> str:
    candidates = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    values = [name for name, feature in features.items() if _holds_values(feature) and name != image_column]
    if settings.label_column is not None and settings.label_column in values:
        return settings.label_column
    return _choose("label", settings.label_column, candidates or values, features, settings.dataset)


def _choose(what: str, asked: str | None, candidates: list[str], features: datasets.Features, dataset: str) -> str:
    if asked is None and len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(candidates) or "none"
    if asked is None:
        raise PipelineError(
            f"{dataset}: {len(candidates)} columns could be the {what} column ({listed}). "
            + (f"Pass --{what}-column." if candidates else f"Its columns are {', '.join(features)}.")
        )
    if asked not in features:
        raise PipelineError(f"{dataset}: no column {asked!r}. Candidates for --{what}-column: {listed}.")
    if asked not in candidates:
        expected = "images" if what == "image" else "classes (class labels, integers or names)"
        raise PipelineError(
            f"{dataset}: column {asked!r} is {features[asked]}, expected {expected}. "
            f"Candidates for --{what}-column: {listed}."
        )
    return asked


def _holds_images(feature: Any) -> bool:
    # Parquet that was not written by `datasets` has images as plain structures of bytes and path.
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _holds_values(feature: Any) -> bool:
    if not isinstance(feature, datasets.Value):
        return False
    return feature.dtype in ("string", "large_string") or re.fullmatch(r"u?int\d+", feature.dtype) is not None


def _labels(
    rows: datasets.Dataset, column: str, settings: DataSettings
) -> tuple[NDArray[np.int64], tuple[str, ...], bool]:
    if len(rows) == 0:
        raise PipelineError(f"{settings.dataset}, split {settings.split}: it has no rows.")
    cells = rows.with_format("arrow")[:][column]
    if cells.null_count:
        raise PipelineError(f"{settings.dataset}, split {settings.split}: {cells.null_count} rows have no {column}.")
    feature = rows.features[column]
    if isinstance(feature, datasets.Value) and feature.dtype.endswith("string"):
        names, inverse = np.unique(np.array(cells.to_pylist(), dtype=object).astype(str), return_inverse=True)
        return inverse.astype(np.int64), tuple(str(name) for name in names), True
    labels: NDArray[np.int64] = cells.to_numpy().astype(np.int64)
    if labels.min() < 0:
        row = int(np.flatnonzero(labels < 0)[0])
        raise PipelineError(
            f"{settings.dataset}, split {settings.split}, row {row}: {column} is {labels[row]}, which is no class. "
            "Is this an unlabelled split? Choose another with --split or --eval-split."
        )
    if isinstance(feature, datasets.ClassLabel):
        beyond = np.flatnonzero(labels >= len(feature.names))
        if len(beyond):
            raise PipelineError(
                f"{settings.dataset}, split {settings.split}, row {beyond[0]}: {column} is {labels[beyond[0]]}, but "
                f"the data set names {len(feature.names)} classes. Mend its labels or its class names."
            )
        return labels, tuple(feature.names), True
    if labels.max() > max(1_000_000, len(labels)):
        raise PipelineError(
            f"{settings.dataset}: {column} goes up to {labels.max()}, expected class indices from 0 on."
        )
    return labels, tuple(str(index) for index in range(int(labels.max()) + 1)), False


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
