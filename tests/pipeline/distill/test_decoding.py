import errno
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import Labelled
from pipeline.distill import decoding
from pipeline.distill.cache import cached_images
from pipeline.distill.decoding import Block, ReplayedViews, decode_blocks
from pipeline.distill.images import fit_to
from pipeline.errors import PipelineError
from pipeline.pixels import sample_key
from pipeline.views import render_view
from tests.conftest import make_images, make_split
from tests.pipeline.distill.examples import JUNK, labelled, make_rows, noise, png

reaches_processes = pytest.mark.skipif(sys.platform == "darwin", reason="what is patched reaches forked processes only")
VIEWS = ReplayedViews(count=3, seed=5, view_size=24)


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any work is worth a second process, and one row is a block."""
    monkeypatch.setattr(decoding, "_WORTH_SECONDS", 0.0)
    monkeypatch.setattr(decoding, "_num_cores", lambda: 2)
    monkeypatch.setattr(decoding, "_BLOCK_ROWS", 1)


def one_block(cells: list[Any], folder: Path, image_size: int = 8) -> Block:
    (block,) = decode_blocks(labelled(make_rows(cells, [0] * len(cells)), folder), image_size)
    return block


def test_every_row_is_decoded_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_BLOCK_ROWS", 4)  # the last block is shorter
    monkeypatch.setattr(decoding, "_READ_ROWS", 3)
    blocks = list(decode_blocks(labelled(make_split(10, 3), tmp_path / "data"), 8))
    assert [block.rows.tolist() for block in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [block.pixels.shape for block in blocks] == [(4, 1, 8, 8, 3), (4, 1, 8, 8, 3), (2, 1, 8, 8, 3)]
    images = make_images(10, 3)
    assert (
        np.concatenate([block.pixels for block in blocks])[:, 0] == np.stack([np.array(image) for image in images])
    ).all()
    assert np.concatenate([block.keys for block in blocks]).tobytes() == b"".join(map(sample_key, images))


def test_keys_are_of_the_original_whatever_the_students_size(tmp_path: Path) -> None:
    small, large = (one_block([noise(20, 30), noise(9, 9)], tmp_path / str(size), size) for size in (8, 24))
    assert large.pixels.shape == (2, 1, 24, 24, 3)
    assert (small.keys == large.keys).all()
    assert small.keys[0].tobytes() == sample_key(noise(20, 30))


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 51))
    found = one_block([png(grey), png(clear), png(half)], tmp_path / "data")
    assert (found.pixels[0, 0] == np.arange(64).reshape(8, 8, 1)).all()
    assert (found.pixels[1] == 255).all()  # on white
    assert (found.pixels[2] == (255, 204, 204)).all()
    assert found.keys[1].tobytes() == sample_key(Image.new("RGB", (8, 8), "white"))


def test_views_are_rendered_from_the_original_and_fitted(tmp_path: Path) -> None:
    image = noise(20, 30)
    (block,) = decode_blocks(labelled(make_rows([image], [0]), tmp_path / "data"), 16, VIEWS)
    views = [image, *(render_view(image, sample_key(image), view, seed=5, view_size=24) for view in (1, 2))]
    assert (block.pixels[0] == np.stack([np.asarray(fit_to(16)(view)) for view in views])).all()
    assert block.keys[0].tobytes() == sample_key(image)


def test_what_cannot_be_decoded_comes_as_an_error_beside_the_rest(tmp_path: Path) -> None:
    found = one_block([JUNK, png(noise(8, 8)), JUNK], tmp_path / "data")
    assert found.rows.tolist() == [1]
    assert found.keys.tobytes() == sample_key(noise(8, 8))
    assert (found.pixels[0, 0] == np.array(noise(8, 8))).all()
    assert [str(error).split(": ")[0] for error in found.bad] == [
        f"{tmp_path / 'data'}, split train, row 0",
        f"{tmp_path / 'data'}, split train, row 2",
    ]


def test_a_strip_that_would_take_gigabytes_is_a_bad_image(tmp_path: Path) -> None:
    found = one_block([png(noise(8, 8)), png(Image.new("L", (1, 65_000))), png(noise(9, 9))], tmp_path / "data", 32)
    assert found.rows.tolist() == [0, 2]
    assert found.keys.tobytes() == sample_key(noise(8, 8)) + sample_key(noise(9, 9))
    assert (found.pixels[1, 0] == np.asarray(fit_to(32)(noise(9, 9)))).all()
    assert [str(error) for error in found.bad] == [
        f"{tmp_path / 'data'}, split train, row 1: the image cannot be decoded (it has 1×65000 pixels, 66,560,000 with "
        "a shorter side of 32; at most 50,000,000 are taken). Mend or remove it, or pass --skip-bad to leave such "
        "images out and count them."
    ]


def test_a_block_of_large_students_has_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled(make_split(5, 0), tmp_path / "data")
    monkeypatch.setattr(decoding, "_BLOCK_BYTES", 2 * 3 * 12 * 12 * 3)
    assert [len(block.rows) for block in decode_blocks(data, 12, VIEWS)] == [2, 2, 1]
    monkeypatch.setattr(decoding, "_BLOCK_BYTES", 1)
    assert [len(block.rows) for block in decode_blocks(data, 12)] == [1] * 5


@pytest.mark.usefixtures("several")
def test_several_processes_give_the_same_and_draw_no_random_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = labelled(make_rows([png(noise(9, 8)), JUNK, *make_images(3, 0)], [0] * 5), tmp_path / "data")
    before = torch.get_rng_state()
    together = list(decode_blocks(data, 8, VIEWS))
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(decoding, "_num_cores", lambda: 1)
    for block, expected in zip(together, decode_blocks(data, 8, VIEWS), strict=True):
        assert block.rows.tolist() == expected.rows.tolist()
        assert (block.keys == expected.keys).all()
        assert (block.pixels == expected.pixels).all()
        assert list(map(str, block.bad)) == list(map(str, expected.bad))


@reaches_processes
@pytest.mark.usefixtures("several")
@pytest.mark.parametrize(("seconds", "own"), [(0.0, False), (3600.0, True)])
def test_processes_are_started_for_much_work_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, own: bool
) -> None:
    monkeypatch.setattr(decoding, "_WORTH_SECONDS", seconds)
    monkeypatch.setattr(decoding, "sample_key", lambda image: os.getpid().to_bytes(16, "little"))
    blocks = list(decode_blocks(labelled(make_split(4, 0), tmp_path / "data"), 8))
    found = [int.from_bytes(block.keys.tobytes(), "little") == os.getpid() for block in blocks]
    assert found == [True, own, own, own]


@reaches_processes
@pytest.mark.usefixtures("several")
def test_processes_end_with_their_parent_however_it_ends(tmp_path: Path) -> None:
    data = labelled(make_split(30, 0), tmp_path / "data")
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            blocks = decode_blocks(data, 256)  # larger than a pipe, so that they wait to hand over theirs
            next(blocks)
            next(blocks)
            os.write(writing, b"ready")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 5) == b"ready"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert select.select([reading], [], [], 30)[0]
    assert os.read(reading, 1) == b""  # nobody has the other end any more
    os.close(reading)


def test_a_process_without_parent_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    monkeypatch.setattr(multiprocessing, "parent_process", asked.set)
    decoding._end_with_parent(0)
    assert asked.wait(30)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(join=lambda: None))
    assert not ended.is_set()
    decoding._end_with_parent(0)
    assert ended.wait(30)


@reaches_processes
@pytest.mark.usefixtures("several")
def test_a_process_that_dies_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, test = labelled(make_split(3, 0), tmp_path / "data"), os.getpid()
    read = Labelled.read

    def die(self: Labelled, rows: Any) -> Any:
        if os.getpid() != test:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, rows)

    monkeypatch.setattr(Labelled, "read", die)
    with pytest.raises(PipelineError) as caught:
        list(decode_blocks(data, 8))
    assert str(caught.value) == (
        "a decoding process died, most likely for want of memory. Close other programs, and give the same command "
        "again."
    )


def test_a_process_that_ran_the_users_own_script_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(PipelineError) as caught, decoding._said():
        raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")
    assert str(caught.value).endswith(
        'again. In a script of your own, begin what it does with `if __name__ == "__main__":`.'
    )


@pytest.mark.usefixtures("several")
def test_processes_end_as_soon_as_nobody_wants_more(tmp_path: Path) -> None:
    blocks = decode_blocks(labelled(make_split(9, 0), tmp_path / "data"), 8)
    next(blocks)
    next(blocks)
    processes = multiprocessing.active_children()
    assert len(processes) == 2
    blocks.close()
    assert not any(process.is_alive() for process in processes)


def test_an_unforeseen_error_is_not_taken_for_a_dead_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_BLOCK_ROWS", 1)
    blocks = decode_blocks(labelled(make_split(3, 0), tmp_path / "data"), 8)

    def fail(self: Labelled, rows: Any) -> Any:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(Labelled, "read", fail)
    with pytest.raises(RuntimeError, match=r"^unforeseen$"):
        list(blocks)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "[Errno 24] Too many open files"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_fails_around_decoding_is_said_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    data = labelled(make_split(3, 0), tmp_path / "data")
    monkeypatch.setattr(decoding, "DataLoader", fail)
    with pytest.raises(PipelineError) as caught:
        cached_images(data, 8, skip_bad=True, cache=tmp_path / "cache")
    assert str(caught.value) == (
        f"images cannot be decoded just now ({reason}). Close other programs, and give the same command again."
    )


@reaches_processes
@pytest.mark.usefixtures("several")
def test_what_fails_in_a_decoding_process_is_said_without_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, test = labelled(make_split(3, 0), tmp_path / "data"), os.getpid()

    def fail(image: Image.Image) -> bytes:
        if os.getpid() != test:
            raise OSError(errno.EIO, "Input/output error")
        return sample_key(image)

    monkeypatch.setattr(decoding, "sample_key", fail)
    with pytest.raises(PipelineError) as caught:
        list(decode_blocks(data, 8))
    assert str(caught.value) == (
        "images cannot be decoded just now (OSError: [Errno 5] Input/output error). Close other programs, and give the "
        "same command again."
    )


def test_every_core_that_the_process_may_use_is_used_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3)), raising=False)
    assert decoding._num_cores() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(99)))
    assert decoding._num_cores() == 16
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert decoding._num_cores() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert decoding._num_cores() == 1
