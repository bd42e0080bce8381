"""The command: it learns, goes on where it was stopped, writes what `extract` takes, and refuses in one line."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import cli
import store
from benchmarks.finetune_teacher import UNFINISHED, finetune, main
from benchmarks.finetune_training import FineTuning
from pipeline.errors import PipelineError
from pipeline.extract.teacher import load_teacher
from tests.benchmarks.examples import (
    NUM_TEST,
    NUM_TRAIN,
    coloured_images,
    coloured_split,
    save_coloured,
    settings_of,
)
from tests.conftest import CLASS_NAMES


def refusal(*arguments: Any, **changes: Any) -> str:
    with pytest.raises(PipelineError) as error:
        finetune(settings_of(*arguments, **changes))
    return str(error.value)


def done(*arguments: Any, **changes: Any) -> dict[str, Any]:
    result = finetune(settings_of(*arguments, **changes))
    assert result is not None
    return result


def files(folder: Path) -> dict[str, bytes]:
    """Return what must be the same in the end, however often it was stopped."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "finetune.json"}


def test_it_learns_what_can_be_learned(tiny_teacher: Path, coloured: Path, tmp_path: Path) -> None:
    out = tmp_path / "fine"
    result = done(tiny_teacher, coloured, out, epochs=8, operations=0)
    assert result["accuracy"] == 100
    assert result == {
        "teacher": str(tiny_teacher),
        "out": str(out),
        "epochs": 8,
        "seed": 0,
        "accuracy": 100.0,
        "top5": 100.0,
        "evaluated_on": "split test",
        "num_images": {"train": NUM_TRAIN, "evaluation": NUM_TEST},
        "train_seconds": result["train_seconds"],
        "images_per_second": pytest.approx(8 * NUM_TRAIN / result["train_seconds"]),
        "memory": result["memory"],
    }
    record = json.loads((out / "finetune.json").read_text("utf-8"))
    assert record["result"].items() <= result.items()
    assert record["teacher"]["name"] == "tiny-vit"
    assert record["data"].items() >= {"name": "data", "image_column": "image", "label_column": "label"}.items()
    assert record["settings"]["training"]["epochs"] == 8
    assert record["settings"]["class_names"] == list(CLASS_NAMES)
    assert str(tmp_path) not in json.dumps(record)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine"]


def test_a_teacher_that_never_learned_is_right_as_often_as_chance(
    tiny_teacher: Path, coloured: Path, tmp_path: Path
) -> None:
    result = done(tiny_teacher, coloured, tmp_path / "fine", epochs=1, learning_rate=1e-12)
    assert result["accuracy"] < 70


def test_stopped_after_every_step_it_ends_in_the_same_bytes(
    dropping_teacher: Path, coloured: Path, tmp_path: Path
) -> None:
    alone = done(dropping_teacher, coloured, tmp_path / "alone")
    num_stops = 0
    while (result := finetune(settings_of(dropping_teacher, coloured, tmp_path / "fine"), time.monotonic())) is None:
        num_stops += 1
        assert not (tmp_path / "fine").exists()
        assert (tmp_path / ".fine.partial").is_dir()
    assert num_stops == 7
    assert files(tmp_path / "fine") == files(tmp_path / "alone")
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= files(tmp_path / "fine").keys()
    assert result["accuracy"] == alone["accuracy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "fine"]


def test_other_seeds_give_other_weights(tiny_teacher: Path, coloured: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        done(tiny_teacher, coloured, tmp_path / str(seed), epochs=1, seed=seed)
    one, other = (load_file(tmp_path / seed / "model.safetensors") for seed in "01")
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


def test_stopped_before_it_could_be_evaluated_it_only_evaluates(
    tiny_teacher: Path, coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tiny_teacher, coloured, tmp_path / "fine", epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr(FineTuning, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings)
    with monkeypatch.context() as patched:
        patched.setattr(FineTuning, "step", interrupt)
        assert finetune(settings) is not None


def interrupt(*arguments: Any) -> Any:
    raise KeyboardInterrupt


def test_the_result_extracts(tiny_teacher: Path, coloured: Path, tmp_path: Path) -> None:
    done(tiny_teacher, coloured, tmp_path / "fine", epochs=8, operations=0)
    out = tmp_path / "a.safetensors"
    arguments = ["extract", "--teacher", str(tmp_path / "fine"), "--dataset", str(coloured), "--out", str(out)]
    told = CliRunner().invoke(cli.cli, [*arguments, "--samples", "--precision", "float32", "--json"])
    assert told.exit_code == 0, told.output
    teacher = load_teacher(str(tmp_path / "fine"), None, "auto", torch.device("cpu"), torch.float32)
    with store.open_artifact(out) as artifact:
        assert artifact.manifest.teacher.name == "fine"
        assert artifact.manifest.teacher.weights_sha256 == teacher.info.weights_sha256
        means = artifact["class/mean"]
    embeddings = teacher.embed(teacher.preprocess(coloured_images(NUM_TRAIN, 0))).numpy()
    expected = [embeddings[label :: len(CLASS_NAMES)].mean(axis=0) for label in range(len(CLASS_NAMES))]
    assert np.allclose(means, expected, atol=1e-4)
    # It has learned to tell the classes apart, and its embeddings say so.
    tested = teacher.embed(teacher.preprocess(coloured_images(NUM_TEST, 1))).numpy()
    nearest = np.linalg.norm(tested[:, None] - means[None], axis=2).argmin(axis=1)
    assert (nearest == np.arange(NUM_TEST) % len(CLASS_NAMES)).all()


# Refusals


def test_a_folder_that_exists_is_refused_and_replaced_when_asked(
    tiny_teacher: Path, coloured: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fine"
    done(tiny_teacher, coloured, out, epochs=1)
    before = files(out)
    assert refusal(tiny_teacher, coloured, out) == f"{out}: exists. Choose another --out, or pass --overwrite."
    done(tiny_teacher, coloured, out, overwrite=True)
    assert files(out).keys() == before.keys()
    assert files(out) != before


def test_what_is_no_fine_tuned_teacher_is_never_replaced(tiny_teacher: Path, coloured: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, out)
    assert refusal(tiny_teacher, coloured, out, overwrite=True) == (
        f"{out}: holds no finetune.json, so it is no fine-tuned teacher and is not overwritten. Choose another --out."
    )


def test_settings_that_differ_from_the_unfinished_ones_are_named(
    tiny_teacher: Path, coloured: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fine"
    assert finetune(settings_of(tiny_teacher, coloured, out), time.monotonic()) is None
    assert refusal(tiny_teacher, coloured, out, epochs=3, seed=4) == (
        f"{tmp_path / '.fine.partial'}: an interrupted fine-tuning with other settings (training.epochs was 2, is 3; "
        "training.seed was 0, is 4). Give the same command to go on with it, or pass --overwrite to start anew."
    )
    done(tiny_teacher, coloured, out, epochs=3, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine"]


def test_what_it_is_called_does_not_count(tiny_teacher: Path, coloured: Path, tmp_path: Path) -> None:
    out = tmp_path / "fine"
    assert finetune(settings_of(tiny_teacher, coloured, out), time.monotonic()) is None
    shutil.copytree(tiny_teacher, tmp_path / "same-teacher")
    save_coloured(tmp_path / "same-data")
    assert finetune(settings_of(tmp_path / "same-teacher", tmp_path / "same-data", out)) is not None


def test_damaged_checkpoints_are_left_for_the_one_before_or_begun_anew(
    tiny_teacher: Path, coloured: Path, tmp_path: Path
) -> None:
    out, checkpoints = tmp_path / "fine", tmp_path / ".fine.partial" / "checkpoints"
    done(tiny_teacher, coloured, tmp_path / "alone")
    for _ in range(3):
        assert finetune(settings_of(tiny_teacher, coloured, out), time.monotonic()) is None
    assert sorted(path.name for path in checkpoints.iterdir()) == ["00000002", "00000003"]
    for path in sorted(checkpoints.glob("*/tensors.safetensors"), reverse=True):
        path.write_bytes(b"")
        if path.parent.name == "00000003":
            assert finetune(settings_of(tiny_teacher, coloured, out), time.monotonic()) is None
            assert sorted(path.name for path in checkpoints.iterdir()) == ["00000002", "00000003"]
            (checkpoints / "00000003" / "tensors.safetensors").write_bytes(b"")
    assert refusal(tiny_teacher, coloured, out) == (
        f"{checkpoints}: all checkpoints are damaged. Begin anew with --overwrite."
    )
    done(tiny_teacher, coloured, out, overwrite=True)
    assert files(out) == files(tmp_path / "alone")


def test_where_nothing_was_learnt_nothing_is_left(
    tiny_teacher: Path, coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise PipelineError("no")

    monkeypatch.setattr(FineTuning, "step", fail)
    assert refusal(tiny_teacher, coloured, tmp_path / "fine") == "no"
    assert list(tmp_path.iterdir()) == []


def test_a_split_with_classes_that_are_not_trained_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=[*CLASS_NAMES, "dog"])
    test = coloured_split(12, 1).remove_columns("label").add_column("label", [row % 4 for row in range(12)])
    splits = datasets.DatasetDict(train=coloured_split(30, 0), test=test.cast_column("label", names))
    splits.save_to_disk(str(tmp_path / "data"))
    assert refusal(tiny_teacher, tmp_path / "data", tmp_path / "fine") == (
        f"{tmp_path / 'data'}, split test: 1 of its classes were not learned (dog). Learned were 3 classes, among them "
        "ant, bee, cat."
    )


def test_too_few_images_are_refused(tiny_teacher: Path, coloured: Path, tmp_path: Path) -> None:
    assert refusal(tiny_teacher, coloured, tmp_path / "fine", data={"limit": 1}) == (
        f"{coloured}: 1 images are left to train on and 12 to evaluate on; at least 2 and 1 are needed."
    )


# The command line


def command(*arguments: object) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu", "--precision", "float32"])


def test_the_command_prints_its_result(tiny_teacher: Path, coloured: Path, tmp_path: Path) -> None:
    given = ["--teacher", tiny_teacher, "--dataset", coloured, "--batch-size", 9, "--epochs", 1]
    told = command(*given, "--out", tmp_path / "json", "--json", "--lr", 1e-3, "--seed", 5)
    assert told.exit_code == 0, told.output
    result = json.loads(told.stdout)
    assert set(result) == {
        *("teacher", "out", "epochs", "seed", "accuracy", "top5", "evaluated_on", "num_images", "train_seconds"),
        *("images_per_second", "memory"),
    }
    assert (result["epochs"], result["seed"]) == (1, 5)
    told = command(*given, "--out", tmp_path / "rows", "--holdout")
    assert told.exit_code == 0, told.output
    assert [line.split("  ")[0].strip() for line in told.stdout.splitlines()] == [
        *("teacher", "accuracy", "time", "memory"),
    ]
    assert "(held-out tenth of the training split)" in told.stdout


def test_when_time_is_up_the_exit_status_says_so(tiny_teacher: Path, coloured: Path, tmp_path: Path) -> None:
    given = ["--teacher", tiny_teacher, "--dataset", coloured, "--epochs", 1, "--out", tmp_path / "fine"]
    told = command(*given, "--max-minutes", 1e-9, "--batch-size", 14)
    assert told.exit_code == UNFINISHED
    assert told.stdout == ""
    assert told.stderr.endswith(
        f"{tmp_path / 'fine'}: time is up. The same command goes on from {tmp_path / '.fine.partial'}.\n"
    )
    assert command(*given, "--batch-size", 14).exit_code == 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--teacher", "./none"), 1, "Error: ./none: no such teacher folder. Check --teacher.\n"),
        (("--dataset", "./none"), 1, "Error: ./none: no such data set folder. Check --dataset.\n"),
        (
            ("--holdout", "--eval-split", "test"),
            2,
            "Error: --holdout does not go with --eval-split: it evaluates on training images.\n",
        ),
    ],
)
def test_errors_are_one_line(
    options: tuple[str, ...], status: int, message: str, tiny_teacher: Path, coloured: Path, tmp_path: Path
) -> None:
    given = ["--teacher", tiny_teacher, "--dataset", coloured, "--out", tmp_path / "fine"]
    told = command(*given, *options)
    assert told.exit_code == status
    assert told.stderr.endswith(message)
    assert "Traceback" not in told.output
    assert list(tmp_path.iterdir()) == []


def test_interrupted_it_exits_130(
    tiny_teacher: Path, coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineTuning, "step", interrupt)
    told = command("--teacher", tiny_teacher, "--dataset", coloured, "--out", tmp_path / "fine")
    assert told.exit_code == 130
    assert told.stderr.endswith("Interrupted.\n")
