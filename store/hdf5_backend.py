"""The `.h5` container: one contiguous HDF5 data set a tensor, the manifest in a root attribute.

Tensors are only located here: readers map the file at a data set's offset, which gathers rows far faster
than h5py does, and takes no HDF5 object into worker processes. Anything else that HDF5 can hold (links,
filters, external storage, object types) is refused.
"""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from store.container import Blocks, Header, Location, hash_blocks
from store.errors import ArtifactFormatError
from store.layout import check_name, numpy_dtype
from store.manifest import MAX_MANIFEST_BYTES, Manifest

_ALIGNMENT_BYTES = 64
# Object formats of HDF5 1.8: every reader since 2008 opens them, and attributes may be larger than 64 KiB.
_LIBVER = ("v108", "v108")
_DTYPE_NAMES = {numpy_dtype(name): name for name in ("float32", "float16", "int64", "int32", "int8", "uint8")}


def write(path: Path, manifest: Manifest, blocks: dict[str, Blocks]) -> Manifest:
    """Write an artifact to a new file, one block at a time.

    Args:
        path: the file to write; an existing one is truncated.
        manifest: its `tensors` give every dtype and shape; their digests are filled in.
        blocks: for each tensor its rows, in order.

    Returns:
        The manifest with the digests.
    """
    with h5py.File(
        path,
        "w",
        libver=_LIBVER,
        locking=False,
        alignment_threshold=_ALIGNMENT_BYTES,
        alignment_interval=_ALIGNMENT_BYTES,
    ) as file:
        tensors = {}
        for name in sorted(blocks):
            info = manifest.tensors[name]
            dataset = file.create_dataset(name, shape=info.shape, dtype=numpy_dtype(info.dtype), track_times=False)
            sha256 = hash_blocks(name, info, blocks[name], _Rows(dataset))
            tensors[name] = info.model_copy(update={"sha256": sha256})
        finished = manifest.model_copy(update={"tensors": tensors})
        file.attrs.create("manifest", np.bytes_(finished.to_bytes()))
        file.attrs.create("manifest_sha256", np.bytes_(finished.sha256().encode()))
    with path.open("rb+") as written:
        os.fsync(written.fileno())
    return finished


def read_header(path: Path) -> Header:
    """Read and check what the file holds; tensors are only located.

    Args:
        path: an existing file.

    Returns:
        The raw manifest with its digest, and where each tensor lies.

    Raises:
        ArtifactFormatError: not an HDF5 file, or it holds what an artifact must not.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            return Header(
                manifest=_attribute(file, "manifest", path.name),
                manifest_sha256=_attribute(file, "manifest_sha256", path.name).decode("ascii", "replace"),
                locations=_locate(file, path),
            )
    except PermissionError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        # The HDF5 library reports damage with any of these.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactFormatError(
            f"{path.name}: not a readable HDF5 file ({reason}). It is cut off or damaged: copy it again."
        ) from None


class _Rows:
    """Write consecutive blocks of bytes into a data set."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset = dataset
        self._row_shape = dataset.shape[1:]
        self._position = 0

    def __call__(self, data: bytes) -> None:
        block: NDArray[Any] = np.frombuffer(data, self._dataset.dtype).reshape(-1, *self._row_shape)
        self._dataset[self._position : self._position + len(block)] = block
        self._position += len(block)


def _attribute(file: h5py.File, name: str, where: str) -> bytes:
    encoded = name.encode()
    if not h5py.h5a.exists(file.id, encoded):
        raise ArtifactFormatError(f"{where}: no root attribute {name}. An HDF5 file, but not an artifact.")
    attribute = h5py.h5a.open(file.id, encoded)
    kind = attribute.get_type()
    if kind.get_class() != h5py.h5t.STRING or kind.is_variable_str() or attribute.shape != ():
        raise ArtifactFormatError(f"{where}: attribute {name} is not one string of fixed length.")
    if kind.get_size() > MAX_MANIFEST_BYTES:
        raise ArtifactFormatError(
            f"{where}: attribute {name} has {kind.get_size()} bytes, at most {MAX_MANIFEST_BYTES} are read."
        )
    buffer = np.empty((), f"S{kind.get_size()}")
    attribute.read(buffer, mtype=kind)  # as stored: HDF5 does not convert between character sets
    return bytes(buffer.item())


def _locate(file: h5py.File, path: Path) -> dict[str, Location]:
    file_bytes = path.stat().st_size
    locations: dict[str, Location] = {}
    for group_name in file:
        group = _hard_link(file, group_name, path.name)
        if not isinstance(group, h5py.Group):
            raise ArtifactFormatError(f"{path.name}: {group_name} is not a group of tensors.")
        for leaf in group:
            name = f"{group_name}/{leaf}"
            check_name(name, path.name)
            dataset = _hard_link(group, leaf, path.name, name)
            if not isinstance(dataset, h5py.Dataset):
                raise ArtifactFormatError(f"{path.name}: {name} is not a data set.")
            locations[name] = _location(dataset, name, path.name, file_bytes)
    return locations


def _hard_link(group: h5py.Group, name: str, where: str, full_name: str | None = None) -> Any:
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ArtifactFormatError(f"{where}: {full_name or name} is a soft or external link, which is refused.")
    return group[name]


def _location(dataset: h5py.Dataset, name: str, where: str, file_bytes: int) -> Location:
    settings = dataset.id.get_create_plist()
    if settings.get_layout() != h5py.h5d.CONTIGUOUS or settings.get_external_count() or settings.get_nfilters():
        raise ArtifactFormatError(
            f"{where}: {name} is not stored contiguously in this file without filters, as artifacts are."
        )
    dtype = _DTYPE_NAMES.get(dataset.dtype)
    if dtype is None:
        raise ArtifactFormatError(f"{where}: {name} has type {dataset.dtype}, which no tensor has.")
    shape = tuple(int(length) for length in dataset.shape)
    offset = dataset.id.get_offset()
    num_bytes = numpy_dtype(dtype).itemsize
    for length in shape:
        num_bytes *= length
    if offset is None or offset + num_bytes > file_bytes:
        raise ArtifactFormatError(
            f"{where}: {name} ends beyond the end of the file ({file_bytes} bytes). It is cut off: copy it again."
        )
    return Location(dtype, shape, int(offset))
