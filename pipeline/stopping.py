"""A request to stop (SIGTERM, or Ctrl-C too) that lets the work in hand be finished."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from pipeline.progress import LOGGER

EXIT_STATUS = 128 + signal.SIGTERM


class StopRequest:
    """Notes a first signal instead of obeying it; a second one is obeyed. A context manager.

    Outside the main thread, where Python gives nobody a signal, it notes nothing.
    """

    def __init__(self, in_hand: str, signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)) -> None:
        """Prepare; nothing changes before `with`.

        Args:
            in_hand: what is finished first, e.g. `the batch in hand`.
            signals: which are noted.
        """
        self._in_hand, self._signals = in_hand, signals
        self._previous: dict[int, Any] = {}
        self._noted: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._noted is not None

    def __enter__(self) -> "StopRequest":
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the signals back."""
        self._give_back()

    def obey(self) -> None:
        """Leave, if so asked.

        Raises:
            SystemExit: with status 143, as SIGTERM itself would have it.
            KeyboardInterrupt: after Ctrl-C.
        """
        if self._noted == signal.SIGINT:
            raise KeyboardInterrupt
        if self._noted is not None:
            raise SystemExit(EXIT_STATUS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        self._give_back()
        LOGGER.info("Asked to stop: after %s.", self._in_hand)

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
