import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data import DataSettings
from pipeline.distill import DistillSettings, alignment, evaluate
from pipeline.distill.alignment import Alignment, class_cosines, linear_cka, measure_alignment, sample_cosines
from pipeline.distill.evaluate import evaluate_student
from pipeline.distill.preparation import Prepared, compute_for, prepare
from store import open_artifact
from tests.conftest import CLASS_NAMES, make_split
from tests.pipeline.distill.examples import embedding_of, mean_of, pairs_of, write_example

RANDOM = np.random.default_rng(0)


# Linear CKA


def cka_of_kernels(left: Any, right: Any) -> float:
    """Compute it as section 3 of the paper defines it: with Gram matrices and a centring matrix."""
    centre = np.eye(len(left)) - 1 / len(left)
    kernels = [centre @ rows @ rows.T @ centre for rows in (left, right)]
    hsic = [[np.trace(first @ second) for second in kernels] for first in kernels]
    return float(hsic[0][1] / np.sqrt(hsic[0][0] * hsic[1][1]))


def test_cka_and_its_value_by_chance_are_those_of_the_definition() -> None:
    left, right = RANDOM.normal(size=(5, 3)) + 7, RANDOM.normal(size=(5, 4)) - 2
    found = linear_cka(left, right)
    assert found is not None
    assert found[0] == pytest.approx(cka_of_kernels(left, right))
    shuffled = [cka_of_kernels(left, right[list(order)]) for order in itertools.permutations(range(5))]
    assert found[1] == pytest.approx(np.mean(shuffled))


def test_cka_does_not_mind_rotation_scale_and_place() -> None:
    rows = RANDOM.normal(size=(20, 6))
    rotation, _ = np.linalg.qr(RANDOM.normal(size=(6, 6)))
    found = linear_cka(rows, 1e30 * (rows @ rotation) + 1e30)
    assert found is not None
    assert found[0] == pytest.approx(1)
    assert found[1] < 0.5


def test_few_classes_in_many_dimensions_look_alike_by_chance() -> None:
    found = linear_cka(RANDOM.normal(size=(10, 256)), RANDOM.normal(size=(10, 192)))
    assert found is not None
    assert found == pytest.approx((found[1], found[1]), abs=0.02)
    assert found[1] > 0.9


def test_two_classes_always_agree() -> None:
    assert linear_cka(RANDOM.normal(size=(2, 5)), RANDOM.normal(size=(2, 4))) == pytest.approx((1, 1))


@pytest.mark.parametrize(
    "same", [np.ones((4, 3)), np.zeros((4, 3)), np.full((4, 3), 1 / 3) * (1 + 1e-12), np.ones((1, 3))]
)
def test_there_is_no_cka_where_all_rows_are_the_same(same: Any) -> None:
    other = RANDOM.normal(size=(len(same), 2))
    assert linear_cka(same, other) is None
    assert linear_cka(other, same) is None


# Cosines


def test_class_cosines_by_hand() -> None:
    embeddings = np.array([[2, 0], [0, 3], [1, 1]], np.float32)
    projected = np.array([[5, 0], [0, 1], [-1, 0]], np.float32)
    found = class_cosines(embeddings, np.array([0, 0, 2]), projected)
    half = math.sqrt(0.5)
    assert found["own_class"] == pytest.approx((1 + 0 - half) / 3)
    assert found["other_class"] == pytest.approx((0 + 1 + half) / 3)
    assert found["nearest_own"] == pytest.approx(1 / 3)


def test_class_cosines_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, projected = (RANDOM.normal(size=(number, 4)).astype(np.float32) for number in (50, 9))
    labels = RANDOM.integers(0, 9, 50)
    whole = class_cosines(embeddings, labels, projected)
    monkeypatch.setattr(alignment, "_BLOCK", 60)
    assert class_cosines(embeddings, labels, projected) == pytest.approx(whole)
    monkeypatch.setattr(alignment, "_BLOCK", 1)
    assert class_cosines(embeddings, labels, projected) == pytest.approx(whole)


def test_one_class_has_no_other() -> None:
    one = np.ones((1, 2), np.float32)
    assert class_cosines(one, np.zeros(1, np.int64), one) == {"own_class": pytest.approx(1)}


def test_an_embedding_of_length_0_has_cosine_0() -> None:
    zero, one = np.zeros((1, 2), np.float32), np.ones((2, 2), np.float32)
    assert class_cosines(zero, np.zeros(1, np.int64), one)["own_class"] == 0


def test_sample_cosines_by_hand() -> None:
    embeddings = np.array([[2, 0], [0, 3]], np.float32)
    projected = np.array([[1, 0], [1, 1]], np.float32)
    found = sample_cosines(embeddings, projected)
    half = math.sqrt(0.5)
    assert found == {
        "num_samples": 2,
        "own_sample": pytest.approx((1 + half) / 2),
        "other_sample": pytest.approx((half + 0) / 2),
    }
    assert sample_cosines(embeddings[:1], projected[:1]) == {"num_samples": 1, "own_sample": 1}


# Of a run


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "a.safetensors"
    return write_example(path, ("dog", *reversed(CLASS_NAMES)), pairs_of(make_split(30, 0))[:25])


@contextmanager
def prepared_for(artifact: Path, dataset: Path, out: Path, **fields: Any) -> Iterator[Prepared]:
    plain = {"student": "test_resnet", "image_size": 8, "device": "cpu", "precision": "float32", "max_missing": 0.2}
    overrides = {"batch_size": 5, **fields.pop("overrides", {})}
    data = DataSettings(dataset=str(dataset))
    settings = DistillSettings.model_validate(
        {"artifact": artifact, "data": data, "out": out, **plain, "overrides": overrides, **fields}
    )
    with open_artifact(artifact) as opened:
        yield prepare(settings, settings.resolved_recipe(), compute_for(settings), opened)


def aligned(prepared: Prepared) -> Alignment:
    trainer = prepared.trainer
    kept, images = trainer.kept, prepared.images.evaluation
    found = evaluate_student(kept, images, trainer.compute.device, trainer.compute.precision, 5)
    return measure_alignment(prepared, found)


def embedded(prepared: Prepared, images: Any) -> torch.Tensor:
    student = prepared.trainer.kept.eval()
    pixels = torch.from_numpy(np.array(images.pixels[images.places, 0]))
    with torch.no_grad():
        found: torch.Tensor = student(student.normalise(pixels))[0]
    return found


def cosines(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(left[:, None], right[None], dim=2)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_run_is_measured_with_what_it_keeps(average: float, artifact: Path, saved_data: Path, tmp_path: Path) -> None:
    overrides = {"centre": True, "average_decay": average}
    with prepared_for(artifact, saved_data, tmp_path / "run", target="both", overrides=overrides) as prepared:
        method = prepared.trainer.method
        if prepared.trainer.average is not None:
            torch.nn.init.zeros_(method.projection.weight)  # not what is kept
            method = prepared.trainer.average.method
        found = aligned(prepared)
        images = prepared.images
        evaluated, trained = embedded(prepared, images.evaluation), embedded(prepared, images.train)
        means = torch.from_numpy(np.stack([mean_of(name) for name in CLASS_NAMES]))
        stored = np.stack([embedding_of(pair) for pair in pairs_of(make_split(30, 0))[:25]]).astype(np.float32)
        with torch.no_grad():
            classes = method.projection(means - means.mean(dim=0))
            samples = method.projection(torch.from_numpy(stored) - means.mean(dim=0))
    labels = torch.from_numpy(images.evaluation.labels)
    student_means = torch.stack([evaluated[labels == label].mean(dim=0) for label in range(3)])
    to_classes, to_samples = cosines(evaluated, classes), cosines(trained[:25], samples)
    own = to_classes[range(12), labels]
    others = to_classes.masked_fill(torch.nn.functional.one_hot(labels, 3).bool(), -2).amax(dim=1)
    assert found.class_cka == pytest.approx(
        cka_of_kernels(student_means.double().numpy(), means.double().numpy()), rel=1e-4
    )
    assert found.own_class == pytest.approx(own.mean().item(), abs=1e-5)
    assert found.other_class == pytest.approx(others.mean().item(), abs=1e-5)
    assert found.nearest_own == pytest.approx((own > others).float().mean().item())
    assert found.own_sample == pytest.approx(to_samples.diagonal().mean().item(), abs=1e-5)
    off = to_samples.sum() - to_samples.diagonal().sum()
    assert found.other_sample == pytest.approx(off.item() / (25 * 24), abs=1e-5)
    assert (found.num_images, found.num_classes, found.num_samples) == (12, 3, 25)


def test_without_distillation_there_are_no_cosines(artifact: Path, saved_data: Path, tmp_path: Path) -> None:
    with prepared_for(artifact, saved_data, tmp_path / "run", overrides={"alpha2": 0}) as prepared:
        found = aligned(prepared)
    assert found.class_cka is not None
    assert found == Alignment(12, 3, class_cka=found.class_cka, class_cka_by_chance=found.class_cka_by_chance)


def test_class_targets_have_no_cosines_of_samples(artifact: Path, saved_data: Path, tmp_path: Path) -> None:
    with prepared_for(artifact, saved_data, tmp_path / "run") as prepared:
        found = aligned(prepared)
    assert found.own_class is not None
    assert (found.num_samples, found.own_sample, found.other_sample) == (0, None, None)


def test_a_student_that_sees_no_difference_has_no_cka(artifact: Path, saved_data: Path, tmp_path: Path) -> None:
    with prepared_for(artifact, saved_data, tmp_path / "run") as prepared:
        for parameter in prepared.trainer.kept.parameters():
            parameter.data.zero_()
        found = aligned(prepared)
    assert (found.class_cka, found.class_cka_by_chance) == (None, None)
    assert (found.own_class, found.nearest_own) == (0, 0)


def test_embeddings_that_are_not_finite_are_not_measured(artifact: Path, saved_data: Path, tmp_path: Path) -> None:
    with prepared_for(artifact, saved_data, tmp_path / "run", target="both") as prepared:
        next(prepared.trainer.kept.parameters()).data.fill_(math.nan)
        assert aligned(prepared) == Alignment(12, 3)


def test_samples_that_are_not_finite_are_not_measured(
    artifact: Path, saved_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with prepared_for(artifact, saved_data, tmp_path / "run", target="both") as prepared:
        monkeypatch.setattr(
            type(prepared.targets), "sample_embeddings", lambda *_: np.full((25, 6), math.inf, np.float32)
        )
        found = aligned(prepared)
    assert found.own_class is not None
    assert found.own_sample is None


def test_of_many_images_some_from_everywhere_are_measured(
    artifact: Path, saved_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "MAX_EMBEDDED", 7)
    monkeypatch.setattr(alignment, "MAX_SAMPLES", 4)
    with prepared_for(artifact, saved_data, tmp_path / "run", target="sample") as prepared:
        found = aligned(prepared)
    assert (found.num_images, found.num_classes, found.num_samples) == (7, 3, 4)
