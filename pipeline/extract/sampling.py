"""Which images stand for a class: N of them at random, from a seed."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data import Labelled
from pipeline.errors import PipelineError, listed


def sample_rows(
    labels: NDArray[np.int64], class_names: Sequence[str], per_class: int | None, seed: int
) -> tuple[NDArray[np.int64], int]:
    """Draw rows of every class without replacement (paper section II).

    Each class has a random stream of its own, by its name: adding a class changes no other class's choice.

    Args:
        labels: [N] class index of every row.
        class_names: C names, for messages.
        per_class: rows wanted in each class; none: all of them.
        seed: ≥ 0.

    Returns:
        The chosen rows in ascending order, and how many classes have fewer than `per_class`.

    Raises:
        PipelineError: a class has no row at all.
    """
    available = np.bincount(labels, minlength=len(class_names))
    check_no_empty_class(available, class_names)
    if per_class is None:
        return np.arange(len(labels)), 0
    # Sorted once: a search for each of many classes through millions of rows would take hours.
    of_classes = np.split(np.argsort(labels, kind="stable"), np.cumsum(available)[:-1])
    chosen = []
    for name, rows in zip(class_names, of_classes, strict=True):
        if len(rows) > per_class:
            rows = np.random.default_rng([seed, _stream(name)]).choice(rows, per_class, replace=False)
        chosen.append(rows)
    return np.sort(np.concatenate(chosen)), int((available < per_class).sum())


def rows_within(data: Labelled, chosen: NDArray[np.int64], limits: tuple[int, int]) -> NDArray[np.int64]:
    """Keep the chosen rows of one part of a split.

    What is chosen is chosen among all rows, so that the parts of a split together have what the whole would have.

    Args:
        data: the data set.
        chosen: rows of it.
        limits: the first row of the part and the one after its last, in the split's own count.

    Returns:
        The rows within.

    Raises:
        PipelineError: the split ends before, no chosen row is within, or classes are missing that have no names.
    """
    first, end = limits
    if end > data.num_rows_before_limit:
        raise PipelineError(f"--rows {first}:{end}: the split has {data.num_rows_before_limit:,} rows.")
    rows = chosen[(data.numbers[chosen] >= first) & (data.numbers[chosen] < end)]
    if len(rows) == 0:
        raise PipelineError(f"--rows {first}:{end}: none of the chosen images stands there. Take a larger part.")
    num_missing = len(data.class_names) - len(np.unique(data.labels[rows]))
    if num_missing and not data.classes_named:
        raise PipelineError(
            f"--rows {first}:{end}: {num_missing} of {len(data.class_names)} classes have no image there, and classes "
            "without names are known by their place. Name the classes, shuffle the data, or take larger parts."
        )
    return rows


def check_no_empty_class(count: NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Refuse classes without an image: their mean would not exist.

    Args:
        count: [C] images of each class.
        class_names: C names.

    Raises:
        PipelineError: names up to five of the classes.
    """
    empty = [class_names[index] for index in np.flatnonzero(count == 0).tolist()]
    if empty:
        raise PipelineError(
            f"{len(empty)} of {len(class_names)} classes have no image ({listed(empty)}). "
            "Every class needs at least one: choose another split, raise --limit, or remove the class from the "
            "data set."
        )


def _stream(class_name: str) -> int:
    return int.from_bytes(hashlib.blake2b(class_name.encode(), digest_size=8).digest(), "little")
