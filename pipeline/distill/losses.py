"""The losses of CLIP-Embed-KD, each a pure function of embeddings, averaged over the batch, in float32.

Symbols as in the paper (arXiv 2404.06170, section II): s student embeddings, P t projected teacher
embeddings, κ logit scale; hats mean divided by the Euclidean norm.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def class_prototype_loss(
    student: Float[Tensor, "batch student_dim"],
    projected: Float[Tensor, "classes student_dim"],
    labels: Int[Tensor, " batch"],
    logit_scale: float,
) -> Float[Tensor, ""]:
    """Compute L_class: cross-entropy over cosines to the class embeddings (the paper's Embed-KD).

    Args:
        student: s, raw.
        projected: P t_c, one row a class, raw.
        labels: the class row of each image.
        logit_scale: κ; z_ic = κ · ŝ_i·p̂_c.

    Returns:
        The mean over the batch.
    """
    return F.cross_entropy(_cosines(student, projected) * logit_scale, labels)


def sample_contrastive_loss(
    student: Float[Tensor, "batch student_dim"],
    projected: Float[Tensor, "batch student_dim"],
    image_ids: Int[Tensor, " batch"],
    logit_scale: float,
) -> Float[Tensor, ""]:
    """Compute L_sample: cross-entropy over cosines to the batch's own teacher embeddings.

    The paper's CLIP-Teacher-KD, from stored embeddings instead of a live teacher. Image i's target is its own
    embedding; where the same image stands in the batch twice, its copies share the target evenly.

    Args:
        student: s, raw.
        projected: P t_j, the teacher embedding of image j, raw.
        image_ids: equal where the image is.
        logit_scale: κ; z_ij = κ · ŝ_i·p̂_j.

    Returns:
        The mean over the batch.
    """
    same = (image_ids[:, None] == image_ids[None, :]).float()
    return F.cross_entropy(_cosines(student, projected) * logit_scale, same / same.sum(dim=1, keepdim=True))


def cosine_regression_loss(
    student: Float[Tensor, "batch student_dim"], projected: Float[Tensor, "batch student_dim"]
) -> Float[Tensor, ""]:
    """Compute L_cos: the mean of 1 − ŝ_i·p̂_i.

    Args:
        student: s, raw.
        projected: P t_i, the teacher embedding of the same image, raw.

    Returns:
        The mean over the batch, in [0, 2].
    """
    return (1 - F.cosine_similarity(student.float(), projected.float(), dim=1)).mean()


def total_loss(
    ce: Float[Tensor, ""],
    clip: Float[Tensor, ""] | None,
    cosine: Float[Tensor, ""] | None,
    weights: tuple[float, float],
) -> Float[Tensor, ""]:
    """Compute L = α₁ L_CE + α₂ L_clip + λ L_cos with α₁ = 1 − α₂.

    Args:
        ce: L_CE.
        clip: L_clip; none where it has no weight or no image, which leaves exactly the supervised loss.
        cosine: L_cos; none where λ is 0.
        weights: (α₂, λ).

    Returns:
        L.
    """
    alpha2, cosine_weight = weights
    loss = ce if clip is None else (1 - alpha2) * ce + alpha2 * clip
    return loss if cosine is None else loss + cosine_weight * cosine


def _cosines(
    left: Float[Tensor, "rows student_dim"], right: Float[Tensor, "columns student_dim"]
) -> Float[Tensor, "rows columns"]:
    return F.normalize(left.float(), dim=1) @ F.normalize(right.float(), dim=1).T
