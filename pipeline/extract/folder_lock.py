"""A lock on a folder that two extractions must not work in at once; it goes with its process, however that ends."""

import fcntl
from pathlib import Path
from typing import IO

from pipeline.errors import PipelineError

LOCK_NAME = "lock"


class FolderLock:
    """A lock on a file in the folder."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is touched.

        Args:
            folder: to be locked.
        """
        self._folder = folder
        self._file: IO[bytes] | None = None

    def take(self) -> None:
        """Take the lock, if this process does not have it; on a disk without locks nothing happens.

        Raises:
            PipelineError: another process has it.
        """
        if self._file is not None:
            return
        file = (self._folder / LOCK_NAME).open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise PipelineError(
                f"{self._folder}: another extraction is at work in it. Wait for it, or choose another --out."
            ) from None
        except OSError:  # some network disks have none
            file.close()
            return
        self._file = file

    def release(self) -> None:
        """Give the lock back, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None
