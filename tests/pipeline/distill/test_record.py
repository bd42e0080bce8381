import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import store
from pipeline.distill import record as module
from pipeline.distill.config import load_recipe
from pipeline.distill.evaluate import Evaluation
from pipeline.distill.loop import Compute, EpochResult
from pipeline.distill.record import RunDirectory
from pipeline.distill.student import Student, load_student
from pipeline.errors import PipelineError
from tests.conftest import CLASS_NAMES
from tests.pipeline.distill.examples import (
    equal_weights,
    file_names,
    make_student,
    settings_for,
    weights_of,
    write_example,
)

METRICS = {
    "epoch",
    "step",
    "loss",
    "loss_ce",
    "loss_clip",
    "loss_cosine",
    "learning_rate",
    "images_per_second",
    "seconds",
    "top1",
    "top5",
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("artifact") / "a.safetensors")


@pytest.fixture(scope="module")
def student() -> Student:
    return make_student()


@contextmanager
def recording(artifact: Path, out: Path, *, overwrite: bool = False) -> Iterator[RunDirectory]:
    directory = RunDirectory(out, overwrite=overwrite)
    settings = settings_for(artifact, Path("images"), out, overwrite=overwrite)
    compute = Compute(torch.device("cpu"), torch.float32, 0)
    with (
        store.open_artifact(artifact) as opened,
        directory.open(settings, load_recipe("paper"), opened, {"name": "images"}, compute),
    ):
        yield directory


def log(directory: RunDirectory, student: Student, epoch: int = 1) -> None:
    counts = np.array([2, 2, 2])
    evaluation = Evaluation(50.0 + epoch, 100.0, CLASS_NAMES, counts, counts, 1.0, 6.0)
    result = EpochResult(3.0 / epoch, 2.0, 1.0, 0.5, num_images=30, num_steps=4, seconds=1.5)
    directory.save(student)
    directory.log_epoch(epoch, 4 * epoch, 1e-4, result, evaluation)


def log_and_fail(artifact: Path, out: Path, student: Student, error: BaseException) -> None:
    with recording(artifact, out) as directory:
        log(directory, student)
        raise error


def run_record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return found


def test_the_directory_appears_with_the_first_student(artifact: Path, student: Student, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with recording(artifact, out) as directory:
        assert not out.exists()
        log(directory, student)
        assert file_names(out) == ["metrics.jsonl", "run.json", "student", "tensorboard"]
        assert run_record(out)["status"] == "running"
        directory.finish({"top1": 51.0})
    assert run_record(out)["status"] == "finished"
    assert run_record(out)["result"] == {"top1": 51.0}
    assert file_names(tmp_path) == ["run"]
    assert equal_weights(weights_of(load_student(out)), weights_of(student))


def test_the_record_says_what_made_the_student(artifact: Path, student: Student, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with recording(artifact, out) as directory:
        log(directory, student)
        directory.finish({})
    found = run_record(out)
    with store.open_artifact(artifact) as opened:
        assert found["artifact"] == {
            "file": "a.safetensors",
            "manifest_sha256": opened.manifest.sha256(),
            "teacher": opened.manifest.teacher.model_dump(),
        }
    assert found["settings"] == settings_for(artifact, Path("images"), out).model_dump(mode="json")
    assert found["recipe"] == load_recipe("paper").model_dump()
    assert found["data"] == {"name": "images"}
    assert set(found["machine"]) == {"system", "processor", "cpu_cores", "gpu", "device", "precision"}
    assert (found["machine"]["gpu"], found["machine"]["device"], found["machine"]["precision"]) == (
        None,
        "cpu",
        "float32",
    )
    assert found["software"]["torch"] == version("torch")
    packages = {"python", "clip-embed-kd", "torch", "torchvision", "timm", "datasets", "numpy", "pillow", "safetensors"}
    assert set(found["software"]) == packages


def test_every_epoch_is_in_the_metrics_and_in_tensorboard(artifact: Path, student: Student, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with recording(artifact, out) as directory:
        for epoch in (1, 2, 3):
            log(directory, student, epoch)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [set(line) for line in lines] == [METRICS] * 3
    assert [(line["step"], line["top1"]) for line in lines] == [(4, 51.0), (8, 52.0), (12, 53.0)]
    assert lines[0] == {
        "epoch": 1,
        "step": 4,
        "loss": 3.0,
        "loss_ce": 2.0,
        "loss_clip": 1.0,
        "loss_cosine": 0.5,
        "learning_rate": 1e-4,
        "images_per_second": 20.0,
        "seconds": 1.5,
        "top1": 51.0,
        "top5": 100.0,
    }
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    names = {f"evaluation/{name}" if name.startswith("top") else f"training/{name}" for name in METRICS}
    assert set(events.Tags()["scalars"]) == names - {"training/epoch", "training/step"}
    assert [(event.step, event.value) for event in events.Scalars("evaluation/top1")] == [(4, 51), (8, 52), (12, 53)]
    assert [event.value for event in events.Scalars("training/loss")] == [3.0, 1.5, 1.0]


def test_the_last_student_is_kept(artifact: Path, student: Student, tmp_path: Path) -> None:
    newer = make_student(seed=1)
    with recording(artifact, tmp_path / "run") as directory:
        log(directory, student)
        log(directory, newer, 2)
    assert equal_weights(weights_of(load_student(tmp_path / "run")), weights_of(newer))


# What is in the way


def test_what_exists_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with pytest.raises(PipelineError) as caught:
        RunDirectory(out, overwrite=False)
    assert str(caught.value) == f"{out}: exists. Choose another --out, or pass --overwrite."


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_only_a_run_directory_is_overwritten(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    if kind == "file":
        out.write_text("chapter one")
    else:
        out.mkdir()
        (out / "chapter.tex").write_text("chapter one")
    with pytest.raises(PipelineError) as caught:
        RunDirectory(out, overwrite=True)
    assert str(caught.value) == f"{out}: is not a run directory, so it is not overwritten. Choose another --out."
    assert out.exists()


def test_an_older_run_is_replaced_by_the_first_student_not_before(
    artifact: Path, student: Student, tmp_path: Path
) -> None:
    out, newer = tmp_path / "run", make_student(seed=1)
    with recording(artifact, out) as directory:
        log(directory, student)
        directory.finish({"top1": 51.0})
    with recording(artifact, out, overwrite=True) as directory:
        assert run_record(out)["status"] == "finished"
        log(directory, newer)
        assert run_record(out)["status"] == "running"
    assert equal_weights(weights_of(load_student(out)), weights_of(newer))
    assert len((out / "metrics.jsonl").read_text("utf-8").splitlines()) == 1
    assert file_names(tmp_path) == ["run"]


def test_a_link_to_an_older_run_is_followed(artifact: Path, student: Student, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "run", tmp_path / "run"
    with recording(artifact, real) as directory:
        log(directory, student)
    link.symlink_to(real)
    newer = make_student(seed=1)
    with recording(artifact, link, overwrite=True) as directory:
        log(directory, newer)
    assert link.is_symlink()
    assert equal_weights(weights_of(load_student(real)), weights_of(newer))


def test_what_a_killed_run_left_is_removed(artifact: Path, student: Student, tmp_path: Path) -> None:
    left = tmp_path / ".run.partial"
    (left / "student").mkdir(parents=True)
    (left / "metrics.jsonl").write_text("{}\n")
    with recording(artifact, tmp_path / "run") as directory:
        log(directory, student)
    assert file_names(tmp_path) == ["run"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()) == 1


# What stops a run


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), PipelineError("no"), RuntimeError("bug")])
def test_before_the_first_student_nothing_is_left(error: BaseException, artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(type(error)), recording(artifact, tmp_path / "run"):
        raise error
    assert file_names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "interrupted"),
        (PipelineError("no"), "failed"),
        (RuntimeError("bug"), "failed"),
    ],
)
def test_after_it_the_student_and_the_reason_are_kept(
    error: BaseException,
    status: str,
    artifact: Path,
    student: Student,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    out = tmp_path / "run"
    with pytest.raises(type(error)):
        log_and_fail(artifact, out, student, error)
    assert run_record(out)["status"] == status
    assert "result" not in run_record(out)
    assert equal_weights(weights_of(load_student(out)), weights_of(student))
    assert file_names(out) == ["metrics.jsonl", "run.json", "student", "tensorboard"]
    assert f"{out}: the student of the last finished epoch is kept." in caplog.messages


def test_an_older_run_survives_one_that_fails_early(artifact: Path, student: Student, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with recording(artifact, out) as directory:
        log(directory, student)
        directory.finish({})
    with pytest.raises(KeyboardInterrupt), recording(artifact, out, overwrite=True):
        raise KeyboardInterrupt
    assert run_record(out)["status"] == "finished"
    assert file_names(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(errno.ENOSPC, "No space left on device"), "No space left on device"), (OSError("odd"), "odd")],
)
def test_a_disk_that_fails_is_said(
    error: OSError, reason: str, artifact: Path, student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(student: Student, folder: Path) -> None:
        raise error

    monkeypatch.setattr(module, "save_student", fail)
    out = tmp_path / "run"
    with pytest.raises(PipelineError) as caught, recording(artifact, out) as directory:
        log(directory, student)
    assert str(caught.value) == f"{out}: cannot be written ({reason})."
    assert file_names(tmp_path) == []


def test_a_disk_that_fails_later_leaves_the_student_before(artifact: Path, student: Student, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(PipelineError, match=r"cannot be written \(Input/output error\)\."):
        log_and_fail(artifact, out, student, OSError(errno.EIO, "Input/output error"))
    assert run_record(out)["status"] == "failed"
    assert equal_weights(weights_of(load_student(out)), weights_of(student))


def test_the_root_of_the_file_system_is_no_place_for_a_run() -> None:
    with pytest.raises(PipelineError) as refused:
        RunDirectory(Path("/"), overwrite=False)
    assert str(refused.value) == "/: exists. Choose another --out, or pass --overwrite."
