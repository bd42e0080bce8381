"""Metrics of a run that was stopped and gone on with: every epoch once, in the file and in TensorBoard."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import DataSettings
from pipeline.distill import DistillSettings, distill
from pipeline.distill.record import RunDirectory
from tests.conftest import CLASS_NAMES
from tests.pipeline.distill.examples import write_example

STEPS = 4  # in an epoch of 30 images, 8 at a time


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("artifact") / "a.safetensors", CLASS_NAMES)


def settings_of(artifact: Path, dataset: Path, out: Path, **fields: Any) -> DistillSettings:
    quick = {"student": "test_resnet", "image_size": 8, "device": "cpu", "precision": "float32"}
    quick["overrides"] = {"epochs": 3, "batch_size": 8}
    data = DataSettings(dataset=str(dataset))
    return DistillSettings.model_validate({"artifact": artifact, "data": data, "out": out, **quick, **fields})


def epochs_of(folder: Path) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [(line["epoch"], line["step"]) for line in lines]


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points of every scalar as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {
        name: [(each.step, each.value) for each in accumulator.Scalars(name)] for name in accumulator.scalars.Keys()
    }


def go_on(settings: DistillSettings) -> None:
    """Resume in another second: TensorBoard reads files in the order of their names, which begin with the second."""
    time.sleep(1 - time.time() % 1)
    distill(settings)


def steps_of(folder: Path) -> list[int]:
    (steps,) = {tuple(step for step, _ in points) for points in scalars_of(folder).values()}
    return list(steps)


def test_scalars_are_those_of_the_metrics(artifact: Path, saved_data: Path, tmp_path: Path) -> None:
    distill(settings_of(artifact, saved_data, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    scalars = scalars_of(tmp_path / "run")
    assert set(scalars) == {
        f"{'evaluation' if name in ('top1', 'top5') else 'training'}/{name}"
        for name in set(lines[0]) - {"epoch", "step"}
    }
    for name, points in scalars.items():
        assert [step for step, _ in points] == [line["step"] for line in lines]
        assert [value for _, value in points] == pytest.approx([line[name.split("/")[1]] for line in lines])


@pytest.mark.parametrize("epoch", [1, 3])
def test_an_epoch_that_was_noted_but_not_passed_is_not_there_twice(
    epoch: int, artifact: Path, saved_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = RunDirectory.log_epoch

    def note_and_die(self: RunDirectory, line: Mapping[str, float]) -> None:
        noted(self, line)
        if line["epoch"] == epoch:
            raise KeyError("as if killed before the next checkpoint")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "log_epoch", note_and_die)
        with pytest.raises(KeyError):
            distill(settings_of(artifact, saved_data, tmp_path / "run"))
    assert epochs_of(tmp_path / "run")[-1] == (epoch, STEPS * epoch)
    go_on(settings_of(artifact, saved_data, tmp_path / "run", resume=True))
    assert epochs_of(tmp_path / "run") == [(1, 4), (2, 8), (3, 12)]
    assert steps_of(tmp_path / "run") == [4, 8, 12]


def test_an_epoch_that_was_cut_short_is_noted_where_it_ends(artifact: Path, saved_data: Path, tmp_path: Path) -> None:
    distill(settings_of(artifact, saved_data, tmp_path / "run", max_steps=6))
    assert epochs_of(tmp_path / "run") == [(1, 4), (2, 6)]
    go_on(settings_of(artifact, saved_data, tmp_path / "run", resume=True))
    assert epochs_of(tmp_path / "run") == [(1, 4), (2, 8), (3, 12)]
    assert steps_of(tmp_path / "run") == [4, 8, 12]
    go_on(settings_of(artifact, saved_data, tmp_path / "run", resume=True))
    assert epochs_of(tmp_path / "run") == [(1, 4), (2, 8), (3, 12)]
    assert steps_of(tmp_path / "run") == [4, 8, 12]
