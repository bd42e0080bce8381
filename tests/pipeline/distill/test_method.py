from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distill.config import Target
from pipeline.distill.feed import Feed
from pipeline.distill.images import DecodedImages
from pipeline.distill.losses import (
    class_prototype_loss,
    cosine_regression_loss,
    cross_entropy_loss,
    direction_norm_loss,
    soft_label_loss,
)
from pipeline.distill.method import LOSSES, Batch, Method, Samples
from pipeline.distill.recipe import SAMPLE_LOSSES
from tests.conftest import CLASS_NAMES
from tests.pipeline.distill.examples import (
    CPU,
    TARGETS,
    embedding_of,
    images_of,
    join_example,
    make_recipe,
    make_student,
    mean_of,
    noise_images,
    pairs_in,
)

EXTRA: dict[str, Any] = {"cosine_weight": 0.7, "soft_label_weight": 0.5, "direction_weight": 0.3, "text_weight": 0.2}
MIXED: dict[str, Any] = {
    "augmentation.mixup_alpha": 1.0,
    "label_smoothing": 0.1,
    "centre": True,
    "learn_logit_scale": True,
}


def noise(num_images: int = 8) -> DecodedImages:
    return noise_images(num_images, 0, image_size=16)


def make(
    images: DecodedImages, folder: Path, target: Target, without: Sequence[int] = (), **fields: Any
) -> tuple[Method, Batch]:
    """Make a method over a student without BatchNorm, and one batch of all images."""
    recipe = make_recipe(batch_size=len(images), **fields)
    targets = join_example(images, folder, recipe, without=without)
    torch.manual_seed(1)
    method = Method(make_student("test_vit", 16), targets, target, recipe)
    (batch,) = Feed(images, targets, recipe, CPU, 0).epoch(1)
    return method, batch if target != "class" else batch._replace(samples=None)


def losses_of(method: Method, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        return dict(zip(LOSSES, method(batch, batch.samples, len(batch.pixels)).tolist(), strict=True))


def outputs(method: Method, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the student's embeddings and logits, straight from the model."""
    with torch.no_grad():
        features = method.student.model.forward_features(method.student.normalise(batch.pixels))  # type: ignore[operator]
        embeddings = method.student.model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return embeddings, F.linear(embeddings, method.student.classifier.weight, method.student.classifier.bias)


def samples_of(batch: Batch) -> Samples:
    assert batch.samples is not None
    return batch.samples


def gradients(method: Method) -> dict[str, Tensor]:
    found = {
        name: parameter.grad.clone() for name, parameter in method.named_parameters() if parameter.grad is not None
    }
    method.zero_grad(set_to_none=True)
    return found


# The paper, computed once more


@pytest.mark.parametrize("target", TARGETS)
def test_recipe_paper_is_what_the_design_writes(target: Target, tmp_path: Path) -> None:
    """Section II of the paper in loops, from the artifact's own numbers: nothing of the pipeline's arithmetic."""
    images = images_of(noise(7).pixels[[0, 1, 2, 3, 4, 5, 6, 1]], [0, 1, 2, 0, 1, 2, 0, 1])  # one image stands twice
    method, batch = make(images, tmp_path, target, alpha2=0.5, logit_scale=1.0, cosine_weight=0.0)
    s, logits = outputs(method, batch)
    weight, bias = method.projection.weight.detach(), method.projection.bias.detach()
    shown = torch.from_numpy(images.pixels[:, 0])
    rows = [int((shown == pixels).all(dim=(1, 2, 3)).nonzero()[0, 0]) for pixels in batch.pixels]
    labels = [int(images.labels[row]) for row in rows]

    def unit(vector: Tensor) -> Tensor:
        return vector / (vector * vector).sum().sqrt()

    def projected(embedding: Any) -> Tensor:
        return unit(weight @ torch.from_numpy(np.array(embedding, np.float32)) + bias)

    class_embeddings = [projected(mean_of(name)) for name in CLASS_NAMES]
    sample_embeddings = [projected(embedding_of(pairs_in(images)[row])) for row in rows]
    l_ce = l_class = l_sample = 0.0
    for i, label in enumerate(labels):
        l_ce += float(-logits[i].softmax(dim=0)[label].log()) / len(labels)
        z = torch.stack([unit(s[i]) @ embedding for embedding in class_embeddings])
        l_class += float(-z.softmax(dim=0)[label].log()) / len(labels)
        z = torch.stack([unit(s[i]) @ embedding for embedding in sample_embeddings])
        positives = [j for j in range(len(rows)) if rows[j] == rows[i]]
        l_sample += float(-z.softmax(dim=0)[positives].log().mean()) / len(labels)
    l_clip = {"class": l_class, "sample": l_sample, "both": (l_class + l_sample) / 2}[target]
    found = losses_of(method, batch)
    assert sorted(rows) == [0, 1, 1, 2, 3, 4, 5, 6]
    assert found["ce"] == pytest.approx(l_ce, rel=1e-5)
    assert found["clip"] == pytest.approx(l_clip, rel=1e-5)
    assert found["loss"] == pytest.approx(0.5 * l_ce + 0.5 * l_clip, rel=1e-5)
    assert [found[name] for name in LOSSES[3:]] == [0, 0, 0, 0]


# Weights


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_is_the_weighted_sum_of_its_parts(target: Target, tmp_path: Path) -> None:
    fields = {name: weight for name, weight in EXTRA.items() if target != "class" or name not in SAMPLE_LOSSES}
    method, batch = make(noise(), tmp_path, target, alpha2=0.25, **fields)
    found = losses_of(method, batch)
    weights = {"ce": 0.75, "clip": 0.25, "cosine": 0.7, "soft_label": 0.5, "direction": 0.3, "text": 0.2}
    assert found["loss"] == pytest.approx(sum(weight * found[name] for name, weight in weights.items()), rel=1e-5)
    there = {name for name, value in found.items() if value != 0}
    assert there == {"loss", "ce", "clip", *(name.removesuffix("_weight") for name in fields)}


def test_each_loss_is_that_of_the_batch(tmp_path: Path) -> None:
    method, batch = make(noise(), tmp_path, "both", **EXTRA, **MIXED, logit_scale=3.0)
    found, samples = losses_of(method, batch), samples_of(batch)
    embeddings, logits = outputs(method, batch)
    with torch.no_grad():
        projected, text = method.projection(method.class_embeddings), method.projection(method.class_text)
        assert method.regressor is not None
        assert samples.probabilities is not None
        regressed = method.regressor(embeddings)
        means = batch.class_targets @ method.class_embeddings
        expected = {
            "ce": cross_entropy_loss(logits, batch.class_targets, 0.1),
            "cosine": cosine_regression_loss(regressed, samples.embeddings),
            "soft_label": soft_label_loss(logits, samples.probabilities),
            "direction": direction_norm_loss(regressed, means, samples.embeddings.norm(dim=1)),
            "text": class_prototype_loss(embeddings, text, batch.class_targets, 3.0),
        }
    for name, losses in expected.items():
        assert found[name] == pytest.approx(losses.mean().item(), rel=1e-5), name
    assert projected.shape == (3, 64)


def test_without_distillation_loss_and_gradient_are_exactly_the_supervised_ones(tmp_path: Path) -> None:
    method, batch = make(noise(), tmp_path, "both", alpha2=0.0)
    losses = method(batch, batch.samples, 8)
    losses[0].backward()
    found = gradients(method)
    student = method.student
    supervised = F.cross_entropy(student(student.normalise(batch.pixels))[1], batch.class_targets, reduction="sum") / 8
    supervised.backward()  # type: ignore[no-untyped-call]
    expected = gradients(method)
    assert losses.tolist() == [supervised.item(), supervised.item(), 0, 0, 0, 0, 0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())
    assert not any("projection" in name for name in found)


def test_at_alpha2_one_nothing_but_the_embedding_is_taught(tmp_path: Path) -> None:
    method, batch = make(noise(), tmp_path, "class", alpha2=1.0)
    losses = method(batch, batch.samples, 8)
    losses[0].backward()
    assert losses[0] == losses[2]
    assert losses[1] > 0  # told, not learned
    found = gradients(method)
    assert all(not found[name].any() for name in found if name.startswith("student.model.head."))
    assert found["projection.weight"].any()


def test_both_targets_are_the_mean_of_class_and_sample(tmp_path: Path) -> None:
    found = {target: losses_of(*make(noise(), tmp_path, target)) for target in TARGETS}
    assert found["both"]["clip"] == pytest.approx((found["class"]["clip"] + found["sample"]["clip"]) / 2, rel=1e-6)
    assert found["both"]["ce"] == found["class"]["ce"] == found["sample"]["ce"]


def test_only_what_a_loss_needs_is_learned(tmp_path: Path) -> None:
    def learned(**fields: Any) -> set[str]:
        method, _ = make(noise(), tmp_path, "both", **fields)
        return {name for name, _ in method.named_parameters() if not name.startswith("student.")}

    projection = {"projection.weight", "projection.bias"}
    assert learned() == projection
    for weight in ("direction_weight", "cosine_weight"):
        assert learned(**{weight: 1}) == {*projection, "regressor.weight", "regressor.bias"}
    assert learned(learn_logit_scale=True) == {*projection, "log_logit_scale"}


def test_cosine_regression_is_not_met_by_a_projection_that_forgets_images(tmp_path: Path) -> None:
    method, batch = make(noise(), tmp_path, "sample", alpha2=0.0, cosine_weight=1.0)
    found, (embeddings, _) = losses_of(method, batch)["cosine"], outputs(method, batch)
    with torch.no_grad():
        method.projection.weight.zero_()
        method.projection.bias.copy_(embeddings.mean(dim=0))  # all images alike, and near the student's
    assert losses_of(method, batch)["cosine"] == found > 0.5


# By parts


@pytest.mark.parametrize("fields", [{}, {**EXTRA, **MIXED}], ids=["plain", "everything"])
@pytest.mark.parametrize("target", TARGETS)
def test_parts_add_up_to_the_losses_and_gradients_of_the_batch(
    target: Target, fields: dict[str, Any], tmp_path: Path
) -> None:
    method, batch = make(noise(), tmp_path, target, without=(2, 5), logit_scale=4.0, **fields)
    whole = method(batch, batch.samples, 8)
    whole[0].backward()
    expected = gradients(method)
    parts = [method(batch.part(start, stop), batch.samples, 8) for start, stop in ((0, 3), (3, 4), (4, 8))]
    for part in parts:
        part[0].backward()
    assert torch.stack(parts).sum(dim=0).tolist() == pytest.approx(whole.tolist(), rel=1e-5, abs=1e-6)
    found = gradients(method)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-6), name


# Images without an embedding


def test_images_without_an_embedding_take_no_part_in_the_losses_of_samples(tmp_path: Path) -> None:
    method, batch = make(noise(), tmp_path, "sample", without=(1, 4, 5), **EXTRA, logit_scale=3.0)
    found, samples = losses_of(method, batch), samples_of(batch)
    joined = samples.joined
    assert joined.sum() == 5
    embeddings, logits = outputs(method, batch)
    with torch.no_grad():
        projected = method.projection(samples.embeddings[joined])
        clip = F.cross_entropy(3 * F.normalize(embeddings[joined]) @ F.normalize(projected).T, torch.arange(5))
        assert method.regressor is not None
        cosine = cosine_regression_loss(method.regressor(embeddings[joined]), samples.embeddings[joined]).mean()
        assert samples.probabilities is not None
        soft_label = soft_label_loss(logits[joined], samples.probabilities[joined]).mean()
    assert found["clip"] == pytest.approx(clip.item(), rel=1e-5)
    assert found["cosine"] == pytest.approx(cosine.item(), rel=1e-5)
    assert found["soft_label"] == pytest.approx(soft_label.item(), rel=1e-5)
    assert found["ce"] == pytest.approx(cross_entropy_loss(logits, batch.class_targets, 0.0).mean().item(), rel=1e-5)


def test_where_no_sample_is_stored_the_norm_is_that_of_the_class_embedding(tmp_path: Path) -> None:
    method, batch = make(noise(), tmp_path, "both", without=(1, 4, 5), direction_weight=1)
    samples, (embeddings, _) = samples_of(batch), outputs(method, batch)
    means = batch.class_targets @ method.class_embeddings
    norms = torch.where(samples.joined, samples.embeddings.norm(dim=1), means.norm(dim=1))
    assert method.regressor is not None
    expected = direction_norm_loss(method.regressor(embeddings), means, norms).mean()
    assert losses_of(method, batch)["direction"] == pytest.approx(expected.item(), rel=1e-5)
    alone = losses_of(method, batch._replace(samples=None))["direction"]
    expected = direction_norm_loss(method.regressor(embeddings), means, means.norm(dim=1)).mean()
    assert alone == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("alpha2", [0.5, 1.0])
def test_a_batch_without_any_embedding_is_trained_without_its_losses(alpha2: float, tmp_path: Path) -> None:
    extra = {name: EXTRA[name] for name in SAMPLE_LOSSES}
    method, batch = make(noise(), tmp_path, "sample", without=range(8), alpha2=alpha2, **extra, **MIXED)
    losses = method(batch, batch.samples, 8)
    losses[0].backward()
    found = dict(zip(LOSSES, losses.tolist(), strict=True))
    assert (found["clip"], found["cosine"], found["soft_label"]) == (0, 0, 0)
    assert found["loss"] == pytest.approx((1 - alpha2) * found["ce"])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(method).values())


@pytest.mark.parametrize("missing", [(), (3,), (0, 3)])
def test_losses_of_mixed_images_stay_in_their_range(missing: tuple[int, ...], tmp_path: Path) -> None:
    method, batch = make(noise(), tmp_path, "sample", without=missing, **MIXED, logit_scale=5.0)
    assert 0 < losses_of(method, batch)["clip"] < 2 * 5 + np.log(8)


# The logit scale


def test_a_fixed_logit_scale_is_the_recipes(tmp_path: Path) -> None:
    method, _ = make(noise(), tmp_path, "class", logit_scale=14.3)
    assert method.logit_scale == method.logit_scale_value == 14.3
    method.limit_logit_scale()
    assert method.logit_scale == 14.3


def test_a_learned_logit_scale_begins_at_the_recipes_and_is_learned(tmp_path: Path) -> None:
    method, batch = make(noise(), tmp_path, "class", logit_scale=14.3, learn_logit_scale=True)
    assert method.logit_scale_value == pytest.approx(14.3, rel=1e-6)
    fixed, _ = make(noise(), tmp_path, "class", logit_scale=14.3)
    assert losses_of(method, batch)["loss"] == pytest.approx(losses_of(fixed, batch)["loss"], rel=1e-5)
    method(batch, batch.samples, 8)[0].backward()
    assert gradients(method)["log_logit_scale"].item() != 0


def test_a_learned_logit_scale_ends_at_one_hundred(tmp_path: Path) -> None:
    method, _ = make(noise(), tmp_path, "class", logit_scale=100.0, learn_logit_scale=True)
    assert method.log_logit_scale is not None
    assert method.logit_scale_value == pytest.approx(100)
    for before, after in ((7.0, 100.0), (0.0, 1.0), (-3.0, np.exp(-3.0))):
        with torch.no_grad():
            method.log_logit_scale.fill_(before)
        method.limit_logit_scale()
        assert method.logit_scale_value == pytest.approx(after, rel=1e-5)
        assert torch.as_tensor(method.logit_scale).item() == pytest.approx(after, rel=1e-5)


# The classifier without cross-entropy


def test_at_alpha2_one_the_classifier_names_the_nearest_class_embedding(tmp_path: Path) -> None:
    method, batch = make(noise(), tmp_path, "class", alpha2=1.0, centre=True)
    method.classifier_from_prototypes()
    embeddings, logits = outputs(method, batch)
    with torch.no_grad():
        prototypes = method.projection(method.class_embeddings)
    cosines = F.cosine_similarity(embeddings[:, None], prototypes[None], dim=2)
    assert torch.allclose(logits, cosines * embeddings.norm(dim=1, keepdim=True), atol=1e-4)
    assert method.student.classifier.weight.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    assert method.student.classifier.bias.tolist() == [0, 0, 0]


@pytest.mark.parametrize("fields", [{"alpha2": 0.99}, {"alpha2": 0.0}, {"alpha2": 1.0, "soft_label_weight": 0.1}])
def test_a_classifier_that_is_taught_stays_as_it_is(fields: dict[str, Any], tmp_path: Path) -> None:
    method, _ = make(noise(), tmp_path, "both", **fields)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.classifier_from_prototypes()
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())


# Precision


def test_losses_are_float32_under_autocast(tmp_path: Path) -> None:
    method, batch = make(noise(), tmp_path, "both", **EXTRA)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = method(batch, batch.samples, 8)
        assert method.student(method.student.normalise(batch.pixels))[1].dtype == torch.bfloat16
    assert coarse.dtype == torch.float32
    exact = method(batch, batch.samples, 8)
    assert not torch.equal(coarse, exact)
    assert coarse.tolist() == pytest.approx(exact.tolist(), rel=0.05)


def test_only_what_is_learned_is_in_the_state(tmp_path: Path) -> None:
    method, _ = make(noise(), tmp_path, "both", direction_weight=1, learn_logit_scale=True)
    names = {name for name in method.state_dict() if not name.startswith("student.model.")}
    weights = {f"{layer}.{kind}" for layer in ("projection", "regressor") for kind in ("weight", "bias")}
    assert names == {*weights, "log_logit_scale"}
