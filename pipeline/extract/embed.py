"""Embed the images of an extraction, chunk by chunk, and keep each finished chunk."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data import Labelled
from pipeline.errors import PipelineError
from pipeline.extract.batches import Batch, Rendering, read_batches
from pipeline.extract.config import ExtractSettings
from pipeline.extract.partial import Chunk, PartialFolder, chunk_dtype
from pipeline.progress import LOGGER, ProgressBar
from pipeline.runtime import batch_must_fit
from store import check_fits

if TYPE_CHECKING:
    from pipeline.extract.teacher import Teacher

_CHUNK_IMAGES = 1024  # what a crash costs at most: seconds on a CPU, a moment on a GPU


@dataclass(frozen=True)
class Plan:
    """Which rows are embedded in which chunk and batch: cut by row, before anybody asks who does what.

    `chunks` has, for each chunk, the rows [B] of each of its batches.
    """

    chunks: tuple[tuple[NDArray[np.int64], ...], ...]

    def num_images(self, indices: Sequence[int]) -> int:
        """Return how many rows some chunks have."""
        return sum(len(rows) for index in indices for rows in self.chunks[index])


class Keeper(Protocol):
    """What finished chunks are given to: the folder that keeps them, or a check that compares them."""

    def save(self, index: int, chunk: Chunk) -> None:
        """Take one finished chunk."""


def make_plan(rows: NDArray[np.int64], batch_size: int) -> Plan:
    """Cut rows into batches, and batches into chunks of about a thousand images.

    Args:
        rows: [N] of the data set, in order.
        batch_size: rows in a batch; the last may be shorter.

    Returns:
        The plan.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    step = max(1, _CHUNK_IMAGES // batch_size)
    return Plan(tuple(tuple(batches[start : start + step]) for start in range(0, len(batches), step)))


@dataclass(frozen=True)
class Embedder:
    """Everything that turns rows of the data into finished chunks."""

    settings: ExtractSettings
    data: Labelled
    teacher: "Teacher"
    rendering: Rendering
    plan: Plan
    num_workers: int

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Type of one record of a chunk."""
        return chunk_dtype(self.rendering.views, self.teacher.info.embed_dim)

    def load(self, index: int, partial: PartialFolder) -> Chunk:
        """Map a finished chunk; one that was damaged meanwhile is embedded again."""
        chunk = partial.load(index, self.dtype)
        while chunk is None:
            LOGGER.info("Chunk %d is damaged and is embedded again.", index)
            self.run([index], partial)
            chunk = partial.load(index, self.dtype)
        return chunk

    def run(self, indices: Sequence[int], keeper: Keeper) -> float:
        """Embed some chunks and save each as soon as it is finished.

        Args:
            indices: which chunks.
            keeper: where they go.

        Returns:
            The seconds that it took.

        Raises:
            PipelineError: an image is bad, memory or the disk ran out; what is finished stays.
            StoreError: an embedding does not fit the dtype.
        """
        fits = batch_must_fit(self.settings.batch_size, "the teacher")
        with ProgressBar("embedding", max(1, self.plan.num_images(indices))) as bar, _workers_must_live(), fits:
            cuts = [rows for index in indices for rows in self.plan.chunks[index]]
            batches = read_batches(self.data, cuts, self.rendering, self.num_workers)
            for index in indices:
                records = [self._embed(next(batches), bar) for _ in self.plan.chunks[index]]
                keeper.save(index, np.concatenate(records))
        return bar.seconds

    def _embed(self, batch: Batch, bar: ProgressBar) -> Chunk:
        if batch.bad and not self.settings.skip_bad:
            raise batch.bad[0]
        records = np.empty(len(batch.rows), self.dtype)
        if len(records):
            views = [self.teacher.embed(pixels).cpu().numpy() for pixels in batch.pixels]
            records["row"] = self.data.numbers[batch.rows]
            records["key"] = batch.keys
            records["label"] = self.data.labels[batch.rows]
            records["embedding"] = np.stack(views, axis=1)
            self._check(records)
        bar.advance(len(batch.rows) + len(batch.bad))
        return records

    def _check(self, records: Chunk) -> None:
        finite = np.isfinite(records["embedding"]).all(axis=(1, 2))
        if not finite.all():
            raise PipelineError(
                f"{self.settings.teacher}: the embedding of row {records['row'][~finite][0]} has values that are not "
                "finite. Try --precision float32; if that does not help, the teacher's weights are damaged."
            )
        if self.settings.samples:
            check_fits(records["embedding"], self.settings.dtype)  # now, not when all hours are spent


@contextmanager
def _workers_must_live() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) and "shared memory" not in str(error):
            raise
        raise PipelineError(
            "a decoding process died, for want of memory or of shared memory (/dev/shm). "
            "Try --workers 0, or a smaller --batch-size."
        ) from None
