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
from pipeline.distill.decoding import ReplayedViews
from pipeline.distill.images import DecodedImages
from pipeline.distill.recipe import Recipe
from pipeline.errors import PipelineError, listed
from pipeline.views import VIEWS_VERSION
from store import Artifact, sample_embeddings

_SAMPLES = ("sample/key", "sample/label", "sample/embedding", "sample/scale")


@dataclass(frozen=True)
class Targets:
    """What the student is drawn to.

    Everything of classes stands in the order of the data's classes, [C, D] float32. `centre` [D] has been taken off
    `class_embeddings` and is to be taken off sample embeddings: the mean class embedding, or 0. `head` is the ridge
    head's weight and bias, of raw embeddings. `sample_rows` [N]: each training image's row in the artifact, −1 where
    it has none; `image_ids` [N]: equal where the image is. Both are empty where no loss needs samples.
    """

    artifact: Artifact
    class_embeddings: Float[Tensor, "classes embed_dim"]
    centre: Float[Tensor, " embed_dim"]
    class_text: Float[Tensor, "classes embed_dim"] | None
    head: tuple[Float[Tensor, "classes embed_dim"], Float[Tensor, " classes"]] | None
    sample_rows: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    num_views: int

    def sample_embeddings(self, images: NDArray[np.int64]) -> NDArray[np.float32]:
        """Gather the teacher's embeddings of some training images.

        Args:
            images: [B] training images.

        Returns:
            [B, V, D], raw, of the views that are replayed; 0 for an image without a row.
        """
        rows = self.sample_rows[images]
        embeddings = sample_embeddings(self.artifact, np.maximum(rows, 0))[:, : self.num_views]
        embeddings[rows < 0] = 0
        return embeddings


def verify_for(artifact: Artifact, target: Target, recipe: Recipe) -> None:
    """Check that the artifact carries what the losses need, and every byte of that.

    Args:
        artifact: the artifact.
        target: which embeddings L_clip is made of.
        recipe: the losses.

    Raises:
        PipelineError: something that is needed is not in it, or its views are of another version.
        StoreError: a tensor is damaged.
    """
    name, manifest = artifact.path.name, artifact.manifest
    if target != "class" and "sample/embedding" not in artifact:
        raise PipelineError(
            f"{name}: has no sample embeddings, which --target {target} needs. "
            "Pass --target class, or extract with --samples."
        )
    if recipe.text_weight and "class/text" not in artifact:
        raise PipelineError(
            f"{name}: has no text embeddings, which text_weight {recipe.text_weight:g} needs. "
            "Set it to 0, or extract with --class-text from a teacher like CLIP."
        )
    if recipe.soft_label_weight and "head/weight" not in artifact:
        raise PipelineError(
            f"{name}: has no ridge head, which soft_label_weight {recipe.soft_label_weight:g} needs. "
            "Set it to 0, or extract again."
        )
    if recipe.replay_views and manifest.sampling.views > 1 and manifest.sampling.views_version != VIEWS_VERSION:
        raise PipelineError(
            f"{name}: its views are of version {manifest.sampling.views_version}, this program renders version "
            f"{VIEWS_VERSION}: the student would not see what the teacher saw. Extract again, or train on the images "
            "themselves with --set replay_views=false."
        )
    used = ["class/mean"]
    used += ["class/text"] if recipe.text_weight else []
    used += ["head/weight", "head/bias"] if recipe.soft_label_weight else []
    used += [each for each in _SAMPLES if target != "class" and each in artifact]
    for each in used:
        artifact.verify(each)  # training gathers rows unchecked


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


def join(artifact: Artifact, images: DecodedImages, rows: NDArray[np.int64], target: Target, recipe: Recipe) -> Targets:
    """Join an artifact to the training images.

    Args:
        artifact: verified for the target and the recipe.
        images: the training images.
        rows: [C] the artifact's row of each class, as `class_rows` finds them.
        target: which embeddings L_clip is made of.
        recipe: the losses.

    Returns:
        The targets.
    """
    means = _rows_of(artifact, "class/mean", rows)
    centre = means.mean(dim=0) if recipe.centre else torch.zeros(means.shape[1])
    text = head = None
    if recipe.text_weight:
        text = _rows_of(artifact, "class/text", rows)
        # Texts lie apart from images (arXiv 2203.02053): each kind has its own centre.
        text = text - text.mean(dim=0) if recipe.centre else text
    if recipe.soft_label_weight:
        head = (_rows_of(artifact, "head/weight", rows), _rows_of(artifact, "head/bias", rows))
    views = replayed_views(artifact, target, recipe)
    sample_rows = image_ids = np.empty(0, np.int64)
    if target != "class":
        sample_rows = artifact.find(images.keys, rows[images.labels])
        _, image_ids = np.unique(np.ascontiguousarray(images.keys).view("V16")[:, 0], return_inverse=True)
    return Targets(
        artifact=artifact,
        class_embeddings=means - centre,
        centre=centre,
        class_text=text,
        head=head,
        sample_rows=sample_rows,
        image_ids=image_ids.astype(np.int64),
        num_views=1 if views is None else views.count,
    )


def replayed_views(artifact: Artifact, target: Target, recipe: Recipe) -> ReplayedViews | None:
    """Say which views the student is shown beside the images themselves.

    Args:
        artifact: verified for the target.
        target: what will be used.
        recipe: whether views are replayed.

    Returns:
        Those of the artifact; none where it has no more than view 0, or that alone is used.

    Raises:
        PipelineError: it does not say how large they are.
    """
    sampling = artifact.manifest.sampling
    if not recipe.replay_views or target == "class" or sampling.views == 1:
        return None
    if sampling.view_size is None:
        raise PipelineError(
            f"{artifact.path.name}: its manifest does not say how large its {sampling.views} views are. Extract again, "
            "or train on the images themselves with --set replay_views=false."
        )
    return ReplayedViews(sampling.views, sampling.seed, sampling.view_size)


def _rows_of(artifact: Artifact, name: str, rows: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.array(artifact[name][rows], np.float32))
