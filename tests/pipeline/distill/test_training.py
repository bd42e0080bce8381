"""The flow of a run, and that a run that was stopped anywhere ends in the bits of one that was not."""

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.distill import checkpoint, training
from pipeline.distill.config import Target
from pipeline.distill.evaluate import Evaluation, evaluate_student
from pipeline.distill.feed import Feed
from pipeline.distill.loop import Compute, Trainer
from pipeline.distill.record import RunDirectory
from pipeline.distill.step import ForwardBackward
from pipeline.distill.student import load_student
from pipeline.distill.training import Limits, Training
from pipeline.errors import PipelineError
from tests.pipeline.distill.examples import (
    CPU,
    file_names,
    join_example,
    make_recipe,
    make_student,
    make_trainer,
    noise_images,
)
from tests.pipeline.distill.killing import kill_before, killed

RECORD: dict[str, Any] = {part: {} for part in ("settings", "recipe", "artifact", "data", "compute")}
TIMES = ("seconds", "epoch_seconds", "feed_seconds", "images_per_second")
Step = Callable[..., None]


@dataclass(frozen=True)
class Setup:
    """A run of two epochs of three steps: ten images in batches of four, four and two."""

    target: Target = "class"
    name: str = "test_resnet"
    dropout: float = 0.0
    micro_batch: int | None = None
    compiled: bool = False
    fields: tuple[tuple[str, Any], ...] = ()

    def make(self, folder: Path) -> tuple[Trainer, Feed]:
        size = 16 if self.name == "test_vit" else 8
        images, recipe = noise_images(10, 0, image_size=size), make_recipe(**{"epochs": 2, **dict(self.fields)})
        folder.mkdir(exist_ok=True)
        targets = join_example(images, folder, recipe, without=(3,) if self.target == "sample" else ())
        model = make_student(self.name, size)
        if self.dropout:
            model.model.head_drop = nn.Dropout(self.dropout)
        compute = Compute(CPU, torch.float32, 0, self.micro_batch, self.compiled)
        return make_trainer(targets, recipe, self.target, model, compute), Feed(images, targets, recipe, CPU, 0)


EVERYTHING = Setup(
    target="both",
    micro_batch=2,
    fields=tuple(
        {
            **{"cosine_weight": 0.5, "soft_label_weight": 0.5, "direction_weight": 0.2, "text_weight": 0.2},
            **{"learn_logit_scale": True, "average_decay": 0.9, "gradient_clip": 1.0, "centre": True},
            **{"schedule": "cosine", "warmup": 0.5, "decay_all": False, "label_smoothing": 0.1},
            **{"augmentation.mixup_alpha": 1.0, "augmentation.cutmix_alpha": 1.0, "augmentation.operations": 1},
        }.items()
    ),
)
SETUPS = {
    "everything": EVERYTHING,
    "dropout": Setup(name="test_vit", target="sample", dropout=0.3),
    "supervised": Setup(fields=(("alpha2", 0.0),)),
    "prototypes": Setup(fields=(("alpha2", 1.0), ("average_decay", 0.5))),
}


@dataclass
class Place:
    """Where runs of one setup are made."""

    setup: Setup
    folder: Path

    def train(
        self,
        name: str = "run",
        *,
        resume: bool = False,
        max_steps: int | None = None,
        minutes: float = 10.0,
        evaluate_every: int = 1,
    ) -> Evaluation:
        trainer, feed = self.setup.make(self.folder / "artifacts")
        directory = RunDirectory(self.folder / name, overwrite=False, resume=resume)
        size = trainer.method.student.config.image_size
        with directory.claim(RECORD), directory.open({}, trainer):
            evaluated = noise_images(6, 1, image_size=size)
            return Training(trainer, feed, evaluated, directory).run(Limits(max_steps, minutes, evaluate_every))


@dataclass
class Outcome:
    """All that a run leaves, without what a clock says."""

    step: int
    progress: dict[str, Any]
    tensors: dict[str, Tensor]
    student: dict[str, bytes]
    metrics: list[dict[str, Any]]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Outcome)
        assert (self.step, self.progress) == (other.step, other.progress)
        assert self.metrics == other.metrics
        assert self.tensors.keys() == other.tensors.keys()
        differing = [name for name, tensor in self.tensors.items() if not torch.equal(tensor, other.tensors[name])]
        assert differing == []
        assert self.student.keys() == other.student.keys()
        return self.student == other.student


def read(folder: Path) -> Outcome:
    newest = max((folder / "checkpoints").iterdir())
    progress = json.loads((newest / "progress.json").read_text("utf-8"))["progress"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return Outcome(
        int(newest.name),
        {name: value for name, value in progress.items() if name not in TIMES},
        load_file(newest / "tensors.safetensors"),
        {path.name: path.read_bytes() for path in sorted((folder / "student").iterdir())},
        [{name: value for name, value in line.items() if name not in TIMES} for line in metrics],
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setup], Outcome]:
    """What a run of a setup leaves that nothing stopped."""
    found: dict[Setup, Outcome] = {}

    def train(setup: Setup) -> Outcome:
        if setup not in found:
            place = Place(setup, tmp_path_factory.mktemp("unbroken"))
            place.train()
            found[setup] = read(place.folder / "run")
        return found[setup]

    return train


Unbroken = Callable[[Setup], Outcome]


def before_step(number: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in the midst of a step, counted from 1 since the start of the run."""
    step = Trainer.step

    def watched(trainer: Trainer, *arguments: Any) -> None:
        if trainer.progress.num_steps + 1 == number:
            act()
        step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "step", watched)


def status(folder: Path) -> str:
    found: str = json.loads((folder / "run.json").read_text("utf-8"))["status"]
    return found


# The flow


def test_a_run_evaluates_and_keeps_its_student_after_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []

    def evaluate(student: Any, images: Any, *arguments: Any) -> Evaluation:
        shown.append(len(images))
        return evaluate_student(student, images, *arguments)

    monkeypatch.setattr(training, "evaluate_student", evaluate)
    found = Place(EVERYTHING, tmp_path).train()
    assert shown == [6, 6]
    outcome = read(tmp_path / "run")
    assert [(line["epoch"], line["step"]) for line in outcome.metrics] == [(1, 3), (2, 6)]
    assert (outcome.metrics[-1]["top1"], outcome.metrics[-1]["top5"]) == (found.top1, found.top5)
    assert file_names(tmp_path / "run" / "checkpoints") == ["00000003", "00000006"]
    again = evaluate_student(load_student(tmp_path / "run"), noise_images(6, 1), CPU, torch.float32, batch_size=3)
    assert again.correct.tolist() == found.correct.tolist()


def test_the_metrics_of_an_epoch_are_these(tmp_path: Path) -> None:
    Place(EVERYTHING, tmp_path).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = ("ce", "clip", "cosine", "soft_label", "direction", "text")
    names = {"epoch", "step", "loss", "logit_scale", "learning_rate", "images_per_second", "seconds", "top1", "top5"}
    assert [set(line) for line in lines] == [names | {f"loss_{name}" for name in losses}] * 2
    for line in lines:
        assert line["images_per_second"] == pytest.approx(10 / line["seconds"])
        weighted = 0.5 * line["loss_ce"] + 0.5 * line["loss_clip"] + 0.5 * line["loss_cosine"]
        weighted += 0.5 * line["loss_soft_label"] + 0.2 * line["loss_direction"] + 0.2 * line["loss_text"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)
    # Of the last step: at the end of the warm-up, and on the cosine.
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 2.5e-4])


def test_epochs_are_told_now_and_then_and_the_last_one_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    Place(Setup(), tmp_path).train("quiet")
    pattern = r"Epoch (\d) of 2: loss \d\.\d{4}, top-1 \d+\.\d\d %, \d+ images/s, \d+\.\d s\."
    assert [re.fullmatch(pattern, message)[1] for message in caplog.messages] == ["2"]  # type: ignore[index]
    caplog.clear()
    monkeypatch.setattr(training, "_REPORT_SECONDS", 0.0)
    Place(Setup(), tmp_path).train("talkative")
    assert [re.fullmatch(pattern, message)[1] for message in caplog.messages] == ["1", "2"]  # type: ignore[index]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After which steps runs are saved."""
    steps: list[int] = []
    save = checkpoint.Checkpoints.save

    def watched(checkpoints: Any, trainer: Trainer) -> None:
        steps.append(trainer.progress.num_steps)
        save(checkpoints, trainer)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", watched)
    return steps


def test_a_run_is_saved_within_an_epoch_as_often_as_asked(tmp_path: Path, saved: list[int]) -> None:
    Place(Setup(), tmp_path).train("often", minutes=1e-9)
    assert saved == [1, 2, 3, 3, 4, 5, 6, 6]
    saved.clear()
    Place(Setup(), tmp_path).train("seldom")
    assert saved == [3, 6]
    assert read(tmp_path / "often") == read(tmp_path / "seldom")


def test_short_epochs_that_are_not_evaluated_share_a_checkpoint(
    tmp_path: Path, saved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(replace(EVERYTHING, fields=(*EVERYTHING.fields, ("epochs", 6))), tmp_path)
    place.train("shared", evaluate_every=4)
    assert saved == [3, 12, 18]  # the first, with which the run directory appears, and those that are evaluated
    saved.clear()
    monkeypatch.setattr(training, "_SAVE_SECONDS", 0.0)
    place.train("each", evaluate_every=4)
    assert saved == [3, 6, 9, 12, 15, 18]
    assert read(tmp_path / "shared") == read(tmp_path / "each")


def test_a_run_that_was_killed_behind_a_short_epoch_goes_back_to_the_checkpoint_before(
    tmp_path: Path, unbroken: Unbroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(EVERYTHING, tmp_path)
    place.train(max_steps=1)
    with monkeypatch.context() as patched:
        before_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM), patched)
        patched.setattr(training.Training, "_save", lambda self: None)  # as SIGKILL leaves it
        with pytest.raises(SystemExit):
            place.train(resume=True, evaluate_every=2)
    assert [line["epoch"] for line in read(tmp_path / "run").metrics] == [1]
    assert file_names(tmp_path / "run" / "checkpoints") == ["00000001"]
    place.train(resume=True)
    assert read(tmp_path / "run") == unbroken(EVERYTHING)


def test_time_is_counted_over_all_parts_of_a_run(tmp_path: Path) -> None:
    place = Place(Setup(), tmp_path)
    times = []
    for max_steps in (2, 4, None):
        place.train(resume=True, max_steps=max_steps, minutes=1e-9)
        newest = max((tmp_path / "run" / "checkpoints").iterdir())
        times.append(json.loads((newest / "progress.json").read_text("utf-8"))["progress"])
    seconds = [progress["seconds"] for progress in times]
    assert seconds == sorted(set(seconds))
    for progress in times:
        assert 0 < progress["feed_seconds"] < progress["seconds"]
        assert 0 < progress["epoch_seconds"] <= progress["seconds"]


# Stopped by a number of steps


@pytest.mark.parametrize("max_steps", range(1, 7))
def test_a_run_stops_after_so_many_steps_and_can_go_on_to_more(
    max_steps: int, tmp_path: Path, unbroken: Unbroken
) -> None:
    place = Place(EVERYTHING, tmp_path)
    place.train(max_steps=max_steps)
    stopped = read(tmp_path / "run")
    assert stopped.step == max_steps
    assert [line["step"] for line in stopped.metrics] == ([max_steps] if max_steps <= 3 else [3, max_steps])
    place.train(resume=True)
    assert read(tmp_path / "run") == unbroken(EVERYTHING)


@pytest.mark.parametrize("name", ["dropout", "supervised", "prototypes"])
@pytest.mark.parametrize("max_steps", [2, 3])
def test_runs_of_every_kind_go_on_exactly(name: str, max_steps: int, tmp_path: Path, unbroken: Unbroken) -> None:
    place = Place(SETUPS[name], tmp_path)
    place.train(max_steps=max_steps)
    place.train(resume=True)
    assert read(tmp_path / "run") == unbroken(SETUPS[name])


def test_a_run_stopped_after_every_step_ends_as_one_that_was_not(tmp_path: Path, unbroken: Unbroken) -> None:
    place = Place(EVERYTHING, tmp_path)
    for max_steps in range(1, 8):
        place.train(resume=True, max_steps=max_steps)
    assert read(tmp_path / "run") == unbroken(EVERYTHING)


@pytest.mark.parametrize("max_steps", [1, 3, 5])
def test_fewer_steps_than_are_done_are_no_more_steps(max_steps: int, tmp_path: Path) -> None:
    place = Place(Setup(), tmp_path)
    place.train(max_steps=5)
    before = read(tmp_path / "run")
    place.train(resume=True, max_steps=max_steps)
    assert read(tmp_path / "run") == before


@pytest.mark.slow
@pytest.mark.parametrize("max_steps", [2, 4])  # the next batch is the short one, and a whole one
def test_a_compiled_run_goes_on_exactly(
    max_steps: int, tmp_path: Path, unbroken: Unbroken, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    fields = (("learn_logit_scale", True), ("average_decay", 0.9), ("augmentation.mixup_alpha", 1.0))
    setup = Setup(name="test_vit", target="both", dropout=0.3, compiled=True, fields=fields)
    place = Place(setup, tmp_path)
    place.train(max_steps=max_steps)
    place.train(resume=True)
    assert "Compiling the step, which takes a minute or so." in caplog.messages
    assert not any(message.startswith("The step is not compiled") for message in caplog.messages)
    assert read(tmp_path / "run") == unbroken(setup)


# Stopped by a signal


@pytest.mark.parametrize("step", [2, 3, 6])
def test_sigterm_is_obeyed_after_the_step_in_hand_and_the_run_goes_on_exactly(
    step: int, tmp_path: Path, unbroken: Unbroken, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    place = Place(EVERYTHING, tmp_path)
    with monkeypatch.context() as patched:
        before_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM), patched)
        with pytest.raises(SystemExit) as stopped:
            place.train()
    assert stopped.value.code == 143
    assert status(tmp_path / "run") == "interrupted"
    assert max(file_names(tmp_path / "run" / "checkpoints")) == f"{step:08d}"
    assert caplog.messages[0] == "Asked to stop: after a checkpoint."
    place.train(resume=True)
    assert f"Going on after step {step}, in epoch {1 if step <= 3 else 2}." in caplog.messages
    assert read(tmp_path / "run") == unbroken(EVERYTHING)
    assert file_names(tmp_path) == ["artifacts", "run"]


@pytest.mark.parametrize("step", [1, 3, 4])
def test_ctrl_c_is_obeyed_after_the_step_in_hand_too(
    step: int, tmp_path: Path, unbroken: Unbroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = SETUPS["prototypes"]
    place = Place(setup, tmp_path)
    with monkeypatch.context() as patched:
        before_step(step, lambda: os.kill(os.getpid(), signal.SIGINT), patched)
        with pytest.raises(KeyboardInterrupt):
            place.train()
    assert status(tmp_path / "run") == "interrupted"
    assert max(file_names(tmp_path / "run" / "checkpoints")) == f"{step:08d}"
    place.train(resume=True)
    assert read(tmp_path / "run") == unbroken(setup)


@pytest.mark.parametrize("first_epoch", [True, False])
def test_ctrl_c_while_an_epoch_is_closed_loses_nothing(
    first_epoch: bool, tmp_path: Path, unbroken: Unbroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = SETUPS["prototypes"]  # whose classifier is made of class embeddings as the epoch is closed
    calls = iter([False, True] if not first_epoch else [True])

    def evaluate(*arguments: Any) -> Evaluation:
        if next(calls):
            raise KeyboardInterrupt
        return evaluate_student(*arguments)

    place = Place(setup, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(training, "evaluate_student", evaluate)
        with pytest.raises(KeyboardInterrupt):
            place.train()
    place.train(resume=True)
    assert read(tmp_path / "run") == unbroken(setup)


def test_out_of_memory_in_an_evaluation_advises_what_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Evaluation:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(training, "evaluate_student", fail)
    with pytest.raises(PipelineError) as caught:
        Place(SETUPS["supervised"], tmp_path).train()
    assert str(caught.value) == "out of memory: evaluation at batch size 4. Try --micro-batch 2."


# Killed


# All that change a run directory.
CALLS = (
    *((Path, name) for name in ("mkdir", "rename", "replace", "write_text")),
    *((RunDirectory, name) for name in ("log_epoch", "save_student", "finish")),
    *((checkpoint, "save_file"), (os, "fsync"), (shutil, "rmtree")),
)


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(
    tmp_path: Path, unbroken: Unbroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each life gets as far as a few more writes than the one before; the kills fall on other calls each time."""
    expected, place = unbroken(EVERYTHING), Place(EVERYTHING, tmp_path)
    (tmp_path / "artifacts").mkdir()
    lives = 0
    while True:

        def live(call: int = 9 + 4 * lives) -> None:
            kill_before(call, CALLS, monkeypatch)
            place.train(resume=True, minutes=1e-9)

        lives += 1
        if not killed(live):
            break
        assert lives < 40
    assert lives > 5
    assert read(tmp_path / "run") == expected
    assert file_names(tmp_path) == ["artifacts", "run"]
    assert file_names(tmp_path / "run" / "student") == ["config.json", "model.safetensors"]


# Finished


def test_a_finished_run_that_is_gone_on_with_is_evaluated_and_nothing_else(
    tmp_path: Path, unbroken: Unbroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, place = unbroken(EVERYTHING), Place(EVERYTHING, tmp_path)
    first = place.train()
    newest = tmp_path / "run" / "checkpoints" / "00000006" / "tensors.safetensors"
    written = newest.stat().st_mtime_ns
    monkeypatch.setattr(Trainer, "step", lambda *arguments: pytest.fail("a step was done again"))
    second = place.train(resume=True)
    assert (second.top1, second.top5) == (first.top1, first.top5)
    assert second.correct.tolist() == first.correct.tolist()
    assert newest.stat().st_mtime_ns == written
    assert read(tmp_path / "run") == expected


# Damaged, and not finite


def test_after_a_damaged_checkpoint_a_run_goes_on_from_the_one_before_to_the_same_end(
    tmp_path: Path, unbroken: Unbroken, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    place = Place(EVERYTHING, tmp_path)
    place.train(max_steps=5)
    newest = tmp_path / "run" / "checkpoints" / "00000005"
    (newest / "tensors.safetensors").write_bytes(b"")
    place.train(resume=True)
    assert f"Checkpoint {newest} is damaged (tensors.safetensors has another digest" in "".join(caplog.messages)
    assert "Going on after step 3, in epoch 1." in caplog.messages
    assert read(tmp_path / "run") == unbroken(EVERYTHING)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint_from_which_a_mended_run_goes_on(
    tmp_path: Path, unbroken: Unbroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(EVERYTHING, tmp_path)
    run, calls = ForwardBackward.__call__, iter(range(1, 100))

    def spoilt(step: ForwardBackward, batch: Any) -> Tensor:
        losses = run(step, batch)
        return losses * math.nan if next(calls) == 5 else losses

    with monkeypatch.context() as patched:
        patched.setattr(ForwardBackward, "__call__", spoilt)
        with pytest.raises(PipelineError, match=r"^the loss is not finite at step 5, in epoch 2 \(ce is nan, "):
            place.train()
    assert status(tmp_path / "run") == "failed"
    assert file_names(tmp_path / "run" / "checkpoints") == ["00000003"]
    assert load_student(tmp_path / "run").config.image_size == 8
    place.train(resume=True)
    assert read(tmp_path / "run") == unbroken(EVERYTHING)


def test_a_learning_rate_that_is_far_too_high_is_said(tmp_path: Path) -> None:
    place = Place(Setup(fields=(("learning_rate", 1e30),)), tmp_path)
    with pytest.raises(PipelineError) as caught:
        place.train()
    message = str(caught.value)
    assert message.startswith("the loss is not finite at step 2, in epoch 1 (ce is nan, clip is nan). It is likely")
    assert message.endswith("that a step was too long: try a lower --lr than 1e+30, or --set gradient_clip=1.")
    assert file_names(tmp_path) == ["artifacts"]


def test_outcomes_are_compared_to_the_bit(tmp_path: Path, unbroken: Unbroken) -> None:
    """The comparison above would see one changed bit."""
    expected = unbroken(EVERYTHING)
    name = "average.student.model.conv1.0.weight"
    changed = expected.tensors[name].clone()
    changed.view(torch.int32)[0, 0, 0, 0] ^= 1
    with pytest.raises(AssertionError):
        assert expected == replace(expected, tensors={**expected.tensors, name: changed})
    assert asdict(expected)["step"] == 6
