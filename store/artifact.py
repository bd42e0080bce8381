"""Open and write artifacts, whatever their container.

Opening reads the header and the manifest only. `artifact[name]` checks a tensor's digest before it hands
out a read-only memory map of it; `gather` reads single rows and checks nothing but their bounds.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from store import layout
from store.container import Blocks, Header, Location, row_blocks
from store.errors import (
    ArtifactDigestError,
    ArtifactFormatError,
    ArtifactNotFoundError,
    ArtifactWriteError,
    StoreError,
)
from store.manifest import MAX_MANIFEST_BYTES, Manifest, TensorInfo, parse_manifest

SUFFIXES = (".safetensors", ".h5", ".hdf5")


@dataclass(frozen=True)
class RowBlocks:
    """A tensor too large for memory: its rows come in blocks, in order, and are read once."""

    shape: tuple[int, ...]
    dtype: str
    blocks: Blocks


class Artifact:
    """An open artifact. Use it as a context manager; made by `open_artifact`.

    `manifest_sha256` names the whole artifact, since the digest of every tensor stands in the manifest.
    """

    def __init__(self, path: Path, manifest: Manifest, header: Header, identity: tuple[int, ...]) -> None:
        """Hold what `open_artifact` found; use that."""
        self.path = path
        self.manifest = manifest
        self.manifest_sha256 = header.manifest_sha256
        self._locations = header.locations
        self._identity = identity
        self._maps: dict[str, NDArray[Any]] = {}
        self._verified: set[str] = set()

    def __enter__(self) -> "Artifact":
        """Return the artifact itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Forget the memory maps; arrays that were handed out stay valid."""
        self._maps.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process without the memory maps, which would be pickled as arrays."""
        return {**self.__dict__, "_maps": {}}

    def __contains__(self, name: object) -> bool:
        """Tell whether the artifact has a tensor of this name."""
        return name in self.manifest.tensors

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a whole tensor, its digest checked at the first access.

        Args:
            name: e.g. `class/mean`.

        Returns:
            A read-only memory map of dtype and shape as the manifest says, little-endian.

        Raises:
            KeyError: the artifact has no such tensor.
            ArtifactDigestError: the bytes differ from the manifest's SHA-256.
            ArtifactFormatError: a value is not finite.
        """
        array = self._map(name)
        if name not in self._verified:
            self._verify(name, array)
            self._verified.add(name)
        return array

    def gather(self, name: str, rows: NDArray[np.integer]) -> NDArray[Any]:
        """Read some rows of a tensor; nothing else is read, and no digest is checked.

        Args:
            name: e.g. `sample/embedding`.
            rows: [R], each in 0…length−1, in any order, repeats allowed.

        Returns:
            [R, …], a copy.

        Raises:
            KeyError: the artifact has no such tensor.
            IndexError: a row is negative or beyond the last one.
        """
        array = self._map(name)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(array)):
            raise IndexError(f"{name} has rows 0 to {len(array) - 1}, asked for {rows.min()} to {rows.max()}")
        return np.asarray(array[rows])

    def find(self, keys: NDArray[np.uint8], labels: NDArray[np.integer]) -> NDArray[np.int64]:
        """Find the rows of (sample key, label) pairs.

        Args:
            keys: [N, 16] uint8 sample keys.
            labels: [N], class rows of this artifact.

        Returns:
            [N] int64: the row in `sample/*` of each pair, −1 where there is none.

        Raises:
            KeyError: the artifact has no samples.
        """
        stored_keys, stored_labels = self["sample/key"], self["sample/label"]
        # Rows are sorted by key, so big-endian prefixes are sorted too. Few keys share 64 bits: walk along those.
        prefixes = np.ascontiguousarray(stored_keys[:, :8]).view(">u8")[:, 0].astype(np.uint64)
        queries = np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0].astype(np.uint64)
        order = np.argsort(queries, kind="stable")
        row = np.searchsorted(prefixes, queries[order])
        found = np.full(len(queries), -1, np.int64)
        while len(order):
            inside = row < len(prefixes)
            order, row = order[inside], row[inside]
            candidate = prefixes[row] == queries[order]
            order, row = order[candidate], row[candidate]
            equal = (stored_keys[row] == keys[order]).all(axis=1) & (stored_labels[row] == labels[order])
            found[order[equal]] = row[equal]
            order, row = order[~equal], row[~equal] + 1
        return found

    def _map(self, name: str) -> NDArray[Any]:
        if name not in self.manifest.tensors:
            raise KeyError(f"{self.path.name} has no tensor {name!r}; it has {sorted(self.manifest.tensors)}")
        if name not in self._maps:
            place = self._locations[name]
            dtype = layout.numpy_dtype(place.dtype)
            with self.path.open("rb") as file:
                if _identity(os.fstat(file.fileno())) != self._identity:
                    raise ArtifactFormatError(f"{self.path.name}: was replaced while it was open. Open it again.")
                self._maps[name] = np.memmap(file, dtype, "r", place.offset, place.shape)
        return self._maps[name]

    def _verify(self, name: str, array: NDArray[Any]) -> None:
        digest = hashlib.sha256()
        for block in row_blocks(array):
            digest.update(np.ascontiguousarray(block).data)
            layout.check_finite(name, block, self.path.name)
        expected = self.manifest.tensors[name].sha256
        if digest.hexdigest() != expected:
            raise ArtifactDigestError(
                f"{self.path.name}: {name} has SHA-256 {digest.hexdigest()[:12]}…, the manifest says "
                f"{expected[:12]}…. The file is damaged: copy or extract it again."
            )


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact; header and manifest are checked, no tensor is read.

    Args:
        path: a `.safetensors`, `.h5` or `.hdf5` file.

    Returns:
        The artifact, to be used as a context manager.

    Raises:
        ArtifactNotFoundError: no such file, or no permission to read it.
        ArtifactFormatError: not a valid artifact (also version and digest errors, which are kinds of it).
    """
    path = Path(path)
    backend = backend_of(path)
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise ArtifactNotFoundError(f"{path}: artifact {what}. Make one with `clip-embed-kd extract`.")
        identity = _identity(path.stat())
        header = backend.read_header(path)
    except PermissionError:
        raise ArtifactNotFoundError(f"{path}: no permission to read the artifact.") from None
    manifest = parse_manifest(header.manifest, header.manifest_sha256, path.name)
    layout.check_layout(manifest, path.name)
    _check_agreement(manifest, header.locations, path.name)
    return Artifact(path, manifest, header, identity)


def write_artifact(
    path: str | os.PathLike[str],
    manifest: Manifest,
    tensors: Mapping[str, NDArray[Any] | RowBlocks],
    *,
    overwrite: bool = False,
) -> Manifest:
    """Write an artifact atomically: a temporary file in the same folder, fsync, rename.

    Args:
        path: a `.safetensors`, `.h5` or `.hdf5` file to make.
        manifest: everything but `tensors`, which is filled in from the data.
        tensors: arrays, or `RowBlocks` for rows that stream in.
        overwrite: replace an existing file; otherwise that is an error.

    Returns:
        The manifest as written, with dtypes, shapes and digests.

    Raises:
        ArtifactWriteError: the file exists, or cannot be written; nothing is left behind.
        ArtifactFormatError: the tensors are not those of the format, or hold NaN or infinity.
    """
    path = Path(path)
    backend = backend_of(path)
    if path.is_dir() or (path.exists() and not overwrite):
        what = (
            "is a folder. Choose another name."
            if path.is_dir()
            else "exists. Choose another file, or pass --overwrite."
        )
        raise ArtifactWriteError(f"{path}: {what}")
    infos = {name: TensorInfo(dtype=_dtype_name(data), shape=data.shape) for name, data in tensors.items()}
    manifest = manifest.model_copy(update={"tensors": infos})
    layout.check_layout(manifest, path.name)
    if len(manifest.to_bytes()) > MAX_MANIFEST_BYTES:
        raise ArtifactWriteError(f"{path}: the manifest is larger than {MAX_MANIFEST_BYTES} bytes.")
    blocks = {
        name: _guarded(data.blocks if isinstance(data, RowBlocks) else row_blocks(data))
        for name, data in tensors.items()
    }
    try:
        with _replacing(path) as temporary:
            written: Manifest = backend.write(temporary, manifest, blocks)
    except _SourceError as error:
        raise error.source from None
    return written


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


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _dtype_name(data: NDArray[Any] | RowBlocks) -> str:
    return data.dtype if isinstance(data.dtype, str) else data.dtype.name


def _check_agreement(manifest: Manifest, locations: Mapping[str, Location], where: str) -> None:
    if set(manifest.tensors) != set(locations):
        odd = sorted(set(manifest.tensors) ^ set(locations))[0]
        side = "manifest" if odd in manifest.tensors else "file"
        raise ArtifactFormatError(f"{where}: {odd!r} stands in the {side} only. The file is damaged: extract it again.")
    for name, info in manifest.tensors.items():
        place = locations[name]
        if (place.dtype, place.shape) != (info.dtype, info.shape):
            raise ArtifactFormatError(
                f"{where}: {name} is {place.dtype} {list(place.shape)}, the manifest says "
                f"{info.dtype} {list(info.shape)}. The file is damaged: extract it again."
            )


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


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with temporary.open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ArtifactWriteError(f"{path}: another process is writing it.") from None
            if not _is_same_file(lock, temporary):  # it was renamed or removed between open and flock
                raise ArtifactWriteError(f"{path}: another process is writing it.")
            try:
                yield temporary
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # h5py reports a full disk with RuntimeError
        reason = getattr(error, "strerror", None) or str(error)
        if inner := re.search(r"error message = '([^']+)'", reason):  # HDF5 buries the cause in its own trace
            reason = inner.group(1)
        reason = reason.splitlines()[0]
        raise ArtifactWriteError(f"{path}: cannot be written ({reason}).") from None


def _is_same_file(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
