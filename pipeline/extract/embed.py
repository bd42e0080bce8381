"""Embed the images of an extraction, chunk by chunk, and keep each finished chunk."""

import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data import BadImageError, Labelled, UnreadableImageError, raise_bad
from pipeline.errors import PipelineError
from pipeline.extract.batches import Batch, Rendering, read_batches
from pipeline.extract.chunk_files import ChunkFiles
from pipeline.extract.chunk_writer import ChunkWriter
from pipeline.extract.config import ExtractSettings
from pipeline.extract.partial import Chunk, PartialFolder, chunk_dtype
from pipeline.pixels import sample_key
from pipeline.progress import LOGGER, ProgressBar
from pipeline.runtime import batch_must_fit
from pipeline.stopping import StopRequest
from store import check_fits

if TYPE_CHECKING:
    from pipeline.extract.teacher import Teacher

# A chunk is what a crash costs: seconds on a CPU, less on a GPU. More images in all make larger ones, so that a folder
# has thousands of files and not millions; what is in memory before it is written is bounded.
_CHUNK_IMAGES = 1024
_MOST_CHUNKS = 4096
_CHUNK_BYTES = 64 * 1024 * 1024
# Chunks of an earlier run of which one image is read again, to see that the data are still the same.
_PROBED_CHUNKS = 16


@dataclass(frozen=True)
class Plan:
    """Which rows are embedded in which chunk and batch: cut by row, before anybody asks who does what.

    `chunks` has, for each chunk, the rows [B] of each of its batches.
    """

    chunks: tuple[tuple[NDArray[np.int64], ...], ...]

    def num_images(self, indices: Sequence[int]) -> int:
        """Return how many rows some chunks have."""
        return sum(len(rows) for index in indices for rows in self.chunks[index])


def make_plan(rows: NDArray[np.int64], batch_size: int, record_bytes: int) -> Plan:
    """Cut rows into batches, and batches into chunks of about a thousand images, or more where there are millions.

    Args:
        rows: [N] of the data set, in order.
        batch_size: rows in a batch; the last may be shorter.
        record_bytes: size of one embedded image.

    Returns:
        The plan.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    most = max(_CHUNK_IMAGES, _CHUNK_BYTES // record_bytes)
    step = max(1, min(max(_CHUNK_IMAGES, len(rows) // _MOST_CHUNKS), most) // batch_size)
    return Plan(tuple(tuple(batches[start : start + step]) for start in range(0, len(batches), step)))


@dataclass(frozen=True)
class Embedder:
    """Everything that turns rows of the data into finished chunks."""

    settings: ExtractSettings
    data: Labelled
    teacher: "Teacher"
    rendering: Rendering
    plan: Plan
    batch_size: int
    num_workers: int
    what: str = "embedding"

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Type of one record of a chunk."""
        return chunk_dtype(self.rendering.views, self.teacher.info.embed_dim)

    def load(self, partial: PartialFolder) -> ChunkFiles:
        """Check all chunks and return them in order; one that was damaged meanwhile is embedded again."""
        finished, paths = partial.finished(), []
        for index in range(len(self.plan.chunks)):
            while index not in finished or partial.read(finished[index], self.dtype) is None:
                LOGGER.info("Chunk %d is missing or damaged and is embedded again.", index)
                self.run([index], partial)
                finished = partial.finished()
            paths.append(finished[index])
        return ChunkFiles(paths)

    def check_same_images(self, partial: PartialFolder) -> None:
        """Read an image again of some chunks that an earlier run finished.

        Args:
            partial: where they are.

        Raises:
            PipelineError: it is another image now.
        """
        paths = list(partial.finished().values())
        for path in paths[:: max(1, len(paths) // _PROBED_CHUNKS)]:
            chunk = partial.read(path, self.dtype)
            if chunk is None or len(chunk) == 0:
                continue
            row = int(np.flatnonzero(self.data.numbers == chunk["row"][0])[0])
            (image,) = self.data.read([row])
            if isinstance(image, UnreadableImageError):  # nothing is known of it
                raise image
            if isinstance(image, BadImageError) or sample_key(image) != chunk["key"][0].tobytes():
                raise PipelineError(
                    f"{partial.path}: row {chunk['row'][0]} was another image when it was embedded (sample key "
                    f"{chunk['key'][0].tobytes().hex()[:12]}…). The data or what decodes them have changed: pass "
                    "--overwrite to start anew."
                )

    def run(self, indices: Sequence[int], partial: PartialFolder) -> float:
        """Embed some chunks and save each as soon as it is finished.

        Args:
            indices: which chunks; what an earlier run began is gone on with.
            partial: where they go.

        Returns:
            The seconds that it took.

        Raises:
            PipelineError: an image is bad, memory or the disk ran out; what is finished stays.
            StoreError: an embedding does not fit the dtype.
            SystemExit: this process was asked to stop; what is finished stays.
        """
        mine = set(indices)
        begun = {
            index: partial.read_begun(*found, self.dtype)
            for index, found in partial.begun().items()
            if index in mine  # others' may be finished, and gone, at any moment
        }
        cuts = [rows for index in indices for rows in self._missing(index, begun)]
        start = time.monotonic()
        stop = StopRequest("the batch in hand")
        with (
            stop,
            _workers_must_live(stop),
            ChunkWriter(partial) as writer,
            closing(self.embed(cuts, stop)) as embedded,  # so that the bar is gone before an error is shown
        ):
            for index in indices:
                missing = self._missing(index, begun)
                with writer.chunk(index, begun.pop(index, [])) as records:
                    for _ in missing:
                        records.append(next(embedded))
                        stop.obey()
        return time.monotonic() - start

    def embed(self, cuts: Sequence[NDArray[np.int64]], stop: StopRequest | None = None) -> Generator[Chunk]:
        """Embed batches, with a progress bar.

        Args:
            cuts: for each batch, which rows of the data.
            stop: who may have asked this process to stop.

        Yields:
            The records of each batch; fewer than rows where images were left out.

        Raises:
            PipelineError: an image is bad, or memory ran out.
            StoreError: an embedding does not fit the dtype.
        """
        fits = batch_must_fit(self.batch_size, "the teacher")
        num_images = sum(len(rows) for rows in cuts)
        with ProgressBar(self.what, max(1, num_images)) as bar, _workers_must_live(stop), fits:
            yield from self._embed(cuts, bar)

    def _missing(self, index: int, begun: Mapping[int, list[Chunk]]) -> tuple[NDArray[np.int64], ...]:
        return self.plan.chunks[index][len(begun.get(index, ())) :]

    def _embed(self, cuts: Sequence[NDArray[np.int64]], bar: ProgressBar) -> Iterator[Chunk]:
        """Yield the records of each batch. A GPU is given the next batch before the last one's result is awaited."""
        on_gpu = self.teacher.model.device.type == "cuda"
        launched: deque[tuple[Batch, _Result]] = deque()
        for batch in read_batches(self.data, cuts, self.rendering, self.num_workers, pin=on_gpu):
            raise_bad(batch.bad, skip_bad=self.settings.skip_bad)
            launched.append((batch, _Result([self.teacher.embed(view) for view in batch.pixels])))
            if len(launched) > on_gpu:
                yield self._finish(*launched.popleft(), bar)
        while launched:
            yield self._finish(*launched.popleft(), bar)

    def _finish(self, batch: Batch, result: "_Result", bar: ProgressBar) -> Chunk:
        records = np.empty(len(batch.rows), self.dtype)
        if len(records):
            records["row"] = self.data.numbers[batch.rows]
            records["key"] = batch.keys
            records["label"] = self.data.labels[batch.rows]
            records["embedding"] = result.wait()
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


class _Result:
    """Embeddings of a batch that a GPU may still be computing."""

    def __init__(self, views: list[torch.Tensor]) -> None:
        """Take each view's [B, D]; none at all where no image could be decoded."""
        self._computed: torch.cuda.Event | None = None
        self._embeddings = [view.to("cpu", non_blocking=view.is_cuda) for view in views]
        if views and views[0].is_cuda:
            self._computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._computed.record(torch.cuda.current_stream(views[0].device))

    def wait(self) -> NDArray[np.float32]:
        """Return [B, V, D]."""
        if self._computed is not None:
            self._computed.synchronize()
        return np.stack([embeddings.numpy() for embeddings in self._embeddings], axis=1)


@contextmanager
def _workers_must_live(stop: StopRequest | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error) and "shared memory" not in str(error):
            raise
        if stop is not None:
            stop.obey()  # the signal went to the whole process group
        raise PipelineError(
            "a decoding process died, for want of memory or of shared memory (/dev/shm). "
            "Try --workers 0, or a smaller --batch-size."
        ) from None
