"""What an extraction has finished so far: a folder of chunks beside the artifact, and the settings behind them.

A chunk is a run of batches, cut before any process is told of it, so that its bytes depend neither on how often an
extraction was interrupted nor on how many processes share it. Every chunk is written whole (temporary file,
fsync, rename) and named by its own SHA-256, so that a damaged one is found and made again. Who is asked to stop leaves
the chunk in hand as begun, with so many of its batches.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError, describe_differences, first_line
from pipeline.folder_lock import LOCK_NAME, FolderLock
from pipeline.output import write_atomically

PARTIAL_VERSION = 1
_SETTINGS = "settings.json"
_UNFINISHED = re.compile(r"\.settings\.json\.(\d+\.)?tmp")
_ASSEMBLED = "assembled"
_FINISHED = re.compile(r"(\d{8})-([0-9a-f]{64})\.npy")
_BEGUN = re.compile(r"(\d{8})-(\d+)-([0-9a-f]{64})\.begun\.npy")
_MAX_SETTINGS_BYTES = 1024 * 1024

Chunk = NDArray[np.void]


def chunk_dtype(views: int, embed_dim: int) -> np.dtype[np.void]:
    """Return the type of one embedded image: its row in the data set, sample key, class row, and embeddings.

    Embeddings are float32 whatever the artifact will hold: statistics and head are made of these.
    """
    return np.dtype([("row", "<i8"), ("key", "u1", (16,)), ("label", "<i8"), ("embedding", "<f4", (views, embed_dim))])


def partial_path(out: Path) -> Path:
    """Return the folder of an artifact's finished chunks: `OUT.partial`."""
    return out.with_name(out.name + ".partial")


class PartialFolder:
    """The finished chunks of one extraction."""

    def __init__(self, path: Path, what: str = "extraction") -> None:
        """Name the folder; nothing is touched.

        Args:
            path: of the folder.
            what: is not finished, for messages.
        """
        self.path, self._what = path, what
        self.is_open = False
        self._lock = FolderLock(path, f"{path}: another {what} is at work in it. Wait for it, or choose another --out.")

    def open(self, settings: Mapping[str, Any], *, overwrite: bool) -> int:
        """Make the folder, or take up one that was made with the same settings.

        Args:
            settings: all that decides what the chunks contain, as plain JSON.
            overwrite: throw away what other settings left.

        Returns:
            How many finished chunks stand in it.

        Raises:
            PipelineError: other settings made it, or another version of the program; the fields that differ are named.
        """
        wanted = {"partial_version": PARTIAL_VERSION, **settings}
        if self.path.exists() and not self._is_new():
            found = self._read_settings()
            if "partial_version" not in found:
                raise PipelineError(
                    f"{self.path}: is in the way: no {self._what} made it. Move it, or choose another --out."
                )
            self._lock.take()
            if not (differing := describe_differences(found, wanted)):
                self.is_open = True
                for leftover in self.path.glob(".*.tmp"):
                    leftover.unlink(missing_ok=True)
                return len(self.finished())
            if not overwrite:
                raise PipelineError(
                    f"{self.path}: an interrupted {self._what} with other settings ({'; '.join(differing[:3])}). "
                    "Give the same command to go on with it, or pass --overwrite to start anew."
                )
            self.remove()
        self.path.mkdir(exist_ok=True)
        self._lock.take()
        self.is_open = True
        write_atomically(self.path / _SETTINGS, json.dumps(wanted, indent=2, sort_keys=True).encode())
        return 0

    def join(self, settings: Mapping[str, Any]) -> None:
        """Check that the folder that another process opened is this one's, too.

        Args:
            settings: as for `open`.

        Raises:
            PipelineError: it is not here, or that process sees another teacher or other data.
        """
        if not self.path.exists():
            raise PipelineError(
                f"{self.path}: is not on this machine. Processes on several machines need --out in a folder that all "
                "of them share."
            )
        differing = describe_differences(self._read_settings(), {"partial_version": PARTIAL_VERSION, **settings})
        if differing:
            raise PipelineError(
                f"{self.path}: this process does not see what the first one sees ({'; '.join(differing[:3])}). Give "
                "all of them the same teacher, data and versions."
            )

    def finished(self) -> dict[int, Path]:
        """Return the file of every finished chunk, by its index."""
        named = {path: _FINISHED.fullmatch(path.name) for path in sorted(self.path.iterdir())}
        return {int(match.group(1)): path for path, match in named.items() if match}

    def begun(self) -> dict[int, tuple[int, Path]]:
        """Return how many batches of a chunk that is not finished are saved, and where, by its index."""
        named = {path: _BEGUN.fullmatch(path.name) for path in sorted(self.path.iterdir())}
        return {int(match.group(1)): (int(match.group(2)), path) for path, match in named.items() if match}

    def save(self, index: int, chunk: Chunk, begun: int | None = None) -> None:
        """Write a chunk.

        Args:
            index: which chunk.
            chunk: [R] of `chunk_dtype`; may be empty, where no image could be decoded.
            begun: how many batches these are, of a chunk that is not finished.

        Raises:
            PipelineError: the disk is full or cannot be written to.
        """
        digest = hashlib.sha256(chunk.tobytes()).hexdigest()
        name = f"{index:08d}-{digest}.npy" if begun is None else f"{index:08d}-{begun}-{digest}.begun.npy"
        temporary = self.path / f".{index:08d}-{os.getpid()}.tmp"
        older = [path for other, (_, path) in self.begun().items() if other == index]
        try:
            with temporary.open("wb") as file:
                np.save(file, chunk, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise PipelineError(
                f"{self.path}: cannot be written to ({error.strerror or first_line(error)}). What is finished stays: "
                "make room, and give the same command again."
            ) from None
        for path in older:
            if path.name != name:
                path.unlink(missing_ok=True)

    def read(self, path: Path, dtype: np.dtype[np.void]) -> Chunk | None:
        """Map a chunk.

        Args:
            path: its file.
            dtype: of one of its records.

        Returns:
            [R], read-only; none where the chunk is damaged, in which case it is removed.
        """
        try:
            chunk: Chunk = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            return None
        except OSError as error:  # the machine's fault, not the file's
            raise PipelineError(
                f"{path}: cannot be read ({error.strerror or first_line(error)}). Nothing was removed: give the same "
                "command again."
            ) from None
        except (ValueError, EOFError):
            chunk = np.empty(0, "V1")
        digest = path.name.split(".")[0].rpartition("-")[2]
        if chunk.dtype != dtype or chunk.ndim != 1 or hashlib.sha256(chunk.tobytes()).hexdigest() != digest:
            path.unlink(missing_ok=True)
            return None
        return chunk

    def read_begun(self, num_batches: int, path: Path, dtype: np.dtype[np.void]) -> list[Chunk]:
        """Map a chunk that is not finished.

        Args:
            num_batches: how many batches it has.
            path: its file.
            dtype: of one of its records.

        Returns:
            One part for each batch: the first has all records, the others have none. Nothing where it is damaged.
        """
        chunk = self.read(path, dtype)
        return [] if chunk is None else [chunk, *[chunk[:0]] * (num_batches - 1)]

    def mark_assembled(self) -> None:
        """Note that the artifact is about to be written: if one is there when the folder is found, it is this one."""
        write_atomically(self.path / _ASSEMBLED, b"")

    def is_assembled(self) -> bool:
        """Tell whether an artifact that stands beside the folder was made from it."""
        return (self.path / _ASSEMBLED).exists()

    def is_empty(self) -> bool:
        """Tell whether the folder is there, ours, and without anything that is worth keeping."""
        return self.is_open and self.path.is_dir() and not self.finished() and not self.begun()

    def remove(self) -> None:
        """Remove the folder and all chunks."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Leave the folder to whoever goes on."""
        self.is_open = False
        self._lock.release()

    def _is_new(self) -> bool:
        """Tell whether somebody was stopped before the settings were written."""
        return all(path.name == LOCK_NAME or _UNFINISHED.fullmatch(path.name) for path in self.path.iterdir())

    def _read_settings(self) -> dict[str, Any]:
        try:
            raw = (self.path / _SETTINGS).read_bytes()[:_MAX_SETTINGS_BYTES]
            settings = json.loads(raw)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise PipelineError(
                f"{self.path}: its {_SETTINGS} cannot be read ({type(error).__name__}). Remove the folder."
            ) from None
        return settings if isinstance(settings, dict) else {}
