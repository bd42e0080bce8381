"""What commands print: results, bars, and why they failed."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

_BYTES_WITHOUT_BAR = 1_000_000_000  # less is done in a second or so


def emit(as_json: bool, document: dict[str, Any], rows: Sequence[tuple[str, str]]) -> None:
    """Print a result.

    Args:
        as_json: as a document; else as rows.
        document: for programs.
        rows: label and text, for people.
    """
    if as_json:
        click.echo(as_json_text(document))
        return
    from pipeline.errors import printable

    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        click.echo(printable(f"{label:<{width}}  {text}"))


def as_json_text(document: object) -> str:
    """Encode as JSON in UTF-8; what cannot be printed, or not be encoded, is escaped in its strings."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return "".join(part if part.isprintable() or part == "\n" else json.dumps(part)[1:-1] for part in text)


def memory_rows(memory: Any) -> list[tuple[str, str]]:
    """Write what a command held at its peak (`pipeline.runtime.PeakMemory`) as rows."""
    from pipeline.progress import size

    rows = [("memory", f"{size(memory.resident_bytes)} at the peak, libraries included")]
    if memory.device_bytes:
        rows.append(("GPU memory", f"{size(memory.device_bytes)} at the peak"))
    return rows


@contextmanager
def byte_progress(what: str, paths: Sequence[Path]) -> Iterator[Callable[[int], None]]:
    """Show a bar over the bytes of some files, where they are many."""
    total = sum(path.stat().st_size for path in paths if path.is_file())
    if total < _BYTES_WITHOUT_BAR:
        yield lambda num_bytes: None
        return
    from pipeline.progress import ProgressBar

    done = 0
    with ProgressBar(what, max(1, total // 10**6), "MB") as bar:

        def advance(num_bytes: int) -> None:
            nonlocal done
            bar.advance((done + num_bytes) // 10**6 - done // 10**6)
            done += num_bytes

        yield advance


def explain(error: Exception) -> tuple[str | None, int]:
    """Turn what a user can cause into one line; anything else keeps its traceback."""
    from pydantic import ValidationError

    from pipeline.errors import PipelineError, describe_problems
    from store.errors import StoreError

    if isinstance(error, PipelineError | StoreError):
        return " ".join(str(error).split()), 1
    if isinstance(error, ValidationError):
        return describe_problems(error), 2
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}.", 1
    return None, 1
