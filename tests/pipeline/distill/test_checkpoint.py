"""What a checkpoint holds, and what becomes of it when writing stops at any point or its files are damaged."""

import json
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.distill import checkpoint as module
from pipeline.distill.checkpoint import Checkpoints
from pipeline.distill.feed import Feed
from pipeline.distill.loop import Trainer
from pipeline.errors import PipelineError
from tests.pipeline.distill.examples import CPU, file_names, join_example, make_recipe, make_trainer, noise_images
from tests.pipeline.distill.killing import kill_before, killed

Made = tuple[Trainer, Feed]
Make = Callable[..., Made]
Saved = tuple[Checkpoints, dict[int, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    images = noise_images(10, 0)
    recipe = make_recipe(learn_logit_scale=True, average_decay=0.9)
    targets = join_example(images, tmp_path_factory.mktemp("artifact"), recipe)

    def make_one(learning_rate: float = recipe.learning_rate) -> Made:
        own = recipe.model_copy(update={"learning_rate": learning_rate})
        return make_trainer(targets, own, "both"), Feed(images, targets, own, CPU, 0)

    return make_one


def steps(made: Made, num_steps: int) -> None:
    """Train, over epochs of three steps."""
    trainer, feed = made
    for _ in range(num_steps):
        if trainer.progress.steps_done == feed.num_steps:
            trainer.begin_epoch()
        batch = next(feed.epoch(trainer.progress.epoch, trainer.progress.steps_done))
        trainer.step(batch, feed.num_steps)


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.tensors().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.fixture(scope="module")
def written(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    made, checkpoints = make(), Checkpoints(tmp_path_factory.mktemp("written") / "checkpoints")
    states = {}
    for number in (2, 4):
        steps(made, 2)
        checkpoints.save(made[0])
        states[number] = state(made[0])
    return checkpoints, states


@pytest.fixture
def saved(written: Saved, tmp_path: Path) -> Saved:
    """Checkpoints after two and four steps, and what each holds."""
    checkpoints, states = written
    return Checkpoints(shutil.copytree(checkpoints.folder, tmp_path / "checkpoints")), dict(states)


# What is written


def test_a_checkpoint_is_a_folder_of_tensors_and_progress(make: Make, tmp_path: Path) -> None:
    trainer, feed = made = make()
    steps(made, 4)
    trainer.progress = replace(trainer.progress, seconds=1.5)
    Checkpoints(tmp_path / "checkpoints").save(trainer)
    assert file_names(tmp_path / "checkpoints") == ["00000004"]
    folder = tmp_path / "checkpoints" / "00000004"
    assert file_names(folder) == ["progress.json", "tensors.safetensors"]
    document = json.loads((folder / "progress.json").read_text("utf-8"))
    assert set(document) == {"format", "progress", "tensors_sha256"}
    assert document["progress"] == {
        "epoch": 2,
        "steps_done": 1,
        "num_steps": 4,
        "epoch_images": 4,
        "epoch_seconds": 0.0,
        "num_images": 14,
        "seconds": 1.5,
        "feed_seconds": 0.0,
    }
    assert equal(load_file(folder / "tensors.safetensors"), state(trainer))
    assert feed.num_steps == 3


def test_going_back_is_exact(saved: Saved, make: Make) -> None:
    checkpoints, states = saved
    trainer, feed = made = make()
    assert Checkpoints(checkpoints.folder).restore(trainer)
    assert equal(state(trainer), states[4])
    assert (trainer.progress.epoch, trainer.progress.steps_done, trainer.progress.num_images) == (2, 1, 14)
    unbroken = make()
    steps(unbroken, 7)
    steps(made, 3)
    assert equal(state(trainer), state(unbroken[0]))
    assert trainer.progress == unbroken[0].progress
    assert feed.num_images == 10


def test_where_there_is_none_a_run_is_at_its_start(make: Make, tmp_path: Path) -> None:
    trainer, _ = make()
    before = state(trainer)
    assert not Checkpoints(tmp_path / "none").restore(trainer)
    (tmp_path / "empty").mkdir()
    assert not Checkpoints(tmp_path / "empty").restore(trainer)
    assert equal(state(trainer), before)


def test_the_last_two_are_kept(make: Make, tmp_path: Path) -> None:
    made, checkpoints = make(), Checkpoints(tmp_path / "checkpoints")
    seen = []
    for _ in range(4):
        steps(made, 1)
        checkpoints.save(made[0])
        seen.append(file_names(checkpoints.folder))
    names = ["00000001", "00000002", "00000003", "00000004"]
    assert seen == [names[:1], names[:2], names[1:3], names[2:]]


def test_what_a_killed_run_left_is_removed(saved: Saved, make: Make) -> None:
    checkpoints, _ = saved
    for name in (".00000009.tmp", ".00000006.tmp"):
        (checkpoints.folder / name).mkdir()
        (checkpoints.folder / name / "tensors.safetensors").write_bytes(b"half")
    made = make()
    again = Checkpoints(checkpoints.folder)
    assert again.restore(made[0])
    steps(made, 2)
    again.save(made[0])
    assert file_names(checkpoints.folder) == ["00000004", "00000006"]


def test_where_no_step_was_done_nothing_is_written(saved: Saved, make: Make) -> None:
    checkpoints, _ = saved
    trainer, _ = make()
    again = Checkpoints(checkpoints.folder)
    again.restore(trainer)
    before = (checkpoints.folder / "00000004" / "tensors.safetensors").stat()
    again.save(trainer)
    assert (checkpoints.folder / "00000004" / "tensors.safetensors").stat() == before


# What is not written


def test_weights_that_are_not_finite_are_not_kept(saved: Saved, make: Make) -> None:
    checkpoints, _ = saved
    made = make(learning_rate=0.25)
    checkpoints.restore(made[0])
    steps(made, 1)
    with torch.no_grad():
        made[0].method.projection.bias[0] = math.inf
    with pytest.raises(PipelineError) as caught:
        checkpoints.save(made[0])
    assert str(caught.value) == (
        "the weights are not finite after step 5. Try a lower --lr than 0.25, or --precision float32."
    )
    assert file_names(checkpoints.folder) == ["00000002", "00000004"]


def test_losses_that_a_gpu_was_not_asked_for_yet_are_looked_at_first(saved: Saved, make: Make) -> None:
    checkpoints, _ = saved
    trainer, _ = make()
    checkpoints.restore(trainer)
    trainer._unchecked = [(5, torch.ones(7)), (6, torch.full((7,), math.nan))]
    with pytest.raises(PipelineError, match=r"^the loss is not finite at step 6, in epoch 2 \(ce is nan, clip"):
        checkpoints.save(trainer)
    assert file_names(checkpoints.folder) == ["00000002", "00000004"]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let no file become larger, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_stood_there(saved: Saved, make: Make) -> None:
    checkpoints, states = saved
    made = make()
    checkpoints.restore(made[0])
    steps(made, 1)
    with file_size_limit(100_000), pytest.raises(OSError, match="File too large"):
        checkpoints.save(made[0])
    assert file_names(checkpoints.folder) == ["00000002", "00000004"]
    checkpoints.save(made[0])  # there is room again
    assert file_names(checkpoints.folder) == ["00000004", "00000005"]
    trainer, _ = make()
    Checkpoints(checkpoints.folder).restore(trainer)
    assert equal(state(trainer), state(made[0]))
    assert not equal(state(trainer), states[4])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_stops_leaves_nothing_of_its_own(
    error: BaseException, saved: Saved, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, _ = saved
    made = make()
    checkpoints.restore(made[0])
    steps(made, 1)

    def stop(descriptor: int) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", stop)
        with pytest.raises(type(error)):
            checkpoints.save(made[0])
    assert file_names(checkpoints.folder) == ["00000002", "00000004"]


# Killed


# All that change a disk.
CALLS = (
    *((Path, name) for name in ("mkdir", "write_text", "rename")),
    *((module, "save_file"), (os, "fsync"), (shutil, "rmtree")),
)


def test_a_run_killed_at_any_point_of_writing_goes_on_from_a_whole_checkpoint(
    saved: Saved, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, states = saved
    made = make()
    checkpoints.restore(made[0])
    steps(made, 2)
    states[6] = state(made[0])
    seen: list[int] = []
    dead = True
    while dead:
        call, folder = len(seen), tmp_path / f"killed-{len(seen)}"
        shutil.copytree(checkpoints.folder, folder)

        def save(call: int = call, folder: Path = folder) -> None:
            kill_before(call, CALLS, monkeypatch)
            Checkpoints(folder).save(made[0])

        dead = killed(save)
        trainer, _ = make()
        assert Checkpoints(folder).restore(trainer)
        assert equal(state(trainer), states[trainer.progress.num_steps])
        seen.append(trainer.progress.num_steps)
        steps((trainer, made[1]), 1)
        Checkpoints(folder).save(trainer)
        assert len(file_names(folder)) == 2  # nothing is left of the one that was killed
    assert sorted(seen) == seen
    assert seen.count(4) >= 6
    assert seen.count(6) >= 2


# Damaged


def truncate(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def empty_the_tensors(folder: Path) -> None:
    (folder / "tensors.safetensors").write_bytes(b"")


def remove_the_tensors(folder: Path) -> None:
    (folder / "tensors.safetensors").unlink()


def remove_the_progress(folder: Path) -> None:
    (folder / "progress.json").unlink()


def write_garbage(folder: Path) -> None:
    (folder / "progress.json").write_bytes(b"\x00\x00{garbage")


def write_no_text(folder: Path) -> None:
    (folder / "progress.json").write_bytes(b"\xff\xfe")


def write_json(folder: Path, text: str) -> None:
    (folder / "progress.json").write_text(text, "utf-8")


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change tensors and write their digest too, as another program might."""
    tensors = load_file(folder / "tensors.safetensors")
    change(tensors)
    save_file(tensors, folder / "tensors.safetensors")
    document = json.loads((folder / "progress.json").read_text("utf-8"))
    document["tensors_sha256"] = module._sha256(folder / "tensors.safetensors")
    write_json(folder, json.dumps(document))


def give_another_shape(folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors.update({"method.projection.bias": torch.zeros(5)}))


def take_a_tensor(folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors.pop("method.projection.bias"))


DIGEST = "tensors.safetensors has another digest than progress.json says"


def spoil_a_weight(folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors["method.projection.bias"].fill_(math.nan))


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: DIGEST,
    flip_a_byte: DIGEST,
    empty_the_tensors: DIGEST,
    remove_the_tensors: "[Errno 2] No such file or directory: '{folder}/tensors.safetensors'",
    remove_the_progress: "[Errno 2] No such file or directory: '{folder}/progress.json'",
    write_garbage: "Expecting value: line 1 column 1 (char 0)",
    write_no_text: "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    give_another_shape: "method.projection.bias is torch.float32 [5], expected torch.float32 [96]",
    take_a_tensor: "method.projection.bias is missing",
    spoil_a_weight: "method.projection.bias has values that are not finite",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(
    damage: Callable[[Path], None], saved: Saved, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    checkpoints, states = saved
    newest = checkpoints.folder / "00000004"
    damage(newest)
    trainer, feed = made = make()
    again = Checkpoints(checkpoints.folder)
    assert again.restore(trainer)
    reason = DAMAGES[damage].format(folder=newest)[:200]
    assert caplog.messages == [f"Checkpoint {newest} is damaged ({reason}): the one before is taken."]
    assert equal(state(trainer), states[2])
    steps(made, 2)
    again.save(trainer)  # in the damaged one's place
    other, _ = make()
    assert Checkpoints(checkpoints.folder).restore(other)
    assert equal(state(other), states[4])
    assert file_names(checkpoints.folder) == ["00000002", "00000004"]
    assert feed.num_steps == 3


def test_what_is_no_checkpoint_is_not_removed(saved: Saved, make: Make) -> None:
    checkpoints, _ = saved
    (checkpoints.folder / "notes").mkdir()
    (checkpoints.folder / ".00000001.tmp").mkdir()
    made = make()
    checkpoints.restore(made[0])
    steps(made, 1)
    checkpoints.save(made[0])
    assert file_names(checkpoints.folder) == ["00000004", "00000005", "notes"]


PROGRESS: dict[str, Any] = {
    "epoch": 2,
    "steps_done": 1,
    "num_steps": 4,
    "epoch_images": 4,
    "epoch_seconds": 0.0,
    "num_images": 14,
    "seconds": 0.0,
    "feed_seconds": 0.0,
}


@pytest.mark.parametrize(
    "changed",
    [
        {"epoch": 0},
        {"epoch": -1},
        {"epoch": "two"},
        {"epoch": None},
        {"epoch": 1.5},
        {"epoch": [1]},
        {"steps_done": -1},
        {"steps_done": 5},
        {"steps_done": 10**400},
        {"num_steps": 3},
        {"num_steps": -4},
        {"num_images": {}},
        {"num_images": 10**400},
        {"seconds": "long"},
        {"seconds": math.nan},
        {"feed_seconds": math.inf},
        {"epoch_seconds": -1.0},
    ],
    ids=str,
)
def test_progress_that_cannot_be_is_damage(changed: dict[str, Any], saved: Saved, make: Make) -> None:
    checkpoints, states = saved
    folder = checkpoints.folder / "00000004"
    document = json.loads((folder / "progress.json").read_text("utf-8"))
    assert document["progress"] == PROGRESS
    write_json(folder, json.dumps(document | {"progress": PROGRESS | changed}))
    trainer, _ = make()
    assert Checkpoints(checkpoints.folder).restore(trainer)
    assert trainer.progress.num_steps == 2
    assert equal(state(trainer), states[2])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "progress.json holds no object"),
        ("null", "progress.json holds no object"),
        ('"format"', "progress.json holds no object"),
        ("{}", "its format is None, expected 1"),
        ('{"format": 2}', "its format is 2, expected 1"),
        ('{"format": 1}', DIGEST),
        ('{"format": 1, "tensors_sha256": 5}', DIGEST),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ("1" * 5000, "Exceeds the limit (4300"),
    ],
    ids=["list", "null", "text", "empty", "newer", "no digest", "odd digest", "deep", "long"],
)
def test_hostile_progress_is_damage(
    text: str, reason: str, saved: Saved, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    checkpoints, _ = saved
    write_json(checkpoints.folder / "00000004", text)
    trainer, _ = make()
    assert Checkpoints(checkpoints.folder).restore(trainer)
    assert trainer.progress.num_steps == 2
    (message,) = caplog.messages
    assert message.startswith(f"Checkpoint {checkpoints.folder / '00000004'} is damaged ({reason}")
    assert "\n" not in message


def test_problems_with_several_figures_are_one_line(saved: Saved, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    folder = saved[0].folder / "00000004"
    document = json.loads((folder / "progress.json").read_text("utf-8"))
    write_json(folder, json.dumps(document | {"progress": {"epoch": "two", "seconds": None}}))
    trainer, _ = make()
    assert Checkpoints(saved[0].folder).restore(trainer)
    assert caplog.messages == [
        f"Checkpoint {folder} is damaged (epoch: input should be a valid integer, unable to parse string as an "
        "integer, found 'two'; seconds: input should be a valid number, found None): the one before is taken."
    ]


def test_where_all_are_damaged_a_run_is_not_gone_on_with(
    saved: Saved, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    checkpoints, _ = saved
    truncate(checkpoints.folder / "00000002")
    write_garbage(checkpoints.folder / "00000004")
    trainer, _ = make()
    before = state(trainer)
    with pytest.raises(PipelineError) as caught:
        Checkpoints(checkpoints.folder).restore(trainer)
    assert str(caught.value) == f"{checkpoints.folder}: all checkpoints are damaged. Begin anew with --overwrite."
    assert [message.rpartition(": ")[2] for message in caplog.messages] == [
        "the one before is taken.",
        "there is none before it.",
    ]
    assert equal(state(trainer), before)


def test_checkpoints_of_more_steps_than_the_run_has_now_are_removed(saved: Saved, make: Make) -> None:
    checkpoints, _ = saved
    truncate(checkpoints.folder / "00000004")
    made, again = make(), Checkpoints(checkpoints.folder)
    again.restore(made[0])
    steps(made, 1)
    again.save(made[0])
    assert file_names(checkpoints.folder) == ["00000002", "00000003"]


def test_a_file_among_the_checkpoints_is_left_alone(saved: Saved, make: Make) -> None:
    checkpoints, _ = saved
    (checkpoints.folder / "notes.txt").write_text("mine")
    made = make()
    checkpoints.restore(made[0])
    steps(made, 1)
    checkpoints.save(made[0])
    assert file_names(checkpoints.folder) == ["00000004", "00000005", "notes.txt"]
    assert asdict(made[0].progress)["num_steps"] == 5
