"""Replace a file as a whole or not at all: a temporary file beside it, fsync, rename.

The temporary file has a fixed name and a lock, so that what a killed writer left behind is written over by the
next one, and two writers of one file do not mix. Others may know the name, too: a link there is not followed.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from store.errors import ArtifactWriteError

# Some network file systems have no locks: writers are then trusted not to share a name.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give out a temporary file to write and sync; move it into place when the body of the `with` ends well.

    Args:
        path: the file to make or replace.

    Yields:
        The temporary file, in the same folder.

    Raises:
        ArtifactWriteError: it cannot be written, or another process is writing it; nothing is left behind.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        _remove_strange(temporary)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ArtifactWriteError(f"{path}: another process is writing it.") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if not _is_same_file(lock, temporary):  # it was renamed or removed between open and flock
                raise ArtifactWriteError(f"{path}: another process is writing it.")
            try:
                yield temporary
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # the latter is what h5py raises if HDF5 fails
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        raise ArtifactWriteError(f"{path}: cannot be written ({reason}).") from None


def _remove_strange(path: Path) -> None:
    """Remove what no killed writer left behind: a link to another file, which would be written over, or a pipe."""
    with suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            path.unlink()


def _is_same_file(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
