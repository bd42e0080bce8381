"""Checks of an output path before hours are spent on what is to be written there."""

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
