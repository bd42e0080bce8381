"""Sides of a comparison in processes of their own: each computes as its program would, with its memory allocator."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.distill_loops import Step, Subject, default_step, our_step, released_step
from benchmarks.distill_rounds import Timer, seconds_of
from pipeline.distill.preparation import Prepared
from pipeline.runtime import keep_freed_memory

OURS, COMPILED, RELEASED, DEFAULTS = "ours", "ours, compiled", "released loop", "timm with defaults"
_STEPS: dict[str, Callable[[Prepared], Step]] = {
    OURS: our_step,
    COMPILED: our_step,
    RELEASED: released_step,
    DEFAULTS: default_step,
}


@contextmanager
def side_process(subject: Subject, name: str, **changes: Any) -> Iterator[Timer]:
    """Start a process that prepares a side, and takes its steps when it is told to.

    Args:
        subject: what is learned from.
        name: which side: `OURS` …
        changes: settings of the run.

    Yields:
        What takes steps there and times them there.

    Raises:
        EOFError: the process died; it said why.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, subject, name, changes), daemon=True)
    process.start()
    there.close()

    def seconds(steps: int) -> float:
        here.send(steps)
        found: float = here.recv()
        return found

    try:
        yield seconds
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, subject: Subject, name: str, changes: dict[str, Any]) -> None:
    if name in (OURS, COMPILED):
        keep_freed_memory()  # as the command does; the others' programs do not
    with subject.prepared(**changes, compile=name == COMPILED) as prepared:
        step = _STEPS[name](prepared)
        while True:
            try:
                steps = connection.recv()
            except EOFError:
                return
            connection.send(seconds_of(step, steps, subject.device))
            if name == COMPILED and not prepared.trainer.forward_backward.compiled:
                raise RuntimeError("the step was not compiled")
