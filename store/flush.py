"""Send written bytes to the disk while the next are made, instead of all at the end.

Left alone, the kernel keeps gigabytes in memory until the final fsync, which then takes as long as the disk needs.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

_FLUSH_BYTES = 64 * 1024 * 1024


class FlushBehind:
    """Syncs an open file in a thread of its own, again and again. Use it as a context manager."""

    def __init__(self, descriptor: int) -> None:
        """Start with nothing written.

        Args:
            descriptor: of the file; stays open for as long as this does.
        """
        self._descriptor = descriptor
        self._unflushed_bytes = 0
        self._flushing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush")

    def __enter__(self) -> "FlushBehind":
        """Return it itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the flush in hand; one that failed counts only where nothing else did."""
        self._thread.shutdown()
        if self._flushing is not None and error is None:
            self._flushing.result()

    def wrote(self, num_bytes: int) -> None:
        """Count bytes that were written, and flush them if there are many and no flush is in hand.

        Raises:
            OSError: an earlier flush failed, e.g. since the disk is full.
        """
        self._unflushed_bytes += num_bytes
        if self._unflushed_bytes < _FLUSH_BYTES or (self._flushing is not None and not self._flushing.done()):
            return
        if self._flushing is not None:
            self._flushing.result()
        self._unflushed_bytes = 0
        self._flushing = self._thread.submit(os.fsync, self._descriptor)
