"""What a user can cause in the pipeline: one class, one line of text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

Value = TypeVar("Value")

_MAX_PROBLEMS = 40  # more than a recipe has settings, so that all that it lacks are named
_MAX_SHOWN = 80  # characters


class PipelineError(Exception):
    """A problem that the user can mend; its text says what, where and the next step."""


def describe_problems(error: ValidationError) -> str:
    """Put everything that is wrong with some settings into one line.

    Args:
        error: what pydantic found.

    Returns:
        E.g. `epochs: input should be greater than or equal to 1, found 0; speed: unknown`.
    """
    problems, found = [], error.errors(include_url=False)
    for problem in found[:_MAX_PROBLEMS]:
        field = shortened(".".join(str(part) for part in problem["loc"]))
        if problem["type"] == "extra_forbidden":
            problems.append(f"{field}: unknown setting")
        elif problem["type"] == "missing":
            problems.append(f"{field}: missing")
        else:
            message = problem["msg"][:1].lower() + problem["msg"][1:]
            place = f"{field}: " if field else ""  # of a name that is no name
            problems.append(f"{place}{message}, found {shown(problem['input'])}")
    if len(found) > _MAX_PROBLEMS:
        problems.append(f"and {len(found) - _MAX_PROBLEMS:,} more")
    return "; ".join(problems)


def check_utf8(value: Value) -> Value:
    """Check that a setting can be written down; a file name on Linux may be any bytes.

    Args:
        value: of a setting; only texts, paths and tuples of them are looked at.

    Returns:
        The same.

    Raises:
        PydanticCustomError: it is not UTF-8; for validators, which name the setting.
    """
    parts = value if isinstance(value, tuple) else (value,)
    try:
        "".join(str(part) for part in parts if isinstance(part, str | Path)).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("not_utf8", "its name is not UTF-8: give it another") from None
    return value


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name what differs between two sets of settings, as plain JSON.

    Args:
        before: what was found.
        now: what is wanted.
        prefix: of the names, for settings within others.

    Returns:
        E.g. `recipe.epochs was 200, is 100`, by name.
    """
    differing = []
    for name in sorted({**before, **now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differing += describe_differences(old, new, f"{prefix}{name}.")
        elif json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):
            differing.append(f"{prefix}{name} was {json.dumps(old)}, is {json.dumps(new)}")
    return differing


def first_line(error: BaseException) -> str:
    """Return what an error says, without its further lines; its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def shown(value: object) -> str:
    """Write a value of any origin as Python does, but at most its first 80 characters."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits; a table in a table in a table …
        return f"something too large to show ({type(value).__name__})"


def shortened(text: str, length: int = _MAX_SHOWN) -> str:
    """Cut a text that is longer than so many characters; the last one is `…` then."""
    return text if len(text) <= length else text[: length - 1] + "…"


def printable(text: str) -> str:
    """Escape what could steer a terminal: names may come from a stranger's file."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def listed(names: Sequence[object]) -> str:
    """Name up to five of several things: `a, b, c, d, e, …`."""
    return ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "")
