"""An extraction that was stopped goes on where it was, alone or shared, and ends in the same bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import store
from pipeline.data import DataSettings
from pipeline.errors import PipelineError
from pipeline.extract import ExtractSettings, extract
from pipeline.extract.partial import PartialFolder
from pipeline.extract.processes import Processes, join_processes
from pipeline.extract.teacher import Teacher

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.extract.embed._CHUNK_IMAGES", 8)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.fixture
def settings(tiny_teacher: Path, saved_data: Path, tmp_path: Path) -> Callable[..., ExtractSettings]:
    def make(name: str = "a.safetensors", **options: Any) -> ExtractSettings:
        given: dict[str, Any] = {
            "teacher": str(tiny_teacher),
            "data": DataSettings(dataset=str(saved_data)),
            "out": tmp_path / name,
            "samples": True,
            "batch_size": 4,
            "device": "cpu",
            "precision": "float32",
        }
        return ExtractSettings(**(given | options))

    return make


def stop_after(monkeypatch: pytest.MonkeyPatch, num_batches: int) -> None:
    """Interrupt the teacher after so many batches; before them come two runs of its trial image."""
    embed, calls = Teacher.embed, iter(range(1_000))

    def embed_or_stop(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        if next(calls) == num_batches + 2:
            raise KeyboardInterrupt
        return embed(self, pixels)

    monkeypatch.setattr(Teacher, "embed", embed_or_stop)


@pytest.mark.parametrize("num_batches", [2, 3, 7])
@pytest.mark.parametrize("name", ["a.safetensors", "a.h5"])
def test_a_stopped_extraction_ends_in_the_same_bytes(
    settings: Callable[..., ExtractSettings], monkeypatch: pytest.MonkeyPatch, num_batches: int, name: str
) -> None:
    whole, stopped = settings(f"whole-{name}", views=2, view_size=16), settings(name, views=2, view_size=16)
    extract(whole)
    with monkeypatch.context() as context:
        stop_after(context, 2 * num_batches)
        with pytest.raises(KeyboardInterrupt):
            extract(stopped)
    finished = len(PartialFolder(stopped.out).finished())
    assert finished == num_batches // 2
    assert not stopped.out.exists()
    result = extract(stopped)
    assert result.num_resumed == 8 * finished
    assert stopped.out.read_bytes() == whole.out.read_bytes()
    assert not PartialFolder(stopped.out).path.exists()
    store.verify_artifact(stopped.out)


def test_other_settings_do_not_go_on(settings: Callable[..., ExtractSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        stop_after(context, 3)
        with pytest.raises(KeyboardInterrupt):
            extract(settings())
    with pytest.raises(PipelineError, match=r"other settings \(batch_size was 4, is 2\)"):
        extract(settings(batch_size=2))
    assert len(PartialFolder(settings().out).finished()) == 1
    result = extract(settings(batch_size=2, overwrite=True))
    assert result.num_resumed == 0


def test_a_chunk_that_was_damaged_is_embedded_again(
    settings: Callable[..., ExtractSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(settings("whole.safetensors"))
    with monkeypatch.context() as context:
        stop_after(context, 5)
        with pytest.raises(KeyboardInterrupt):
            extract(settings())
    path = PartialFolder(settings().out).finished()[1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    path.write_bytes(content)
    extract(settings())
    assert settings().out.read_bytes() == settings("whole.safetensors").out.read_bytes()


def test_views_are_of_the_same_samples(settings: Callable[..., ExtractSettings]) -> None:
    result = extract(settings(views=3, view_size=16, dtype="float32"))
    sampling = result.manifest.sampling
    assert (sampling.views, sampling.view_size, sampling.views_version) == (3, 16, 1)
    extract(settings("plain.safetensors", dtype="float32"))
    with store.open_artifact(settings().out) as viewed, store.open_artifact(settings("plain.safetensors").out) as plain:
        assert np.array_equal(viewed["sample/embedding"][:, :1], plain["sample/embedding"])
        assert np.array_equal(viewed["class/mean"], plain["class/mean"])
        spread = viewed["sample/embedding"].std(axis=1)
        assert (spread.max(axis=1) > 0).all()


def test_the_head_is_in_the_artifact(settings: Callable[..., ExtractSettings]) -> None:
    result = extract(settings(samples=False))
    head = result.manifest.head
    assert head is not None
    with store.open_artifact(result.path) as artifact:
        assert artifact["head/weight"].shape == artifact["class/mean"].shape
    assert head.loo_error > 0


def test_several_processes_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(PipelineError, match="several processes need accelerate, which is not installed"):
        join_processes(torch.device("cpu"))


def test_one_process_is_the_main_one() -> None:
    processes, device = join_processes(torch.device("cpu"))
    processes.wait()
    assert (processes.is_main, processes.count, device.type) == (True, 1, "cpu")


def test_a_process_that_fails_leaves_the_folder_to_the_first(
    settings: Callable[..., ExtractSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Processes(1, 2)
    monkeypatch.setattr("pipeline.extract.run.join_processes", lambda device: (second, device))
    with pytest.raises(PipelineError, match="is not on this machine"):
        extract(settings())
    folder = PartialFolder(settings().out)
    folder.path.mkdir()
    with pytest.raises(PipelineError, match="does not see what the first one sees"):
        extract(settings())
    assert folder.path.exists()


LAUNCHED = """
import sys
import pipeline.extract.embed
pipeline.extract.embed._CHUNK_IMAGES = 8
import cli
sys.argv = ["clip-embed-kd", *sys.argv[1:]]
cli.main()
"""


def test_two_processes_write_the_same_bytes(
    settings: Callable[..., ExtractSettings], tiny_teacher: Path, saved_data: Path, tmp_path: Path
) -> None:
    extract(settings("one.safetensors"))
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    out = tmp_path / "two.safetensors"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        str(script),
    ]
    command += ["extract", "--teacher", str(tiny_teacher), "--dataset", str(saved_data), "--out", str(out), "--json"]
    command += ["--samples", "--batch-size", "4", "--device", "cpu", "--precision", "float32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_images"] == 30
    assert out.read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert not PartialFolder(out).path.exists()
