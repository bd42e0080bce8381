"""The `.h5` container: one HDF5 data set a tensor, the manifest in a root attribute.

Tensors are only located here: readers map the file at a data set's offset, which gathers rows far faster
than h5py does. Data sets are contiguous; only sample embeddings may be gzip chunks instead. Anything else that
HDF5 can hold (links, other filters, external storage, object types) is refused.

The HDF5 library can crash on a hostile file, so it reads headers in a child process only.
"""

import functools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from store.container import Blocks, GzipChunks, Header, Location, block_rows, write_blocks
from store.errors import ArtifactFormatError
from store.flush import FlushBehind
from store.isolation import ChildError, run_isolated
from store.layout import COMPRESSIBLE, check_name, num_bytes, numpy_dtype
from store.manifest import MAX_MANIFEST_BYTES, Manifest, TensorInfo
from store.patient_file import PatientFile

_ALIGNMENT_BYTES = 64
# Object formats of HDF5 1.8: every reader since 2008 opens them, and attributes may be larger than 64 KiB.
_LIBVER = ("v108", "v108")
_DTYPE_NAMES = {numpy_dtype(name): name for name in ("float32", "float16", "int64", "int32", "int8", "uint8")}
_CHUNK_BYTES = 64 * 1024  # one random row costs one chunk: at 256 KiB, gathering takes four times as long
_MAX_CHUNK_BYTES = 16 * 1024 * 1024
_GZIP_LEVEL = 4
# Embeddings are noise to gzip: 1.1 to 1.3 times is usual, hundreds of times are zeros. Small tensors may be anything.
_MAX_RATIO, _ANY_RATIO_BYTES = 64, 16 * 1024 * 1024
_CPU_SECONDS, _CPU_SECONDS_PER_BYTE = 0.8, 1e-10  # headers take some hundredths; chunks have to be listed


def write(path: Path, manifest: Manifest, blocks: dict[str, Blocks], *, gzip: bool = False) -> Manifest:
    """Write an artifact to a new file, one block at a time.

    Args:
        path: the file to write; an existing one is truncated.
        manifest: its `tensors` give every dtype and shape; their digests are filled in.
        blocks: for each tensor its rows, in order.
        gzip: compress sample embeddings, in chunks of rows.

    Returns:
        The manifest with the digests.
    """
    stopped = Event()
    # HDF5 calls `PatientFile`, and must not meet the exception of Ctrl-C there: only the main thread gets that one.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hdf5") as thread:
        rows = {name: _until(stopped, of_one) for name, of_one in blocks.items()}
        try:
            return thread.submit(_write, path, manifest, rows, gzip=gzip).result()
        finally:
            stopped.set()


def read_header(path: Path) -> Header:
    """Read and check what the file holds, in a child process; tensors are only located.

    Args:
        path: an existing file.

    Returns:
        The raw manifest with its digest, and where each tensor lies.

    Raises:
        ArtifactFormatError: not an HDF5 file, or it holds what an artifact must not.
    """
    file_bytes = path.stat().st_size
    try:
        answer = run_isolated(
            functools.partial(_answer, path, file_bytes), _CPU_SECONDS + _CPU_SECONDS_PER_BYTE * file_bytes
        )
    except ChildError as error:
        raise ArtifactFormatError(
            f"{path.name}: the HDF5 library could not read it: {error}. The file is damaged or hostile: copy it again."
        ) from None
    line, _, rest = answer.partition(b"\n")
    document = json.loads(line)
    if "permission" in document:
        raise PermissionError
    if "error" in document:
        raise ArtifactFormatError(document["error"])
    return _decode_header(document, rest)


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


def _until(stopped: Event, blocks: Blocks) -> Iterator[NDArray[Any]]:
    for block in blocks:
        yield block
        if stopped.is_set():
            raise InterruptedError


def _write(path: Path, manifest: Manifest, blocks: Mapping[str, Blocks], *, gzip: bool) -> Manifest:
    with path.open("w+b", buffering=0) as raw:
        target = PatientFile(raw)
        with (
            FlushBehind(raw.fileno()) as flush,
            h5py.File(
                target,
                "w",
                libver=_LIBVER,
                alignment_threshold=_ALIGNMENT_BYTES,
                alignment_interval=_ALIGNMENT_BYTES,
            ) as file,
        ):
            tensors = {}
            for name in sorted(blocks):
                info = manifest.tensors[name]
                dataset = _create(file, name, info, compress=gzip and name in COMPRESSIBLE)
                sha256 = write_blocks(name, info, blocks[name], _Rows(dataset, target, flush))
                if dataset.chunks:
                    file.flush()
                    target.check()
                    _location(dataset, name, "artifact", sys.maxsize)  # what readers would refuse is not written
                tensors[name] = info.model_copy(update={"sha256": sha256})
            finished = manifest.model_copy(update={"tensors": tensors})
            file.attrs.create("manifest", np.bytes_(finished.to_bytes()))
            file.attrs.create("manifest_sha256", np.bytes_(finished.sha256().encode()))
        target.check()
        os.fsync(raw.fileno())
    return finished


class _Rows:
    """Write consecutive blocks into a data set."""

    def __init__(self, dataset: h5py.Dataset, target: PatientFile, flush: FlushBehind) -> None:
        self._dataset = dataset
        self._target = target
        self._flush = flush
        self._position = 0

    def __call__(self, block: NDArray[Any]) -> None:
        self._dataset[self._position : self._position + len(block)] = block
        self._target.check()
        self._position += len(block)
        self._flush.wrote(block.nbytes)


def _create(file: h5py.File, name: str, info: TensorInfo, *, compress: bool) -> h5py.Dataset:
    dtype = numpy_dtype(info.dtype)
    layout: dict[str, Any] = {}
    if compress:
        rows = min(info.shape[0], block_rows(info.shape, dtype, _CHUNK_BYTES))
        layout = {
            "chunks": (rows, *info.shape[1:]),
            "compression": "gzip",
            "compression_opts": _GZIP_LEVEL,
            "shuffle": dtype.itemsize > 1,  # in a trial 14 % of float16 noise rather than 8 %, and faster to inflate
        }
    return file.create_dataset(name, shape=info.shape, dtype=dtype, track_times=False, **layout)


def _answer(path: Path, file_bytes: int) -> bytes:
    """Encode what `parse` says as one line of JSON, the manifest and the spans of all chunks."""
    try:
        header = parse(path, file_bytes)
    except PermissionError:
        return b'{"permission":false}\n'
    except ArtifactFormatError as error:
        return json.dumps({"error": str(error)}).encode() + b"\n"
    document = {
        "manifest_bytes": len(header.manifest),
        "manifest_sha256": header.manifest_sha256,
        "tensors": [
            [name, place.dtype, place.shape, place.offset, _chunk_fields(place.chunks)]
            for name, place in header.locations.items()
        ],
    }
    spans = [place.chunks.spans.tobytes() for place in header.locations.values() if place.chunks]
    return b"".join([json.dumps(document).encode(), b"\n", header.manifest, *spans])


def _chunk_fields(chunks: GzipChunks | None) -> list[int] | None:
    return None if chunks is None else [chunks.rows, len(chunks.spans), chunks.shuffled]


def _decode_header(document: dict[str, Any], rest: bytes) -> Header:
    manifest = rest[: document["manifest_bytes"]]
    spans: NDArray[np.int64] = np.frombuffer(rest[len(manifest) :], "<i8").reshape(-1, 2)
    locations = {}
    for name, dtype, shape, offset, fields in document["tensors"]:
        chunks = None
        if fields is not None:
            rows, count, shuffled = fields
            chunks = GzipChunks(rows, spans[:count], shuffled)
            spans = spans[count:]
        locations[name] = Location(dtype, tuple(shape), offset, chunks)
    return Header(manifest, document["manifest_sha256"], locations)


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
            place = locations[name] = _location(dataset, name, where, file_bytes)
            stored_bytes += int(place.chunks.spans[:, 1].sum()) if place.chunks else int(dataset.nbytes)
            if stored_bytes > file_bytes:  # a small file could claim to be any size
                raise ArtifactFormatError(f"{where}: {name} overlaps other tensors. The file is damaged or hostile.")
    return locations


def _hard_link(group: h5py.Group, name: str, where: str, full_name: str | None = None) -> Any:
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ArtifactFormatError(f"{where}: {full_name or name} is a soft or external link, which is refused.")
    return group[name]


def _location(dataset: h5py.Dataset, name: str, where: str, file_bytes: int) -> Location:
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
