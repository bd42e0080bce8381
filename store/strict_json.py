"""JSON from strangers: bounded in size and depth, no key twice, no NaN."""

import json
import math
from typing import Any

from store.errors import ArtifactFormatError

# Commas, colons and opening brackets, wherever they stand. Python's objects take 30 times the bytes of tiny JSON.
_MAX_JSON_MARKS, MAX_MANIFEST_MARKS = 2**21, 2_000_000  # the header of a .safetensors file has a few more
_MAX_LEVELS = 64  # Python's own limit depends on who calls


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """Decode one JSON object, refusing what strict JSON does not have.

    Args:
        raw: UTF-8 bytes.
        where: file name, for messages.

    Returns:
        The object.

    Raises:
        ArtifactFormatError: not UTF-8, not JSON, nested too deeply, too many values, a key twice, or not an object.
    """
    if (marks := count_marks(raw)) > _MAX_JSON_MARKS:
        raise ArtifactFormatError(
            f"{where}: header has {marks} commas, colons and brackets, at most {_MAX_JSON_MARKS} are read."
        )
    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_repeats, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactFormatError(
            f"{where}: header is not valid JSON ({error}). The file is damaged or not an artifact."
        ) from None
    if not isinstance(document, dict):
        raise ArtifactFormatError(f"{where}: header is a JSON {type(document).__name__}, expected an object.")
    if _is_deep(document):
        raise ArtifactFormatError(f"{where}: header is nested more than {_MAX_LEVELS} levels deep. Not an artifact.")
    return document


def count_marks(raw: bytes) -> int:
    """Count what JSON has more of the more values it holds; names may have them too."""
    return sum(map(raw.count, (b",", b":", b"[", b"{")))


def _is_deep(document: dict[str, Any]) -> bool:
    level: list[Any] = [document]
    for _ in range(_MAX_LEVELS):
        members = (member for outer in level for member in (outer.values() if isinstance(outer, dict) else outer))
        level = [member for member in members if isinstance(member, (dict, list))]
    return bool(level)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key stands twice")
    return document


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a number")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
