"""The files of finished chunks as one sequence, of which a limited number is mapped at a time."""

import resource
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from pipeline.errors import PipelineError
from pipeline.extract.partial import Chunk

_OTHER_FILES = 256  # descriptors left to everything else; a map holds one


class ChunkFiles(Sequence[Chunk]):
    """Chunks that are mapped when they are asked for; those not asked for lately are let go."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Take the files, whose digests were checked.

        Args:
            paths: in order.
        """
        self._paths = paths
        self._mapped: OrderedDict[int, Chunk] = OrderedDict()
        self._most = _allow_open_files(len(paths) + _OTHER_FILES) - _OTHER_FILES

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | Sequence[Chunk]:
        """Map a chunk, read-only."""
        if isinstance(index, slice):
            return ChunkFiles(self._paths[index])
        chunk = self._mapped.pop(index, None)
        if chunk is None:
            try:
                chunk = np.load(self._paths[index], mmap_mode="r", allow_pickle=False)
            except OSError as error:
                raise PipelineError(
                    f"{self._paths[index]}: cannot be read ({error.strerror or error}). Give the same command again."
                ) from None
        self._mapped[index] = chunk
        if len(self._mapped) > max(1, self._most):
            self._mapped.popitem(last=False)
        return chunk


def _allow_open_files(wanted: int) -> int:
    """Raise this process's limit of open files as far as it may; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (ValueError, OSError):  # macOS has a limit of its own
        return soft
    return allowed
