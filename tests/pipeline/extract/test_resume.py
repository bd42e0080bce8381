"""An extraction that was stopped goes on where it was, alone or shared, and ends in the same bytes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch

import store
from pipeline.data import DataSettings, Labelled, UnreadableImageError
from pipeline.errors import PipelineError
from pipeline.extract import ExtractSettings, extract
from pipeline.extract.embed import Embedder
from pipeline.extract.partial import PartialFolder, partial_path
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


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_for_a_while_stops_and_the_same_command_goes_on(
    settings: Callable[..., ExtractSettings], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    whole, stopped = settings("whole.h5"), settings("a.h5", skip_bad=True, workers=workers)
    extract(whole)
    read = Labelled._decode

    def fail(self: Labelled, row: int, cell: Any) -> Any:
        return self._unreadable(row, OSError(errno.EIO, "Input/output error")) if row == 20 else read(self, row, cell)

    with monkeypatch.context() as context:
        context.setattr(Labelled, "_decode", fail)
        with pytest.raises(UnreadableImageError, match=r"row 20: the image could not be read just now \(\[Errno 5\]"):
            extract(stopped)
    assert len(PartialFolder(partial_path(stopped.out)).finished()) == 2
    assert extract(stopped).manifest.sampling.skipped_images == 0
    with store.open_artifact(whole.out) as expected, store.open_artifact(stopped.out) as found:
        assert np.array_equal(found["sample/key"], expected["sample/key"])


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
    partial = PartialFolder(partial_path(stopped.out))
    assert (len(partial.finished()), len(partial.begun())) == (num_batches // 2, num_batches % 2)
    assert not stopped.out.exists()
    result = extract(stopped)
    assert result.num_resumed == 4 * num_batches
    assert stopped.out.read_bytes() == whole.out.read_bytes()
    assert not PartialFolder(partial_path(stopped.out)).path.exists()
    store.verify_artifact(stopped.out)


def test_other_settings_do_not_go_on(settings: Callable[..., ExtractSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        stop_after(context, 2)
        with pytest.raises(KeyboardInterrupt):
            extract(settings())
    with pytest.raises(PipelineError, match=r"other settings \(batch_size was 4, is 2\)"):
        extract(settings(batch_size=2))
    assert len(PartialFolder(partial_path(settings().out)).finished()) == 1
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
    path = PartialFolder(partial_path(settings().out)).finished()[1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    path.write_bytes(content)
    extract(settings())
    assert settings().out.read_bytes() == settings("whole.safetensors").out.read_bytes()


def test_sigterm_finishes_the_batch_in_hand(
    settings: Callable[..., ExtractSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(settings("whole.safetensors"))
    embed, calls = Teacher.embed, iter(range(1_000))

    def embed_and_ask(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        if next(calls) == 2 + 4:  # the fifth batch, after two runs of the trial image
            os.kill(os.getpid(), signal.SIGTERM)
        return embed(self, pixels)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as context:
        context.setattr(Teacher, "embed", embed_and_ask)
        with pytest.raises(SystemExit) as stopped:
            extract(settings())
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert extract(settings()).num_resumed == 5 * 4
    assert settings().out.read_bytes() == settings("whole.safetensors").out.read_bytes()


def test_a_run_that_was_stopped_at_its_report_card_goes_on(
    settings: Callable[..., ExtractSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("pipeline.extract.run.write_report_card", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(settings())
    content = settings().out.read_bytes()
    with pytest.raises(PipelineError, match="with other settings"):
        extract(settings(batch_size=2))
    assert settings().out.read_bytes() == content
    assert extract(settings()).num_resumed == 30
    assert settings().out.read_bytes() == content
    assert not partial_path(settings().out).exists()
    with pytest.raises(store.StoreError, match="exists"):
        extract(settings())


def test_an_image_that_is_another_one_now_is_noticed(
    settings: Callable[..., ExtractSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        stop_after(context, 3)
        with pytest.raises(KeyboardInterrupt):
            extract(settings())
    monkeypatch.setattr("pipeline.extract.embed.sample_key", lambda image: bytes(16))
    with pytest.raises(PipelineError, match=r"row 0 was another image when it was embedded \(sample key [0-9a-f]{12}…"):
        extract(settings())
    assert len(PartialFolder(partial_path(settings().out)).finished()) == 1


def test_parts_merge_into_the_whole(settings: Callable[..., ExtractSettings]) -> None:
    whole = extract(settings("whole.safetensors", per_class=7))
    parts = [extract(settings(f"{rows}.safetensors", per_class=7, rows=rows)) for rows in ((0, 13), (13, 30))]
    assert sum(part.num_images for part in parts) == whole.num_images == 21
    assert [part.manifest.sampling.rows for part in parts] == [(0, 13), (13, 30)]
    out = settings("merged.safetensors").out
    merged = store.merge_artifacts([part.path for part in parts], out).manifest.sampling
    expected = whole.manifest.sampling
    assert (merged.rows, merged.per_class, merged.short_classes) == (None, 7, expected.short_classes)
    assert merged.images_sha256 == expected.images_sha256
    with store.open_artifact(out) as joined, store.open_artifact(whole.path) as one:
        assert np.array_equal(joined["sample/key"], one["sample/key"])
        assert np.array_equal(joined["sample/embedding"], one["sample/embedding"])
        assert np.array_equal(joined["class/count"], one["class/count"])
        assert np.allclose(joined["class/mean"], one["class/mean"], rtol=1e-6, atol=1e-7)


def test_a_part_has_the_classes_of_its_rows(settings: Callable[..., ExtractSettings]) -> None:
    parts = [extract(settings(f"{rows}.safetensors", rows=rows)) for rows in ((0, 2), (2, 3), (10, 12))]
    assert [part.manifest.classes for part in parts] == [("ant", "bee"), ("cat",), ("bee", "cat")]
    merged = [
        store.merge_artifacts([parts[0].path, parts[index].path], settings(f"m{index}.h5").out) for index in (1, 2)
    ]
    assert [one.manifest.sampling.rows for one in merged] == [(0, 3), (0, 12)]


def test_accuracies_may_be_measured_on_another_split(
    settings: Callable[..., ExtractSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = extract(settings("plain.safetensors", views=2, view_size=16))
    with monkeypatch.context() as context:
        stop_after(context, 2 * 8 + 2)  # within the report's images
        with pytest.raises(KeyboardInterrupt):
            extract(settings(report_split="test", views=2, view_size=16))
    result = extract(settings(report_split="test", views=2, view_size=16))
    card = result.report_card
    assert (card.held_out_from, card.num_held_out, card.num_graded) == ("evaluation", 12, 30)
    assert result.num_resumed == 30
    assert plain.path.read_bytes() == result.path.read_bytes()
    assert not partial_path(result.path).exists()


def test_a_chunk_that_was_damaged_at_the_end_is_embedded_again(
    settings: Callable[..., ExtractSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(settings("whole.safetensors"))
    load = Embedder.load

    def damage(self: Embedder, partial: PartialFolder) -> Any:
        partial.finished()[1].write_bytes(b"")
        partial.finished()[2].unlink()
        return load(self, partial)

    monkeypatch.setattr(Embedder, "load", damage)
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


@pytest.mark.parametrize("size", ["2", "x"])
def test_several_processes_need_a_launcher(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    accelerate.PartialState._reset_state()
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(PipelineError, match=r"cannot find each other \(.+\)\. Start them with torchrun, or unset"):
        join_processes(torch.device("cpu"))
    accelerate.PartialState._reset_state()


def test_the_death_of_another_process_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensor: torch.Tensor) -> None:
        assert tensor.device.type == "cpu"  # on a GPU there may be no room, or none of this process's number
        raise RuntimeError("[gloo] Connection closed by peer\nmore")

    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    processes = Processes(0, 2, SimpleNamespace())
    with pytest.raises(PipelineError) as error:
        processes.wait()
    assert str(error.value) == (
        "another process of this extraction has stopped (its own message says why), so this one stops too. The same "
        "command goes on from what is finished. [[gloo] Connection closed by peer]"
    )


def test_what_is_agreed_on_is_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Processes(0, 1).agree([1]) == [1]
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda values: [[2] for _ in values])
    assert Processes(1, 2, SimpleNamespace()).agree([1]) == [2]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    state = SimpleNamespace(local_process_index=rank, process_index=rank, num_processes=2)
    monkeypatch.setattr(accelerate, "PartialState", lambda **options: state)
    if rank == 0:
        assert join_processes(torch.device("cuda"))[1] == torch.device("cuda:0")
        return
    with pytest.raises(PipelineError) as error:
        join_processes(torch.device("cuda"))
    assert str(error.value) == (
        "process 1 of this machine has no GPU of its own: PyTorch sees 1. Start fewer processes, or pass --device "
        "cuda:0."
    )


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
    folder = PartialFolder(partial_path(settings().out))
    folder.path.mkdir()
    with pytest.raises(PipelineError, match="does not see what the first one sees"):
        extract(settings())
    assert folder.path.exists()


LAUNCHED = """
import os, signal, sys
import pipeline.extract.embed
from pipeline.extract.teacher import Teacher

pipeline.extract.embed._CHUNK_IMAGES = 8
embed, calls = Teacher.embed, iter(range(1_000))


def embed_or_die(self, pixels):
    if os.environ.get("DIES") == os.environ["RANK"] and next(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return embed(self, pixels)


Teacher.embed = embed_or_die
import cli

sys.argv = ["clip-embed-kd", *sys.argv[1:]]
cli.main()
"""


@pytest.fixture
def launch(tiny_teacher: Path, saved_data: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `extract` in two processes."""
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)

    def run(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
        command += ["extract", "--teacher", str(tiny_teacher), "--dataset", str(saved_data), "--out", str(out)]
        command += ["--samples", "--batch-size", "4", "--device", "cpu", "--precision", "float32", "--json"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)

    return run


def test_two_processes_write_the_same_bytes(
    settings: Callable[..., ExtractSettings],
    launch: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    extract(settings("one.safetensors"))
    out = tmp_path / "two.safetensors"
    done = launch(out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_images"] == 30
    assert out.read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert not partial_path(out).exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_dies_stops_the_other_and_the_next_run_goes_on(
    settings: Callable[..., ExtractSettings],
    launch: Callable[..., subprocess.CompletedProcess[str]],
    rank: str,
) -> None:
    extract(settings("one.safetensors"))
    out = settings("two.safetensors").out
    start = time.monotonic()
    done = launch(out, DIES=rank)
    assert done.returncode != 0
    assert time.monotonic() - start < 60  # of which most is spent on imports
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert "cli.py" not in done.stderr, done.stderr  # the launcher shows a traceback of its own
    assert not out.exists()
    assert len(PartialFolder(partial_path(out)).finished()) >= 1
    assert extract(settings("two.safetensors")).num_resumed >= 8
    assert out.read_bytes() == settings("one.safetensors").out.read_bytes()
