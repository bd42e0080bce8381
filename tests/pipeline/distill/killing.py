"""Processes that are killed at a chosen point: what they leave must be of use to the next one."""

import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Function = tuple[Any, str]  # what holds it, and its name there


def killed(action: Callable[[], object]) -> bool:
    """Run something in a copy of this process; tell whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_before(call: int, functions: Iterable[Function], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be killed before one of the calls of these functions, counted from 0."""
    left = iter(range(call, -1, -1))

    def counting(function: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            if next(left, 0) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counted

    for holder, name in functions:
        monkeypatch.setattr(holder, name, counting(getattr(holder, name)))
