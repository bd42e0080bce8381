"""Chunks on their way to the partial folder: collected batch by batch, written while the teacher goes on."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import TracebackType

import numpy as np

from pipeline.errors import PipelineError
from pipeline.extract.partial import Chunk, PartialFolder


class ChunkWriter:
    """Saves chunks in a thread, one at a time, while the next one is being embedded. A context manager."""

    def __init__(self, partial: PartialFolder) -> None:
        """Prepare.

        Args:
            partial: where chunks go.
        """
        self._partial = partial
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._saved: Future[None] | None = None

    def __enter__(self) -> "ChunkWriter":
        """Start nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait until all is written."""
        self._thread.shutdown()
        if error is None:
            self._wait()

    @contextmanager
    def chunk(self, index: int, begun: list[Chunk]) -> Iterator[list[Chunk]]:
        """Collect one chunk and save it; after a failure, save what there is of it.

        Args:
            index: which chunk.
            begun: the parts, one for each batch, that an earlier run left.

        Yields:
            The list of parts, for the caller to fill up.

        Raises:
            PipelineError: this chunk or the one before could not be written.
        """
        parts = list(begun)
        try:
            yield parts
            self._wait()
        except BaseException:
            with suppress(PipelineError):  # the failure itself is what is told
                self._wait()
                if len(parts) > len(begun):
                    self._partial.save(index, np.concatenate(parts), begun=len(parts))
            raise
        self._saved = self._thread.submit(self._partial.save, index, np.concatenate(parts))

    def _wait(self) -> None:
        saved, self._saved = self._saved, None
        if saved is not None:
            saved.result()
