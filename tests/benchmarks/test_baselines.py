"""Runs of the command: what they leave, how they go on, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from benchmarks.baseline_methods import METHODS
from benchmarks.baselines import main
from tests.pipeline.distill.examples import equal_weights

Train = Callable[..., Result]


@pytest.fixture
def train(extracted: Path, tiny_teacher: Path, saved_data: Path, tmp_path: Path) -> Train:
    """Run the command on the saved data: four steps an epoch."""

    def run(
        method: str, *options: str, out: str = "run", teacher: Path | None = tiny_teacher, as_json: bool = True
    ) -> Result:
        given = ["--method", method, "--artifact", str(extracted), "--out", str(tmp_path / out)]
        given += ["--dataset", str(saved_data), "--label-column", "label", "--set", "batch_size=8"]
        given += ["--student", "test_vit", "--image-size", "16", "--device", "cpu", *options]
        given += ["--json"] * as_json + ([] if teacher is None else ["--teacher", str(teacher)])
        return CliRunner().invoke(main, given)

    return run


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refusal(result: Result) -> tuple[int, str]:
    return result.exit_code, result.stderr.splitlines()[-1]


def checkpoint_of(run: Path) -> dict[str, Any]:
    return dict(load_file(max((run / "checkpoints").iterdir()) / "tensors.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_says_its_method_and_what_it_took(method: str, train: Train, tmp_path: Path) -> None:
    found = document(train(method, "--epochs", "2", "--seed", "3", "--limit", "24", "--precision", "float32"))
    assert {key: found[key] for key in ("method", "recipe", "artifact", "teacher", "epochs", "seed", "num_steps")} == {
        **{"method": method, "recipe": "paper", "artifact": "a.safetensors", "teacher": "tiny-vit"},
        **{"epochs": 2, "seed": 3, "num_steps": 6},
    }
    assert 0 <= found["accuracy"] <= found["top5"] == 100
    assert found["images_per_second"] == pytest.approx(48 / found["train_seconds"])
    assert found["memory"]["resident_bytes"] > 100_000_000
    if METHODS[method].is_live:
        assert 0 < found["teacher_seconds"] < found["train_seconds"]
    else:
        assert found["teacher_seconds"] == 0
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text())
    assert found["run_directory"] == str(run)
    assert record["status"] == "finished"
    assert record["result"] == found | {"run_directory": "run"}
    assert (record["settings"]["method"], record["settings"]["target"]) == (method, METHODS[method].target)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("top1") for line in lines] == [None, found["accuracy"]]  # evaluated once, at the end


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_ends_in_the_same_weights(method: str, train: Train, tmp_path: Path) -> None:
    options = ("--epochs", "2", "--precision", "float32")
    whole = document(train(method, *options, out="whole"))
    part = document(train(method, *options, "--max-steps", "3", out="parts"))
    assert part["num_steps"] == 3
    rest = document(train(method, *options, "--resume", out="parts"))
    assert (rest["num_steps"], rest["accuracy"]) == (whole["num_steps"], whole["accuracy"])
    assert rest["teacher_seconds"] >= part["teacher_seconds"]
    assert equal_weights(checkpoint_of(tmp_path / "parts"), checkpoint_of(tmp_path / "whole"))
    student = Path("student") / "model.safetensors"
    assert (tmp_path / "parts" / student).read_bytes() == (tmp_path / "whole" / student).read_bytes()


def test_a_run_that_is_finished_tells_its_result_again(train: Train) -> None:
    first = document(train("supervised", "--epochs", "1"))
    again = document(train("supervised", "--epochs", "1", "--resume"))
    kept = ("accuracy", "top5", "num_steps")
    assert [again[key] for key in kept] == [first[key] for key in kept]


def test_methods_end_in_different_students(train: Train, tmp_path: Path) -> None:
    for method in METHODS:
        document(train(method, "--epochs", "1", "--precision", "float32", out=method))
    files = {(tmp_path / method / "student" / "model.safetensors").read_bytes() for method in METHODS}
    assert len(files) == len(METHODS)


def test_people_are_told_too(train: Train, tmp_path: Path) -> None:
    told = train("teacher-kd", "--epochs", "1", "--precision", "float32", as_json=False)
    assert told.exit_code == 0, told.stderr
    rows = dict(line.split("  ", 1) for line in told.stdout.splitlines())
    assert {label.strip() for label in rows} == {"method", "student", "accuracy", "training", "memory"}
    assert told.stdout.splitlines()[:2] == [
        "method      teacher-kd, recipe paper, float32 on cpu",
        f"student     {tmp_path / 'run'}/student",
    ]
    assert "4 steps" in told.stdout
    assert "of it in the teacher" in told.stdout


# What is refused


def test_another_method_does_not_go_on_with_a_run(train: Train, tmp_path: Path) -> None:
    document(train("logits", "--epochs", "1"))
    code, told = refusal(train("supervised", "--epochs", "1", "--resume"))
    assert code == 1
    assert told.startswith(f"Error: {tmp_path / 'run'}: is a run of other settings: ")
    assert 'settings.method was "logits", is "supervised"' in told


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.is_live])
def test_a_live_method_needs_a_teacher(method: str, train: Train) -> None:
    expected = f"Error: --method {method} runs a teacher: pass --teacher, the one that made the artifact."
    assert refusal(train(method, teacher=None)) == (2, expected)


def test_other_methods_need_none(train: Train, tmp_path: Path) -> None:
    assert document(train("released", "--epochs", "1", teacher=None))["precision"] == "float32"
    assert document(train("supervised", "--epochs", "1", teacher=tmp_path / "none", out="other"))["num_steps"] == 4


def test_a_teacher_that_is_not_there_is_said_before_anything_is_written(train: Train, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    expected = f"Error: {missing}: no such teacher folder. Check --teacher."
    assert refusal(train("teacher-kd", teacher=missing)) == (1, expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("released", "--precision", "bfloat16"),
            "Error: --precision bfloat16: method released computes in float32. Leave it out.",
        ),
        (
            ("released", "--set", "logit_scale=10"),
            "Error: --set logit_scale=10: method released has logit_scale=1.0. Leave it out, or take another method.",
        ),
        (("supervised", "--set", "epochs"), "Error: --set 'epochs': expected KEY=VALUE, such as label_smoothing=0.1."),
        (
            ("supervised", "--recipe", "none"),
            "Error: recipe 'none' does not exist. Choose paper, short, strong, or the path of a .toml file.",
        ),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(
    options: tuple[str, ...], expected: str, train: Train, tmp_path: Path
) -> None:
    assert refusal(train(*options)) == (1, expected)
    assert list(tmp_path.iterdir()) == []
