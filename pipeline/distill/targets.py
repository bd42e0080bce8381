"""The teacher's side of the loss: an artifact joined to a data set, by content.

Classes join by name, images by (sample key, label), never by position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from pipeline.distill.config import Target
from pipeline.distill.images import DecodedImages
from pipeline.errors import PipelineError, listed
from store import Artifact, sample_embeddings


@dataclass(frozen=True)
class Targets:
    """What the student is drawn to.

    `class_embeddings` [C, D] float32, in the order of the data's classes. `sample_rows` [N]: each training
    image's row in the artifact, −1 where it has none; `image_ids` [N]: equal where the image is. Both are
    empty without sample targets.
    """

    artifact: Artifact
    class_embeddings: Float[Tensor, "classes embed_dim"]
    sample_rows: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    num_missing: int

    def sample_embeddings(self, images: NDArray[np.int64]) -> Float[Tensor, "batch embed_dim"]:
        """Gather the teacher's embeddings of some training images.

        Args:
            images: [B] training images that all have a row.

        Returns:
            float32, on the CPU.
        """
        return torch.from_numpy(sample_embeddings(self.artifact, self.sample_rows[images])[:, 0])


def verify_for(artifact: Artifact, target: Target) -> None:
    """Check that the artifact carries what the target needs, and every byte of that.

    Args:
        artifact: the artifact.
        target: what will be used.

    Raises:
        PipelineError: samples are asked for, and it has class embeddings only.
        StoreError: a tensor is damaged.
    """
    if target != "class" and "sample/embedding" not in artifact:
        raise PipelineError(
            f"{artifact.path.name}: has no sample embeddings, which --target {target} needs. "
            "Pass --target class, or extract with --samples."
        )
    samples = ("sample/key", "sample/label", "sample/embedding", "sample/scale")
    for name in ("class/mean", *(samples if target != "class" else ())):
        if name in artifact:
            artifact.verify(name)  # training gathers rows unchecked


def class_rows(
    artifact: Artifact, class_names: Sequence[str], classes_named: bool, *, by_index: bool
) -> NDArray[np.int64]:
    """Find the artifact's row of each of the data's classes.

    Args:
        artifact: the artifact.
        class_names: of the data.
        classes_named: whether the data itself names its classes.
        by_index: join class i to row i, whatever the names.

    Returns:
        [C] rows.

    Raises:
        PipelineError: the artifact lacks some of the classes, or one side has no names.
    """
    known = artifact.manifest.classes
    where = artifact.path.name
    if by_index:
        if len(class_names) > len(known):
            raise PipelineError(f"{where}: has {len(known)} classes, the data has {len(class_names)}.")
        return np.arange(len(class_names))
    if not (classes_named and artifact.manifest.data_set.classes_named):
        side = "the artifact's" if classes_named else "the data's"
        raise PipelineError(
            f"{where}: {side} classes have no names, so they cannot be joined by name. If class i is row i on both "
            "sides, pass --join-by-index."
        )
    row_of = {name: row for row, name in enumerate(known)}
    missing = [name for name in class_names if name not in row_of]
    if missing:
        raise PipelineError(
            f"{where}: lacks {len(missing)} of the data's {len(class_names)} classes ({listed(missing)}). "
            f"It has {len(known)}, among them {', '.join(known[:3])}. Is it the artifact of this data set?"
        )
    return np.array([row_of[name] for name in class_names], np.int64)


def join(
    artifact: Artifact, images: DecodedImages, rows: NDArray[np.int64], target: Target, max_missing: float
) -> Targets:
    """Join an artifact to the training images.

    Args:
        artifact: verified for the target.
        images: the training images.
        rows: [C] the artifact's row of each class, as `class_rows` finds them.
        target: what will be used.
        max_missing: largest share of images without a sample embedding, 0…1.

    Returns:
        The targets.

    Raises:
        PipelineError: too many images have no sample embedding; some are named.
    """
    class_embeddings = torch.from_numpy(np.array(artifact["class/mean"][rows], np.float32))
    if target == "class":
        nothing = np.empty(0, np.int64)
        return Targets(artifact, class_embeddings, nothing, nothing, 0)
    sample_rows = artifact.find(images.keys, rows[images.labels])
    missing = np.flatnonzero(sample_rows < 0)
    if len(missing) / len(images) > max_missing:
        examples = listed(images.source_rows[missing].tolist())
        raise PipelineError(
            f"{artifact.path.name}: {len(missing)} of {len(images)} training images have no embedding in it (rows "
            f"{examples}). Extract with --samples --per-class all from this data "
            f"set, or allow it with --max-missing {np.ceil(len(missing) / len(images) * 100) / 100:g}."
        )
    _, image_ids = np.unique(images.keys.view("V16")[:, 0], return_inverse=True)
    return Targets(artifact, class_embeddings, sample_rows, image_ids.astype(np.int64), len(missing))
