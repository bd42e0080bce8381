import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import store
from pipeline.distill.config import Recipe, Target
from pipeline.distill.images import DecodedImages
from pipeline.distill.loop import Compute, EpochResult, Trainer
from pipeline.distill.losses import cosine_regression_loss, sample_contrastive_loss
from pipeline.distill.student import Student
from pipeline.distill.targets import Targets, class_rows, join
from pipeline.errors import PipelineError
from tests.conftest import CLASS_NAMES, make_split
from tests.pipeline.distill.examples import (
    decoded,
    equal_weights,
    make_coloured,
    make_recipe,
    make_student,
    pairs_of,
    weights_of,
    write_example,
)

CPU = torch.device("cpu")
TARGETS: tuple[Target, ...] = ("class", "sample", "both")
Joined = tuple[Targets, DecodedImages]


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Joined:
    return joined(make_coloured(24, 0), tmp_path_factory.mktemp("coloured"))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Joined:
    return joined(make_split(9, 0), tmp_path_factory.mktemp("noise"))


def joined(rows: Any, folder: Path, without: Sequence[int] = ()) -> Joined:
    """Join images to an artifact that lacks the samples of some rows."""
    pairs = [pair for row, pair in enumerate(pairs_of(rows)) if row not in without] or [(bytes(16), "ant")]
    path = write_example(folder / "a.safetensors", samples=pairs)
    images = decoded(rows, folder / "data")
    with store.open_artifact(path) as artifact:
        order = class_rows(artifact, CLASS_NAMES, True, by_index=False)
        return join(artifact, images, order, "both", max_missing=1.0), images


def make_trainer(
    targets: Targets,
    recipe: Recipe,
    target: Target = "class",
    seed: int = 0,
    student: Student | None = None,
    precision: torch.dtype = torch.float32,
) -> Trainer:
    student = make_student() if student is None else student
    torch.manual_seed(7)  # the projection's weights
    return Trainer(student, targets, target, recipe, Compute(CPU, precision, seed))


class Recorder:
    """Keeps what a student in training was shown and what it answered."""

    def __init__(self, student: Student, images: DecodedImages) -> None:
        self.batches: list[Tensor] = []
        self.embeddings: list[Tensor] = []
        self._shown = student.normalise(torch.from_numpy(images.pixels[images.places, 0])).flatten(1)
        student.register_forward_hook(self._keep)

    def _keep(self, student: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        self.batches.append(inputs[0].detach().clone())
        self.embeddings.append(outputs[0].detach().clone())

    def rows(self, batch: int) -> list[int]:
        """Return which images a batch was made of."""
        same = (self.batches[batch].flatten(1)[:, None] == self._shown[None]).all(dim=2)
        assert (same.sum(dim=1) == 1).all()
        return [int(row) for row in same.int().argmax(dim=1)]


# Learning


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_falls_on_a_problem_that_can_be_learnt(target: Target, coloured: Joined) -> None:
    targets, images = coloured
    recipe = make_recipe(batch_size=8, learning_rate=3e-3, logit_scale=5.0, cosine_weight=0.1)
    trainer = make_trainer(targets, recipe, target)
    losses = [trainer.run_epoch(images, epoch) for epoch in range(1, 16)]
    assert losses[-1].loss < 0.8 * losses[0].loss
    assert losses[-1].ce < 0.5 * losses[0].ce
    assert losses[-1].clip < 0.9 * losses[0].clip
    if target != "class":
        assert losses[-1].cosine < losses[0].cosine
    student = trainer.student.eval()
    with torch.no_grad():
        answers = student(student.normalise(torch.from_numpy(images.pixels[images.places, 0])))[1].argmax(dim=1)
    assert (answers.numpy() == images.labels).mean() > 0.9


def test_means_are_over_images_not_over_batches(noise: Joined) -> None:
    targets, images = noise
    trainer = make_trainer(targets, make_recipe(batch_size=6))
    recorder = Recorder(trainer.student, images)
    logits: list[Tensor] = []
    trainer.student.register_forward_hook(lambda module, inputs, outputs: logits.append(outputs[1].detach()))
    result = trainer.run_epoch(images, 1)
    losses = [
        F.cross_entropy(logits[batch], torch.from_numpy(images.labels[recorder.rows(batch)])).item() for batch in (0, 1)
    ]
    assert result.ce == pytest.approx((6 * losses[0] + 3 * losses[1]) / 9, rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
    assert (result.num_images, result.num_steps) == (9, 2)
    assert result.seconds > 0


def test_the_loss_is_the_weighted_sum_of_its_parts(noise: Joined) -> None:
    targets, images = noise
    trainer = make_trainer(targets, make_recipe(batch_size=6, alpha2=0.25, cosine_weight=2.0), "both")
    result = trainer.run_epoch(images, 1)
    assert result.loss == pytest.approx(0.75 * result.ce + 0.25 * result.clip + 2.0 * result.cosine, rel=1e-5)


def test_only_selected_images_are_trained_on(noise: Joined) -> None:
    targets, images = noise
    chosen = images.select(np.array([8, 3, 5, 1]))
    trainer = make_trainer(targets, make_recipe(batch_size=4))
    recorder = Recorder(trainer.student, chosen)
    logits: list[Tensor] = []
    trainer.student.register_forward_hook(lambda module, inputs, outputs: logits.append(outputs[1].detach()))
    result = trainer.run_epoch(chosen, 1)
    order = recorder.rows(0)
    assert sorted(order) == [0, 1, 2, 3]
    expected = F.cross_entropy(logits[0], torch.from_numpy(chosen.labels[order])).item()
    assert result.ce == pytest.approx(expected, rel=1e-6)


def test_both_targets_are_the_mean_of_class_and_sample(noise: Joined) -> None:
    targets, images = noise
    results = {}
    for target in TARGETS:
        trainer = make_trainer(targets, make_recipe(batch_size=9), target)
        results[target] = trainer.run_epoch(images, 1)
    mean = (results["class"].clip + results["sample"].clip) / 2
    assert results["both"].clip == pytest.approx(mean, rel=1e-5)
    assert results["both"].ce == results["class"].ce == results["sample"].ce


def test_bfloat16_trains_about_as_float32(noise: Joined) -> None:
    targets, images = noise
    results = [
        make_trainer(targets, make_recipe(batch_size=9), "both", precision=precision).run_epoch(images, 1)
        for precision in (torch.float32, torch.bfloat16)
    ]
    assert results[0].loss != results[1].loss
    assert results[0].loss == pytest.approx(results[1].loss, rel=0.02)


@pytest.mark.parametrize("target", TARGETS)
def test_without_distillation_a_step_is_exactly_the_supervised_one(target: Target, noise: Joined) -> None:
    targets, images = noise
    recipe = make_recipe(batch_size=9, alpha2=0.0, learning_rate=0.01, weight_decay=0.05)
    trainer = make_trainer(targets, recipe, target)
    plain = copy.deepcopy(trainer.student).train()
    projection = copy.deepcopy(trainer.projection.state_dict())
    recorder = Recorder(trainer.student, images)
    result = trainer.run_epoch(images, 1)
    assert (result.loss, result.clip, result.cosine) == (result.ce, 0, 0)

    pixels, labels = recorder.batches[0], torch.from_numpy(images.labels[recorder.rows(0)])
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.05, fused=True)
    loss = F.cross_entropy(plain(pixels)[1], labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert result.loss == loss.item()
    assert equal_weights(weights_of(trainer.student), weights_of(plain))
    assert not equal_weights(weights_of(plain), weights_of(make_student()))
    for name, tensor in trainer.projection.state_dict().items():
        assert torch.equal(tensor, projection[name])


def test_distillation_trains_the_projection(noise: Joined) -> None:
    targets, images = noise
    trainer = make_trainer(targets, make_recipe())
    before = trainer.projection.weight.detach().clone()
    trainer.run_epoch(images, 1)
    assert not torch.equal(trainer.projection.weight, before)
    assert trainer.projection.bias is not None


# What chance decides


def run(noise: Joined, seed: int, name: str = "test_resnet", **fields: Any) -> tuple[dict[str, Tensor], EpochResult]:
    targets, images = noise
    student = make_student(name, 16) if name == "test_vit" else make_student(name)
    trainer = make_trainer(targets, make_recipe(horizontal_flip=0.5, **fields), "both", seed, student)
    trainer.run_epoch(images, 1)
    result = trainer.run_epoch(images, 2)
    return weights_of(trainer.student), result


def test_the_same_seed_gives_the_same_weights(noise: Joined) -> None:
    first, second = run(noise, 3), run(noise, 3)
    assert equal_weights(first[0], second[0])
    assert first[1].loss == second[1].loss


def test_another_seed_gives_other_weights(noise: Joined) -> None:
    assert not equal_weights(run(noise, 3)[0], run(noise, 4)[0])


def test_dropout_follows_from_the_seed_too(noise: Joined) -> None:
    targets, images = noise
    losses = []
    for seed in (1, 1, 2):
        student = make_student()
        student.model.get_submodule("layer4").register_forward_hook(lambda m, i, output: F.dropout(output, 0.5))
        recipe = make_recipe(batch_size=9, learning_rate=1e-9)
        torch.manual_seed(seed * 11)  # what happened before does not matter
        losses.append(make_trainer(targets, recipe, student=student, seed=seed).run_epoch(images, 1).loss)
    assert losses[0] == losses[1] != losses[2]


def test_every_epoch_has_its_own_order_of_all_images(noise: Joined) -> None:
    targets, images = noise
    trainer = make_trainer(targets, make_recipe(batch_size=3))
    recorder = Recorder(trainer.student, images)
    for epoch in (1, 2):
        trainer.run_epoch(images, epoch)
    orders = [[row for batch in range(start, start + 3) for row in recorder.rows(batch)] for start in (0, 3)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(9))
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("probability", "flipped"), [(0.0, False), (1.0, True)])
def test_images_are_flipped_left_to_right_with_the_recipes_probability(
    probability: float, flipped: bool, noise: Joined
) -> None:
    targets, images = noise
    mirrored = DecodedImages(
        images.pixels[:, :, :, ::-1].copy() if flipped else images.pixels,
        images.places,
        images.source_rows,
        images.keys,
        images.labels,
    )
    trainer = make_trainer(targets, make_recipe(batch_size=9, horizontal_flip=probability))
    recorder = Recorder(trainer.student, mirrored)
    trainer.run_epoch(images, 1)
    assert sorted(recorder.rows(0)) == list(range(9))


def test_about_half_of_the_images_are_flipped_at_one_half(coloured: Joined) -> None:
    targets, images = coloured
    trainer = make_trainer(targets, make_recipe(batch_size=24, horizontal_flip=0.5))
    seen: list[Tensor] = []
    trainer.student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trainer.run_epoch(images, 1)
    shown = trainer.student.normalise(torch.from_numpy(images.pixels[images.places, 0])).flatten(1)
    plain = (seen[0].flatten(1)[:, None] == shown[None]).all(dim=2).any(dim=1)
    assert 4 < int(plain.sum()) < 20


# How far an epoch goes


def test_an_epoch_stops_after_max_steps(noise: Joined) -> None:
    targets, images = noise
    result = make_trainer(targets, make_recipe(batch_size=2)).run_epoch(images, 1, max_steps=2)
    assert (result.num_steps, result.num_images) == (2, 4)


def test_a_last_batch_of_one_image_is_left_out(noise: Joined) -> None:
    targets, images = noise
    trainer = make_trainer(targets, make_recipe(batch_size=4))
    recorder = Recorder(trainer.student, images)
    result = trainer.run_epoch(images, 1)
    assert (result.num_steps, result.num_images) == (2, 8)
    assert [len(batch) for batch in recorder.batches] == [4, 4]


def test_a_last_batch_of_two_images_is_not_left_out(noise: Joined) -> None:
    targets, images = noise
    result = make_trainer(targets, make_recipe(batch_size=7)).run_epoch(images, 1)
    assert (result.num_steps, result.num_images) == (2, 9)


def test_the_largest_seed_of_32_bits_is_one(noise: Joined) -> None:
    targets, images = noise
    trainer = make_trainer(targets, make_recipe(batch_size=9), seed=2**32 - 1)
    assert trainer.run_epoch(images, 1).num_images == 9


def test_a_loss_that_is_not_finite_stops_the_run(noise: Joined) -> None:
    targets, images = noise
    trainer = make_trainer(targets, make_recipe(learning_rate=0.01))
    with torch.no_grad():
        trainer.student.classifier.bias.fill_(math.nan)
    with pytest.raises(PipelineError) as caught:
        trainer.run_epoch(images, 3)
    assert str(caught.value) == (
        "the loss is not finite in epoch 3. The student of the epoch before is kept. "
        "Try a lower --lr than 0.01, or --precision float32."
    )


# The classifier without cross-entropy


def test_at_alpha2_one_the_classifier_names_the_nearest_class_embedding(coloured: Joined) -> None:
    targets, images = coloured
    trainer = make_trainer(targets, make_recipe(batch_size=8, alpha2=1.0, logit_scale=10.0, learning_rate=3e-3))
    for epoch in range(1, 16):
        result = trainer.run_epoch(images, epoch)
        assert result.loss == result.clip
    trainer.finish_classifier()
    student = trainer.student.eval()
    with torch.no_grad():
        embeddings, logits = student(student.normalise(torch.from_numpy(images.pixels[images.places, 0])))
        prototypes = trainer.projection(targets.class_embeddings)
    cosines = F.cosine_similarity(embeddings[:, None], prototypes[None], dim=2)
    assert torch.allclose(logits, cosines * embeddings.norm(dim=1, keepdim=True), atol=1e-5)
    assert (logits.argmax(dim=1) == cosines.argmax(dim=1)).all()
    assert (logits.argmax(dim=1).numpy() == images.labels).mean() > 0.9


def test_below_alpha2_one_the_classifier_stays_as_trained(noise: Joined) -> None:
    trainer = make_trainer(noise[0], make_recipe(alpha2=0.99))
    before = weights_of(trainer.student)
    trainer.finish_classifier()
    assert equal_weights(weights_of(trainer.student), before)


# Missing samples


def test_images_without_a_sample_take_no_part_in_the_sample_losses(tmp_path: Path) -> None:
    targets, images = joined(make_split(9, 0), tmp_path, without=[1, 4, 5])
    assert targets.num_missing == 3
    trainer = make_trainer(targets, make_recipe(batch_size=9, cosine_weight=0.5, logit_scale=3.0), "sample")
    projection = copy.deepcopy(trainer.projection)
    recorder = Recorder(trainer.student, images)
    result = trainer.run_epoch(images, 1)
    order = np.array(recorder.rows(0))
    there = ~np.isin(order, [1, 4, 5])
    drawn = recorder.embeddings[0][torch.from_numpy(there)]
    with torch.no_grad():
        projected = projection(targets.sample_embeddings(order[there]))
        clip = sample_contrastive_loss(drawn, projected, torch.arange(6), 3.0).item()
        cosine = cosine_regression_loss(drawn, projected).item()
    assert result.clip == pytest.approx(clip, rel=1e-5)
    assert result.cosine == pytest.approx(cosine, rel=1e-5)
    assert result.loss == pytest.approx(0.5 * result.ce + 0.5 * clip + 0.5 * cosine, rel=1e-5)


def test_copies_of_an_image_are_positives_of_each_other(tmp_path: Path) -> None:
    rows = make_split(3, 0)
    targets, images = joined(rows.select([0, 1, 2, 0]), tmp_path)
    trainer = make_trainer(targets, make_recipe(batch_size=4, logit_scale=4.0), "sample")
    projection = copy.deepcopy(trainer.projection)
    embeddings: list[Tensor] = []
    trainer.student.register_forward_hook(lambda module, inputs, outputs: embeddings.append(outputs[0].detach()))
    shown: list[Tensor] = []
    trainer.student.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    result = trainer.run_epoch(images, 1)
    pixels = trainer.student.normalise(torch.from_numpy(images.pixels[:3, 0].copy())).flatten(1)
    order = (shown[0].flatten(1)[:, None] == pixels[None]).all(dim=2).int().argmax(dim=1)
    assert sorted(order.tolist()) == [0, 0, 1, 2]
    with torch.no_grad():
        projected = projection(targets.sample_embeddings(order.numpy()))
        expected = sample_contrastive_loss(embeddings[0], projected, order, 4.0).item()
    assert result.clip == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_any_sample_is_trained_supervised(tmp_path: Path) -> None:
    targets, images = joined(make_split(6, 0), tmp_path, without=range(6))
    trainer = make_trainer(targets, make_recipe(batch_size=6, cosine_weight=1.0), "sample")
    result = trainer.run_epoch(images, 1)
    assert (result.clip, result.cosine) == (0, 0)
    assert result.loss == result.ce


def test_the_cosine_loss_needs_no_other_distillation(noise: Joined) -> None:
    targets, images = noise
    trainer = make_trainer(targets, make_recipe(alpha2=0.0, cosine_weight=0.5, batch_size=9), "both")
    result = trainer.run_epoch(images, 1)
    assert result.clip == 0
    assert result.loss == pytest.approx(result.ce + 0.5 * result.cosine, rel=1e-6)
    assert result.cosine > 0
