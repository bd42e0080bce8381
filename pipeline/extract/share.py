"""One process's share of an extraction: which chunks are missing, and which of them are its own."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data import Labelled
from pipeline.errors import PipelineError
from pipeline.extract.assemble import Chunks
from pipeline.extract.embed import Embedder
from pipeline.extract.measures import Embedded
from pipeline.extract.partial import PartialFolder
from pipeline.extract.processes import Processes
from pipeline.progress import LOGGER
from pipeline.runtime import software_versions
from pipeline.views import VIEWS_VERSION
from store import DataSetInfo

SOFTWARE = ("torch", "torchvision", "transformers", "timm", "datasets", "numpy", "pillow")


@dataclass(frozen=True)
class ShareResult:
    """How many images an earlier run had embedded, and how long this process took for its share of the others."""

    num_resumed: int
    seconds: float


@dataclass(frozen=True)
class Share:
    """The folder of finished chunks, and the processes that share it."""

    partial: PartialFolder
    processes: Processes

    def embed(self, embedder: Embedder) -> ShareResult:
        """Embed this process's share of the missing chunks, and wait for the other processes.

        Args:
            embedder: what is to be embedded, the same in all processes.

        Returns:
            What it took.

        Raises:
            PipelineError: other settings made the folder, the data have changed, or another process has died.
        """
        partial, processes, decides = self.partial, self.processes, what_decides(embedder)
        if processes.is_main:
            partial.open(decides, overwrite=embedder.settings.overwrite)
            embedder.check_same_images(partial)
        processes.wait()
        if not processes.is_main:
            partial.join(decides)
        # The first one's list is everybody's: a network disk may show each of them another one.
        missing, num_resumed = processes.agree(self._missing(embedder))
        if num_resumed and processes.is_main:
            LOGGER.info("%d images were embedded by an earlier run.", num_resumed)
        seconds = embedder.run(missing[processes.rank :: processes.count], partial)
        processes.wait()
        return ShareResult(num_resumed, seconds)

    def _missing(self, embedder: Embedder) -> tuple[list[int], int]:
        """Return the chunks that are not finished, and how many images are."""
        finished, begun, chunks = self.partial.finished(), self.partial.begun(), embedder.plan.chunks
        missing = [index for index in range(len(chunks)) if index not in finished]
        num_resumed = embedder.plan.num_images([index for index in range(len(chunks)) if index in finished])
        num_resumed += sum(len(rows) for index in begun.keys() - finished for rows in chunks[index][: begun[index][0]])
        return missing, num_resumed

    def embed_evaluation(self, embedder: Embedder) -> Embedded | None:
        """Embed other images, for the report card alone; their chunks lie in a folder within the first.

        Args:
            embedder: what is to be embedded.

        Returns:
            The distinct images; none in other processes than the first.

        Raises:
            PipelineError: no image can be decoded.
        """
        inner = Share(PartialFolder(self.partial.path / "report"), self.processes)
        try:
            inner.embed(embedder)
        finally:
            inner.partial.close()
        if not self.processes.is_main:  # the first one alone makes the report card, and removes the folder
            return None
        chunks = Chunks(embedder.load(inner.partial), len(embedder.data.class_names))
        if not len(chunks):
            raise PipelineError(
                f"--report-split {embedder.data.settings.split}: none of its images can be decoded. Choose another one."
            )
        return chunks.unique_images(len(chunks))

    @contextmanager
    def kept_if_worthwhile(self) -> Iterator[None]:
        """After a failure, say how to go on, or remove a folder without a finished chunk."""
        try:
            yield
        except BaseException:
            # The other processes may still be at work in it.
            if self.processes.is_main and self.partial.is_empty():
                self.partial.remove()
            elif self.processes.is_main and self.partial.is_open:
                LOGGER.info("What is finished stays in %s: the same command goes on from there.", self.partial.path)
            raise
        finally:
            self.partial.close()


def what_decides(embedder: Embedder) -> dict[str, Any]:
    """Return all that the chunks' bytes depend on, as plain JSON."""
    settings, data = embedder.settings, embedder.data
    rows = np.concatenate([rows for chunk in embedder.plan.chunks for rows in chunk])
    return {
        "teacher": embedder.teacher.info.model_dump(),
        "preprocessing": embedder.teacher.preprocess.describe(),
        "data_set": data_set_info(data).model_dump(),
        "labels_sha256": hashlib.sha256(np.stack([data.numbers[rows], data.labels[rows]]).tobytes()).hexdigest(),
        "classes_sha256": hashlib.sha256(json.dumps(data.class_names).encode()).hexdigest(),
        "batch_size": embedder.batch_size,
        "chunk_images": embedder.plan.num_images([0]),
        "seed": settings.seed,
        "views": settings.views,
        "view_size": settings.view_size if settings.views > 1 else None,
        "views_version": VIEWS_VERSION,
        "device": embedder.teacher.model.device.type,
        "software": software_versions(SOFTWARE),
    }


def data_set_info(data: Labelled) -> DataSetInfo:
    """Return what the manifest says of a data set."""
    return DataSetInfo(
        name=data.name,
        config=data.settings.config,
        revision=data.revision,
        split=data.settings.split,
        image_column=data.image_column,
        label_column=data.label_column,
        rows=data.num_rows_before_limit,
        classes_named=data.classes_named,
        licence=data.licence,
    )
