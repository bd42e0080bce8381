import copy
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distill import loop as module
from pipeline.distill.config import Target
from pipeline.distill.feed import Feed
from pipeline.distill.images import DecodedImages
from pipeline.distill.loop import Compute, Progress, Trainer
from pipeline.distill.method import LOSSES, Batch
from pipeline.distill.student import Student
from pipeline.errors import PipelineError
from tests.pipeline.distill.examples import (
    CPU,
    TARGETS,
    decoded,
    equal_weights,
    join_example,
    make_coloured,
    make_recipe,
    make_student,
    make_trainer,
    noise_images,
    weights_of,
)

EVERYTHING: dict[str, Any] = {
    **{"cosine_weight": 0.5, "soft_label_weight": 0.5, "direction_weight": 0.2, "text_weight": 0.2},
    **{"learn_logit_scale": True, "average_decay": 0.9, "gradient_clip": 1.0, "augmentation.mixup_alpha": 1.0},
}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> DecodedImages:
    return decoded(make_coloured(24, 0), tmp_path_factory.mktemp("coloured") / "data")


def make(
    images: DecodedImages,
    folder: Path,
    target: Target = "class",
    compute: Compute | None = None,
    student: Student | None = None,
    **fields: Any,
) -> tuple[Trainer, Feed]:
    recipe = make_recipe(**fields)
    targets = join_example(images, folder, recipe)
    compute = Compute(CPU, torch.float32, 0) if compute is None else compute
    trainer = make_trainer(targets, recipe, target, student, compute)
    return trainer, Feed(images, targets, recipe, CPU, compute.seed)


def seeded(seed: int) -> Compute:
    return Compute(CPU, torch.float32, seed)


def run_epoch(trainer: Trainer, feed: Feed) -> dict[str, float]:
    progress = trainer.progress
    for batch in feed.epoch(progress.epoch, progress.steps_done):
        trainer.step(batch, feed.num_steps)
    means = trainer.finish_epoch()
    trainer.begin_epoch()
    return means


def run_epochs(trainer: Trainer, feed: Feed, num_epochs: int) -> list[dict[str, float]]:
    return [run_epoch(trainer, feed) for _ in range(num_epochs)]


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.tensors().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# Learning


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_falls_on_a_problem_that_can_be_learnt(
    target: Target, coloured: DecodedImages, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"batch_size": 8, "learning_rate": 3e-3, "logit_scale": 5.0, "cosine_weight": 0.1}
    trainer, feed = make(coloured, tmp_path, target, **fields)
    losses = run_epochs(trainer, feed, 15)
    assert losses[-1]["loss"] < 0.8 * losses[0]["loss"]
    assert losses[-1]["ce"] < 0.5 * losses[0]["ce"]
    assert losses[-1]["clip"] < 0.9 * losses[0]["clip"]
    student = trainer.kept.eval()
    with torch.no_grad():
        answers = student(student.normalise(torch.from_numpy(coloured.pixels[coloured.places, 0])))[1].argmax(dim=1)
    assert (answers.numpy() == coloured.labels).mean() > 0.9


def test_everything_at_once_can_be_learnt(coloured: DecodedImages, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "batch_size": 8,
        "learning_rate": 3e-3,
        "logit_scale": 5.0,
        "schedule": "cosine",
        "warmup": 0.5,
    }
    trainer, feed = make(coloured, tmp_path, "both", **fields, **EVERYTHING)
    losses = run_epochs(trainer, feed, 15)
    assert losses[-1]["loss"] < 0.9 * losses[0]["loss"]
    assert trainer.method.logit_scale_value != trainer.recipe.logit_scale
    assert all(value > 0 for value in losses[-1].values())


def test_means_are_over_images_not_over_batches(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(9, 0), tmp_path, batch_size=6)
    logits: list[Tensor] = []
    trainer.method.student.register_forward_hook(lambda module, inputs, outputs: logits.append(outputs[1].detach()))
    batches = list(feed.epoch(1))
    means = run_epoch(trainer, feed)
    losses = [
        F.cross_entropy(answers, batch.class_targets).item() for answers, batch in zip(logits, batches, strict=True)
    ]
    assert means["ce"] == pytest.approx((6 * losses[0] + 3 * losses[1]) / 9, rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
    assert set(means) == set(LOSSES)


def test_means_are_of_one_epoch(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(8, 0), tmp_path, batch_size=4, learning_rate=1e-9)
    first, second = run_epochs(trainer, feed, 2)
    assert first["loss"] == pytest.approx(second["loss"], rel=0.1)


def test_bfloat16_trains_about_as_float32(tmp_path: Path) -> None:
    results = []
    for precision in (torch.float32, torch.bfloat16):
        student, images = make_student("test_vit", 16), noise_images(9, 0, image_size=16)
        trainer, feed = make(images, tmp_path, "both", Compute(CPU, precision, 0), student, batch_size=9)
        results.append(run_epoch(trainer, feed)["loss"])
        assert all(tensor.dtype != torch.bfloat16 for tensor in trainer.tensors().values())
    assert results[0] != results[1]
    assert results[0] == pytest.approx(results[1], rel=0.02)


@pytest.mark.parametrize("target", TARGETS)
def test_without_distillation_a_step_is_exactly_the_supervised_one(target: Target, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"batch_size": 9, "alpha2": 0.0, "learning_rate": 0.01, "weight_decay": 0.05}
    trainer, feed = make(noise_images(9, 0), tmp_path, target, **fields)
    plain = copy.deepcopy(trainer.method.student).train()
    projection = copy.deepcopy(trainer.method.projection.state_dict())
    (batch,) = feed.epoch(1)
    trainer.step(batch, 1)

    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.05, fused=True)
    loss = F.cross_entropy(plain(plain.normalise(batch.pixels))[1], batch.class_targets, reduction="sum") / 9
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    means = trainer.finish_epoch()
    assert means["loss"] == means["ce"] == pytest.approx(loss.item(), rel=1e-6)
    assert equal_weights(weights_of(trainer.method.student), weights_of(plain))
    assert not equal_weights(weights_of(plain), weights_of(make_student()))
    for name, tensor in trainer.method.projection.state_dict().items():
        assert torch.equal(tensor, projection[name])


def test_distillation_trains_the_projection(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(9, 0), tmp_path)
    before = trainer.method.projection.weight.detach().clone()
    run_epoch(trainer, feed)
    assert not torch.equal(trainer.method.projection.weight, before)


def test_the_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "batch_size": 3,
        "epochs": 2,
        "warmup": 0.5,
        "schedule": "cosine",
        "learning_rate": 0.3,
    }
    trainer, feed = make(noise_images(9, 0), tmp_path, **fields)
    used = []
    for _ in range(2):
        for batch in feed.epoch(trainer.progress.epoch):
            trainer.step(batch, feed.num_steps)
            used.append({group["lr"] for group in trainer.optimizer.param_groups})
        trainer.begin_epoch()
    half = 0.15
    cosine = [half + half * math.cos(math.pi * step / 3) for step in range(3)]
    assert [next(iter(rates)) for rates in used] == pytest.approx([0.1, 0.2, 0.3, *cosine])


def test_gradients_are_clipped_to_the_recipes_norm(tmp_path: Path) -> None:
    norms = {}
    for clip in (0.0, 0.01):
        trainer, feed = make(noise_images(4, 0), tmp_path, gradient_clip=clip)
        run_epoch(trainer, feed)
        gradients = [parameter.grad for parameter in trainer.method.parameters() if parameter.grad is not None]
        norms[clip] = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert norms[0.0] > 0.1
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_a_learned_logit_scale_does_not_pass_one_hundred(tmp_path: Path) -> None:
    images = noise_images(4, 0)
    trainer, feed = make(images, tmp_path, logit_scale=99.9, learn_logit_scale=True, learning_rate=0.05)
    (batch,) = feed.epoch(1)
    perfect = batch.class_targets  # the gradient raises κ where all answers are right
    with torch.no_grad():
        trainer.method.projection.weight.zero_()
        trainer.method.projection.bias.fill_(1.0)
    scales = []
    for _ in range(6):
        trainer.step(batch._replace(class_targets=perfect), 1)
        scales.append(trainer.method.logit_scale_value)
    assert max(scales) <= 100.001


# What chance decides


def run(images: DecodedImages, folder: Path, seed: int, **fields: Any) -> tuple[dict[str, Tensor], float]:
    trainer, feed = make(images, folder, "both", seeded(seed), **{"augmentation.horizontal_flip": 0.5, **fields})
    losses = run_epochs(trainer, feed, 2)
    return state(trainer), losses[-1]["loss"]


def test_the_same_seed_gives_the_same_state(tmp_path: Path) -> None:
    images = noise_images(9, 0)
    first = run(images, tmp_path, 3, **EVERYTHING)
    torch.rand(5)
    second = run(images, tmp_path, 3, **EVERYTHING)
    assert equal(first[0], second[0])
    assert first[1] == second[1]


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    images = noise_images(9, 0)
    assert not equal(run(images, tmp_path, 3)[0], run(images, tmp_path, 4)[0])


def test_dropout_follows_from_the_seed_too(tmp_path: Path) -> None:
    images, losses = noise_images(9, 0), []
    for seed in (1, 1, 2):
        student = make_student()
        student.model.get_submodule("layer4").register_forward_hook(lambda m, i, output: F.dropout(output, 0.5))
        torch.manual_seed(seed * 11)  # what happened before does not matter
        # The batch is the same for every seed: nothing but dropout differs.
        trainer, _ = make(images, tmp_path, "class", seeded(seed), student, batch_size=9, learning_rate=1e-9)
        (batch,) = make(images, tmp_path, batch_size=9)[1].epoch(1)
        trainer.step(batch, 1)
        losses.append(trainer.finish_epoch()["ce"])
    assert losses[0] == losses[1] != losses[2]


def test_dropout_is_another_at_every_step(tmp_path: Path) -> None:
    student = make_student()
    drawn: list[Tensor] = []
    student.register_forward_hook(lambda module, inputs, outputs: drawn.append(torch.rand(3)))
    trainer, feed = make(noise_images(8, 0), tmp_path, student=student)
    run_epochs(trainer, feed, 2)
    assert len({tuple(values.tolist()) for values in drawn}) == 4


def test_the_largest_seed_of_32_bits_is_one(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(9, 0), tmp_path, compute=seeded(2**32 - 1), batch_size=9)
    run_epoch(trainer, feed)
    assert trainer.progress.num_images == 9


# Where a run stands


def test_progress_counts_steps_images_and_epochs(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(9, 0), tmp_path, batch_size=6)
    assert trainer.progress == Progress()
    batches = list(feed.epoch(1))
    trainer.step(batches[0], 2)
    assert trainer.progress == Progress(steps_done=1, num_steps=1, epoch_images=6, num_images=6)
    trainer.step(batches[1], 2)
    assert trainer.progress == Progress(steps_done=2, num_steps=2, epoch_images=9, num_images=9)
    trainer.progress = replace(trainer.progress, epoch_seconds=3.0, seconds=5.0, feed_seconds=1.0)
    trainer.begin_epoch()
    assert trainer.progress == Progress(epoch=2, num_steps=2, num_images=9, seconds=5.0, feed_seconds=1.0)


# What is kept


def test_without_an_average_the_student_itself_is_kept(tmp_path: Path) -> None:
    trainer, _ = make(noise_images(4, 0), tmp_path)
    assert trainer.average is None
    assert trainer.kept is trainer.method.student


def test_with_an_average_its_student_is_kept_and_follows(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(4, 0), tmp_path, average_decay=0.999, learning_rate=0.01)
    assert trainer.average is not None
    assert trainer.kept is trainer.average.method.student
    before = weights_of(trainer.kept)
    run_epoch(trainer, feed)
    learned, kept = weights_of(trainer.method.student), weights_of(trainer.kept)
    name = "conv1.0.weight"
    assert torch.allclose(kept[name], 0.1 * before[name] + 0.9 * learned[name], atol=1e-6)  # the first step's share
    assert not torch.equal(kept[name], learned[name])


def test_at_alpha2_one_the_kept_students_classifier_is_made_of_class_embeddings(
    coloured: DecodedImages, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "batch_size": 8,
        "alpha2": 1.0,
        "logit_scale": 10.0,
        "learning_rate": 3e-3,
        "average_decay": 0.5,
    }
    trainer, feed = make(coloured, tmp_path, **fields)
    for losses in run_epochs(trainer, feed, 15):
        assert losses["loss"] == losses["clip"]
    for student in (trainer.method.student, trainer.kept):
        assert student.classifier.weight.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    student = trainer.kept.eval()
    with torch.no_grad():
        logits = student(student.normalise(torch.from_numpy(coloured.pixels[coloured.places, 0])))[1]
    assert (logits.argmax(dim=1).numpy() == coloured.labels).mean() > 0.9


# Losses that are not finite


def not_finite(trainer: Trainer, batches: Sequence[Batch]) -> str:
    def steps() -> None:
        for batch in batches:
            trainer.step(batch, len(batches))

    with pytest.raises(PipelineError) as caught:
        steps()
    return str(caught.value)


def spoil(trainer: Trainer, *, at_step: int, loss: str = "ce", value: float = math.nan) -> None:
    """Let a loss be not finite, while all weights stay as they are."""
    inner = trainer.forward_backward

    def spoilt(batch: Batch) -> Tensor:
        losses = inner(batch)
        if trainer.progress.num_steps + 1 == at_step:
            losses[0] = losses[LOSSES.index(loss)] = value
        return losses

    trainer.forward_backward = spoilt  # type: ignore[assignment]


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(12, 0), tmp_path, batch_size=4, learning_rate=0.01)
    run_epoch(trainer, feed)
    spoil(trainer, at_step=5, loss="clip", value=math.inf)
    batches = list(feed.epoch(2))
    trainer.step(batches[0], 3)
    before = weights_of(trainer.method.student)
    assert not_finite(trainer, batches[1:]) == (
        "the loss is not finite at step 5, in epoch 2 (clip is inf). It is likely that a step was too long: try a "
        "lower --lr than 0.01, or --set gradient_clip=1."
    )
    learned = {name: tensor for name, tensor in before.items() if "running" not in name and "num_" not in name}
    after = weights_of(trainer.method.student)
    assert all(torch.equal(tensor, after[name]) for name, tensor in learned.items())
    assert trainer.progress.num_steps == 4


def test_all_losses_that_are_not_finite_are_named(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(4, 0), tmp_path, learning_rate=0.01, gradient_clip=2.0)
    with torch.no_grad():
        trainer.method.student.model.get_parameter("conv1.0.weight").fill_(math.nan)
    assert not_finite(trainer, list(feed.epoch(1))) == (
        "the loss is not finite at step 1, in epoch 1 (ce is nan, clip is nan). It is likely that a step was too "
        "long: try a lower --lr than 0.01."
    )


def test_finite_weights_in_bfloat16_are_suspected_to_be_too_coarse(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(4, 0), tmp_path, compute=Compute(CPU, torch.bfloat16, 0))
    spoil(trainer, at_step=1)
    assert not_finite(trainer, list(feed.epoch(1))) == (
        "the loss is not finite at step 1, in epoch 1 (ce is nan). The weights are finite: try a lower --lr than "
        "0.001, or --set gradient_clip=1, then --precision float32."
    )


def test_a_gpu_that_is_asked_late_may_have_been_too_coarse_too(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(4, 0), tmp_path, compute=Compute(CPU, torch.bfloat16, 0))
    trainer.compute = Compute(torch.device("cuda"), torch.bfloat16, 0)
    with torch.no_grad():  # as the steps since then have left them
        trainer.method.student.model.get_parameter("conv1.0.weight").fill_(math.nan)
    trainer._unchecked = [(1, torch.tensor([math.nan, math.nan, *[0.0] * (len(LOSSES) - 2)]))]
    with pytest.raises(PipelineError) as error:
        trainer.check_finite()
    assert str(error.value).endswith(
        "A step was too long, or bfloat16 too coarse: try a lower --lr than 0.001, or --set gradient_clip=1, then "
        "--precision float32."
    )
    del feed


def test_a_sum_that_is_not_finite_is_told_as_such(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(4, 0), tmp_path)
    spoil(trainer, at_step=1, loss="loss", value=math.inf)
    assert "at step 1, in epoch 1 (their sum). It is likely" in not_finite(trainer, list(feed.epoch(1)))


def test_a_gpu_is_asked_now_and_then_and_the_step_is_named_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHECK_STEPS", 3)
    for spoilt, noticed in ((2, 3), (3, 3), (4, None)):
        trainer, feed = make(noise_images(12, 0), tmp_path, batch_size=3)
        trainer.compute = replace(trainer.compute, device=torch.device("cuda"))  # it computes on the CPU
        spoil(trainer, at_step=spoilt)
        with pytest.raises(PipelineError) as caught:
            run_epoch(trainer, feed)
        assert str(caught.value).startswith(f"the loss is not finite at step {spoilt}, in epoch 1 (ce is nan).")
        assert trainer.progress.num_steps == (4 if noticed is None else noticed - 1)


def test_memory_that_runs_out_is_advised_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, feed = make(noise_images(9, 0), tmp_path, batch_size=9)

    def exhaust(batch: Batch) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(trainer, "forward_backward", exhaust)
    assert not_finite(trainer, list(feed.epoch(1))) == "out of memory: training at batch size 9. Try --micro-batch 4."


# Going back


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "supervised": {"alpha2": 0.0},
    "prototypes": {"alpha2": 1.0},
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_a_trainer_that_went_back_goes_on_to_the_same_state(fields: dict[str, Any], tmp_path: Path) -> None:
    images = noise_images(10, 0)
    trainer, feed = make(images, tmp_path, "both", batch_size=4, **fields)
    run_epoch(trainer, feed)
    batches = list(feed.epoch(2))
    trainer.step(batches[0], feed.num_steps)
    kept, progress = state(trainer), trainer.progress
    for batch in batches[1:]:
        trainer.step(batch, feed.num_steps)
    expected = trainer.finish_epoch()

    other, other_feed = make(images, tmp_path, "both", student=make_student(seed=5), batch_size=4, **fields)
    other.restore(kept, progress)
    assert equal(state(other), kept)
    for batch in other_feed.epoch(progress.epoch, progress.steps_done):
        other.step(batch, other_feed.num_steps)
    assert other.finish_epoch() == expected
    assert equal(state(other), state(trainer))
    assert other.progress == trainer.progress


def test_what_is_kept_of_a_run_is_all_that_it_has_learnt(tmp_path: Path) -> None:
    trainer, feed = make(noise_images(4, 0), tmp_path, "both", **EVERYTHING)
    run_epoch(trainer, feed)
    names = set(trainer.tensors())
    parameters = {name for name, _ in trainer.method.named_parameters()}
    state_names = set(trainer.method.state_dict())
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert names == {
        *(f"method.{name}" for name in state_names),
        *(f"average.{name}" for name in state_names),
        *(f"optimizer.{kind}.{name}" for name in parameters for kind in kinds),
        "sums",
    }
    assert {"log_logit_scale", "projection.weight", "regressor.bias", "student.model.bn1.running_mean"} <= state_names


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.pop("sums"), "sums is missing"),
        (lambda tensors: tensors.pop("optimizer.exp_avg.projection.bias"), "optimizer.exp_avg.projection.bias is miss"),
        (lambda tensors: tensors.update(other=torch.zeros(1)), "other is unknown"),
        (lambda tensors: tensors.update(sums=torch.zeros(3)), "sums is torch.float32 [3], expected torch.float32 [7]"),
        (
            lambda tensors: tensors.update(sums=torch.zeros(7, dtype=torch.float64)),
            "sums is torch.float64 [7], expected torch.float32 [7]",
        ),
    ],
)
def test_tensors_of_another_run_are_refused_and_nothing_changes(change: Any, problem: str, tmp_path: Path) -> None:
    images = noise_images(4, 0)
    trainer, feed = make(images, tmp_path)
    run_epoch(trainer, feed)
    tensors = {name: tensor + 1 for name, tensor in state(trainer).items()}
    change(tensors)
    other, _ = make(images, tmp_path)
    before = weights_of(other.method.student)
    with pytest.raises(ValueError, match="^" + re.escape(problem)):
        other.restore(tensors, trainer.progress)
    assert equal_weights(weights_of(other.method.student), before)
    assert other.progress == Progress()


def test_a_trainer_goes_back_after_a_try_that_failed(tmp_path: Path) -> None:
    images = noise_images(4, 0)
    trainer, feed = make(images, tmp_path, alpha2=0.0)
    run_epoch(trainer, feed)
    kept = state(trainer)
    strange = {**kept, "optimizer.step.projection.bias": torch.zeros(())}
    other, _ = make(images, tmp_path, alpha2=0.0)
    with pytest.raises(ValueError, match="is missing"):
        other.restore(strange, trainer.progress)
    other.restore(kept, trainer.progress)
    assert equal(state(other), kept)


def test_arithmetic_of_attention_is_given_back_after_a_step(tmp_path: Path) -> None:
    student = make_student("test_vit", 16)
    seen: list[bool] = []
    layer = next(layer for layer in student.model.modules() if hasattr(layer, "fused_attn"))
    layer.q_norm = nn.LayerNorm(cast(Any, layer).head_dim)  # such a block is none that is written out
    assert isinstance(layer, nn.Module)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(bool(module.fused_attn)))
    trainer, feed = make(noise_images(4, 0, image_size=16), tmp_path, student=student)
    run_epoch(trainer, feed)
    assert seen == [False]
    assert layer.fused_attn


def test_labels_beside_pixels_are_what_is_learned(coloured: DecodedImages, tmp_path: Path) -> None:
    """A student of wrong labels learns the wrong ones: nothing but the feed says which is which."""
    moved = replace(coloured, labels=(coloured.labels + 1) % 3)
    trainer, feed = make(moved, tmp_path, batch_size=8, learning_rate=3e-3, alpha2=0.0)
    run_epochs(trainer, feed, 12)
    student = trainer.kept.eval()
    with torch.no_grad():
        answers = (
            student(student.normalise(torch.from_numpy(coloured.pixels[coloured.places, 0])))[1].argmax(dim=1).numpy()
        )
    assert np.mean(answers == moved.labels) > 0.9
