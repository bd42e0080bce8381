"""Which columns of a data set hold the images and the labels, and what the labels are."""

import re
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError


def find_image_column(features: datasets.Features, asked: str | None, dataset: str) -> str:
    """Find the column of images.

    Args:
        features: of the data set, by column.
        asked: the column that the user names, if any.
        dataset: its name, for messages.

    Returns:
        The column's name.

    Raises:
        PipelineError: none that could be it, several, or not the one that was asked for.
    """
    candidates = [name for name, feature in features.items() if _holds_images(feature)]
    return _choose("image", asked, candidates, features, dataset)


def find_label_column(features: datasets.Features, asked: str | None, dataset: str, *, beside: str) -> str:
    """Find the column of labels: class labels where there are any, else integers or names.

    Args:
        features: of the data set, by column.
        asked: the column that the user names, if any.
        dataset: its name, for messages.
        beside: the column of images.

    Returns:
        The column's name.

    Raises:
        PipelineError: none that could be it, several, or not the one that was asked for.
    """
    candidates = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    values = [name for name, feature in features.items() if _holds_values(feature) and name != beside]
    if asked is not None and asked in values:
        return asked
    return _choose("label", asked, candidates or values, features, dataset)


def read_labels(rows: datasets.Dataset, column: str, where: str) -> tuple[NDArray[np.int64], tuple[str, ...], bool]:
    """Read the classes of all rows.

    Args:
        rows: N of them.
        column: of labels, as `find_label_column` finds it.
        where: data set and split, for messages.

    Returns:
        Class indices [N] int64, the names of the classes, and whether the data names them; else the names are the
        indices in decimal.

    Raises:
        PipelineError: no rows, rows without a label, or labels that are not classes.
    """
    if len(rows) == 0:
        raise PipelineError(f"{where}: it has no rows.")
    cells = rows.with_format("arrow")[:][column]
    if cells.null_count:
        raise PipelineError(f"{where}: {cells.null_count} rows have no {column}.")
    feature = rows.features[column]
    if isinstance(feature, datasets.Value) and feature.dtype.endswith("string"):
        names, inverse = np.unique(np.array(cells.to_pylist(), dtype=object).astype(str), return_inverse=True)
        return inverse.astype(np.int64), tuple(str(name) for name in names), True
    labels: NDArray[np.int64] = cells.to_numpy().astype(np.int64)
    if labels.min() < 0:
        row = int(np.flatnonzero(labels < 0)[0])
        raise PipelineError(
            f"{where}, row {row}: {column} is {labels[row]}, which is no class. "
            "Is this an unlabelled split? Choose another with --split or --eval-split."
        )
    if isinstance(feature, datasets.ClassLabel):
        beyond = np.flatnonzero(labels >= len(feature.names))
        if len(beyond):
            raise PipelineError(
                f"{where}, row {beyond[0]}: {column} is {labels[beyond[0]]}, but "
                f"the data set names {len(feature.names)} classes. Mend its labels or its class names."
            )
        return labels, tuple(feature.names), True
    if labels.max() > max(1_000_000, len(labels)):
        raise PipelineError(f"{where}: {column} goes up to {labels.max()}, expected class indices from 0 on.")
    return labels, tuple(str(index) for index in range(int(labels.max()) + 1)), False


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
