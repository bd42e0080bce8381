"""The `.h5` container: one HDF5 data set a tensor, the manifest in a root attribute.

Tensors are only located here: readers map the file at a data set's offset, which gathers rows far faster
than h5py does. Data sets are contiguous; only sample embeddings may be gzip chunks instead.

The HDF5 library can crash on a hostile file, so it reads headers in a child process only.
"""

import functools
import json
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
from store.hdf5_parse import locate, parse
from store.isolation import ChildError, run_isolated
from store.layout import COMPRESSIBLE, numpy_dtype
from store.manifest import Manifest, TensorInfo
from store.patient_file import PatientFile

_ALIGNMENT_BYTES = 64
# Object formats of HDF5 1.8: every reader since 2008 opens them, and attributes may be larger than 64 KiB.
_LIBVER = ("v108", "v108")
_CHUNK_BYTES = 64 * 1024  # one random row costs one chunk: at 256 KiB, gathering takes four times as long
_GZIP_LEVEL = 4
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
                    locate(dataset, name, "artifact", sys.maxsize)  # what readers would refuse is not written
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
