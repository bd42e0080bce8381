"""One entry of the image cache: a folder of raw arrays, named by what decided them.

    pixels      [N, V, size, size, 3] uint8
    keys        [N, 16] uint8
    rows        [N] int64, little-endian, ascending: the rows of the split that could be decoded
    entry.json  what decided the content, N, and the SHA-256 of each file; written last: without it there is no entry
    lock        held by who writes; stays, else somebody could wait for a lock that nobody sees any more

No file is changed once it has its name, so that processes that have mapped it see what they checked.
"""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.distill.decoding import Block
from pipeline.errors import PipelineError, first_line
from pipeline.folder_lock import FolderLock
from pipeline.progress import ProgressBar, size

_INDEX = "entry.json"
_ARRAYS = ("pixels", "keys", "rows")
_MAX_INDEX_BYTES = 64 * 1024
_HASHED_BYTES = 1_000_000  # at a time: the bar counts megabytes
_BYTES_WITHOUT_BAR = 1_000_000_000  # fewer are hashed in a second


class DamagedEntryError(Exception):
    """An entry that is not as it was written, or not of these images; its text says what is wrong."""


@dataclass(frozen=True)
class Stored:
    """What an entry holds, mapped read-only: `pixels` [N, V, size, size, 3], `keys` [N, 16], `rows` [N]."""

    pixels: NDArray[np.uint8]
    keys: NDArray[np.uint8]
    rows: NDArray[np.int64]


class _Index(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    content: dict[str, Any]
    num_images: int = Field(ge=1)
    sha256: dict[str, str]


class CacheEntry:
    """An entry that may be there or not."""

    def __init__(self, cache: Path, content: Mapping[str, Any], num_rows: int, shape: tuple[int, ...]) -> None:
        """Name the entry; nothing is touched.

        Args:
            cache: folder of all entries.
            content: all that decides what the entry holds, as plain JSON.
            num_rows: of the split.
            shape: (V, size, size, 3), of one image's pixels.
        """
        self._content, self._num_rows, self._shape = dict(content), num_rows, shape
        name = hashlib.sha256(json.dumps(self._content, sort_keys=True).encode()).hexdigest()[:32]
        self._cache, self.folder = cache, cache / name
        self._lock = _lock(self.folder)

    def read(self) -> Stored | None:
        """Map the entry, every byte of it checked.

        Returns:
            What it holds; none where it is not there.

        Raises:
            DamagedEntryError: it is not as it was written.
        """
        try:
            with (self.folder / _INDEX).open("rb") as file:
                index = _Index.model_validate_json(file.read(_MAX_INDEX_BYTES))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DamagedEntryError(f"{_INDEX} cannot be read: {error.strerror}") from None
        except ValidationError:
            raise DamagedEntryError(f"{_INDEX} is not what was written") from None
        if index.content != self._content or index.num_images > self._num_rows or set(index.sha256) != set(_ARRAYS):
            raise DamagedEntryError(f"{_INDEX} describes other images")
        rows = self._map("rows", (index.num_images,), "<i8", index.sha256["rows"])
        if rows[0] < 0 or rows[-1] >= self._num_rows or (np.diff(rows) < 1).any():
            raise DamagedEntryError("rows are not rows of this split")
        keys = self._map("keys", (index.num_images, 16), "u1", index.sha256["keys"])
        pixels = self._map("pixels", (index.num_images, *self._shape), "u1", index.sha256["pixels"])
        return Stored(pixels, keys, rows)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Have the entry to oneself, after waiting for another process if need be.

        Leftovers of processes that were killed, here or in other entries, are removed.

        Raises:
            PipelineError: the cache cannot be written to, as anything that the body does may find.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.wait()
            try:
                _remove_leftovers(self._cache)
                yield
            finally:
                self._lock.release()
        except OSError as error:
            raise PipelineError(
                f"{self._cache}: decoded images cannot be kept there ({error.strerror or first_line(error)}). "
                "Choose another folder with --cache."
            ) from None

    def make_room(self) -> None:
        """Remove what is there of the entry, inside `writing`.

        Raises:
            OSError: it cannot be removed.
            PipelineError: the disk is too full for what is to be written.
        """
        _clear(self.folder, self._lock)
        needed = self._num_rows * (int(np.prod(self._shape)) + 24)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise PipelineError(
                f"{self._cache}: about {size(needed)} are needed for decoded images, {size(free)} are free. Make room "
                "or choose another folder with --cache."
            )

    def write(self, blocks: Iterable[Block]) -> None:
        """Make the entry, inside `writing`.

        Args:
            blocks: all rows of the split; one of them at least could be decoded.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        keys: list[NDArray[np.uint8]] = []
        rows: list[NDArray[np.int64]] = []

        def pixels() -> Iterator[NDArray[np.uint8]]:
            for block in blocks:
                keys.append(block.keys)
                rows.append(block.rows)
                yield block.pixels

        try:
            sha256 = {"pixels": self._write("pixels", pixels())}
            sha256 |= {"keys": self._write("keys", keys), "rows": self._write("rows", rows)}
            index = _Index(content=self._content, num_images=sum(map(len, rows)), sha256=sha256)
            self._write(_INDEX, [np.frombuffer(index.model_dump_json(indent=2).encode(), np.uint8)])
        except BaseException:
            with suppress(OSError):
                _clear(self.folder, self._lock)
            raise

    def read_back(self) -> Stored:
        """Map what has just been written, inside `writing`.

        Returns:
            What it holds.

        Raises:
            OSError: the disk does not give back what it was given, or somebody removed it.
        """
        try:
            if (stored := self.read()) is not None:
                return stored
            lost = "it was removed at once"
        except DamagedEntryError as error:
            lost = str(error)
        raise OSError(lost)

    def _write(self, name: str, arrays: Iterable[NDArray[Any]]) -> str:
        # The process is named for disks without locks: two writers of the same bytes do no harm.
        temporary = self.folder / f"{name}{_own_ending()}"
        digest = hashlib.sha256()
        with temporary.open("wb") as file:
            for array in arrays:
                if array.size:
                    file.write(array.data)
                    digest.update(array.data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / name)
        return digest.hexdigest()

    def _map(self, name: str, shape: tuple[int, ...], dtype: DTypeLike, sha256: str) -> NDArray[Any]:
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            with (self.folder / name).open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != num_bytes:
                    raise DamagedEntryError(f"{name} has {found} bytes, expected {num_bytes}")
                if _sha256(file, num_bytes) != sha256:
                    raise DamagedEntryError(f"{name} has another SHA-256 than when it was written")
                return np.memmap(file, dtype, "r", shape=shape)
        except OSError as error:
            raise DamagedEntryError(f"{name} cannot be read: {error.strerror}") from None


def _sha256(file: IO[bytes], num_bytes: int) -> str:
    digest = hashlib.sha256()
    bar = (
        ProgressBar("checking the image cache", num_bytes // _HASHED_BYTES, "MB")
        if num_bytes > _BYTES_WITHOUT_BAR
        else None
    )
    with bar or nullcontext():
        while part := file.read(_HASHED_BYTES):
            digest.update(part)
            if bar is not None:
                bar.advance(len(part) // _HASHED_BYTES)
    return digest.hexdigest()


def _own_ending() -> str:
    """Name this process: hosts that share a disk may have processes of the same number."""
    return f".{re.sub('[^0-9A-Za-z-]', '-', platform.node())}.{os.getpid()}.tmp"


def _lock(folder: Path) -> FolderLock:
    return FolderLock(folder, f"Another process decodes the same images into {folder}: waiting for it.")


def _remove_leftovers(cache: Path) -> None:
    for folder in cache.iterdir():
        # Somebody may have chosen a folder with other things in it.
        if re.fullmatch(r"[0-9a-f]{32}", folder.name) and not (folder / _INDEX).exists():
            lock = _lock(folder)
            with suppress(OSError, PipelineError):  # PipelineError: another process is at work in it
                lock.take()
                if lock.held and not (folder / _INDEX).exists():  # it may have been finished just now
                    _clear(folder, lock)
            lock.release()


def _clear(folder: Path, lock: FolderLock) -> None:
    """Remove what an entry is made of, and first what makes it one; the lock stays.

    On a disk without locks another process may be writing here: its unfinished files stay, too.
    """
    unfinished = folder.glob("*.tmp" if lock.held else f"*{_own_ending()}")
    for path in (folder / _INDEX, *map(folder.joinpath, _ARRAYS), *unfinished):
        path.unlink(missing_ok=True)
