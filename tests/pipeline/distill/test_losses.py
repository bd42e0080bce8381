import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.distill.losses import (
    class_prototype_loss,
    cosine_regression_loss,
    cross_entropy_loss,
    direction_norm_loss,
    sample_contrastive_loss,
    soft_label_loss,
    soft_labels,
)

Array = NDArray[np.float64]

# ŝ is (0.6, 0.8), (0, 1) and (1, 0).
STUDENT = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])


def unit(rows: Array) -> Array:
    norms: Array = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / norms


def log_softmax(logits: Array) -> Array:
    shares: Array = np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits - shares


def cross_entropies(logits: Array, targets: Array) -> list[float]:
    found: list[float] = (-(targets * log_softmax(logits)).sum(axis=1)).tolist()
    return found


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def shares(seed: int, *shape: int) -> Array:
    drawn = np.random.default_rng(seed).random(shape)
    shared: Array = drawn / drawn.sum(axis=1, keepdims=True)
    return shared


def tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).float()


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    return F.one_hot(labels, num_classes).float()


def everyone(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.bool)


# Cross-entropy of the classifier


def test_cross_entropy_is_the_value_computed_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    targets = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.75, 0.0]])
    first = math.log(math.e + math.e**2 + 1) - 2
    assert cross_entropy_loss(logits, targets, 0.0).tolist() == pytest.approx([first, math.log(3)], rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_of_one_hot_targets_is_that_of_the_labels(label_smoothing: float) -> None:
    logits, labels = tensor(draw(0, 7, 4)), torch.arange(7) % 4
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    found = cross_entropy_loss(logits, one_hot(labels, 4), label_smoothing)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_cross_entropy_is_linear_in_the_target() -> None:
    logits, left, right = tensor(draw(0, 5, 4)), tensor(shares(1, 5, 4)), tensor(shares(2, 5, 4))
    mixed = cross_entropy_loss(logits, 0.3 * left + 0.7 * right, 0.1)
    expected = 0.3 * cross_entropy_loss(logits, left, 0.1) + 0.7 * cross_entropy_loss(logits, right, 0.1)
    assert mixed.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_label_smoothing_spreads_its_share_over_all_classes() -> None:
    logits, targets = draw(0, 5, 4), shares(1, 5, 4)
    found = cross_entropy_loss(tensor(logits), tensor(targets), 0.2)
    assert found.tolist() == pytest.approx(cross_entropies(logits, 0.8 * targets + 0.2 / 4), rel=1e-5)


# Class embeddings


def test_class_loss_is_the_value_computed_by_hand() -> None:
    projected = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-2.0, 0.0]])  # p̂ is (1, 0), (0, 1) and (−1, 0)
    loss = class_prototype_loss(STUDENT[:2], projected, one_hot(torch.tensor([0, 1]), 3), logit_scale=2.0)
    first = math.log(math.exp(1.2) + math.exp(1.6) + math.exp(-1.2)) - 1.2  # z is 2 · (0.6, 0.8, −0.6)
    second = math.log(1 + math.exp(2) + 1) - 2  # z is 2 · (0, 1, 0)
    assert loss.tolist() == pytest.approx([first, second], rel=1e-6)


def test_class_loss_of_a_mixed_image_is_mixed() -> None:
    student, projected = tensor(draw(0, 6, 5)), tensor(draw(1, 4, 5))
    left, right = one_hot(torch.arange(6) % 4, 4), one_hot((torch.arange(6) + 1) % 4, 4)
    mixed = class_prototype_loss(student, projected, 0.25 * left + 0.75 * right, 3.0)
    parts = [class_prototype_loss(student, projected, target, 3.0) for target in (left, right)]
    assert mixed.tolist() == pytest.approx((0.25 * parts[0] + 0.75 * parts[1]).tolist(), rel=1e-5)


def test_class_loss_of_perfect_students_is_the_lower_bound_of_orthogonal_classes() -> None:
    # κ = 1 and 100 classes: each cosine is 1 to its own class and 0 to 99 others.
    perfect = torch.eye(100)
    loss = class_prototype_loss(7 * perfect, perfect, perfect, logit_scale=1.0)
    assert loss.tolist() == pytest.approx([math.log(math.e + 99) - 1] * 100, rel=1e-6)
    uniform = class_prototype_loss(torch.zeros(1, 100), perfect, perfect[3:4], logit_scale=1.0)
    assert uniform.item() == pytest.approx(math.log(100), rel=1e-6)


def test_a_learned_logit_scale_is_a_number_that_gradients_reach() -> None:
    scale = torch.tensor(3.0, requires_grad=True)
    student, projected, targets = tensor(draw(0, 6, 5)), tensor(draw(1, 4, 5)), tensor(shares(2, 6, 4))
    loss = class_prototype_loss(student, projected, targets, scale)
    assert torch.equal(loss.detach(), class_prototype_loss(student, projected, targets, 3.0))
    (gradient,) = torch.autograd.grad(loss.sum(), scale)
    above, below = (class_prototype_loss(student, projected, targets, 3 + step).sum() for step in (1e-2, -1e-2))
    assert gradient.item() == pytest.approx((above - below).item() / 2e-2, rel=1e-2)


# Sample embeddings


def test_sample_loss_is_the_value_computed_by_hand() -> None:
    projected = torch.tensor([[7.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])
    loss = sample_contrastive_loss(STUDENT, projected, torch.eye(3), everyone(3), logit_scale=1.0)
    first = math.log(math.exp(0.6) + math.exp(0.8) + math.exp(-0.6)) - 0.6
    second = math.log(1 + math.e + 1) - 1
    third = math.log(math.e + 1 + math.exp(-1)) + 1
    assert loss.tolist() == pytest.approx([first, second, third], rel=1e-6)


def test_sample_loss_of_the_identity_is_cross_entropy_to_ones_own_embedding() -> None:
    student, samples = tensor(draw(0, 6, 5)), tensor(draw(1, 6, 5))
    logits = 2 * F.normalize(student) @ F.normalize(samples).T
    expected = F.cross_entropy(logits, torch.arange(6), reduction="none")
    found = sample_contrastive_loss(student, samples, torch.eye(6), everyone(6), logit_scale=2.0)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_copies_of_an_image_in_a_batch_share_the_target() -> None:
    projected = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    positives = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    loss = sample_contrastive_loss(STUDENT, projected, positives, everyone(3), logit_scale=1.0)
    first = math.log(2 * math.exp(0.6) + math.exp(0.8)) - (0.6 + 0.6) / 2  # z is (0.6, 0.6, 0.8)
    second = math.log(1 + 1 + math.e) - (0 + 0) / 2  # z is (0, 0, 1)
    third = math.log(2 * math.e + 1) - 0  # z is (1, 1, 0)
    assert loss.tolist() == pytest.approx([first, second, third], rel=1e-6)


def test_images_that_are_not_joined_are_no_candidates() -> None:
    student, samples = tensor(draw(0, 5, 4)), tensor(draw(1, 5, 4))
    joined = torch.tensor([True, False, True, True, False])
    there = joined.nonzero()[:, 0]
    found = sample_contrastive_loss(student[there], samples, torch.eye(5)[there], joined, 3.0)
    alone = sample_contrastive_loss(student[there], samples[there], torch.eye(3), everyone(3), 3.0)
    assert found.tolist() == pytest.approx(alone.tolist(), rel=1e-6)
    samples[~joined] = 100 * tensor(draw(2, 2, 4))
    assert torch.equal(sample_contrastive_loss(student[there], samples, torch.eye(5)[there], joined, 3.0), found)


def test_no_gradient_reaches_what_is_not_joined_and_every_gradient_is_finite() -> None:
    student = tensor(draw(0, 3, 4)).requires_grad_()
    samples = tensor(draw(1, 3, 4))
    samples[1] = 0  # as the missing ones are
    samples.requires_grad_()
    loss = sample_contrastive_loss(student, samples, torch.eye(3), torch.tensor([True, False, True]), 2.0)
    gradients = torch.autograd.grad(loss[[0, 2]].sum(), (student, samples))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert gradients[1][1].tolist() == [0, 0, 0, 0]


def test_some_rows_of_a_batch_have_the_losses_that_they_have_in_the_whole() -> None:
    student, samples, positives = tensor(draw(0, 6, 5)), tensor(draw(1, 6, 5)), tensor(shares(2, 6, 6))
    whole = sample_contrastive_loss(student, samples, positives, everyone(6), 2.0)
    part = sample_contrastive_loss(student[2:4], samples, positives[2:4], everyone(6), 2.0)
    assert part.tolist() == pytest.approx(whole[2:4].tolist(), rel=1e-6)


# The others


def test_cosine_loss_is_the_value_computed_by_hand() -> None:
    samples = torch.tensor([[9.0, 0.0], [0.0, 0.1], [-1.0, 0.0]])  # cosines 0.6, 1 and −1
    assert cosine_regression_loss(STUDENT, samples).tolist() == pytest.approx([0.4, 0, 2], rel=1e-6)


def test_soft_label_loss_is_the_value_computed_by_hand() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(3.0)], [5.0, 5.0]])  # probabilities (¼, ¾) and (½, ½)
    teacher = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert soft_label_loss(logits, teacher).tolist() == pytest.approx([first, math.log(2)], rel=1e-6)


def test_the_divergence_of_equal_distributions_is_zero_and_else_positive() -> None:
    logits, other = tensor(draw(0, 6, 5)), tensor(draw(1, 6, 5))
    assert soft_label_loss(logits, logits.softmax(dim=1)).tolist() == pytest.approx([0] * 6, abs=1e-6)
    assert (soft_label_loss(logits, other.softmax(dim=1)) > 0.01).all()


def test_the_divergence_is_cross_entropy_without_the_teachers_own_entropy() -> None:
    logits, teacher = tensor(draw(0, 6, 5)), tensor(shares(1, 6, 5))
    entropy = -(teacher * teacher.log()).sum(dim=1)
    expected = F.cross_entropy(logits, teacher, reduction="none") - entropy
    assert soft_label_loss(logits, teacher).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_soft_labels_are_the_ridge_heads_values_through_a_softmax() -> None:
    head = (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.1, -0.1]))
    found = soft_labels(torch.tensor([[0.5, 0.2]]), head, temperature=0.25)
    expected = [math.exp(0.6 / 0.25), math.exp(0.1 / 0.25)]
    assert found.tolist()[0] == pytest.approx([value / sum(expected) for value in expected], rel=1e-6)


def test_direction_loss_is_the_value_computed_by_hand() -> None:
    # q is (3, 4), c is (0, 2): along 4. Lengths 5 and 8: the longer one divides.
    regressed, classes = torch.tensor([[3.0, 4.0]] * 2), torch.tensor([[0.0, 2.0]] * 2)
    found = direction_norm_loss(regressed, classes, torch.tensor([8.0, 1.0]))
    assert found.tolist() == pytest.approx([1 - 4 / 8, 1 - 4 / 5], rel=1e-6)


def test_direction_loss_is_zero_for_what_is_parallel_and_longer_only() -> None:
    classes = tensor(draw(0, 4, 5))
    lengths = torch.tensor([[1.0], [2.0], [30.0], [0.5]])
    found = direction_norm_loss(classes * lengths, classes, classes.norm(dim=1))
    assert found.tolist() == pytest.approx([0, 0, 0, 0.5], abs=1e-6)
    opposite = direction_norm_loss(-classes, classes, classes.norm(dim=1))
    assert opposite.tolist() == pytest.approx([2] * 4, rel=1e-6)


# All of them


@pytest.mark.parametrize("logit_scale", [1.0, 14.3])
def test_losses_agree_with_double_precision(logit_scale: float) -> None:
    student, classes, samples = draw(0, 9, 5), draw(1, 4, 5), draw(2, 9, 5)
    class_targets, positives = shares(3, 9, 4), shares(4, 9, 9)
    found = class_prototype_loss(tensor(student), tensor(classes), tensor(class_targets), logit_scale)
    expected = cross_entropies(logit_scale * unit(student) @ unit(classes).T, class_targets)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)

    found = sample_contrastive_loss(tensor(student), tensor(samples), tensor(positives), everyone(9), logit_scale)
    expected = cross_entropies(logit_scale * unit(student) @ unit(samples).T, positives)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)

    expected = (1 - (unit(student) * unit(samples)).sum(axis=1)).tolist()
    assert cosine_regression_loss(tensor(student), tensor(samples)).tolist() == pytest.approx(expected, rel=1e-5)

    norms = np.abs(draw(5, 9))
    along = (student * unit(samples)).sum(axis=1)
    expected = (1 - along / np.maximum(np.linalg.norm(student, axis=1), norms)).tolist()
    found = direction_norm_loss(tensor(student), tensor(samples), tensor(norms))
    assert found.tolist() == pytest.approx(expected, rel=1e-4)

    teacher = shares(6, 9, 5)
    expected = (teacher * (np.log(teacher) - log_softmax(student))).sum(axis=1).tolist()
    assert soft_label_loss(tensor(student), tensor(teacher)).tolist() == pytest.approx(expected, rel=1e-4)


def test_losses_of_cosines_do_not_depend_on_the_length_of_embeddings() -> None:
    student, classes, samples = tensor(draw(0, 6, 5)), tensor(draw(1, 4, 5)), tensor(draw(2, 6, 5))
    targets = one_hot(torch.arange(6) % 4, 4)
    longer = torch.tensor([[1e-3], [0.5], [1.0], [3.0], [40.0], [1e4]])
    for one, other in (
        (
            class_prototype_loss(student * longer, classes * longer[:4], targets, 2.0),
            class_prototype_loss(student, classes, targets, 2.0),
        ),
        (
            sample_contrastive_loss(student * longer, samples / longer, torch.eye(6), everyone(6), 2.0),
            sample_contrastive_loss(student, samples, torch.eye(6), everyone(6), 2.0),
        ),
        (cosine_regression_loss(student * longer, samples / longer), cosine_regression_loss(student, samples)),
    ):
        assert one.tolist() == pytest.approx(other.tolist(), rel=1e-5)


def test_losses_of_bfloat16_embeddings_are_computed_in_float32() -> None:
    student, other = tensor(draw(0, 6, 6)).bfloat16(), tensor(draw(1, 6, 6)).bfloat16()
    identity, joined, norms = torch.eye(6), everyone(6), torch.ones(6)
    for low, high in (
        (cross_entropy_loss(student, identity, 0.1), cross_entropy_loss(student.float(), identity, 0.1)),
        (
            class_prototype_loss(student, other, identity, 1.0),
            class_prototype_loss(student.float(), other.float(), identity, 1.0),
        ),
        (
            sample_contrastive_loss(student, other, identity, joined, 1.0),
            sample_contrastive_loss(student.float(), other.float(), identity, joined, 1.0),
        ),
        (cosine_regression_loss(student, other), cosine_regression_loss(student.float(), other.float())),
        (soft_label_loss(student, identity), soft_label_loss(student.float(), identity)),
        (
            direction_norm_loss(student, other.float(), norms),
            direction_norm_loss(student.float(), other.float(), norms),
        ),
    ):
        assert low.dtype == torch.float32
        assert torch.equal(low, high)
