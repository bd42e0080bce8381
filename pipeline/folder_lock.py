"""A lock on a folder that two processes must not work in at once; it goes with its process, however that ends."""

import fcntl
import os
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.progress import LOGGER

LOCK_NAME = "lock"


class FolderLock:
    """A lock on a file in the folder. On a disk without locks nothing is ever locked."""

    def __init__(self, folder: Path, taken: str) -> None:
        """Name the folder; nothing is touched.

        Args:
            folder: to be locked.
            taken: one line for the user, where another process has the lock.
        """
        self._folder, self._taken = folder, taken
        self._file: int | None = None  # its descriptor

    @property
    def held(self) -> bool:
        """Whether this process has the lock, and not just leave to go on without one."""
        return self._file is not None

    def take(self) -> None:
        """Take the lock, if this process does not have it.

        Raises:
            PipelineError: another process has it.
        """
        try:
            self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PipelineError(self._taken) from None

    def wait(self) -> None:
        """Take the lock as soon as no other process has it; that there is one is said."""
        try:
            self.take()
        except PipelineError as error:
            LOGGER.info("%s", error)
            self._lock(fcntl.LOCK_EX)

    def release(self) -> None:
        """Give the lock back, if there is one."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock(self, operation: int) -> None:
        while self._file is None:
            # Nothing is cut off, and no link followed: somebody may have put one there.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(self._folder / LOCK_NAME, flags, 0o666)
            try:
                fcntl.flock(file, operation)
            except BaseException as error:
                os.close(file)
                if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
                    return  # some network disks have none
                raise
            if os.fstat(file).st_nlink:
                self._file = file
            else:
                os.close(file)  # removed between opening and locking: nobody else would meet this lock
