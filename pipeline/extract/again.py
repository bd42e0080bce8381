"""Embed some samples of an artifact again, or the images of some classes, and compare with what is stored.

By the code that extracts, as the manifest says. What comes out is compared batch by batch: nothing of it is kept.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data import Labelled
from pipeline.errors import PipelineError, listed
from pipeline.extract.check_result import Compared
from pipeline.extract.comparison import Comparison, compare_means, compare_samples, joined
from pipeline.extract.config import ExtractSettings
from pipeline.extract.partial import Chunk
from pipeline.extract.preparation import make_embedder
from pipeline.extract.search import Found, draw_again, find_samples
from pipeline.progress import ProgressBar
from store import Artifact, ClassStatistics, Manifest

if TYPE_CHECKING:
    from pipeline.extract.teacher import Teacher

_BYTES_WITHOUT_BAR = 1_000_000_000  # fewer are hashed in a second


class Keeper(Protocol):
    """What embedded images are given to, a batch at a time."""

    def save(self, chunk: Chunk) -> None:
        """Take one batch."""


@dataclass(frozen=True)
class Again:
    """What an extraction is done again with: `settings` as they were, `class_rows` [C of the data] in the artifact.

    `fraction` of it is done, and `relative` is what arithmetic may make of an embedding.
    """

    fraction: float
    settings: ExtractSettings
    artifact: Artifact
    data: Labelled
    class_rows: NDArray[np.int64]
    teacher: "Teacher"
    relative: float

    def embed(self, rows: NDArray[np.int64], views: int, keeper: Keeper) -> None:
        """Embed rows of the data, ascending; images that cannot be decoded are left out."""
        settings = self.settings.model_copy(update={"views": views})
        embedder = make_embedder(settings, self.data, rows, self.teacher)
        for chunk in embedder.embed([rows for batches in embedder.plan.chunks for rows in batches]):
            keeper.save(chunk)


def samples_again(again: Again) -> Compared:
    """Embed some of an artifact's samples again, in all their views.

    Args:
        again: of an artifact with samples.

    Returns:
        How far they are from the file's.

    Raises:
        PipelineError: none of them is in the data.
        ArtifactDigestError: the samples are damaged.
    """
    artifact, manifest = again.artifact, again.artifact.manifest
    for name in ("sample/embedding", "sample/scale"):
        if name in artifact:
            _verify(artifact, name)
    num_samples = len(artifact["sample/label"])
    num_chosen = math.ceil(again.fraction * num_samples)
    found = find_samples(artifact, again.data, again.class_rows, num_chosen)
    keeper = _SampleKeeper(again, found)
    again.embed(np.sort(np.array(found.rows, np.int64)), manifest.sampling.views, keeper)
    failures = keeper.failures()
    if not keeper.names:
        raise PipelineError(f"{again.data.settings.dataset}: {'; '.join(failures)}. Nothing could be compared.")
    return Compared(
        "samples",
        num_samples,
        num_chosen,
        tuple(keeper.names),
        joined(keeper.parts),
        failures,
        _search_notes(found, num_chosen, manifest),
        {
            "num_read": found.num_read,
            "num_absent": found.num_absent,
            "num_relabelled": found.num_relabelled,
            "num_undecodable": found.num_bad,
        },
    )


def classes_again(again: Again) -> Compared:
    """Embed the images of some of an artifact's classes again.

    Args:
        again: of an artifact that was extracted, from this data.

    Returns:
        How far their means are from the file's.

    Raises:
        ArtifactDigestError: the class statistics are damaged.
    """
    artifact, data, manifest = again.artifact, again.data, again.artifact.manifest
    present = np.unique(data.labels)
    shared = present[again.class_rows[present] >= 0]
    num_chosen = math.ceil(again.fraction * len(manifest.classes))
    random = np.random.default_rng(manifest.sampling.seed)
    chosen = np.sort(random.choice(shared, min(num_chosen, len(shared)), replace=False))
    keeper = _ClassKeeper(ClassStatistics(len(data.class_names), manifest.teacher.embed_dim))
    again.embed(draw_again(data, chosen, manifest.sampling), 1, keeper)
    rows, statistics = again.class_rows[chosen], keeper.statistics
    stored = artifact["class/count"][rows]
    failures = [
        f"{data.class_names[index]} has {count} images, the file says {there}"
        for index, count, there in zip(chosen, statistics.count[chosen], stored, strict=True)
        if count != there
    ]
    notes = []
    if len(shared) < len(manifest.classes):
        there = {manifest.classes[row] for row in again.class_rows[shared].tolist()}
        lacking = [name for name in manifest.classes if name not in there]
        notes.append(f"the data lacks {len(lacking)} of the file's {len(manifest.classes)} classes ({listed(lacking)})")
    return Compared(
        "classes",
        len(manifest.classes),
        num_chosen,
        tuple(f"class {data.class_names[index]}" for index in chosen),
        compare_means(artifact, rows, statistics.mean[chosen], again.relative),
        (f"{len(failures)} classes have other counts ({listed(failures)})",) if failures else (),
        tuple(notes),
    )


class _SampleKeeper:
    """Compares samples as soon as they are embedded."""

    def __init__(self, again: Again, found: Found) -> None:
        self.names: list[str] = []
        self.parts: list[Comparison] = []
        self._again = again
        self._found = {
            row: (sample, key) for row, sample, key in zip(found.rows, found.samples, found.keys, strict=True)
        }
        self._seen: set[int] = set()
        self._changed: list[int] = []

    def save(self, chunk: Chunk) -> None:
        """Compare one batch; an image with another key than at the first reading is none of the file's."""
        rows, keys = chunk["row"].tolist(), [key.tobytes() for key in chunk["key"]]
        same = [position for position, row in enumerate(rows) if self._found[row][1] == keys[position]]
        samples = np.array([self._found[rows[position]][0] for position in same], np.int64)
        self.parts.append(
            compare_samples(self._again.artifact, samples, chunk["embedding"][same], self._again.relative)
        )
        classes = self._again.data.class_names
        self.names += [f"row {rows[at]}, {classes[chunk['label'][at]]}, key {keys[at].hex()[:12]}…" for at in same]
        self._seen |= set(rows)
        self._changed += sorted(set(rows) - {rows[position] for position in same})

    def failures(self) -> tuple[str, ...]:
        """Say which images were not the same at the second reading."""
        lost = sorted(set(self._found) - self._seen)
        return tuple(
            f"{len(rows)} images {what} when they were read again (row {listed(rows)})"
            for rows, what in ((self._changed, "had other pixels"), (lost, "could not be decoded"))
            if rows
        )


@dataclass
class _ClassKeeper:
    """Sums up images as an extraction does."""

    statistics: ClassStatistics

    def save(self, chunk: Chunk) -> None:
        """Fold in one batch."""
        self.statistics.add(chunk["embedding"][:, 0], chunk["label"])


def _search_notes(found: Found, num_chosen: int, manifest: Manifest) -> tuple[str, ...]:
    notes = []
    if len(found.rows) < num_chosen:
        notes.append(f"only {len(found.rows)} of {num_chosen} samples are among the {found.num_read} images read")
    if num_absent := found.num_absent - found.num_relabelled:
        sampled = manifest.sampling.per_class is not None or manifest.sampling.limit is not None
        notes.append(
            f"{num_absent} of {found.num_read} images read are not in the file ({'; '.join(found.absent)}), "
            + ("which holds a choice of its data" if sampled else "which holds all of its data: other pixels?")
        )
    if found.num_relabelled:
        notes.append(
            f"{found.num_relabelled} of {found.num_read} images read have another label in the file "
            f"({'; '.join(found.relabelled)})"
        )
    if found.num_bad:
        notes.append(f"{found.num_bad} of {found.num_read} images read cannot be decoded")
    return tuple(notes)


def _verify(artifact: Artifact, name: str) -> None:
    stored = artifact.stored(name)
    total = math.prod(stored.shape) * stored.dtype.itemsize
    if total < _BYTES_WITHOUT_BAR:
        artifact.verify(name)
        return
    with ProgressBar("verifying", total // 10**6, "MB") as bar:
        artifact.verify(name, lambda num_bytes: bar.advance(num_bytes // 10**6))
