"""What a user can cause in the pipeline: one class, one line of text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError


class PipelineError(Exception):
    """A problem that the user can mend; its text says what, where and the next step."""


def describe_problems(error: ValidationError) -> str:
    """Put everything that is wrong with some settings into one line.

    Args:
        error: what pydantic found.

    Returns:
        E.g. `epochs: input should be greater than or equal to 1, found 0; speed: unknown`.
    """
    problems = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            problems.append(f"{field}: unknown setting")
        elif problem["type"] == "missing":
            problems.append(f"{field}: missing")
        else:
            message = problem["msg"][:1].lower() + problem["msg"][1:]
            problems.append(f"{field}: {message}, found {problem['input']!r}")
    return "; ".join(problems)


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


def listed(names: Sequence[object]) -> str:
    """Name up to five of several things: `a, b, c, d, e, …`."""
    return ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "")
