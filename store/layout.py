"""Format 1: tensor names, types and how their shapes hang together. No input or output here.

Axes: C classes, D embed_dim, S samples, V views.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.errors import ArtifactFormatError
from store.manifest import Manifest, TensorInfo


@dataclass(frozen=True)
class TensorRule:
    """What one tensor of the format must be."""

    axes: tuple[str | int, ...]
    dtypes: tuple[str, ...]


RULES: dict[str, TensorRule] = {
    "class/count": TensorRule(("C",), ("int64",)),
    "class/mean": TensorRule(("C", "D"), ("float32",)),
    "class/m2": TensorRule(("C", "D"), ("float32",)),
    "class/text": TensorRule(("C", "D"), ("float32",)),
    "head/weight": TensorRule(("C", "D"), ("float32",)),
    "head/bias": TensorRule(("C",), ("float32",)),
    "sample/key": TensorRule(("S", 16), ("uint8",)),
    "sample/label": TensorRule(("S",), ("int32",)),
    "sample/embedding": TensorRule(("S", "V", "D"), ("float32", "float16", "int8")),
    "sample/scale": TensorRule(("S", "V"), ("float32",)),
}

# A tensor of the first kind is there only together with the others of its line.
REQUIRED = frozenset({"class/count", "class/mean", "class/m2"})
GROUPS = (
    frozenset({"head/weight", "head/bias"}),
    frozenset({"sample/key", "sample/label", "sample/embedding"}),
)

MAX_AXES = 32  # HDF5 has no more
_MAX_ROW_BYTES = 16 * 1024 * 1024  # a row is what has to fit in memory

# Tensors that HDF5 may hold as gzip chunks: the others are small, or read whole.
COMPRESSIBLE = frozenset({"sample/embedding"})

_NAME = re.compile(r"[a-z0-9_]+/[a-z0-9_]+")
_LITTLE_ENDIAN: dict[str, np.dtype[np.generic]] = {
    name: np.dtype(name).newbyteorder("<") for name in ("float32", "float16", "int64", "int32", "int8", "uint8")
}


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """Return the little-endian numpy type of a dtype name of the format.

    Args:
        name: e.g. `float32`.

    Returns:
        The numpy dtype.

    Raises:
        KeyError: no tensor of the format has this type.
    """
    return _LITTLE_ENDIAN[name]


def num_bytes(info: TensorInfo) -> int:
    """Return the size of a tensor's data in bytes, in exact integers."""
    size = numpy_dtype(info.dtype).itemsize
    for length in info.shape:
        size *= length
    return size


def check_layout(manifest: Manifest, where: str) -> None:
    """Check that the manifest's tensors are those of format 1 and that their shapes agree.

    Tensors with names that format 1 does not have are left alone: a newer minor version may add some.

    Args:
        manifest: the manifest to check.
        where: file name, for messages.

    Raises:
        ArtifactFormatError: a tensor is missing, or has another type or shape than the rules ask for.
    """
    tensors = manifest.tensors
    for missing in sorted(_missing(tensors)):
        raise ArtifactFormatError(f"{where}: {missing} is missing. Extract the artifact again.")
    if "sample/scale" in tensors and getattr(tensors.get("sample/embedding"), "dtype", None) != "int8":
        raise ArtifactFormatError(f"{where}: sample/scale stands without int8 samples. Extract the artifact again.")
    sizes: dict[str | int, int] = {
        "C": len(manifest.classes),
        "D": manifest.teacher.embed_dim,
        "V": manifest.sampling.views,
    }
    if "sample/key" in tensors and tensors["sample/key"].shape:
        sizes["S"] = tensors["sample/key"].shape[0]
    for name, info in tensors.items():
        check_name(name, where)
        if len(info.shape) > MAX_AXES:
            raise ArtifactFormatError(f"{where}: {name} has {len(info.shape)} axes, at most {MAX_AXES} are read.")
        rule = RULES.get(name)
        if rule is None:
            if info.dtype not in _LITTLE_ENDIAN or not info.shape or min(info.shape) < 1:
                raise ArtifactFormatError(
                    f"{where}: {name} is {info.dtype!r} {list(info.shape)}, expected one of "
                    f"{', '.join(_LITTLE_ENDIAN)} with at least one axis, none of them empty."
                )
            _check_row(name, info, where)
            continue
        if info.dtype not in rule.dtypes:
            raise ArtifactFormatError(f"{where}: {name} is {info.dtype}, expected {' or '.join(rule.dtypes)}.")
        expected = tuple(axis if isinstance(axis, int) else sizes.get(axis, -1) for axis in rule.axes)
        if info.shape != expected or 0 in info.shape:
            raise ArtifactFormatError(
                f"{where}: {name} has shape {list(info.shape)}, expected {list(expected)} "
                f"({' × '.join(str(axis) for axis in rule.axes)}: {len(manifest.classes)} classes, "
                f"embed_dim {manifest.teacher.embed_dim}). The file is damaged: extract it again."
            )
        _check_row(name, info, where)


def check_name(name: str, where: str) -> None:
    """Refuse a tensor name that is not group and leaf: HDF5 could not hold it, or a terminal not show it.

    Args:
        name: tensor name.
        where: file name, for the message.

    Raises:
        ArtifactFormatError: another name.
    """
    if not _NAME.fullmatch(name):
        raise ArtifactFormatError(f"{where}: tensor name {name!r} is not of the form group/leaf.")


def check_finite(name: str, block: NDArray[np.generic], where: str) -> None:
    """Refuse NaN and infinity.

    Args:
        name: tensor name, for the message.
        block: any array; only floating-point ones are looked at.
        where: file name, for the message.

    Raises:
        ArtifactFormatError: a value is not finite.
    """
    if block.dtype.kind != "f" or not block.size:
        return
    # NaN and infinity have all exponent bits set. Integers compare 15 times faster than np.isfinite in float16.
    bits = block.view(np.dtype(f"u{block.dtype.itemsize}").newbyteorder(block.dtype.byteorder))
    exponent = np.array(np.inf, block.dtype.newbyteorder("=")).view(f"u{block.dtype.itemsize}")[()]
    if (bits & exponent).max() == exponent:
        raise ArtifactFormatError(f"{where}: {name} has values that are not finite (NaN or infinity).")


def check_counts(counts: NDArray[np.int64], where: str) -> None:
    """Refuse a class without images: sums are divided by their number.

    Args:
        counts: [C] `class/count`.
        where: file name, for the message.

    Raises:
        ArtifactFormatError: a class has none, or fewer.
    """
    if counts.min() < 1:
        raise ArtifactFormatError(
            f"{where}: class/count has a value of {counts.min()}, expected at least 1. "
            "The file is damaged: extract it again."
        )


def _check_row(name: str, info: TensorInfo, where: str) -> None:
    row_bytes = num_bytes(info) // info.shape[0]
    if row_bytes > _MAX_ROW_BYTES:
        raise ArtifactFormatError(f"{where}: {name} has rows of {row_bytes} bytes, at most {_MAX_ROW_BYTES} are read.")


def _missing(tensors: Mapping[str, TensorInfo]) -> set[str]:
    missing = set(REQUIRED - set(tensors))
    for group in GROUPS:
        present = group & set(tensors)
        if present:
            missing |= group - present
    embedding = tensors.get("sample/embedding")
    if embedding is not None and embedding.dtype == "int8" and "sample/scale" not in tensors:
        missing |= {"sample/scale"}
    return missing
