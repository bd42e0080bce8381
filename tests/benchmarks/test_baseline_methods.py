"""Each method's loss of one batch, by hand."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.baseline_methods import METHODS, ReleasedLoss, arrange, method_overrides
from benchmarks.live_teacher import load_live_teacher, teacher_pixels
from pipeline.distill.loop import Trainer
from pipeline.distill.method import LOSSES, Batch
from pipeline.distill.preparation import compute_for, prepare
from pipeline.distill.recipe import load_recipe
from pipeline.distill.step import ForwardBackward
from pipeline.errors import PipelineError
from pipeline.extract.teacher import Teacher
from store import open_artifact
from tests.benchmarks.conftest import Start
from tests.pipeline.distill.examples import equal_weights, weights_of

Floats = NDArray[np.float64]
Arranged = tuple[Trainer, Batch, Teacher | None]


@pytest.fixture
def arranged(start: Start, tiny_teacher: Path) -> Iterator[Callable[..., Arranged]]:
    """Make the trainer of a method, and its first batch of eight images."""
    with ExitStack() as stack:

        def make(name: str, *, compile: bool = False, **overrides: Any) -> Arranged:
            settings = start(student="test_vit", image_size=16, compile=compile)
            fields = method_overrides(name, {"batch_size": 8, **overrides})
            artifact = stack.enter_context(open_artifact(settings.artifact))
            teacher = load_live_teacher(str(tiny_teacher), artifact, settings) if METHODS[name].is_live else None
            prepared = prepare(settings, load_recipe("paper", fields), compute_for(settings), artifact)
            trainer, batches = arrange(prepared, name, teacher)
            return trainer, next(batches.epoch(1)), teacher

        yield make


def losses_of(trainer: Trainer, batch: Batch) -> dict[str, float]:
    found = trainer.forward_backward(batch)
    return dict(zip(LOSSES, found.tolist(), strict=True))


def outputs(trainer: Trainer, batch: Batch) -> tuple[Floats, Floats]:
    """Return the student's embeddings and logits."""
    student = trainer.method.student
    with torch.no_grad():
        embeddings, logits = student(student.normalise(batch.pixels))
    return embeddings.double().numpy(), logits.double().numpy()


def project(trainer: Trainer, embeddings: Floats) -> Floats:
    weight, bias = (tensor.detach().double().numpy() for tensor in trainer.method.projection.parameters())
    projected: Floats = embeddings @ weight.T + bias
    return projected


def directions(vectors: Floats) -> Floats:
    found: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


def log_softmax(values: Floats) -> Floats:
    found: Floats = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    return found


def cross_entropy(values: Floats, batch: Batch) -> float:
    labels = batch.class_targets.argmax(dim=1).numpy()
    return float(-log_softmax(values)[np.arange(len(labels)), labels].mean())


def test_teacher_kd_is_cross_entropy_and_contrast_with_the_teachers_embeddings_of_the_batch(
    arranged: Callable[..., Arranged],
) -> None:
    trainer, batch, teacher = arranged("teacher-kd", alpha2=0.25)
    assert teacher is not None
    with torch.no_grad():
        hidden = teacher.model(pixel_values=teacher_pixels(teacher.preprocess, batch.pixels)).last_hidden_state
    embeddings, logits = outputs(trainer, batch)
    cosines = directions(embeddings) @ directions(project(trainer, hidden[:, 0].double().numpy())).T
    contrast = -np.diag(log_softmax(cosines)).mean()  # without a temperature: κ of recipe `paper` is 1
    found = losses_of(trainer, batch)
    assert found["clip"] == pytest.approx(contrast, rel=1e-5)
    assert found["ce"] == pytest.approx(cross_entropy(logits, batch), rel=1e-5)
    assert found["loss"] == pytest.approx(0.75 * found["ce"] + 0.25 * found["clip"], rel=1e-5)
    gradient = trainer.method.projection.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_logits_is_cross_entropy_and_half_the_divergence_from_the_heads_opinion(
    arranged: Callable[..., Arranged],
) -> None:
    trainer, batch, _ = arranged("logits")
    assert batch.samples is not None
    assert batch.samples.probabilities is not None
    teacher = batch.samples.probabilities.double().numpy()
    _, logits = outputs(trainer, batch)
    divergence = (teacher * (np.log(teacher) - log_softmax(logits))).sum(axis=1).mean()
    found = losses_of(trainer, batch)
    assert found["soft_label"] == pytest.approx(divergence, rel=1e-4)
    assert found["loss"] == pytest.approx(cross_entropy(logits, batch) + 0.5 * divergence, rel=1e-4)
    assert found["clip"] == 0


def test_released_has_a_double_softmax_and_weights_of_one_and_a_half(arranged: Callable[..., Arranged]) -> None:
    trainer, batch, _ = arranged("released")
    embeddings, logits = outputs(trainer, batch)
    means = trainer.method.class_embeddings.double().numpy()
    cosines = directions(embeddings) @ directions(project(trainer, means)).T
    probabilities = np.exp(log_softmax(logits))
    found = losses_of(trainer, batch)
    assert found["ce"] == pytest.approx(cross_entropy(probabilities, batch), rel=1e-5)
    assert found["clip"] == pytest.approx(cross_entropy(cosines, batch), rel=1e-5)
    assert found["loss"] == pytest.approx(found["ce"] + 0.5 * found["clip"], rel=1e-6)


def test_supervised_is_cross_entropy_alone(arranged: Callable[..., Arranged]) -> None:
    trainer, batch, _ = arranged("supervised")
    _, logits = outputs(trainer, batch)
    found = losses_of(trainer, batch)
    assert found["loss"] == found["ce"] == pytest.approx(cross_entropy(logits, batch), rel=1e-5)
    assert sum(found.values()) == 2 * found["ce"]
    assert trainer.method.projection.weight.grad is None


def test_parts_of_the_released_loss_add_up(arranged: Callable[..., Arranged]) -> None:
    trainer, batch, _ = arranged("released")
    loss = ReleasedLoss(trainer.method)
    whole, parts = (ForwardBackward(loss, torch.float32, size)(batch) for size in (None, 3))
    assert parts.tolist() == pytest.approx(whole.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_may_be_compiled(name: str, arranged: Callable[..., Arranged]) -> None:
    assert not arranged(name)[0].forward_backward.compiled
    assert arranged(name, compile=True)[0].forward_backward.compiled


def test_the_released_methods_optimizer_decays_everything_at_a_constant_rate() -> None:
    recipe = load_recipe("strong", method_overrides("released", {}))
    assert (recipe.decay_all, recipe.schedule, recipe.warmup, recipe.gradient_clip) == (True, "constant", 0, 0)
    assert METHODS["released"].precision == "float32"


def test_all_methods_begin_with_the_same_student(arranged: Callable[..., Arranged]) -> None:
    weights = [weights_of(arranged(name)[0].method.student) for name in METHODS]
    assert all(equal_weights(each, weights[0]) for each in weights)


def test_what_a_method_fixes_may_be_repeated_and_not_changed() -> None:
    assert method_overrides("supervised", {"alpha2": 0, "epochs": 3})["epochs"] == 3
    with pytest.raises(PipelineError) as error:
        method_overrides("supervised", {"alpha2": 0.5, "epochs": 3})
    assert str(error.value) == (
        "--set alpha2=0.5: method supervised has alpha2=0.0. Leave it out, or take another method."
    )
