"""Sizes are the published ones, ratios the paper's, and steps those that are asked for; nothing is timed."""

import json
import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import resources, resources_step, vit_teachers
from benchmarks.resources import count, main, measure
from benchmarks.resources_step import WARM_STEPS, StepCase, make_step, time_steps
from benchmarks.vit_teachers import random_teacher, teacher_config
from pipeline.distill.loop import Trainer
from pipeline.distill.method import Batch
from pipeline.errors import PipelineError
from pipeline.runtime import PeakMemory
from tests.pipeline.distill.examples import CPU

SMALL = {"base": (1, 8, 2, 16), "large": (2, 16, 4, 32)}


def case(method: Any, **fields: Any) -> StepCase:
    given = {"student": "base", "image_size": 8, "teacher": "vit-base-patch32", "embed_dim": 8, "steps": 1}
    return StepCase(method=method, **{**given, "device": "cpu", "precision": "float32", **fields})


# Sizes


@pytest.mark.parametrize(
    ("teacher", "ratio"),
    [
        ("google/vit-base-patch16-224-in21k", 17.0),
        ("google/vit-large-patch16-224-in21k", 59.0),
        ("google/vit-base-patch32-224-in21k", 17.4),
        ("google/vit-large-patch32-224-in21k", 59.4),
    ],
)
def test_weights_of_the_teacher_are_so_many_times_those_of_the_rest(teacher: str, ratio: float) -> None:
    found = count("base", 32, teacher)
    assert found["weight_ratio"] == pytest.approx(ratio, abs=0.05)
    assert set(found["weight_bytes"]) == {"teacher", "student", "projection", "class_means"}


def test_sizes_are_those_of_table_i() -> None:
    found = count("large", 32, "vit-large-patch32")["sizes"]
    teacher = {"layers": 24, "width": 1024, "heads": 16, "mlp": 4096, "parameters": 306_560_000}
    assert found["teacher"] == teacher
    del found["student"]["parameters"]
    assert found["student"] == {"layers": 10, "width": 512, "heads": 8, "mlp": 2048}
    base = count("base", 32, "vit-base-patch16")
    assert base["sizes"]["student"] == {"layers": 6, "width": 256, "heads": 8, "mlp": 1024, "parameters": 4_794_468}
    assert base["weight_bytes"]["student"] == 4 * 4_794_468
    assert base["weight_bytes"]["projection"] == 4 * (768 * 256 + 256)
    assert base["weight_bytes"]["class_means"] == 4 * 100 * 768


@pytest.mark.parametrize("name", ["vit-large-patch16", "vit-large-patch16-224-in21k", "google/vit-large-patch16"])
def test_teachers_have_short_names_too(name: str) -> None:
    assert teacher_config(name).to_dict() == teacher_config("google/vit-large-patch16-224-in21k").to_dict()


@pytest.mark.parametrize("name", ["vit-huge-patch14", "vit-base-patch8", "vit-base-patch16-384", "vit"])
def test_other_teachers_are_not_the_papers(name: str) -> None:
    with pytest.raises(PipelineError) as error:
        teacher_config(name)
    assert str(error.value) == (
        f"teacher {name!r} is not one of the paper's. Expected google/vit-SIZE-patchP-224-in21k, with SIZE base or "
        "large and P 16 or 32."
    )


# Steps


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make teachers small that are called base and large."""
    monkeypatch.setattr(vit_teachers, "_SIZES", SMALL)


@pytest.mark.usefixtures("small")
def test_a_random_teacher_is_made_in_its_precision_and_embeds() -> None:
    teacher = random_teacher("vit-large-patch32", CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.bfloat16}
    embeddings = teacher.embed(torch.randn(2, 3, 224, 224))
    assert embeddings.shape == (2, 16)
    assert embeddings.isfinite().all()
    assert not torch.equal(embeddings[0], embeddings[1])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("method", "learns"), [("embed", True), ("teacher", True), ("supervised", False)])
def test_a_step_of_each_method_trains_the_student(method: str, learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Trainer, Batch]] = []
    step = Trainer.step

    def spy(trainer: Trainer, batch: Batch, steps_per_epoch: int) -> None:
        taken.append((trainer, batch))
        step(trainer, batch, steps_per_epoch)

    monkeypatch.setattr(Trainer, "step", spy)
    make_step(case(method))()
    ((trainer, batch),) = taken
    assert batch.pixels.shape == (64, 8, 8, 3)
    assert trainer.progress.num_steps == 1
    assert (batch.samples is not None) == (method == "teacher")
    if batch.samples is not None:
        assert batch.samples.embeddings.shape == (64, 8)
    assert (trainer.method.projection.weight.grad is not None) == learns
    assert all(parameter.grad is not None for parameter in trainer.method.student.parameters())


def test_steps_are_timed_after_some_to_warm_up() -> None:
    taken: list[int] = []
    seconds = time_steps(lambda: taken.append(0), 4, CPU)
    assert len(seconds) == 4
    assert len(taken) == 4 + WARM_STEPS


@pytest.mark.parametrize(("device", "chosen"), [("cuda", []), ("cuda:1", [torch.device("cuda:1")])])
def test_a_gpu_is_chosen_where_it_has_a_number(
    device: str, chosen: list[torch.device], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(resources_step, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)  # which refuses one without
    monkeypatch.setattr(resources_step, "make_step", lambda case: None)
    monkeypatch.setattr(resources_step, "time_steps", lambda step, steps, device: [0.5])
    monkeypatch.setattr(resources_step, "peak_memory", lambda device: PeakMemory(1, 2))
    monkeypatch.setattr(sys, "argv", ["resources_step.py", json.dumps(asdict(case("embed", device=device)))])
    resources_step.main()
    assert json.loads(capsys.readouterr().out) == {"seconds": [0.5], "device_bytes": 2}
    assert made == chosen


# The command


def test_without_steps_weights_are_only_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "watch", lambda command: pytest.fail("a process was started"))
    done = CliRunner().invoke(main, ["--teacher", "vit-large-patch32", "--steps", "0", "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weight_ratio"] == 59.419
    assert "ms_per_step" not in found
    plain = CliRunner().invoke(main, ["--teacher", "vit-large-patch32", "--steps", "0"])
    assert plain.stdout.splitlines()[-1] == (
        "weights  teacher 1.2 GB, student 19.2 MB, projection 1.0 MB, class means 409.6 kB: 59.4 times as much in the "
        "teacher as in the rest"
    )


@pytest.mark.parametrize(("device_bytes", "memory_bytes"), [(0, 1024 * 700), (123, 123)])
def test_figures_are_medians_above_an_idle_process(
    device_bytes: int, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def watch(command: list[str]) -> tuple[dict[str, int], dict[str, Any]]:
        commands.append(command)
        if command[0] == "-c":
            return {"anonymous": 300, "file pages": 50, "resident": 350}, {}
        peaks = {"anonymous": 1000, "file pages": 80, "resident": 1080}
        return peaks, {"seconds": [0.5, 0.25, 9.0], "device_bytes": device_bytes}

    monkeypatch.setattr(resources, "watch", watch)
    assert measure(case("teacher")) == {
        "ms_per_step": 500.0,
        "images_per_second": 128.0,
        "epoch_seconds": 390.62,
        "memory_bytes": memory_bytes,
        "file_page_bytes": 1024 * 80,
    }
    assert json.loads(commands[1][1])["method"] == "teacher"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--teacher", "vit-huge"), "teacher 'vit-huge' is not one of the paper's."),
        (("--teacher", "vit-base-patch16", "--image-size", "30"), "Pass --image-size 28 or 32."),
        (("--teacher", "vit-base-patch16", "--device", "abacus"), "device 'abacus' is unknown;"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(options: tuple[str, ...], told: str) -> None:
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert told in line


@pytest.mark.slow
def test_a_process_of_its_own_takes_the_steps() -> None:
    done = CliRunner().invoke(
        main, ["--teacher", "vit-base-patch32", "--method", "embed", "--steps", "1", "--device", "cpu", "--json"]
    )
    found = json.loads(done.stdout)
    assert found["ms_per_step"] > 0
    assert 20_000_000 < found["memory_bytes"] < 4_000_000_000
