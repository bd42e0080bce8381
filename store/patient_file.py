"""A file that the HDF5 library can always close.

Where a write fails, as on a full disk, HDF5 tries it again at each attempt to close the file, and crashes when the
process exits. So it is told that all went well, and the error is raised later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO


class PatientFile:
    """A file object for h5py that keeps the first error of writing for `check`."""

    def __init__(self, file: FileIO) -> None:
        """Write to an open file.

        Args:
            file: unbuffered, open for reading and writing; stays the caller's to sync and to close.
        """
        self._file = file
        self._error: OSError | None = None
        self.read, self.readinto, self.flush = file.read, file.readinto, file.flush
        self.seek, self.tell = file.seek, file.tell

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all the bytes at the file's position, or as many as it takes."""
        rest = memoryview(data)
        with self._remembering():
            while rest:
                rest = rest[self._file.write(rest) :]
        return len(data)

    def truncate(self, size: int) -> int:
        """Make the file as long, if it can be."""
        with self._remembering():
            self._file.truncate(size)
        return size

    def check(self) -> None:
        """Raise the first error of all."""
        if self._error is not None:
            raise self._error

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._error = self._error or error
