"""Alignment: how well a student's embeddings agree with the teacher's, measured when a run has come to its end.

Nothing here is learnt from. Figures that have no meaning for a run (cosines where nothing teaches the projection) are
missing rather than 0.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.distill.evaluate import Evaluation, evaluate_student, spread_out
from pipeline.distill.preparation import Prepared

MAX_SAMPLES = 2_000
_BLOCK = 2**22  # cosines at once
_ROUNDING = 1e-6  # relative: vectors that differ by less are the same

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Alignment:
    """Cosines are means over images, −1…1; ŝ is a student's embedding, P the learned projection.

    `class_cka` is linear CKA (arXiv 1905.00414) of the student's class means of `num_images` evaluation images with
    the teacher's class embeddings, over the `num_classes` classes that have such images; `class_cka_by_chance` its mean
    over all ways to shuffle the classes. `own_class`: ŝ with P of its own class embedding; `other_class`: with the
    nearest of the others; `nearest_own`: share of images that are nearest to their own. `own_sample`: of `num_samples`
    training images, ŝ with P of the image's own stored embedding, view 0; `other_sample`: with those of the others.
    """

    num_images: int
    num_classes: int
    class_cka: float | None = None
    class_cka_by_chance: float | None = None
    own_class: float | None = None
    other_class: float | None = None
    nearest_own: float | None = None
    num_samples: int = 0
    own_sample: float | None = None
    other_sample: float | None = None


def measure_alignment(prepared: Prepared, evaluation: Evaluation) -> Alignment:
    """Compare what evaluation images became with what the teacher has, and embed training images that it has itself.

    Args:
        prepared: the run, trained.
        evaluation: of the student that is kept, by the run's evaluation images.

    Returns:
        The figures.

    Raises:
        PipelineError: memory ran out.
        StoreError: sample embeddings cannot be read.
    """
    trainer = prepared.trainer
    labels, embeddings = prepared.images.evaluation.labels[evaluation.embedded], evaluation.embeddings
    present = np.unique(labels)
    alignment: dict[str, Any] = {"num_images": len(labels), "num_classes": len(present)}
    if not np.isfinite(embeddings).all():
        return Alignment(**alignment)
    method = trainer.method if trainer.average is None else trainer.average.method
    means = np.stack([embeddings[labels == label].mean(axis=0, dtype=np.float64) for label in present])
    cka = linear_cka(means, method.class_embeddings.cpu().numpy()[present])
    if cka is not None:
        alignment |= {"class_cka": cka[0], "class_cka_by_chance": cka[1]}
    if trainer.recipe.alpha2:  # else P learns nothing of images
        projected = _project(method.projection, method.class_embeddings)
        alignment |= class_cosines(embeddings, labels, projected)
        alignment |= _of_samples(prepared, method.projection)
    return Alignment(**alignment)


def linear_cka(left: NDArray[Any], right: NDArray[Any]) -> tuple[float, float] | None:
    """Compute linear CKA (Kornblith et al. 2019, arXiv 1905.00414, equation 3 with linear kernels).

    With few rows in many dimensions it is high whatever the rows are, so it comes with what chance gives: K and L being
    centred Gram matrices, the mean of tr(K P L Pᵀ) over all permutations P of n rows is tr(K) tr(L) / (n − 1).

    Args:
        left: [N, d] rows.
        right: [N, D] rows, of the same things in the same order.

    Returns:
        CKA, 0…1, and its mean over all shufflings of one side's rows; none where the rows of a side are all the same.
    """
    sides = []
    for rows in (left, right):
        centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
        length = np.linalg.norm(centred)
        if length <= _ROUNDING * np.linalg.norm(rows.astype(np.float64)):
            return None
        sides.append(centred / length)  # so both traces are 1
    scale = np.linalg.norm(sides[0].T @ sides[0]) * np.linalg.norm(sides[1].T @ sides[1])
    cka = np.linalg.norm(sides[0].T @ sides[1]) ** 2 / scale
    return min(1.0, float(cka)), min(1.0, float(1 / ((len(left) - 1) * scale)))


def class_cosines(embeddings: Floats, labels: NDArray[np.int64], projected: Floats) -> dict[str, float]:
    """Compare embeddings of images with projected class embeddings.

    Args:
        embeddings: [N, d], the student's.
        labels: [N] rows of `projected`.
        projected: [C, d].

    Returns:
        `own_class`, and where there is another class `other_class` and `nearest_own`, as `Alignment` has them.
    """
    embeddings, projected = _directions(embeddings), _directions(projected)
    own = np.sum(embeddings * projected[labels], axis=1, dtype=np.float64)
    found = {"own_class": float(own.mean())}
    if len(projected) > 1:
        other = np.empty(len(embeddings))
        rows = max(1, _BLOCK // len(projected))
        for start in range(0, len(embeddings), rows):
            cosines = embeddings[start : start + rows] @ projected.T
            cosines[np.arange(len(cosines)), labels[start : start + rows]] = -np.inf
            other[start : start + rows] = cosines.max(axis=1)
        found |= {"other_class": float(other.mean()), "nearest_own": float((own > other).mean())}
    return found


def sample_cosines(embeddings: Floats, projected: Floats) -> dict[str, float]:
    """Compare embeddings of images with the projected embeddings that the teacher has of them.

    Args:
        embeddings: [N, d], the student's.
        projected: [N, d], of the same images.

    Returns:
        `num_samples`, `own_sample`, and where there is another image `other_sample`, as `Alignment` has them.
    """
    embeddings, projected = _directions(embeddings), _directions(projected)
    number, own = len(embeddings), np.sum(embeddings * projected, dtype=np.float64)
    found = {"num_samples": number, "own_sample": float(own / number)}
    if number > 1:
        every = embeddings.sum(axis=0, dtype=np.float64) @ projected.sum(axis=0, dtype=np.float64)
        found["other_sample"] = float((every - own) / (number * (number - 1)))
    return found


def _of_samples(prepared: Prepared, projection: torch.nn.Module) -> dict[str, float]:
    targets, trainer = prepared.targets, prepared.trainer
    chosen = spread_out(np.flatnonzero(targets.sample_rows >= 0), MAX_SAMPLES)
    if not len(chosen):
        return {}
    images, compute = prepared.images.train.select(chosen), trainer.compute
    with trainer.batch_must_fit("evaluation"):
        found = evaluate_student(trainer.kept, images, compute.device, compute.precision, trainer.evaluation_batch)
    stored = targets.sample_embeddings(chosen)[:, 0]
    if not (np.isfinite(found.embeddings).all() and np.isfinite(stored).all()):
        return {}
    return sample_cosines(found.embeddings, _project(projection, torch.from_numpy(stored) - targets.centre))


def _project(projection: torch.nn.Module, embeddings: Tensor) -> Floats:
    with torch.inference_mode():
        projected: Tensor = projection(embeddings.to(next(projection.parameters()).device))
    return projected.cpu().numpy()


def _directions(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions: Floats = vectors / np.maximum(length, np.finfo(np.float32).tiny)
    return directions
