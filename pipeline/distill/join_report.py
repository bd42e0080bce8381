"""The join report: how much of a data set an artifact knows, told before anything is trained."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.distill.images import DecodedImages
from pipeline.distill.targets import Targets
from pipeline.errors import PipelineError, listed

_NUM_EXAMPLES = 5


@dataclass(frozen=True)
class JoinReport:
    """What joined and what did not. `*_rows` are up to five examples, as rows of the data's split.

    `num_known_otherwise`: missing images that the artifact knows under another label. `num_repeated`: images that
    stand in the data more than once; `num_relabelled`: those of them under several labels.
    """

    artifact: str
    num_classes: int
    num_artifact_classes: int
    num_images: int
    num_artifact_samples: int
    num_joined: int
    num_missing: int
    num_known_otherwise: int
    missing_rows: tuple[int, ...]
    num_repeated: int
    num_relabelled: int
    num_views: int

    def lines(self) -> list[str]:
        """Return it in words, a line each."""
        of = f"{self.num_classes} of its {self.num_artifact_classes} classes"
        classes = "all its classes" if self.num_classes == self.num_artifact_classes else of
        if not self.num_artifact_samples:
            return [f"Joined {self.artifact}: {classes}, {self.num_images:,} images to train on."]
        lines = [
            f"Joined {self.artifact}: {classes}, {self.num_joined:,} of {self.num_images:,} images by content; it "
            f"holds {self.num_artifact_samples:,}."
        ]
        if self.num_missing:
            known = self.num_known_otherwise
            otherwise = f", {known:,} of them known under another label" if known else ""
            lines += [
                f"{self.num_missing:,} images have no embedding{otherwise}, and take no part in the losses of samples "
                f"(rows {self.missing()})."
            ]
        if self.num_repeated:
            lines += [
                f"{self.num_repeated:,} images stand in the data more than once, {self.num_relabelled:,} of them under "
                "several labels: each joins by its label, and all of one image are positives of each other."
            ]
        if self.num_views > 1:
            lines += [f"The student sees the {self.num_views} views of each image that the teacher saw."]
        return lines

    def missing(self) -> str:
        """Name some of the rows that did not join."""
        return listed(self.missing_rows) + (", …" if self.num_missing > len(self.missing_rows) else "")

    def as_json(self) -> dict[str, Any]:
        """Return it as the run record has it."""
        return asdict(self)


def report_join(targets: Targets, images: DecodedImages, max_missing: float) -> JoinReport:
    """Count what joined.

    Args:
        targets: the joined artifact.
        images: the training images.
        max_missing: largest share of images without a sample embedding, 0…1.

    Returns:
        The report.

    Raises:
        PipelineError: too many images have no sample embedding; some are named.
    """
    artifact = targets.artifact
    uses_samples = len(targets.sample_rows) > 0
    missing = np.flatnonzero(targets.sample_rows < 0)
    known = 0
    if len(missing):
        known = int(np.isin(_as_void(images.keys[missing]), _as_void(artifact["sample/key"])).sum())
    num_repeated, num_relabelled = _repeats(images)
    report = JoinReport(
        artifact=artifact.path.name,
        num_classes=len(targets.class_embeddings),
        num_artifact_classes=len(artifact.manifest.classes),
        num_images=len(images),
        num_artifact_samples=len(artifact["sample/label"]) if uses_samples else 0,
        num_joined=len(images) - len(missing),
        num_missing=len(missing),
        num_known_otherwise=known,
        missing_rows=tuple(images.source_rows[missing[:_NUM_EXAMPLES]].tolist()),
        num_repeated=num_repeated if uses_samples else 0,
        num_relabelled=num_relabelled if uses_samples else 0,
        num_views=targets.num_views,
    )
    if len(missing) / len(images) > max_missing:  # 29 of 50 are 0.58, but 0.58 · 50 is less than 29
        _refuse(report)
    return report


def _refuse(report: JoinReport) -> None:
    otherwise = ""
    if report.num_known_otherwise:
        otherwise = (
            f" It knows {report.num_known_otherwise:,} of them under another label: is it the same label column?"
        )
    elif report.num_missing == report.num_images:
        otherwise = " It knows none of them: is it the artifact of this data set, at its original size?"
    share = np.ceil(report.num_missing / report.num_images * 100) / 100
    raise PipelineError(
        f"{report.artifact}: {report.num_missing} of {report.num_images} training images have no embedding in it (rows "
        f"{report.missing()}).{otherwise} Extract with --samples --per-class all from this data set, or allow it with "
        f"--max-missing {share:g}."
    )


def _repeats(images: DecodedImages) -> tuple[int, int]:
    _, ids, counts = np.unique(_as_void(images.keys), return_inverse=True, return_counts=True)
    pairs = np.unique(np.stack([ids, images.labels]), axis=1)
    labels_of = np.bincount(pairs[0], minlength=len(counts))
    return int((counts > 1).sum()), int((labels_of > 1).sum())


def _as_void(keys: NDArray[np.uint8]) -> NDArray[np.void]:
    return np.ascontiguousarray(keys).view("V16")[:, 0]
