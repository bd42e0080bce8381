import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from pipeline.distill import record as module
from pipeline.distill.feed import Feed
from pipeline.distill.loop import Trainer
from pipeline.distill.record import RunDirectory
from pipeline.distill.student import load_student
from pipeline.errors import PipelineError
from tests.pipeline.distill.examples import (
    CPU,
    equal_weights,
    file_names,
    join_example,
    make_recipe,
    make_student,
    make_trainer,
    noise_images,
    weights_of,
)

RECORD: dict[str, dict[str, Any]] = {
    "settings": {"seed": 0, "recipe": "paper", "overrides": {}, "data": {"split": "train"}, "eval_split": None},
    "recipe": {"epochs": 3, "alpha2": 0.5, "augmentation": {"horizontal_flip": 0.5}},
    "artifact": {"file": "a.safetensors", "manifest_sha256": "a" * 64},
    "data": {"name": "images", "evaluated_on": "split test", "train_sha256": "c" * 64, "join": {"missing_rows": ()}},
    "compute": {"device": "cpu", "precision": "float32"},
}
WHOLE = ["checkpoints", "metrics.jsonl", "run.json", "student", "tensorboard"]


class Run:
    """A trainer over epochs of one step, and what it does to a run directory."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        recipe, images = make_recipe(batch_size=8), noise_images(8, 0)
        targets = join_example(images, folder, recipe)
        self.trainer = make_trainer(targets, recipe, student=make_student(seed=seed))
        self.feed = Feed(images, targets, recipe, CPU, 0)

    def epoch(self, directory: RunDirectory) -> None:
        """Do all that a run does in an epoch."""
        trainer = self.trainer
        if trainer.progress.steps_done:
            trainer.begin_epoch()
        for batch in self.feed.epoch(trainer.progress.epoch):
            trainer.step(batch, self.feed.num_steps)
        directory.save_checkpoint(trainer)
        directory.save_student(trainer)
        number, step = trainer.progress.epoch, trainer.progress.num_steps
        directory.log_epoch({"epoch": number, "step": step, "loss": 3.0 / number, "top1": 50.0 + number, "top5": 100.0})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "artifacts").mkdir()
    return Run(tmp_path / "artifacts")


@pytest.fixture
def other(tmp_path: Path, run: Run) -> Run:
    """Another run, of other weights."""
    return Run(tmp_path / "artifacts", seed=1)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs" / "run"


@contextmanager
def recording(
    trainer: Trainer,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    record: Mapping[str, Any] = RECORD,
) -> Iterator[RunDirectory]:
    directory = RunDirectory(out, overwrite=overwrite, resume=resume)
    found = {part: record[part] for part in ("data", "compute")}
    with (
        directory.claim({part: values for part, values in record.items() if part not in found}),
        directory.open(found, trainer),
    ):
        yield directory


def record_epochs(run: Run, out: Path, num_epochs: int, error: BaseException | None = None, **options: Any) -> None:
    with recording(run.trainer, out, **options) as directory:
        for _ in range(num_epochs):
            run.epoch(directory)
        if error is not None:
            raise error
        directory.note({"result": {"top1": 51.0}, "outcome": {"confused": []}})
        directory.finish()


def refusal(run: Run, out: Path, **options: Any) -> str:
    with pytest.raises(PipelineError) as caught:
        record_epochs(run, out, 0, **options)
    return str(caught.value)


def place_refusal(path: Path, *, overwrite: bool = False, resume: bool = False) -> str:
    with pytest.raises(PipelineError) as caught:
        RunDirectory(path, overwrite=overwrite, resume=resume)
    return str(caught.value)


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return found


def metrics(folder: Path) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [(line["epoch"], line["step"]) for line in lines]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


# What is written


def test_the_directory_appears_with_the_first_checkpoint(run: Run, out: Path) -> None:
    with recording(run.trainer, out) as directory:
        assert file_names(out.parent) == [".run.partial"]
        for batch in run.feed.epoch(1):
            run.trainer.step(batch, 1)
        directory.save_checkpoint(run.trainer)
        assert file_names(out) == ["checkpoints", "lock", "run.json", "tensorboard"]
        assert read(out)["status"] == "running"
        directory.save_student(run.trainer)
        directory.log_epoch({"epoch": 1, "step": 1})
        directory.note({"result": {"top1": 51.0}, "outcome": {"confused": []}})
        directory.finish()
    assert read(out)["status"] == "finished"
    assert read(out)["result"] == {"top1": 51.0}
    assert file_names(out.parent) == ["run"]
    assert file_names(out) == WHOLE
    assert file_names(out / "student") == ["config.json", "model.safetensors"]
    assert file_names(out / "checkpoints") == ["00000001"]
    assert equal_weights(weights_of(load_student(out)), weights_of(run.trainer.kept))


def test_the_record_says_what_made_the_student(run: Run, out: Path) -> None:
    record_epochs(run, out, 1)
    found = read(out)
    assert {part: found[part] for part in RECORD} == json.loads(json.dumps(RECORD))
    assert set(found["machine"]) == {"system", "processor", "cpu_cores", "num_threads", "gpu"}
    assert found["machine"]["gpu"] is None
    assert found["software"]["torch"] == version("torch")
    packages = {"python", "clip-embed-kd", "torch", "torchvision", "timm", "datasets", "numpy", "pillow", "safetensors"}
    assert set(found["software"]) == packages | {"arithmetic"}
    assert set(found) == {*RECORD, "status", "machine", "software", "result", "outcome"}


def test_every_epoch_is_in_the_metrics_and_in_tensorboard(run: Run, out: Path) -> None:
    record_epochs(run, out, 3)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[0] == {"epoch": 1, "step": 1, "loss": 3.0, "top1": 51.0, "top5": 100.0}
    assert metrics(out) == [(1, 1), (2, 2), (3, 3)]
    assert scalars(out, "evaluation/top1") == [(1, 51), (2, 52), (3, 53)]
    assert scalars(out, "training/loss") == [(1, 3.0), (2, 1.5), (3, 1.0)]
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"training/loss", "evaluation/top1", "evaluation/top5"}


def test_the_last_student_is_kept(run: Run, out: Path) -> None:
    with recording(run.trainer, out) as directory:
        run.epoch(directory)
        first = weights_of(load_student(out))
        run.epoch(directory)
    assert equal_weights(weights_of(load_student(out)), weights_of(run.trainer.kept))
    assert not equal_weights(first, weights_of(run.trainer.kept))


# What is in the way


def test_what_exists_is_not_overwritten_unless_asked(out: Path) -> None:
    out.mkdir()
    assert place_refusal(out) == f"{out}: exists. Pass --resume to go on with it, --overwrite, or another --out."


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize(("option", "what"), [("overwrite", "overwritten"), ("resume", "resumed")])
def test_only_a_run_directory_is_overwritten_or_resumed(kind: str, option: str, what: str, out: Path) -> None:
    if kind == "file":
        out.write_text("chapter one")
    else:
        out.mkdir()
        (out / "chapter.tex").write_text("chapter one")
    assert place_refusal(out, **{option: True}) == (
        f"{out}: is not a run directory, so it is not {what}. Choose another --out."
    )
    assert out.exists()


def test_an_older_run_is_replaced_by_the_first_checkpoint_not_before(run: Run, other: Run, out: Path) -> None:
    record_epochs(run, out, 2)
    with recording(other.trainer, out, overwrite=True) as directory:
        assert read(out)["status"] == "finished"
        other.epoch(directory)
        assert read(out)["status"] == "running"
    assert equal_weights(weights_of(load_student(out)), weights_of(other.trainer.kept))
    assert metrics(out) == [(1, 1)]
    assert file_names(out / "checkpoints") == ["00000001"]
    assert file_names(out.parent) == ["run"]


def test_a_link_to_an_older_run_is_followed(run: Run, other: Run, out: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real = tmp_path / "disk" / "run"
    record_epochs(run, real, 1)
    out.symlink_to(real)
    record_epochs(other, out, 1, overwrite=True)
    assert out.is_symlink()
    assert equal_weights(weights_of(load_student(real)), weights_of(other.trainer.kept))
    record_epochs(other, out, 1, resume=True)
    assert metrics(real) == [(2, 2)]
    assert file_names(out.parent) == ["run"]


@pytest.mark.parametrize("name", ["checkpoints", "student", "tensorboard", "metrics.jsonl", "lock", "student/more"])
def test_a_run_with_links_in_it_is_not_written_into(name: str, run: Run, other: Run, out: Path, tmp_path: Path) -> None:
    record_epochs(run, out, 1)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("chapter one")
    path = out / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "home")
    assert place_refusal(out, resume=True) == (
        f"{path}: is neither a file nor a folder, but a link or the like, which no run has. Remove it, or choose "
        "another --out."
    )
    with nullcontext() if name != "lock" else pytest.raises(PipelineError, match="Too many levels of symbolic links"):
        record_epochs(other, out, 1, overwrite=True)
    assert (tmp_path / "home" / "thesis").read_text() == "chapter one"


def test_a_pipe_in_a_run_is_not_waited_for(run: Run, out: Path) -> None:
    record_epochs(run, out, 1)
    (out / "metrics.jsonl").unlink()
    os.mkfifo(out / "metrics.jsonl")
    assert place_refusal(out, resume=True).startswith(f"{out / 'metrics.jsonl'}: is neither a file nor a folder")


@pytest.mark.parametrize("name", [".run.partial", ".run.replaced"])
def test_links_where_a_run_is_made_are_not_followed(name: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (out.parent / name).symlink_to(tmp_path / "home")
    assert place_refusal(out).startswith(f"{out.parent / name}: is neither a file nor a folder, but a link")


def test_what_a_killed_run_left_is_removed(run: Run, out: Path) -> None:
    left = out.parent / ".run.partial"
    (left / "student").mkdir(parents=True)
    (left / "metrics.jsonl").write_text("{}\n")
    record_epochs(run, out, 1)
    assert file_names(out.parent) == ["run"]
    assert metrics(out) == [(1, 1)]


def test_the_root_of_the_file_system_is_no_place_for_a_run() -> None:
    assert place_refusal(Path("/")) == "/: exists. Pass --resume to go on with it, --overwrite, or another --out."
    assert place_refusal(Path("/"), overwrite=True) == (
        "/: is not a run directory, so it is not overwritten. Choose another --out."
    )


def test_a_folder_that_is_missing_is_said(tmp_path: Path) -> None:
    out = tmp_path / "missing" / "run"
    message = f"{out}: the folder {out.parent} does not exist. Make it first."
    assert place_refusal(out) == place_refusal(out, resume=True) == message


# What stops a run

ERRORS = [
    (KeyboardInterrupt(), "interrupted"),
    (SystemExit(143), "interrupted"),
    (PipelineError("no"), "failed"),
    (RuntimeError("bug"), "failed"),
]


@pytest.mark.parametrize(("error", "status"), ERRORS)
def test_before_the_first_checkpoint_nothing_is_left(
    error: BaseException, status: str, run: Run, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    with pytest.raises(type(error)):
        record_epochs(run, out, 0, error)
    assert file_names(out.parent) == []
    assert caplog.messages == []


@pytest.mark.parametrize(("error", "status"), ERRORS)
def test_after_it_what_was_learnt_and_the_reason_are_kept(
    error: BaseException, status: str, run: Run, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    with pytest.raises(type(error)):
        record_epochs(run, out, 1, error)
    assert read(out)["status"] == status
    assert "result" not in read(out)
    assert file_names(out) == WHOLE
    assert caplog.messages == [f"{out}: what was learnt up to the last checkpoint is kept. Go on with --resume."]


def test_an_older_run_survives_one_that_fails_early(run: Run, other: Run, out: Path) -> None:
    record_epochs(run, out, 1)
    with pytest.raises(KeyboardInterrupt):
        record_epochs(other, out, 0, KeyboardInterrupt(), overwrite=True)
    assert read(out)["status"] == "finished"
    assert file_names(out.parent) == ["run"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(errno.ENOSPC, "No space left on device"), "No space left on device"), (OSError("odd"), "odd")],
)
def test_a_disk_that_fails_is_said(
    error: OSError, reason: str, run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(module, "save_student", fail)
    with pytest.raises(PipelineError) as caught, recording(run.trainer, out) as directory:
        directory.save_student(run.trainer)
    assert str(caught.value) == f"{out}: cannot be written ({reason})."
    assert file_names(out.parent) == []


def test_a_disk_that_fails_elsewhere_is_not_taken_for_this_one_and_leaves_what_stood_there(run: Run, out: Path) -> None:
    with pytest.raises(OSError, match=r"\[Errno 5\] Input/output error: 'a.safetensors'"):
        record_epochs(run, out, 1, OSError(errno.EIO, "Input/output error", "a.safetensors"))
    assert read(out)["status"] == "failed"
    assert equal_weights(weights_of(load_student(out)), weights_of(run.trainer.kept))


def test_a_disk_that_is_full_for_the_record_too_is_said(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def record() -> None:
        with recording(run.trainer, out) as directory:
            run.epoch(directory)
            monkeypatch.setattr(module, "write_atomically", full)
            directory.finish()

    with pytest.raises(PipelineError) as caught:
        record()
    assert str(caught.value) == f"{out}: cannot be written (No space left on device)."
    assert read(out)["status"] == "running"


# Going on


def test_a_stopped_run_is_gone_on_with(run: Run, other: Run, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        record_epochs(run, out, 2, KeyboardInterrupt())
    caplog.set_level("INFO", "clip_embed_kd")
    with recording(other.trainer, out, resume=True) as directory:
        assert read(out)["status"] == "running"
        assert other.trainer.progress == run.trainer.progress
        assert equal_weights(weights_of(other.trainer.kept), weights_of(run.trainer.kept))
        other.epoch(directory)
        directory.finish()
    assert caplog.messages == ["Going on after step 2, in epoch 2."]
    assert metrics(out) == [(1, 1), (3, 3)]  # epoch 2 is closed again by the run itself
    assert read(out)["status"] == "finished"
    assert file_names(out.parent) == ["run"]


def test_an_epoch_that_is_closed_again_stands_once_in_metrics_and_tensorboard(run: Run, other: Run, out: Path) -> None:
    record_epochs(run, out, 2)
    with recording(other.trainer, out, resume=True) as directory:
        assert metrics(out) == [(1, 1)]
        directory.log_epoch({"epoch": 2, "step": 2, "top1": 99.0})
        other.epoch(directory)
    assert metrics(out) == [(1, 1), (2, 2), (3, 3)]
    assert scalars(out, "evaluation/top1") == [(1, 51), (2, 99), (3, 53)]


def test_half_a_line_and_no_lines_are_left_out(run: Run, other: Run, out: Path) -> None:
    record_epochs(run, out, 2)
    path = out / "metrics.jsonl"
    garbage = b'{"epoch": 1, "st\n[]\n{}\n\xff\n{"epoch": "x"}\n' + b"[" * 100_000 + b'\n{"epoch": 1'
    path.write_bytes(path.read_bytes() + garbage)
    with recording(other.trainer, out, resume=True):
        pass
    assert metrics(out) == [(1, 1)]
    path.unlink()
    with recording(other.trainer, out, resume=True):
        pass
    assert path.read_bytes() == b""


def test_where_nothing_is_a_new_run_begins(run: Run, out: Path) -> None:
    record_epochs(run, out, 1, resume=True)
    assert read(out)["status"] == "finished"
    assert metrics(out) == [(1, 1)]
    assert file_names(out.parent) == ["run"]


def test_without_checkpoints_a_run_begins_at_its_start(
    run: Run, other: Run, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record_epochs(run, out, 2)
    for folder in (out / "checkpoints").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    caplog.set_level("INFO", "clip_embed_kd")
    record_epochs(other, out, 1, resume=True)
    assert caplog.messages == ["Going on after step 0, in epoch 1."]
    assert metrics(out) == [(1, 1)]
    assert scalars(out, "evaluation/top1") == [(1, 51)]


def test_every_setting_that_differs_is_named(run: Run, other: Run, out: Path) -> None:
    record_epochs(run, out, 1)
    before = (out / "run.json").read_bytes()
    changed = {
        "settings": {"seed": 1, "recipe": "paper", "overrides": {}, "data": {"split": "train"}, "eval_split": None},
        "recipe": {"epochs": 3, "alpha2": 0.25, "augmentation": {"horizontal_flip": 0.0, "operations": 1}},
        "artifact": {"file": "a.safetensors", "manifest_sha256": "b" * 64},
        "data": {"name": "images", "evaluated_on": "a tenth", "train_sha256": "d" * 64, "join": {"missing_rows": (3,)}},
        "compute": {"device": "cuda", "precision": "float32"},
    }
    assert refusal(other, out, resume=True, record=changed) == (
        f'{out}: is a run of other settings: artifact.manifest_sha256 was "{"a" * 64}", is "{"b" * 64}"; '
        "recipe.alpha2 was 0.5, is 0.25; recipe.augmentation.horizontal_flip was 0.5, is 0.0; "
        "recipe.augmentation.operations was null, is 1; settings.seed was 0, is 1. Pass the same, or another --out."
    )
    found_later = RECORD | {part: changed[part] for part in ("data", "compute")}
    assert refusal(other, out, resume=True, record=found_later) == (
        f'{out}: is a run of other settings: compute.device was "cpu", is "cuda"; data.join.missing_rows was [], is '
        f'[3]; data.train_sha256 was "{"c" * 64}", is "{"d" * 64}". Pass the same, or another --out.'
    )
    assert (out / "run.json").read_bytes() == before
    assert metrics(out) == [(1, 1)]
    assert file_names(out.parent) == ["run"]


def test_other_names_for_the_same_are_no_difference(run: Run, other: Run, out: Path) -> None:
    """What is trained on, and how, is told by digests and by the recipe as it was resolved."""
    record_epochs(run, out, 1)
    names: dict[str, dict[str, Any]] = {
        "settings": {"recipe": "my.toml", "overrides": {"alpha2": 0.5}, "data": {"split": "all"}, "eval_split": "dev"},
        "artifact": {"file": "moved.h5"},
        "data": {"name": "copy", "revision": "1", "licence": "MIT", "evaluated_on": "split dev"},
    }
    record = {part: values | names.get(part, {}) for part, values in RECORD.items()}
    record_epochs(other, out, 0, resume=True, record=record)
    assert read(out)["data"]["name"] == "copy"
    assert metrics(out) == []


# Two processes


def test_two_runs_at_once_do_not_mix(run: Run, other: Run, out: Path) -> None:
    taken = f"{out}: another process trains there. Wait for it, or choose another --out."
    with recording(run.trainer, out) as directory:
        assert refusal(other, out) == taken  # both begin
        assert file_names(out.parent / ".run.partial") == ["lock", "run.json"]
        run.epoch(directory)
        assert refusal(other, out, resume=True) == refusal(other, out, overwrite=True) == taken
        assert file_names(out.parent) == ["run"]
        run.epoch(directory)
        directory.finish()
    assert metrics(out) == [(1, 1), (2, 2)]
    assert file_names(out) == WHOLE
    record_epochs(other, out, 1, overwrite=True)
    assert metrics(out) == [(1, 1)]
    assert file_names(out) == WHOLE


def test_an_older_run_is_replaced_by_one_process_only(run: Run, other: Run, out: Path) -> None:
    record_epochs(run, out, 1)
    with recording(run.trainer, out, overwrite=True) as directory:
        message = f"{out}: another process trains there. Wait for it, or choose another --out."
        assert refusal(other, out, resume=True) == refusal(other, out, overwrite=True) == message
        run.epoch(directory)
    assert file_names(out) == WHOLE
    assert file_names(out.parent) == ["run"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_appeared_meanwhile_is_not_replaced(resume: bool, run: Run, other: Run, out: Path) -> None:
    late = RunDirectory(out, overwrite=False, resume=resume)  # when there was none
    record_epochs(run, out, 1)
    with pytest.raises(PipelineError) as caught, late.claim({}):
        raise AssertionError("it is not prepared")
    assert str(caught.value) == f"{out}: exists. Pass --resume to go on with it, --overwrite, or another --out."
    assert file_names(out) == WHOLE
    assert file_names(out.parent) == ["run"]


def test_a_run_is_replaced_by_renaming(run: Run, other: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the older one is removed, the newer one is whole already; the rest goes with the next run."""
    record_epochs(run, out, 1)

    def killed(path: Path, **options: Any) -> None:
        if path.name == ".run.replaced" and path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.distill.place.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            record_epochs(other, out, 1, overwrite=True)
    assert file_names(out.parent) == [".run.replaced", "run"]
    assert file_names(out / "checkpoints") == ["00000001"]
    record_epochs(run, out, 1, overwrite=True)
    assert file_names(out.parent) == ["run"]


def die_between_the_renames(run: Run, out: Path) -> None:
    """Leave what `kill -9` would leave in the midst of replacing a run."""
    record_epochs(run, out, 1)
    aside, work = out.parent / ".run.replaced", out.parent / ".run.partial"
    out.rename(aside)
    shutil.copytree(aside, work)
    (work / "run.json").write_text("{}")


def test_killed_between_the_renames_the_older_run_stands_there_again(run: Run, other: Run, out: Path) -> None:
    die_between_the_renames(run, out)
    exists = f"{out}: exists. Pass --resume to go on with it, --overwrite, or another --out."
    assert refusal(other, out, resume=True) == exists
    assert file_names(out.parent) == ["run"]
    assert file_names(out) == WHOLE
    record_epochs(other, out, 1, resume=True)
    assert metrics(out) == [(2, 2)]  # the first epoch would be closed again


def test_killed_between_the_renames_it_is_replaced_by_the_next_one(run: Run, other: Run, out: Path) -> None:
    die_between_the_renames(run, out)
    with recording(other.trainer, out, overwrite=True) as directory:
        assert file_names(out) == sorted([*WHOLE, "lock"])
        other.epoch(directory)
    assert file_names(out.parent) == ["run"]
    assert metrics(out) == [(1, 1)]


def test_what_is_locked_by_another_leaves_nothing_of_ones_own(run: Run, other: Run, out: Path) -> None:
    record_epochs(run, out, 1)
    with recording(run.trainer, out, resume=True):
        refusal(other, out, overwrite=True)
        assert file_names(out.parent) == ["run"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"[]", "'settings'"),
        (b"{}", "'settings'"),
        (b'{"settings": 5}', "'int' object is not iterable"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (
            b'{"settings": {}, "recipe": {}, "artifact": {}, "data": {}, "compute": {}, "result": "\\ud800"}',
            "'utf-8' codec can't encode character",
        ),
    ],
    ids=["empty", "list", "no parts", "number", "not text", "deep", "half a character"],
)
def test_a_damaged_record_is_not_gone_on_with(content: bytes, reason: str, run: Run, other: Run, out: Path) -> None:
    record_epochs(run, out, 1)
    (out / "run.json").write_bytes(content)
    message = refusal(other, out, resume=True)
    assert message.startswith(f"{out}: run.json is damaged ({reason}")
    assert message.endswith("), so it is not known what to go on with. Begin anew with --overwrite.")
    assert (out / "run.json").read_bytes() == content


def test_where_all_checkpoints_are_damaged_the_run_stays_as_it_was(run: Run, other: Run, out: Path) -> None:
    record_epochs(run, out, 2)
    for path in (out / "checkpoints").glob("*/tensors.safetensors"):
        path.write_bytes(b"")
    before = (out / "run.json").read_bytes()
    assert refusal(other, out, resume=True) == (
        f"{out / 'checkpoints'}: all checkpoints are damaged. Begin anew with --overwrite."
    )
    assert (out / "run.json").read_bytes() == before
    assert metrics(out) == [(1, 1), (2, 2)]


def test_what_was_told_is_compared_before_anything_is_prepared(run: Run, out: Path) -> None:
    record_epochs(run, out, 1)
    directory = RunDirectory(out, overwrite=False, resume=True)
    with pytest.raises(PipelineError, match=r"settings\.seed was 0, is 1"), directory.claim({"settings": {"seed": 1}}):
        raise AssertionError("it is not prepared")


def test_another_device_is_refused_before_anything_is_prepared(run: Run, out: Path) -> None:
    record_epochs(run, out, 1)
    directory = RunDirectory(out, overwrite=False, resume=True)
    told = {part: RECORD[part] for part in ("settings", "recipe", "artifact")} | {"compute": {"device": "cuda"}}
    with pytest.raises(PipelineError, match=r"compute\.device was \"cpu\", is \"cuda\""), directory.claim(told):
        raise AssertionError("it is not prepared")


def test_what_a_finished_run_says_of_its_student_goes_with_the_student(run: Run, other: Run, out: Path) -> None:
    record_epochs(run, out, 1)
    pages = [out / "report.html", out / "student" / "README.md"]
    for page in pages:
        page.write_text("accuracy 51 %")
    with recording(other.trainer, out, resume=True) as directory:
        assert read(out)["result"] == {"top1": 51.0}
        assert all(page.exists() for page in pages)
        other.epoch(directory)
        assert not {"result", "outcome"} & read(out).keys()
        assert not any(page.exists() for page in pages)


def test_a_run_that_is_gone_on_with_is_not_replaced(out: Path) -> None:
    message = "--resume goes on with a run, --overwrite begins it anew: pass one of them."
    assert place_refusal(out, overwrite=True, resume=True) == message


@pytest.mark.parametrize("part", ["software", "machine"])
def test_other_software_or_another_machine_is_said(
    part: str, run: Run, other: Run, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record_epochs(run, out, 1)
    document = read(out)
    document[part] = {}
    (out / "run.json").write_text(json.dumps(document))
    caplog.set_level("INFO", "clip_embed_kd")
    record_epochs(other, out, 0, resume=True)
    assert caplog.messages == [
        "The run was begun with other software, on another machine, or with another --micro-batch or --compile: "
        "its last bits may differ, and what is dropped at random.",
        "Going on after step 1, in epoch 1.",
    ]
