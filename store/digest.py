"""SHA-256 beside other work: hashing takes most of the time of writing and verifying, and needs no lock."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from numpy.typing import NDArray


class ThreadedSha256:
    """A running SHA-256 that is computed in a thread of its own. Use it as a context manager."""

    def __init__(self) -> None:
        """Start with no bytes."""
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")

    def __enter__(self) -> "ThreadedSha256":
        """Return the digest itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread."""
        self._thread.shutdown()

    @contextmanager
    def beside(self, block: NDArray[Any]) -> Iterator[None]:
        """Append a block's bytes while the body of the `with` statement runs.

        Args:
            block: C-contiguous; must not change before the body ends.
        """
        appended = self._thread.submit(self._digest.update, block.data)
        try:
            yield
        finally:
            appended.result()

    def hexdigest(self) -> str:
        """Return the digest of all blocks so far, in hexadecimal."""
        return self._digest.hexdigest()
