"""The `.safetensors` container: header first, then the tensors without gaps.

Layout (the public safetensors format): u64 little-endian header length, a JSON header padded with spaces
to 8 bytes, then the data. Reading is strict, because a file may come from a stranger; nothing but the
header is read here.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from store.container import Blocks, Header, Location, write_blocks
from store.errors import ArtifactFormatError
from store.flush import FlushBehind
from store.layout import MAX_AXES, check_name, num_bytes, numpy_dtype
from store.manifest import MAX_MANIFEST_BYTES, Manifest, TensorInfo
from store.strict_json import parse_json

_DTYPE_CODES = {
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
}
_DTYPE_NAMES = {code: name for name, code in _DTYPE_CODES.items()}
_MAX_HEADER_BYTES = 2 * MAX_MANIFEST_BYTES + 1024 * 1024  # the manifest is escaped inside the header


def write(path: Path, manifest: Manifest, blocks: dict[str, Blocks]) -> Manifest:
    """Write an artifact to a new file, one block at a time.

    Args:
        path: the file to write; an existing one is truncated.
        manifest: its `tensors` give every dtype and shape; their digests are filled in.
        blocks: for each tensor its rows, in order.

    Returns:
        The manifest with the digests.
    """
    order = sorted(blocks, key=lambda name: (-numpy_dtype(manifest.tensors[name].dtype).itemsize, name))
    with path.open("wb") as file, FlushBehind(file.fileno()) as flush:
        # Digests have a fixed width: the header is written now and overwritten, in place, when they are known.
        header = _encode_header(manifest, order)
        file.write(header)
        digests = {
            name: write_blocks(name, manifest.tensors[name], blocks[name], _writer(file, flush)) for name in order
        }
        finished = manifest.model_copy(update={"tensors": _with_digests(manifest.tensors, digests)})
        file.seek(0)
        file.write(_encode_header(finished, order))
        file.flush()
        os.fsync(file.fileno())
    return finished


def read_header(path: Path) -> Header:
    """Read and check the header of an artifact; tensors are only located.

    Args:
        path: an existing file.

    Returns:
        The raw manifest with its digest, and where each tensor lies.

    Raises:
        ArtifactFormatError: the header is not that of a valid safetensors artifact.
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_bytes = _header_length(file, file_bytes, path.name)
        document = parse_json(file.read(header_bytes), path.name)
    metadata = document.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactFormatError(f"{path.name}: no __metadata__ of strings in the header. Not an artifact.")
    if not {"manifest", "manifest_sha256"} <= set(metadata):
        raise ArtifactFormatError(f"{path.name}: the header has no manifest. A safetensors file, but not an artifact.")
    return Header(
        manifest=metadata["manifest"].encode("utf-8", "surrogatepass"),
        manifest_sha256=metadata["manifest_sha256"],
        locations=_locate(document, 8 + header_bytes, file_bytes, path.name),
    )


def _writer(file: BinaryIO, flush: FlushBehind) -> Callable[[NDArray[Any]], object]:
    return lambda block: flush.wrote(file.write(block.reshape(-1).view(np.uint8).data))


def _encode_header(manifest: Manifest, order: list[str]) -> bytes:
    raw = manifest.to_bytes()
    document: dict[str, Any] = {"__metadata__": {"manifest": raw.decode("utf-8"), "manifest_sha256": manifest.sha256()}}
    start = 0
    for name in order:
        info = manifest.tensors[name]
        stop = start + num_bytes(info)
        document[name] = {
            "dtype": _DTYPE_CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _with_digests(tensors: dict[str, TensorInfo], digests: dict[str, str]) -> dict[str, TensorInfo]:
    return {name: info.model_copy(update={"sha256": digests[name]}) for name, info in tensors.items()}


def _header_length(file: BinaryIO, file_bytes: int, where: str) -> int:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > file_bytes - 8:
        raise ArtifactFormatError(
            f"{where}: the header should have {length} bytes, the file has {file_bytes}. "
            "It is cut off or not a safetensors file: copy it again."
        )
    if length > _MAX_HEADER_BYTES:
        raise ArtifactFormatError(f"{where}: the header has {length} bytes, at most {_MAX_HEADER_BYTES} are read.")
    return length


def _locate(document: dict[str, Any], data_start: int, file_bytes: int, where: str) -> dict[str, Location]:
    locations: dict[str, Location] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in document.items():
        check_name(name, where)
        info, begin, end = _parse_entry(name, entry, where)
        if end - begin != num_bytes(info):
            raise ArtifactFormatError(
                f"{where}: {name} lies in {end - begin} bytes, {info.dtype} {list(info.shape)} "
                f"needs {num_bytes(info)}. The file is damaged: copy or extract it again."
            )
        spans.append((begin, end, name))
        locations[name] = Location(info.dtype, info.shape, data_start + begin)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ArtifactFormatError(
                f"{where}: {name} begins at byte {begin} of the data, expected {position} (no gap, no overlap)."
            )
        position = end
    if data_start + position != file_bytes:
        raise ArtifactFormatError(
            f"{where}: the file has {file_bytes} bytes, its header describes {data_start + position}. "
            "It is cut off or was appended to: copy it again."
        )
    return locations


def _parse_entry(name: str, entry: Any, where: str) -> tuple[TensorInfo, int, int]:
    problem = ArtifactFormatError(
        f"{where}: header entry {name!r} is not dtype, shape and data_offsets of a tensor of the format."
    )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise problem
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_NAMES:
        raise problem
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise problem
    return TensorInfo(dtype=_DTYPE_NAMES[dtype], shape=tuple(shape)), offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= MAX_AXES
        and all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 for value in values)
    )
