"""The losses, each a pure function of one batch, in float32, with one value an image.

Symbols as in the paper (arXiv 2404.06170, section II): s student embeddings, P t projected teacher embeddings, κ logit
scale; hats mean divided by the Euclidean norm. Class targets are shares [batch, classes] that sum to 1, so that mixed
images (mixup, CutMix) have mixed targets; a label alone is a one.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

_MASKED = -1e9  # finite, for 0 · −∞ is not a number


def cross_entropy_loss(
    logits: Float[Tensor, "batch classes"], class_targets: Float[Tensor, "batch classes"], label_smoothing: float
) -> Float[Tensor, " batch"]:
    """Compute L_CE: cross-entropy of the student's own classifier.

    Args:
        logits: head(s).
        class_targets: the share of each class in each image.
        label_smoothing: the share of the target that is spread over all classes (arXiv 1512.00567, section 7), 0…1.

    Returns:
        One loss an image.
    """
    return F.cross_entropy(logits.float(), class_targets, reduction="none", label_smoothing=label_smoothing)


def class_prototype_loss(
    student: Float[Tensor, "batch student_dim"],
    projected: Float[Tensor, "classes student_dim"],
    class_targets: Float[Tensor, "batch classes"],
    logit_scale: float | Float[Tensor, ""],
) -> Float[Tensor, " batch"]:
    """Compute L_class: cross-entropy over cosines to the class embeddings (the paper's Embed-KD).

    With text embeddings of the class names for t_c it is CLIP's classifier (arXiv 2103.00020, section 3.1).

    Args:
        student: s, raw.
        projected: P t_c, one row a class, raw.
        class_targets: the share of each class in each image.
        logit_scale: κ; z_ic = κ · ŝ_i·p̂_c.

    Returns:
        One loss an image.
    """
    return F.cross_entropy(_cosines(student, projected) * logit_scale, class_targets, reduction="none")


def sample_contrastive_loss(
    student: Float[Tensor, "rows student_dim"],
    projected: Float[Tensor, "batch student_dim"],
    positives: Float[Tensor, "rows batch"],
    joined: Bool[Tensor, " batch"],
    logit_scale: float | Float[Tensor, ""],
) -> Float[Tensor, " rows"]:
    """Compute L_sample: cross-entropy over cosines to the batch's own teacher embeddings.

    The paper's CLIP-Teacher-KD, from stored embeddings instead of a live teacher.

    Args:
        student: s of some of the batch's images, raw.
        projected: P t_j, the teacher embedding of image j of the batch, raw.
        positives: each row's target, which sums to 1 over the batch: the identity, where no image stands there twice.
        joined: which images have a teacher embedding; the others are no candidates.
        logit_scale: κ; z_ij = κ · ŝ_i·p̂_j.

    Returns:
        One loss a row; without meaning for an image that is not joined.
    """
    logits = (_cosines(student, projected) * logit_scale).masked_fill(~joined, _MASKED)
    return F.cross_entropy(logits, positives, reduction="none")


def cosine_regression_loss(
    regressed: Float[Tensor, "batch embed_dim"], sample_embeddings: Float[Tensor, "batch embed_dim"]
) -> Float[Tensor, " batch"]:
    """Compute L_cos = 1 − q̂_i·t̂_i, half the squared distance of unit vectors.

    The feature mimicry of CLIP-KD (arXiv 2307.12732).

    Args:
        regressed: q = Q s, the student's embedding brought to the teacher's space: in the student's space P t could
            become the same for all images, and the loss 0.
        sample_embeddings: t_i, the teacher embedding of the same image, raw or centred.

    Returns:
        One loss an image, in [0, 2].
    """
    return 1 - F.cosine_similarity(regressed.float(), sample_embeddings.float(), dim=1)


def soft_label_loss(
    logits: Float[Tensor, "batch classes"], teacher_probabilities: Float[Tensor, "batch classes"]
) -> Float[Tensor, " batch"]:
    """Compute the Kullback-Leibler divergence KL(teacher ‖ student) (arXiv 1503.02531, equation 1).

    Args:
        logits: head(s), at temperature 1.
        teacher_probabilities: what `soft_labels` made of the teacher's embeddings.

    Returns:
        One loss an image, ≥ 0.
    """
    return F.kl_div(logits.float().log_softmax(dim=1), teacher_probabilities, reduction="none").sum(dim=1)


def soft_labels(
    embeddings: Float[Tensor, "batch embed_dim"],
    head: tuple[Float[Tensor, "classes embed_dim"], Float[Tensor, " classes"]],
    temperature: float,
) -> Float[Tensor, "batch classes"]:
    """Compute the teacher's opinion from its stored embeddings and the artifact's ridge head.

    Args:
        embeddings: t, raw.
        head: weight and bias. It was fitted to zeros and ones, so that its values are no logits: they spread over
            about 1, and a temperature near 0.1 makes of them what a classifier would say.
        temperature: divides the head's values.

    Returns:
        Probabilities.
    """
    weight, bias = head
    return (F.linear(embeddings, weight, bias) / temperature).softmax(dim=1)


def direction_norm_loss(
    regressed: Float[Tensor, "batch embed_dim"],
    class_embeddings: Float[Tensor, "batch embed_dim"],
    teacher_norms: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Compute 1 − (q_i·ĉ) / max(‖q_i‖, ‖t_i‖): towards the class's direction, and long (arXiv 2305.17007).

    Args:
        regressed: q = Q s, the student's embedding brought to the teacher's space.
        class_embeddings: c, the class embedding of each image, raw or centred.
        teacher_norms: ‖t_i‖; where no sample embedding is stored, the norm of its class embedding.

    Returns:
        One loss an image.
    """
    along = (regressed.float() * F.normalize(class_embeddings, dim=1)).sum(dim=1)
    return 1 - along / torch.maximum(regressed.float().norm(dim=1), teacher_norms)


def _cosines(
    left: Float[Tensor, "rows student_dim"], right: Float[Tensor, "columns student_dim"]
) -> Float[Tensor, "rows columns"]:
    return F.normalize(left.float(), dim=1) @ F.normalize(right.float(), dim=1).T
