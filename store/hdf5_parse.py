"""What an HDF5 file says of its tensors, checked; by the HDF5 library, which can crash on a hostile file.

Only what an artifact may be is let through: tensors that are contiguous, or sample embeddings in gzip chunks. Anything
else that HDF5 can hold (links, other filters, external storage, object types) is refused.
"""

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from store.container import GzipChunks, Header, Location
from store.errors import ArtifactFormatError
from store.layout import COMPRESSIBLE, check_name, num_bytes, numpy_dtype
from store.manifest import MAX_MANIFEST_BYTES, TensorInfo

_DTYPE_NAMES = {numpy_dtype(name): name for name in ("float32", "float16", "int64", "int32", "int8", "uint8")}
_MAX_CHUNK_BYTES = 16 * 1024 * 1024
# Embeddings are noise to gzip: 1.1 to 1.3 times is usual, hundreds of times are zeros. Small tensors may be anything.
_MAX_RATIO, _ANY_RATIO_BYTES = 64, 16 * 1024 * 1024


def parse(path: Path, file_bytes: int) -> Header:
    """Read and check what the file holds, in this process: the HDF5 library may crash.

    Args:
        path: an existing file.
        file_bytes: its size.

    Returns:
        As `read_header`.

    Raises:
        ArtifactFormatError: not an HDF5 file, or it holds what an artifact must not.
        PermissionError: it may not be read.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            return Header(
                manifest=_attribute(file, "manifest", path.name),
                manifest_sha256=_attribute(file, "manifest_sha256", path.name).decode("ascii", "replace"),
                locations=_locate(file, path.name, file_bytes),
            )
    except (ArtifactFormatError, PermissionError):
        raise
    except Exception as error:  # the HDF5 library reports damage with whatever comes to hand
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactFormatError(
            f"{path.name}: not a readable HDF5 file ({reason}). It is cut off or damaged: copy it again."
        ) from None


def locate(dataset: h5py.Dataset, name: str, where: str, file_bytes: int) -> Location:
    """Find where the bytes of one data set are, and refuse what no tensor is.

    Args:
        dataset: of an open file.
        name: of the tensor.
        where: file name, for messages.
        file_bytes: size of the file.

    Returns:
        Type, shape and place.

    Raises:
        ArtifactFormatError: another type, other filters than gzip, or a place outside the file.
    """
    dtype = _DTYPE_NAMES.get(dataset.dtype)
    if dtype is None:
        raise ArtifactFormatError(f"{where}: {name} has type {dataset.dtype}, which no tensor has.")
    info = TensorInfo(dtype=dtype, shape=tuple(int(length) for length in dataset.shape))
    settings = dataset.id.get_create_plist()
    if settings.get_layout() == h5py.h5d.CHUNKED and name in COMPRESSIBLE:
        chunks = _gzip_chunks(dataset, info, name, where)
        _check_chunks(chunks, info, name, where, file_bytes)
        return Location(info.dtype, info.shape, 0, chunks)
    if settings.get_layout() != h5py.h5d.CONTIGUOUS or settings.get_external_count() or settings.get_nfilters():
        raise ArtifactFormatError(
            f"{where}: {name} is neither contiguous in this file nor, as sample embeddings may be, in gzip chunks."
        )
    offset = dataset.id.get_offset()
    if offset is None or offset + num_bytes(info) > file_bytes:
        raise ArtifactFormatError(
            f"{where}: {name} ends beyond the end of the file ({file_bytes} bytes). It is cut off: copy it again."
        )
    return Location(info.dtype, info.shape, int(offset))


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


def _locate(file: h5py.File, where: str, file_bytes: int) -> dict[str, Location]:
    locations: dict[str, Location] = {}
    stored_bytes = 0
    for group_name in file:
        group = _hard_link(file, group_name, where)
        if not isinstance(group, h5py.Group):
            raise ArtifactFormatError(f"{where}: {group_name} is not a group of tensors.")
        for leaf in group:
            name = f"{group_name}/{leaf}"
            check_name(name, where)
            dataset = _hard_link(group, leaf, where, name)
            if not isinstance(dataset, h5py.Dataset):
                raise ArtifactFormatError(f"{where}: {name} is not a data set.")
            place = locations[name] = locate(dataset, name, where, file_bytes)
            stored_bytes += int(place.chunks.spans[:, 1].sum()) if place.chunks else int(dataset.nbytes)
            if stored_bytes > file_bytes:  # a small file could claim to be any size
                raise ArtifactFormatError(f"{where}: {name} overlaps other tensors. The file is damaged or hostile.")
    return locations


def _hard_link(group: h5py.Group, name: str, where: str, full_name: str | None = None) -> Any:
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ArtifactFormatError(f"{where}: {full_name or name} is a soft or external link, which is refused.")
    return group[name]


def _gzip_chunks(dataset: h5py.Dataset, info: TensorInfo, name: str, where: str) -> GzipChunks:
    settings = dataset.id.get_create_plist()
    filters = [settings.get_filter(index)[0] for index in range(settings.get_nfilters())]
    shapes = dataset.chunks, dataset.maxshape
    if filters not in ([h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE]):
        raise ArtifactFormatError(f"{where}: {name} has HDF5 filters {filters}, expected gzip, or shuffle and gzip.")
    if not info.shape or shapes != ((dataset.chunks[0], *info.shape[1:]), info.shape):
        raise ArtifactFormatError(f"{where}: {name} has chunks of {shapes[0]} in {list(info.shape)}, not whole rows.")
    rows = int(dataset.chunks[0])
    found: dict[int, tuple[int, int]] = {}

    def note(chunk: Any) -> None:
        if chunk.filter_mask or any(chunk.chunk_offset[1:]):
            raise ArtifactFormatError(f"{where}: {name} has a chunk that is not gzip, or not whole rows.")
        found[chunk.chunk_offset[0] // rows] = (chunk.byte_offset, chunk.size)

    dataset.id.chunk_iter(note)
    num_chunks = -(-info.shape[0] // rows)
    if len(found) != num_chunks or sorted(found) != list(range(num_chunks)):  # the first: it may be 2**62
        raise ArtifactFormatError(f"{where}: {name} has {len(found)} chunks, {num_chunks} are needed.")
    spans = np.array([found[index] for index in range(num_chunks)], "<i8").reshape(-1, 2)
    return GzipChunks(rows, spans, shuffled=len(filters) > 1)


def _check_chunks(chunks: GzipChunks, info: TensorInfo, name: str, where: str, file_bytes: int) -> None:
    chunk_bytes = chunks.rows * numpy_dtype(info.dtype).itemsize * math.prod(info.shape[1:])
    offsets, sizes = chunks.spans[:, 0], chunks.spans[:, 1]
    if len(sizes) and sizes.max() > 2 * _MAX_CHUNK_BYTES:
        raise ArtifactFormatError(
            f"{where}: {name} has a chunk of {sizes.max()} bytes, at most {2 * _MAX_CHUNK_BYTES} are read."
        )
    if chunk_bytes > _MAX_CHUNK_BYTES:
        raise ArtifactFormatError(
            f"{where}: {name} has chunks of {chunk_bytes} bytes, at most {_MAX_CHUNK_BYTES} are read."
        )
    if len(sizes) and (min(offsets.min(), sizes.min()) < 0 or (sizes > file_bytes - offsets).any()):
        raise ArtifactFormatError(
            f"{where}: {name} ends beyond the end of the file ({file_bytes} bytes). It is cut off: copy it again."
        )
    order = np.argsort(offsets)
    if (offsets[order][1:] < (offsets + sizes)[order][:-1]).any():  # a small file could claim any size
        raise ArtifactFormatError(f"{where}: {name} has chunks that overlap. The file is damaged or hostile.")
    plain_bytes, stored_bytes = chunk_bytes * len(sizes), int(sizes.sum())
    if plain_bytes > _ANY_RATIO_BYTES and plain_bytes > _MAX_RATIO * stored_bytes:
        raise ArtifactFormatError(
            f"{where}: {name} would grow from {stored_bytes} to {plain_bytes} bytes, as no embeddings do: a "
            "compression bomb, or to be stored without gzip."
        )
