"""The one way to show progress and to log: both on stderr, a bar on a terminal, plain lines elsewhere."""

import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.errors import printable


class _Stderr:
    """Stderr, whatever it is at the moment. When its terminal or pipe is gone, what goes there goes nowhere.

    A run of a night must not end because nobody is left to read of its progress.
    """

    def write(self, text: str) -> int:
        try:
            return _stderr().write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            _stderr().flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), _stderr().fileno())  # for what others write there too, and when Python ends

    def __getattr__(self, name: str) -> Any:
        return getattr(_stderr(), name)


def _stderr() -> IO[str]:
    # Beside a bar rich puts a stand-in in its place, which would write here again.
    found: IO[str] = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    return found


LOGGER = logging.getLogger("clip_embed_kd")
_CONSOLE = Console(file=cast(IO[str], _Stderr()), highlight=False, soft_wrap=True)
_PLAIN_SECONDS = 30.0


def log_to_stderr() -> None:
    """Send the pipeline's messages to stderr, beside the bars. Commands call it; a library user need not."""
    if not LOGGER.handlers:
        LOGGER.addHandler(_ConsoleHandler())
    LOGGER.setLevel(logging.INFO)


class ProgressBar:
    """Count items towards a total, with the rate and the time left. A context manager."""

    def __init__(self, what: str, total: int, unit: str = "images", done: int = 0) -> None:
        """Prepare a bar; nothing is shown before `with`.

        Args:
            what: a short phrase, e.g. `embedding`.
            total: number of items, ≥ 1.
            unit: what is counted, in the plural.
            done: items that an earlier run counted; they are not of this one's rate.
        """
        self._what, self._total, self._unit = what, total, unit
        self._done, self._before = done, done
        self._last_plain = 0.0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=_CONSOLE,
            disable=not _CONSOLE.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(printable(what), total=total, completed=done, rate="", note="")

    def __enter__(self) -> "ProgressBar":
        """Start the clock and show the bar."""
        self._start = self._last_plain = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the clock and remove the bar."""
        self.seconds = time.monotonic() - self._start
        self._bar.stop()

    def advance(self, count: int, note: str = "") -> None:
        """Count some more items as done.

        Args:
            count: how many.
            note: a short text behind the bar, e.g. the current loss.
        """
        self._done += count
        now = time.monotonic()
        rate = (self._done - self._before) / max(now - self._start, 1e-9)
        self._bar.update(self._task, advance=count, rate=f"{rate:,.0f} {self._unit}/s", note=note)
        if not _CONSOLE.is_terminal and now - self._last_plain >= _PLAIN_SECONDS:
            self._last_plain = now
            left = (self._total - self._done) / max(rate, 1e-9)
            LOGGER.info(
                "%s: %d of %d %s, %.0f %s/s, %s left%s",
                *(self._what, self._done, self._total, self._unit, rate, self._unit, duration(left)),
                f" {note}" if note else "",
            )


def duration(seconds: float) -> str:
    """Write a duration for people.

    Args:
        seconds: ≥ 0.

    Returns:
        E.g. `8.4 s`, `3 min 20 s`, `2 h 05 min`.
    """
    if seconds < 59.95:  # above, one digit would say 60.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """Write a number of bytes for people, in powers of 1,000.

    Args:
        num_bytes: ≥ 0.

    Returns:
        E.g. `312 B`, `1.2 MB`, `3.4 GB`.
    """
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1), ("GB", 1)):
        if round(num_bytes, digits) < 1000:
            return f"{num_bytes:.{digits}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().split("\n")  # the demonstration sets its commands apart by empty ones
        _CONSOLE.print("\n".join(map(printable, lines)), markup=False, emoji=False)
