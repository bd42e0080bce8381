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
    sample_contrastive_loss,
    total_loss,
)

Array = NDArray[np.float64]

# ŝ is (0.6, 0.8), (0, 1) and (1, 0).
STUDENT = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])


def unit(rows: Array) -> Array:
    norms: Array = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / norms


def cross_entropy(logits: Array, targets: Array) -> float:
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-(targets * log_probabilities).sum(axis=1).mean())


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).float()


def test_class_loss_is_the_value_computed_by_hand() -> None:
    projected = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-2.0, 0.0]])  # p̂ is (1, 0), (0, 1) and (−1, 0)
    loss = class_prototype_loss(STUDENT[:2], projected, torch.tensor([0, 1]), logit_scale=2.0)
    first = math.log(math.exp(1.2) + math.exp(1.6) + math.exp(-1.2)) - 1.2  # z is 2 · (0.6, 0.8, −0.6)
    second = math.log(1 + math.exp(2) + 1) - 2  # z is 2 · (0, 1, 0)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_sample_loss_is_the_value_computed_by_hand() -> None:
    projected = torch.tensor([[7.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])
    loss = sample_contrastive_loss(STUDENT, projected, torch.tensor([5, 3, 4]), logit_scale=1.0)
    first = math.log(math.exp(0.6) + math.exp(0.8) + math.exp(-0.6)) - 0.6
    second = math.log(1 + math.e + 1) - 1
    third = math.log(math.e + 1 + math.exp(-1)) + 1
    assert loss.item() == pytest.approx((first + second + third) / 3, rel=1e-6)


def test_copies_of_an_image_in_a_batch_share_the_target() -> None:
    projected = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    loss = sample_contrastive_loss(STUDENT, projected, torch.tensor([7, 7, 9]), logit_scale=1.0)
    first = math.log(2 * math.exp(0.6) + math.exp(0.8)) - (0.6 + 0.6) / 2  # z is (0.6, 0.6, 0.8)
    second = math.log(1 + 1 + math.e) - (0 + 0) / 2  # z is (0, 0, 1)
    third = math.log(2 * math.e + 1) - 0  # z is (1, 1, 0)
    assert loss.item() == pytest.approx((first + second + third) / 3, rel=1e-6)


def test_cosine_loss_is_the_value_computed_by_hand() -> None:
    projected = torch.tensor([[9.0, 0.0], [0.0, 0.1], [-1.0, 0.0]])  # cosines 0.6, 1 and −1
    assert cosine_regression_loss(STUDENT, projected).item() == pytest.approx((0.4 + 0 + 2) / 3, rel=1e-6)


def test_total_loss_weighs_its_parts() -> None:
    ce, clip, cosine = torch.tensor(2.0), torch.tensor(4.0), torch.tensor(0.5)
    assert total_loss(ce, clip, cosine, (0.3, 0.6)).item() == pytest.approx(0.7 * 2 + 0.3 * 4 + 0.6 * 0.5)
    assert total_loss(ce, clip, None, (0.5, 0.0)).item() == 0.5 * 2 + 0.5 * 4
    assert total_loss(ce, None, cosine, (0.3, 0.6)).item() == pytest.approx(2 + 0.6 * 0.5)
    assert total_loss(ce, clip, None, (1.0, 0.0)).item() == 4


@pytest.mark.parametrize("logit_scale", [1.0, 14.3])
def test_losses_agree_with_double_precision(logit_scale: float) -> None:
    student, classes, samples = draw(0, 9, 5), draw(1, 4, 5), draw(2, 9, 5)
    labels, image_ids = np.arange(9) % 4, np.array([0, 1, 2, 0, 3, 4, 0, 5, 4])
    one_hot = np.eye(4)[labels]
    expected = cross_entropy(logit_scale * unit(student) @ unit(classes).T, one_hot)
    found = class_prototype_loss(tensor(student), tensor(classes), torch.from_numpy(labels), logit_scale)
    assert found.item() == pytest.approx(expected, rel=1e-5)

    same = (image_ids[:, None] == image_ids).astype(float)
    expected = cross_entropy(logit_scale * unit(student) @ unit(samples).T, same / same.sum(axis=1, keepdims=True))
    found = sample_contrastive_loss(tensor(student), tensor(samples), torch.from_numpy(image_ids), logit_scale)
    assert found.item() == pytest.approx(expected, rel=1e-5)

    expected = float((1 - (unit(student) * unit(samples)).sum(axis=1)).mean())
    assert cosine_regression_loss(tensor(student), tensor(samples)).item() == pytest.approx(expected, rel=1e-5)


def test_losses_do_not_depend_on_the_length_of_embeddings() -> None:
    student, classes, samples = tensor(draw(0, 6, 5)), tensor(draw(1, 4, 5)), tensor(draw(2, 6, 5))
    labels, image_ids = torch.arange(6) % 4, torch.arange(6)
    longer = torch.tensor([[1e-3], [0.5], [1.0], [3.0], [40.0], [1e4]])
    assert class_prototype_loss(student * longer, classes * longer[:4], labels, 2.0).item() == pytest.approx(
        class_prototype_loss(student, classes, labels, 2.0).item(), rel=1e-5
    )
    assert sample_contrastive_loss(student * longer, samples / longer, image_ids, 2.0).item() == pytest.approx(
        sample_contrastive_loss(student, samples, image_ids, 2.0).item(), rel=1e-5
    )
    assert cosine_regression_loss(student * longer, samples / longer).item() == pytest.approx(
        cosine_regression_loss(student, samples).item(), rel=1e-5
    )


def test_class_loss_of_perfect_students_is_the_lower_bound_of_orthogonal_classes() -> None:
    # κ = 1 and 100 classes: each cosine is 1 to its own class and 0 to 99 others.
    perfect = torch.eye(100)
    loss = class_prototype_loss(7 * perfect, perfect, torch.arange(100), logit_scale=1.0)
    assert loss.item() == pytest.approx(math.log(math.e + 99) - 1, rel=1e-6)
    uniform = class_prototype_loss(torch.zeros(1, 100), perfect, torch.tensor([3]), logit_scale=1.0)
    assert uniform.item() == pytest.approx(math.log(100), rel=1e-6)


def test_sample_loss_without_copies_is_cross_entropy_to_the_identity() -> None:
    student, samples = tensor(draw(0, 6, 5)), tensor(draw(1, 6, 5))
    expected = F.cross_entropy(F.normalize(student) @ F.normalize(samples).T, torch.arange(6))
    found = sample_contrastive_loss(student, samples, torch.tensor([4, 8, 15, 16, 23, 42]), logit_scale=1.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_losses_of_bfloat16_embeddings_are_computed_in_float32() -> None:
    student, other = tensor(draw(0, 6, 5)).bfloat16(), tensor(draw(1, 6, 5)).bfloat16()
    index = torch.arange(6)
    for low, high in (
        (class_prototype_loss(student, other, index, 1.0), class_prototype_loss(student.float(), other, index, 1.0)),
        (
            sample_contrastive_loss(student, other, index, 1.0),
            sample_contrastive_loss(student.float(), other, index, 1.0),
        ),
        (cosine_regression_loss(student, other), cosine_regression_loss(student.float(), other.float())),
    ):
        assert low.dtype == torch.float32
        assert torch.equal(low, high)


@pytest.mark.parametrize("with_clip", [False, True])
def test_without_weight_the_loss_and_its_gradient_are_exactly_the_supervised_ones(with_clip: bool) -> None:
    weight = tensor(draw(0, 5, 4)).requires_grad_()
    student, labels = tensor(draw(1, 6, 5)), torch.arange(6) % 4

    def gradient(loss: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(loss, weight)
        return found

    supervised = F.cross_entropy(student @ weight, labels)
    ce = F.cross_entropy(student @ weight, labels)
    clip = class_prototype_loss(student @ weight, torch.eye(4), labels, 1.0) if with_clip else None
    cosine = cosine_regression_loss(student @ weight, torch.eye(6)[:, :4] + 1) if with_clip else None
    loss = total_loss(ce, clip, cosine, (0.0, 0.0))
    assert torch.equal(loss, supervised)
    assert torch.equal(gradient(loss), gradient(supervised))
