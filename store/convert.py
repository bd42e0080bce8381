"""Write an artifact anew: another container, another type of sample embeddings, without samples or some classes.

What the new type costs is measured on the way, while each row is at hand in both.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.artifact import Artifact, open_artifact
from store.container import Progress, block_rows, ignore
from store.errors import ArtifactWriteError, StoreError
from store.layout import RULES
from store.manifest import HeadInfo, Manifest
from store.merge import sources_of
from store.pairs import pairs_sha256
from store.quantize import decode_embeddings, encode_embeddings, row_scales, sample_embeddings
from store.ridge import fit_ridge
from store.verify import verify_open
from store.writing import RowBlocks, check_destination, write_artifact

_COMPARED_ROWS = 10_000  # nearest classes of more rows say nothing new, and cost rows × classes


@dataclass(frozen=True)
class Conversion:
    """What to change. Nothing set: only the container changes, with its suffix."""

    dtype: str | None = None  # of sample embeddings: float32, float16 or int8
    class_only: bool = False  # leave the samples out
    drop_classes: tuple[str, ...] = ()
    gzip: bool = False  # compress sample embeddings; HDF5 only


@dataclass(frozen=True)
class Loss:
    """What another type of sample embeddings cost.

    Cosines between the old and the new embedding of a row; `nearest_class_agreement` is the share of
    `num_compared` rows, evenly spread, whose nearest class mean (Euclidean, view 0) stayed the same.
    """

    mean_cosine: float
    worst_cosine: float
    nearest_class_agreement: float
    num_rows: int
    num_compared: int


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion made: no `loss` where no stored number changed; `notes` its user should read."""

    manifest: Manifest
    bytes_before: int
    bytes_after: int
    loss: Loss | None
    notes: tuple[str, ...]


def convert_artifact(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    conversion: Conversion,
    *,
    overwrite: bool = False,
    progress: Progress = ignore,
) -> ConvertResult:
    """Convert an artifact; the input is verified first.

    Args:
        path: the artifact to read.
        out: the artifact to write; its suffix chooses the container.
        conversion: what to change.
        overwrite: replace an existing file, which may be the input.
        progress: told of the bytes of each block that was checked or written.

    Returns:
        What was made, and what it cost.

    Raises:
        StoreError: the input is damaged or has no such class or samples, or the output cannot be written.
    """
    check_destination(out, overwrite=overwrite, gzip=conversion.gzip)
    with open_artifact(path) as artifact:
        _check_possible(artifact, conversion)
        verify_open(artifact, progress)
        bytes_before = Path(path).stat().st_size
        work = _Conversion(artifact, conversion)
        manifest, tensors = work.finish()
        if isinstance(rows := tensors.get("sample/embedding"), RowBlocks):
            tensors["sample/embedding"] = rows.reporting(progress)
        manifest = write_artifact(out, manifest, tensors, overwrite=overwrite, gzip=conversion.gzip)
        loss = work.meter.loss() if work.meter else None
        return ConvertResult(manifest, bytes_before, Path(out).stat().st_size, loss, tuple(work.notes))


class _Conversion:
    """One conversion: which classes and rows stay, and what there is to say."""

    def __init__(self, artifact: Artifact, conversion: Conversion) -> None:
        self.artifact = artifact
        self.notes: list[str] = []
        self.meter: _LossMeter | None = None
        self.class_only = conversion.class_only
        self.with_samples = "sample/key" in artifact and not self.class_only
        self.dropping = bool(conversion.drop_classes)
        classes = artifact.manifest.classes
        dropped = set(conversion.drop_classes)
        self.kept_classes = np.array([row for row, name in enumerate(classes) if name not in dropped], np.int64)
        self.class_row = np.full(len(classes), -1, np.int64)  # new row of each old one
        self.class_row[self.kept_classes] = np.arange(len(self.kept_classes))
        self.rows = np.empty(0, np.int64)  # of samples that stay
        if "sample/key" in artifact:
            self.rows = np.flatnonzero(self.class_row[artifact["sample/label"]] >= 0)
            self.stored_dtype = artifact.manifest.tensors["sample/embedding"].dtype
            self.dtype = conversion.dtype or self.stored_dtype

    def finish(self) -> tuple[Manifest, dict[str, NDArray[Any] | RowBlocks]]:
        """Return the manifest, but for its tensors, and the tensors."""
        tensors: dict[str, NDArray[Any] | RowBlocks] = {}
        for name in self.artifact.manifest.tensors:
            group, known = name.split("/")[0], name in RULES
            if group == "sample" and (known or self.class_only):
                continue
            if self.dropping and (group == "head" or not known):
                continue
            array = self.artifact[name]
            tensors[name] = array[self.kept_classes] if known else array
        if self.with_samples and len(self.rows):
            tensors |= self._samples()
        changes: dict[str, Any] = {}
        if self.dropping:
            changes = self._without_classes(tensors)
        return self.artifact.manifest.model_copy(update=changes), tensors

    def _samples(self) -> dict[str, NDArray[Any] | RowBlocks]:
        keys, labels = self.artifact["sample/key"], self.artifact["sample/label"]
        _, *row_shape = self.artifact.manifest.tensors["sample/embedding"].shape
        tensors: dict[str, NDArray[Any] | RowBlocks] = {
            "sample/key": keys[self.rows] if self.dropping else keys,
            "sample/label": self.class_row[labels[self.rows]].astype(np.int32),
        }
        if self.dtype == self.stored_dtype:
            blocks: Iterator[NDArray[Any]] = (
                self.artifact.gather("sample/embedding", rows) for rows in self._row_blocks()
            )
            if self.dtype == "int8":
                tensors["sample/scale"] = self.artifact.gather("sample/scale", self.rows)
        else:
            self.meter = _LossMeter(self.artifact["class/mean"][self.kept_classes], len(self.rows))
            blocks = self._converted(self.meter)
            if self.dtype == "int8":
                scales = [row_scales(sample_embeddings(self.artifact, rows)) for rows in self._row_blocks()]
                tensors["sample/scale"] = np.concatenate(scales)
        tensors["sample/embedding"] = RowBlocks((len(self.rows), *row_shape), self.dtype, blocks)
        return tensors

    def _row_blocks(self) -> Iterator[NDArray[np.int64]]:
        step = block_rows(self.artifact.manifest.tensors["sample/embedding"].shape, np.dtype(np.float32))
        for start in range(0, len(self.rows), step):
            yield self.rows[start : start + step]

    def _converted(self, meter: "_LossMeter") -> Iterator[NDArray[Any]]:
        for rows in self._row_blocks():
            old = sample_embeddings(self.artifact, rows)
            scales = row_scales(old) if self.dtype == "int8" else None
            try:
                encoded = encode_embeddings(old, self.dtype)
            except ArtifactWriteError as error:
                raise ArtifactWriteError(f"{self.artifact.path.name}: {error}") from None
            meter.add(old, decode_embeddings(encoded, scales))
            yield encoded

    def _without_classes(self, tensors: dict[str, NDArray[Any] | RowBlocks]) -> dict[str, Any]:
        manifest, sampling = self.artifact.manifest, self.artifact.manifest.sampling
        unknown = sorted(set(manifest.tensors) - set(RULES))
        if unknown:
            self.notes.append(f"Not kept, since this program does not know their classes: {', '.join(unknown)}.")
        # Whether the samples are all images that the statistics are of.
        complete = "sample/key" in self.artifact and sampling.images_sha256 is not None
        digest = None
        if complete:
            keys, labels = self.artifact["sample/key"], self.artifact["sample/label"]
            digest = pairs_sha256(keys[self.rows], self.class_row[labels[self.rows]])
        count = self.artifact["class/count"][self.kept_classes]
        short = 0 if sampling.per_class is None else int((count < sampling.per_class).sum())
        return {
            "classes": tuple(manifest.classes[row] for row in self.kept_classes),
            "sampling": sampling.model_copy(update={"images_sha256": digest, "short_classes": short}),
            "head": self._head(tensors, complete),
            "sources": sources_of(self.artifact),
        }

    def _head(self, tensors: dict[str, NDArray[Any] | RowBlocks], complete: bool) -> HeadInfo | None:
        if "head/weight" not in self.artifact:
            return None
        if not complete or not len(self.rows):
            self.notes.append("The ridge head was dropped: without the samples it cannot be fitted again.")
            return None
        labels = self.class_row[self.artifact["sample/label"]]
        head = fit_ridge(
            lambda: ((sample_embeddings(self.artifact, rows)[:, 0], labels[rows]) for rows in self._row_blocks()),
            len(self.kept_classes),
            self.artifact.manifest.teacher.embed_dim,
        )
        tensors.update(head.tensors())
        self.notes.append("The ridge head was fitted again, without the dropped classes.")
        return head.info()


class _LossMeter:
    """Compares old and new embeddings, block by block."""

    def __init__(self, class_means: NDArray[np.float32], num_rows: int) -> None:
        self._means = class_means.astype(np.float64)  # squares of a float32 may not fit in one
        self._half_squares = np.square(self._means).sum(axis=1) / 2
        self._every = -(-num_rows // _COMPARED_ROWS)
        self._num_rows = self._num_cosines = self._num_compared = self._num_agreeing = 0
        self._sum, self._worst = 0.0, 1.0

    def add(self, old: NDArray[np.float32], new: NDArray[np.float32]) -> None:
        """Compare [B, V, D] with [B, V, D]."""
        product = np.einsum("bvd,bvd->bv", old, new, dtype=np.float64)
        norms = np.sqrt(
            np.einsum("bvd,bvd->bv", old, old, dtype=np.float64) * np.einsum("bvd,bvd->bv", new, new, dtype=np.float64)
        )
        # A zero row that stays zero lost nothing; a row that became zero lost its direction.
        both_zero = ~old.any(axis=-1) & ~new.any(axis=-1)
        cosine = np.where(both_zero, 1.0, np.divide(product, norms, out=np.zeros(norms.shape), where=norms > 0))
        self._sum += float(cosine.sum())
        self._worst = min(self._worst, float(cosine.min()))
        self._num_cosines += cosine.size
        compared = slice(-self._num_rows % self._every, None, self._every)
        nearest = [self._nearest(embeddings[compared, 0]) for embeddings in (old, new)]
        self._num_agreeing += int((nearest[0] == nearest[1]).sum())
        self._num_compared += len(nearest[0])
        self._num_rows += len(old)

    def loss(self) -> Loss:
        """Return what was found."""
        return Loss(
            mean_cosine=min(1.0, self._sum / self._num_cosines),
            worst_cosine=self._worst,
            nearest_class_agreement=self._num_agreeing / self._num_compared,
            num_rows=self._num_rows,
            num_compared=self._num_compared,
        )

    def _nearest(self, embeddings: NDArray[np.float32]) -> NDArray[np.int64]:
        # ‖x − μ‖² is least where x·μ − ‖μ‖²/2 is largest.
        return np.asarray((embeddings @ self._means.T - self._half_squares).argmax(axis=1))


def _check_possible(artifact: Artifact, conversion: Conversion) -> None:
    where, classes = artifact.path.name, artifact.manifest.classes
    unknown = [name for name in conversion.drop_classes if name not in set(classes)]
    if unknown:
        raise StoreError(f"{where}: has no class {unknown[0]!r} to drop. `store inspect` shows its classes.")
    if set(conversion.drop_classes) == set(classes):
        raise StoreError(f"{where}: all {len(classes)} classes would be dropped. Keep at least one.")
    if conversion.dtype is not None and (conversion.class_only or "sample/embedding" not in artifact):
        raise StoreError(
            f"{where}: --dtype is of sample embeddings, and there would be none. Class statistics are always float32."
        )
