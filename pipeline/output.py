"""Output paths: checked before hours are spent on what is to be written there, and written as a whole or not at all."""

import os
import shutil
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.progress import size


def check_output(path: Path, needed_bytes: int, *, replaceable: bool) -> None:
    """Check that an output can be written.

    Args:
        path: the file or folder to make.
        needed_bytes: how much room it will take.
        replaceable: whether an existing one may be replaced.

    Raises:
        PipelineError: it exists, its folder is missing or not writable, or the disk is too full.
    """
    folder = path.absolute().parent
    if path.exists() and not replaceable:
        raise PipelineError(f"{path}: exists. Choose another --out, or pass --overwrite.")
    if not folder.is_dir():
        raise PipelineError(f"{path}: the folder {path.parent} does not exist. Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PipelineError(f"{path}: the folder {path.parent} is not writable. Choose another --out.")
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise PipelineError(
            f"{path}: about {size(needed_bytes)} are needed, {size(free)} are free. Make room or choose another --out."
        )


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: it is the old one or the new one, never a part.

    Args:
        path: the file.
        content: all of it.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes at once do not mix
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk.

    Raises:
        OSError: that failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_output(path: Path, content: bytes) -> None:
    """Do the same for what the user asked for.

    Raises:
        PipelineError: it cannot be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise PipelineError(f"{path}: cannot be written ({error.strerror or error}).") from None
