"""The two containers of artifacts, by a file's suffix."""

from pathlib import Path
from types import ModuleType

from store.errors import StoreError

SUFFIXES = (".safetensors", ".h5", ".hdf5")


def backend_of(path: Path) -> ModuleType:
    """Choose the container by the file's suffix; only the chosen one is imported.

    Args:
        path: the artifact's path.

    Returns:
        The module that reads and writes it.

    Raises:
        StoreError: another suffix.
    """
    if path.suffix == ".safetensors":
        from store import safetensors_backend

        return safetensors_backend
    if path.suffix in SUFFIXES:
        from store import hdf5_backend

        return hdf5_backend
    raise StoreError(f"{path}: an artifact's name ends in {', '.join(SUFFIXES)}, found {path.suffix!r}.")
