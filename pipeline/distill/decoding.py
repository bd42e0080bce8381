"""Images of a split, decoded, keyed and fitted to the student: a block at a time, by several processes where it pays.

Keeps nothing: that is `cache`.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipeline.data import BadImageError, Labelled
from pipeline.distill.images import fit_to
from pipeline.errors import PipelineError
from pipeline.pixels import StripImageError, sample_key
from pipeline.views import render_view

_BLOCK_ROWS = 64
_BLOCK_BYTES = 4_000_000  # it goes through a pipe from process to process
_READ_ROWS = 16  # originals in memory at once: a photograph takes 36 MB
_WORTH_SECONDS = 5.0  # less work is done sooner than processes have started where they do not fork (macOS)
_MAX_PROCESSES = 16


@dataclass(frozen=True)
class ReplayedViews:
    """Which views of an image a student trains on: 0 … `count` − 1, those of an artifact of this seed and size (px)."""

    count: int
    seed: int
    view_size: int


@dataclass(frozen=True)
class Block:
    """Some rows of a split.

    `rows` [B] int64 are those that could be decoded, `keys` [B, 16] uint8 their sample keys, `pixels`
    [B, V, size, size, 3] uint8 their views. `bad` has an error for each of the others.
    """

    rows: NDArray[np.int64]
    keys: NDArray[np.uint8]
    pixels: NDArray[np.uint8]
    bad: tuple[BadImageError, ...]


def decode_blocks(data: Labelled, image_size: int, views: ReplayedViews | None = None) -> Generator[Block, None, None]:
    """Decode all rows of a split.

    The first block is decoded, and what others need is started, before this returns: processes are forked before
    anybody else starts a thread.

    Args:
        data: the split.
        image_size: side of the student's input in pixels.
        views: which views to render; none: view 0, the image itself.

    Returns:
        The blocks, in the order of the rows, whatever the number of processes. Who does not take all of them closes
        it, so that the processes end.

    Raises:
        PipelineError: a decoding process died, or could not be started.
    """
    reader = _Reader(data, image_size, views)
    start = time.perf_counter()
    with _said():
        first = reader[0]
        seconds = (time.perf_counter() - start) * (len(reader) - 1)
        num_processes = _num_cores() if seconds > _WORTH_SECONDS else 1
        others = DataLoader(
            reader,
            batch_size=None,
            sampler=range(1, len(reader)),
            num_workers=num_processes if num_processes > 1 else 0,
            worker_init_fn=_end_with_parent,
            generator=torch.Generator(),  # else it draws from the one that initialises students
        )
        return _blocks(first, [iter(others)])


class _Reader(Dataset[Block]):
    def __init__(self, data: Labelled, image_size: int, views: ReplayedViews | None) -> None:
        self._data, self._views, self._fit = data, views, fit_to(image_size)
        self._shape = (1 if views is None else views.count, image_size, image_size, 3)
        self._num_rows = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // int(np.prod(self._shape))))

    def __len__(self) -> int:
        return -(-len(self._data) // self._num_rows)

    def __getitem__(self, index: int) -> Block:
        start = index * self._num_rows
        stop = min(start + self._num_rows, len(self._data))
        rows: list[int] = []
        keys: list[bytes] = []
        bad: list[BadImageError] = []
        pixels = np.empty((stop - start, *self._shape), np.uint8)
        for first in range(start, stop, _READ_ROWS):
            numbers = range(first, min(first + _READ_ROWS, stop))
            for row, image in zip(numbers, self._data.read(numbers), strict=True):
                if isinstance(image, BadImageError):  # a value: raised, it would come with the process's traceback
                    bad.append(image)
                    continue
                key = sample_key(image)
                try:
                    for view, rendered in enumerate(self._render(image, key)):
                        pixels[len(rows), view] = np.asarray(self._fit(rendered))
                except StripImageError as error:
                    bad.append(self._data.bad_image(row, str(error)))
                    continue
                keys.append(key)
                rows.append(row)
        found = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        return Block(np.array(rows, np.int64), found, pixels[: len(rows)], tuple(bad))

    def _render(self, image: Image.Image, key: bytes) -> Iterator[Image.Image]:
        yield image
        if self._views is not None:
            for view in range(1, self._views.count):
                yield render_view(image, key, view, seed=self._views.seed, view_size=self._views.view_size)


def _num_cores() -> int:
    # macOS does not say which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MAX_PROCESSES)


def _end_with_parent(worker: int) -> None:
    """End this process when its parent was killed: it would wait for ever to hand over its block, and keep any lock."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _blocks(first: Block, others: list[Iterator[Block]]) -> Generator[Block, None, None]:
    try:
        with _said():
            yield first
            yield from others[0]
    finally:
        others.clear()  # the last reference: processes end at once, and not when the garbage collector finds them


@contextmanager
def _said() -> Iterator[None]:
    """Put into one line what fails around decoding; who keeps the blocks would take it for a fault of his own disk."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        guard = ""
        if multiprocessing.get_start_method() != "fork":  # the process runs the user's own script once more
            guard = ' In a script of your own, begin what it does with `if __name__ == "__main__":`.'
        raise PipelineError(
            "a decoding process died, most likely for want of memory. Close other programs, and give the same command "
            f"again.{guard}"
        ) from None
    except (OSError, MemoryError) as error:
        raise PipelineError(
            f"images cannot be decoded just now ({_reason(error)}). Close other programs, and give the same command "
            "again."
        ) from None


def _reason(error: BaseException) -> str:
    # One of another process has the whole traceback in its text, and what happened in its last line.
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else "out of memory"
