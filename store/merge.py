"""Merge artifacts of one teacher: statistics by the parallel formula, samples by their sorted pairs.

Nothing but class tensors is held: the inputs' samples are read in step, block by block.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from store.agreement import check_alike
from store.artifact import Artifact, open_artifact
from store.container import Progress, ignore
from store.errors import ArtifactMergeError
from store.layout import RULES
from store.manifest import DataSetInfo, HeadInfo, Manifest, SamplingInfo, SourceInfo, TextInfo
from store.merged_rows import MergedSamples
from store.ridge import fit_ridge
from store.statistics import ClassStatistics
from store.verify import verify_open
from store.writing import RowBlocks, check_destination, write_artifact


@dataclass(frozen=True)
class MergeResult:
    """What a merge made: `notes` are sentences that its user should read."""

    manifest: Manifest
    num_shared: int
    notes: tuple[str, ...]


def merge_artifacts(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    allow_overlap: bool = False,
    overwrite: bool = False,
    progress: Progress = ignore,
) -> MergeResult:
    """Merge artifacts as if one extraction had seen all their images.

    Counts add up; means and M2 keep the bound that `ClassStatistics.merge` states. Classes are those of the first
    artifact, followed by what each further one adds.

    Args:
        paths: two artifacts or more.
        out: the artifact to write.
        allow_overlap: images that stand in several inputs are stored once, and counted each time.
        overwrite: replace an existing file.
        progress: told of the bytes of each block that was checked or written.

    Returns:
        The manifest, how many samples were shared, and what could not be kept or proved.

    Raises:
        ArtifactMergeError: the inputs are not of the same teacher and preprocessing, or overlap.
        StoreError: an input is damaged, or the output cannot be written.
    """
    check_destination(out, overwrite=overwrite)
    if len(paths) < 2:
        raise ArtifactMergeError(f"{out}: a merge needs two artifacts or more, found {len(paths)}.")
    with ExitStack() as stack:
        artifacts = [stack.enter_context(open_artifact(path)) for path in paths]
        sampled = [artifact for artifact in artifacts if "sample/key" in artifact]
        for alike in (artifacts, sampled):  # the first artifact of all need not have samples
            for other in alike[1:]:
                check_alike(alike[0], other)
        for artifact in artifacts:
            verify_open(artifact, progress)
        merge = _Merge(artifacts)
        if not allow_overlap:
            merge.check_disjoint()
        try:
            manifest, tensors = merge.finish(progress)
        except ValidationError as error:  # a sum of what strangers wrote
            first = error.errors()[0]
            raise merge.overflow(".".join(map(str, first["loc"])), first["input"], 2**63 - 1) from None
        manifest = write_artifact(out, manifest, tensors, overwrite=overwrite)
        return MergeResult(manifest, merge.num_shared, tuple(merge.notes))


class _Merge:
    """One merge: the inputs, where their classes go, and what there is to say."""

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        self.artifacts = artifacts
        self.notes: list[str] = []
        self.classes = tuple(dict.fromkeys(name for artifact in artifacts for name in artifact.manifest.classes))
        row_of = {name: row for row, name in enumerate(self.classes)}
        self.class_rows = [
            np.array([row_of[name] for name in artifact.manifest.classes], np.int64) for artifact in artifacts
        ]
        sampled = [index for index, artifact in enumerate(artifacts) if "sample/key" in artifact]
        self.samples = MergedSamples([artifacts[index] for index in sampled], [self.class_rows[i] for i in sampled])
        # Whether the samples are all images that the statistics are of.
        self.complete = len(sampled) == len(artifacts) and all(
            artifact.manifest.sampling.images_sha256 for artifact in artifacts
        )
        self.num_shared = self.samples.num_shared
        self._note_missing([artifact for artifact in artifacts if "sample/key" not in artifact])

    def check_disjoint(self) -> None:
        """Refuse what is known to overlap."""
        if self.num_shared:
            raise ArtifactMergeError(
                f"{self._named(self.artifacts)}: of their samples {self.num_shared} are repeated, same image and same "
                "label, and would be counted twice. Extract disjoint parts, or pass --allow-overlap to store each once "
                "and count both."
            )
        seen: dict[tuple[str, tuple[str, ...]], Artifact] = {}
        for artifact in self.artifacts:
            digest = artifact.manifest.sampling.images_sha256  # of keys and class rows: equal where names are, too
            if digest and (same := seen.setdefault((digest, artifact.manifest.classes), artifact)) is not artifact:
                raise ArtifactMergeError(
                    f"{artifact.path.name}: is of exactly the images of {same.path.name}. Leave it out, or pass "
                    "--allow-overlap to count them twice."
                )

    def finish(self, progress: Progress) -> tuple[Manifest, dict[str, NDArray[Any] | RowBlocks]]:
        """Return the manifest, but for its tensors, and the tensors, which report their progress."""
        first = self.artifacts[0].manifest
        statistics = ClassStatistics(len(self.classes), first.teacher.embed_dim)
        for artifact, class_rows in zip(self.artifacts, self.class_rows, strict=True):
            statistics.merge(artifact["class/count"], artifact["class/mean"], artifact["class/m2"], class_rows)
        largest, limit = float(statistics.m2.max()), float(np.finfo(np.float32).max)
        if largest > limit:
            raise self.overflow("class/m2", f"{largest:.4g}", f"{limit:.4g}")
        tensors: dict[str, NDArray[Any] | RowBlocks] = {
            **statistics.tensors(),
            **{name: rows.reporting(progress) for name, rows in self.samples.tensors().items()},
        }
        head = self._head(tensors)
        text = self._text(tensors)
        dropped = sorted({name for artifact in self.artifacts for name in artifact.manifest.tensors} - set(RULES))
        if dropped:
            self.notes.append(f"Not kept, since this program does not know how to merge them: {', '.join(dropped)}.")
        sources = tuple(source for artifact in self.artifacts for source in sources_of(artifact))
        manifest = Manifest(
            teacher=first.teacher,
            data_set=_union_of_data_sets([source.data_set for source in sources]),
            preprocessing=first.preprocessing,
            sampling=self._sampling(statistics.count),
            head=head,
            text=text,
            sources=sources,
            classes=self.classes,
            software=_joined([artifact.manifest.software for artifact in self.artifacts]),
        )
        return manifest, tensors

    def overflow(self, what: str, reached: object, limit: object) -> ArtifactMergeError:
        """Return the error that a number of all inputs together is larger than an artifact can hold."""
        return ArtifactMergeError(
            f"{self._named(self.artifacts)}: {what} of all together would be {reached}, at most {limit} can be stored."
        )

    def _head(self, tensors: dict[str, NDArray[Any] | RowBlocks]) -> HeadInfo | None:
        if not any("head/weight" in artifact for artifact in self.artifacts):
            return None
        if not self.complete:
            self.notes.append(
                "The ridge head was dropped: it cannot be merged from means, and not every input has its samples."
            )
            return None
        embed_dim = self.artifacts[0].manifest.teacher.embed_dim
        head = fit_ridge(self.samples.labelled_embeddings, len(self.classes), embed_dim)
        tensors.update(head.tensors())
        self.notes.append("The ridge head was fitted again, to the samples of all inputs.")
        return head.info()

    def _text(self, tensors: dict[str, NDArray[Any] | RowBlocks]) -> TextInfo | None:
        having = [artifact for artifact in self.artifacts if "class/text" in artifact]
        if not having:
            return None
        text = np.full((len(self.classes), self.artifacts[0].manifest.teacher.embed_dim), np.nan, np.float32)
        info = self.artifacts[0].manifest.text
        # Of different classes they would agree in every row, whatever prompts they were made of.
        agree = len(having) == len(self.artifacts) and all(other.manifest.text == info for other in having)
        for artifact, rows in zip(self.artifacts, self.class_rows, strict=True):
            if agree:
                known = ~np.isnan(text[rows, 0])
                differences = text[rows][known].astype(np.float64) - artifact["class/text"][known]
                # Rounding depends on what else was in the batch, in bfloat16 by a hundredth.
                agree = bool((np.abs(differences) <= 0.02).all())
                text[rows] = artifact["class/text"]
        if not agree:
            self.notes.append("class/text was dropped: the inputs do not all have it, or differ in it.")
            return None
        tensors["class/text"] = text
        return info

    def _sampling(self, count: NDArray[np.int64]) -> SamplingInfo:
        parts = [artifact.manifest.sampling for artifact in self.artifacts]
        per_class = None
        asked_of_each = [part.per_class for part in parts if part.per_class is not None]
        if len(asked_of_each) == len(parts):
            asked = np.zeros(len(self.classes), object)  # the sum of strangers' numbers may be of any size
            for number, rows in zip(asked_of_each, self.class_rows, strict=True):
                asked[rows] += number
            per_class = int(asked.max())
        span: tuple[int, int] | None = None
        sources = [source for artifact in self.artifacts for source in sources_of(artifact)]
        if limits := _parts_of_one(sources):  # each was asked for its share of the same choice
            per_class, span = sources[0].sampling.per_class, (limits[0][0], limits[-1][1])
            has_gaps = any(one[1] < other[0] for one, other in pairwise(limits))
            if span == (0, sources[0].data_set.rows) and not has_gaps:
                span = None
        kept = {part.limit for part in parts}
        return SamplingInfo(
            per_class=per_class,
            rows=span,
            limit=kept.pop() if len(kept) == 1 else None,
            seed=parts[0].seed,
            batch_size=max(part.batch_size for part in parts),
            views=parts[0].views,
            view_size=parts[0].view_size,
            views_version=parts[0].views_version,
            short_classes=0 if per_class is None else int((count < per_class).sum()),
            skipped_images=sum(part.skipped_images for part in parts),
            images_sha256=self.samples.images_sha256 if self.complete else None,
        )

    def _note_missing(self, class_only: Sequence[Artifact]) -> None:
        if not class_only:
            return
        self.notes.append(
            f"{self._named(class_only)}: class statistics only, which cannot prove that the inputs are disjoint. "
            "An image that stands in two of them is counted twice."
        )
        if len(class_only) < len(self.artifacts):
            self.notes.append("The merged artifact has the samples of the other inputs only.")

    @staticmethod
    def _named(artifacts: Sequence[Artifact]) -> str:
        return ", ".join(artifact.path.name for artifact in artifacts)


def sources_of(artifact: Artifact) -> tuple[SourceInfo, ...]:
    """Return what an artifact was made from, or itself where it was extracted."""
    manifest = artifact.manifest
    if manifest.sources:
        return manifest.sources
    return (
        SourceInfo(manifest_sha256=artifact.manifest_sha256, data_set=manifest.data_set, sampling=manifest.sampling),
    )


def _parts_of_one(sources: Sequence[SourceInfo]) -> list[tuple[int, int]]:
    """Return the rows of each source, sorted, if they are different rows of one choice among one split's images."""
    first, limits = sources[0], []
    for source in sources:
        rows = source.sampling.rows
        alike = source.data_set == first.data_set and all(
            getattr(source.sampling, name) == getattr(first.sampling, name) for name in ("per_class", "limit", "seed")
        )
        if rows is None or not alike:
            return []
        limits.append(rows)
    limits.sort()
    return limits if all(one[1] <= other[0] for one, other in pairwise(limits)) else []


def _union_of_data_sets(parts: Sequence[DataSetInfo]) -> DataSetInfo:
    distinct = list({part.model_dump_json(): part for part in parts}.values())
    if len(distinct) == 1:
        return distinct[0]
    names = set(DataSetInfo.model_fields) - {"rows", "classes_named"}
    return DataSetInfo(
        **_joined([part.model_dump(include=names) for part in distinct]),
        rows=sum(part.rows for part in distinct),
        classes_named=distinct[0].classes_named,
    )


def _joined(parts: Sequence[Mapping[str, str | None]]) -> dict[str, Any]:
    """Join the different values of each field by a plus sign; they may be joined ones themselves."""
    found: dict[str, dict[str, None]] = {name: {} for part in parts for name in part}
    for part in parts:
        for name, value in part.items():
            found[name] |= dict.fromkeys([] if value is None else value.split(" + "))
    return {name: " + ".join(values) if values else None for name, values in found.items()}
