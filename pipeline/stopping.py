"""A request to stop (SIGTERM) that lets the work in hand be finished. Ctrl-C needs none of this: it stops at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from pipeline.progress import LOGGER

EXIT_STATUS = 128 + signal.SIGTERM


class StopRequest:
    """Notes a first SIGTERM instead of obeying it; a second one is obeyed. A context manager.

    Outside the main thread, where Python gives nobody a signal, it notes nothing.
    """

    def __init__(self, in_hand: str) -> None:
        """Prepare; nothing changes before `with`.

        Args:
            in_hand: what is finished first, e.g. `the batch in hand`.
        """
        self._in_hand = in_hand
        self._previous: Any = None
        self.requested = False

    def __enter__(self) -> "StopRequest":
        """Take the signal over."""
        self._watches = threading.current_thread() is threading.main_thread()
        if self._watches:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the signal back."""
        if self._watches:
            signal.signal(signal.SIGTERM, self._previous)

    def obey(self) -> None:
        """Leave, if so asked.

        Raises:
            SystemExit: with status 143, as the signal itself would have it.
        """
        if self.requested:
            raise SystemExit(EXIT_STATUS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, self._previous)
        LOGGER.info("Asked to stop: after %s.", self._in_hand)
