from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distill import DistillSettings
from pipeline.distill import plan as module
from pipeline.distill.plan import Plan, plan
from pipeline.errors import PipelineError
from tests.pipeline.distill.examples import file_names, settings_for, write_example

MB, GB = 10**6, 10**9
PLAN = Plan(
    batch_size=96,
    micro_batch=96,
    precision="float32",
    device="cpu",
    image_seconds=0.01,
    images_per_epoch=1000,
    feed_share=0.012,
    evaluation_seconds=4.0,
    saving_seconds=1.0,
    epochs=24,
    memory_bytes=2 * GB,
    image_bytes=3 * GB,
    device_memory_bytes=0,
    run_bytes=50 * MB,
)


@pytest.fixture
def start(saved_data: Path, tmp_path: Path) -> Callable[..., DistillSettings]:
    path = write_example(tmp_path / "a.safetensors")
    return lambda **fields: settings_for(path, saved_data, tmp_path / "runs" / "run", **fields)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_MIN_SECONDS", 0.0)
    (tmp_path / "runs").mkdir()


def test_a_plan_adds_up() -> None:
    assert PLAN.step_seconds == pytest.approx(0.96)
    assert PLAN.epoch_seconds == pytest.approx(15)
    assert PLAN.seconds == pytest.approx(360)
    assert PLAN.rows() == [
        ("step", "960.0 ms for 96 images, float32 on cpu, 1.2 % of it waiting for data"),
        ("epoch", "15.0 s for 1,000 images, 5.0 s of it to evaluate and save"),
        ("in all", "6 min 00 s for 24 epochs"),
        ("memory", "2.0 GB at the peak, libraries included"),
        ("images", "3.0 GB, mapped from the cache: beside it in memory as far as there is room"),
        ("disk", "50.0 MB for the run directory"),
    ]
    rows = replace(PLAN, micro_batch=24, device_memory_bytes=GB, suggestions=("--epochs 3: short",)).rows()
    assert rows[0][1].startswith("960.0 ms for 96 images by 24, ")
    assert rows[5:] == [
        ("GPU", "1.0 GB at the peak"),
        ("disk", "50.0 MB for the run directory"),
        ("try", "--epochs 3: short"),
    ]


def test_a_real_plan_is_of_the_run_and_leaves_nothing(start: Callable[..., DistillSettings], tmp_path: Path) -> None:
    settings = start(epochs=5, batch_size=8, micro_batch=4)
    before = file_names(tmp_path)
    found = plan(settings)
    assert (found.batch_size, found.micro_batch, found.epochs, found.images_per_epoch) == (8, 4, 5, 30)
    assert (found.precision, found.device, found.suggestions) == ("float32", "cpu", ())
    assert found.image_seconds > 0
    assert 0 < found.feed_share < 1
    assert found.evaluation_seconds > 0
    assert found.saving_seconds > 0
    assert found.memory_bytes > 100 * MB
    weights = sum(tensor.nbytes for tensor in _weights(settings))
    assert 9 * weights < found.run_bytes < 14 * weights  # three times weights and two moments, twice the student
    assert file_names(tmp_path) == before
    assert file_names(tmp_path / "runs") == []
    assert found.as_json()["epoch_seconds"] == found.epoch_seconds


def _weights(settings: DistillSettings) -> list[torch.Tensor]:
    from pipeline.distill.student import build_student, student_config

    config = student_config(settings.student, settings.image_size, ("a", "b", "c"), settings.resolved_recipe())
    return list(build_student(config).parameters())


def test_evaluations_are_counted_as_often_as_they_come(
    start: Callable[..., DistillSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_evaluation_seconds", lambda prepared: 12.0)
    assert plan(start()).evaluation_seconds == 12
    assert plan(start(evaluate_every=4)).evaluation_seconds == 3


def test_images_are_stated_apart_and_need_no_memory(
    start: Callable[..., DistillSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "peak_memory", lambda device: _Memory())
    found = plan(start(), ram_bytes=GB)
    assert (found.memory_bytes, found.image_bytes) == (GB, (30 + 12) * 8 * 8 * 3)
    assert found.suggestions == ()


class _Memory:
    resident_bytes, device_bytes = GB, 0


@pytest.mark.parametrize(
    ("ram_bytes", "expected"),
    [
        (2 * GB, []),
        (1500 * MB, ["--micro-batch 24: about 1.3 GB"]),
        (1100 * MB, ["--micro-batch 6: about 1.1 GB"]),
        (1065 * MB, ["--micro-batch 2: about 1.1 GB"]),
        (900 * MB, ["a smaller student: with --micro-batch 2 this one still takes about 1.1 GB"]),
    ],
)
def test_the_largest_micro_batch_that_fits_is_suggested(ram_bytes: int, expected: list[str]) -> None:
    assert module._for_memory(PLAN, False, 10 * MB, ram_bytes) == expected


def test_on_a_gpu_its_own_memory_counts() -> None:
    assert module._for_memory(replace(PLAN, device_memory_bytes=MB), False, 10 * MB, GB) == []
    assert module._for_memory(replace(PLAN, memory_bytes=MB, device_memory_bytes=2 * GB), False, 10 * MB, GB) != []


def test_where_memory_does_not_last_another_precision_is_suggested_first() -> None:
    assert module._for_memory(PLAN, True, 10 * MB, 2 * GB) == []
    assert module._for_memory(PLAN, True, 10 * MB, 1500 * MB) == [
        "--precision bfloat16: see what `plan --precision bfloat16` says",
        "--micro-batch 24: about 1.3 GB",
    ]


@pytest.mark.parametrize(
    ("student", "precision", "expected"),
    [("test_vit", "float32", True), ("test_vit", "bfloat16", False), ("test_resnet", "float32", False)],
)
def test_bfloat16_is_suggested_where_float32_was_measured_and_the_student_is_sound_in_it(
    start: Callable[..., DistillSettings], student: str, precision: str, expected: bool
) -> None:
    settings = start(student=student, precision=precision, image_size=16)
    found = plan(settings, ram_bytes=1)
    assert any(text.startswith("--precision bfloat16") for text in found.suggestions) == expected


def test_what_is_compiled_is_measured_with_its_own_micro_batch_alone(
    start: Callable[..., DistillSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[int] = []
    warm = module._warm

    def noted(micro_batch: int, prepared: Any) -> int:
        warmed.append(micro_batch)
        return warm(micro_batch, prepared)

    def compiled(method: torch.nn.Module, **options: Any) -> torch.nn.Module:
        return method

    monkeypatch.setattr(module, "_warm", noted)
    monkeypatch.setattr(torch, "compile", compiled)
    found = plan(start(compile=True), ram_bytes=MB)
    assert warmed == [8]
    assert found.suggestions == ("--micro-batch: see what `plan --no-compile` says",)
    warmed.clear()
    plan(start())
    assert warmed == [2, 8]


@pytest.mark.parametrize(
    ("hours", "faster", "expected"),
    [
        (1.0, 1.0, []),
        (0.05, 1.0, ["--compile: see what `plan --compile` says", "--epochs {}"]),
        (0.05, 0.2, ["--precision bfloat16: ", "--compile: see what `plan --compile` says"]),
        (1e-9, 1.0, ["--compile: ", "a smaller student, or fewer images: not one epoch fits"]),
    ],
)
def test_what_makes_a_run_short_enough_is_suggested(
    hours: float,
    faster: float,
    expected: list[str],
    start: Callable[..., DistillSettings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """30 images of 1 s and 24 epochs are 12 minutes, and 0.05 hours are 3."""
    seconds = iter([(1.0, 0.0), (faster, 0.0)])
    monkeypatch.setattr(module, "_image_seconds", lambda prepared, least: next(seconds))
    monkeypatch.setattr(module, "_evaluation_seconds", lambda prepared: 0.0)
    monkeypatch.setattr(module, "_try_saving", lambda trainer, out: (0.0, 0))
    found = plan(start(epochs=24, student="test_vit", image_size=16), hours=hours).suggestions
    assert len(found) == len(expected)
    for text, beginning in zip(found, expected, strict=True):
        assert text.startswith(beginning.format(6))


def test_convolutions_are_not_advised_to_compute_in_what_is_unsound_for_them(
    start: Callable[..., DistillSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([(1.0, 0.0), (0.1, 0.0)])
    monkeypatch.setattr(module, "_image_seconds", lambda prepared, least: next(seconds))
    found = plan(start(epochs=24), hours=0.05).suggestions
    assert not any("bfloat16" in text for text in found)
    assert next(seconds) == (0.1, 0.0)  # nor was it tried


def test_a_disk_that_cannot_be_written_is_said(
    start: Callable[..., DistillSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(trainer: Any, folder: Path) -> None:
        raise OSError("No space left on device")  # as checkpoints have it

    monkeypatch.setattr(module, "save_student", fail)
    with pytest.raises(PipelineError) as caught:
        plan(start())
    assert str(caught.value) == (
        f"{tmp_path / 'runs'}: cannot be written (No space left on device). Choose another --out."
    )
    assert file_names(tmp_path / "runs") == []
