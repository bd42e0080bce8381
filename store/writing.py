"""Write artifacts, whatever their container: whole, or not at all."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from store import layout
from store.atomic import replacing
from store.backends import backend_of
from store.container import Blocks, Progress, row_blocks
from store.errors import ArtifactWriteError
from store.manifest import MAX_MANIFEST_BYTES, Manifest, TensorInfo
from store.strict_json import MAX_MANIFEST_MARKS, count_marks


@dataclass(frozen=True)
class RowBlocks:
    """A tensor too large for memory: its rows come in blocks, in order, and are read once."""

    shape: tuple[int, ...]
    dtype: str
    blocks: Blocks

    def reporting(self, progress: Progress) -> "RowBlocks":
        """Return the same, with progress told of the bytes of each block once the next is asked for."""
        return replace(self, blocks=_reporting(self.blocks, progress))


def write_artifact(
    path: str | os.PathLike[str],
    manifest: Manifest,
    tensors: Mapping[str, NDArray[Any] | RowBlocks],
    *,
    overwrite: bool = False,
    gzip: bool = False,
) -> Manifest:
    """Write an artifact atomically: a temporary file in the same folder, fsync, rename.

    Args:
        path: a `.safetensors`, `.h5` or `.hdf5` file to make.
        manifest: everything but `tensors`, which is filled in from the data.
        tensors: arrays, or `RowBlocks` for rows that stream in.
        overwrite: replace an existing file; otherwise that is an error.
        gzip: compress sample embeddings, for cold storage; HDF5 only.

    Returns:
        The manifest as written, with dtypes, shapes and digests.

    Raises:
        ArtifactWriteError: the file exists, or cannot be written; nothing is left behind.
        ArtifactFormatError: the tensors are not those of the format, or hold NaN or infinity.
    """
    path = Path(path)
    backend = backend_of(path)
    check_destination(path, overwrite=overwrite, gzip=gzip)
    infos = {name: TensorInfo(dtype=_dtype_name(data), shape=data.shape) for name, data in tensors.items()}
    manifest = manifest.model_copy(update={"tensors": infos})
    layout.check_layout(manifest, path.name)
    raw = manifest.to_bytes()
    if len(raw) > MAX_MANIFEST_BYTES or count_marks(raw) > MAX_MANIFEST_MARKS:
        raise ArtifactWriteError(f"{path}: the manifest is larger than {MAX_MANIFEST_BYTES} bytes.")
    blocks = {
        name: _guarded(data.blocks if isinstance(data, RowBlocks) else row_blocks(data))
        for name, data in tensors.items()
    }
    try:
        with replacing(path) as temporary:
            written: Manifest = backend.write(temporary, manifest, blocks, **({"gzip": True} if gzip else {}))
    except _SourceError as error:
        raise error.source from None
    return written


def check_destination(path: str | os.PathLike[str], *, overwrite: bool, gzip: bool = False) -> None:
    """Check that an artifact may be written there, before there is anything to write.

    Args:
        path: as for `write_artifact`.
        overwrite: whether an existing file may be replaced.
        gzip: whether it is to be compressed.

    Raises:
        StoreError: it has another suffix, is a folder or exists, its folder is missing or not writable, or it cannot
                be compressed.
    """
    path = Path(path)
    backend_of(path)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise ArtifactWriteError(f"{path}: cannot be written ({error.strerror}).") from None
    if is_folder:
        raise ArtifactWriteError(f"{path}: is a folder. Choose another --out.")
    if not path.absolute().parent.is_dir():
        raise ArtifactWriteError(f"{path}: the folder {path.parent} does not exist. Make it first.")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise ArtifactWriteError(f"{path}: the folder {path.parent} is not writable. Choose another --out.")
    if exists and not overwrite:
        raise ArtifactWriteError(f"{path}: exists. Choose another --out, or pass --overwrite.")
    if gzip and path.suffix == ".safetensors":
        raise ArtifactWriteError(f"{path}: .safetensors files are never compressed. Choose a name that ends in .h5.")


def _reporting(blocks: Blocks, progress: Progress) -> Iterator[NDArray[Any]]:
    for block in blocks:
        yield block
        progress(block.nbytes)


def _dtype_name(data: NDArray[Any] | RowBlocks) -> str:
    return data.dtype if isinstance(data.dtype, str) else data.dtype.name


class _SourceError(Exception):
    """Carries an error of the rows' source past the handlers of errors of writing."""

    def __init__(self, source: Exception) -> None:
        super().__init__()
        self.source = source


def _guarded(blocks: Blocks) -> Iterator[NDArray[Any]]:
    try:
        yield from blocks
    except Exception as error:
        raise _SourceError(error) from None
