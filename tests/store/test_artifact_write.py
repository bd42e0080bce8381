import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import store
from tests.store.examples import (
    assert_same_bits,
    class_tensors,
    file_names,
    make_manifest,
    read_all,
    write_refusal,
)

ROWS = class_tensors()["class/mean"]
Stream = dict[str, NDArray[Any] | store.RowBlocks]


def streamed(blocks: Iterable[NDArray[Any]]) -> Stream:
    return class_tensors() | {"class/mean": store.RowBlocks((3, 4), "float32", blocks)}


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((ROWS[:2],), "class/mean: 2 rows were given, 3 were announced."),
        ((), "class/mean: 0 rows were given, 3 were announced."),
        ((ROWS, ROWS[:1]), "class/mean: 4 rows were given, 3 were announced."),
        (
            (ROWS[:2], ROWS[2:].astype(np.float64)),
            "class/mean: a block is float64 [1, 4], expected float32 rows of [4].",
        ),
        ((ROWS[:2], ROWS[2]), "class/mean: a block is float32 [4], expected float32 rows of [4]."),
        ((ROWS[:, :3],), "class/mean: a block is float32 [3, 3], expected float32 rows of [4]."),
    ],
)
def test_blocks_that_are_not_as_announced_leave_nothing_behind(
    path: Path, blocks: tuple[NDArray[Any], ...], message: str
) -> None:
    assert write_refusal(path, streamed(blocks)) == message
    assert file_names(path.parent) == []


def test_too_many_rows_in_one_block_leave_nothing_behind(path: Path) -> None:
    message = write_refusal(path, streamed([ROWS[:2], ROWS[:2]]))
    assert message == "class/mean: 4 rows were given, 3 were announced."
    assert file_names(path.parent) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_leave_nothing_behind(path: Path, value: float) -> None:
    rows = ROWS.copy()
    rows[2, 3] = value
    for tensors in (streamed([rows[:1], rows[1:]]), class_tensors() | {"class/mean": rows}):
        assert write_refusal(path, tensors, store.ArtifactFormatError) == (
            "artifact: class/mean has values that are not finite (NaN or infinity)."
        )
        assert file_names(path.parent) == []


def test_tensors_that_are_not_of_the_format_are_refused_before_a_row_is_read(path: Path) -> None:
    started = []

    def watched() -> Iterator[NDArray[Any]]:
        started.append(True)
        yield ROWS

    blocks = store.RowBlocks((3, 5), "float32", watched())
    message = write_refusal(path, class_tensors() | {"class/mean": blocks}, store.ArtifactFormatError)
    assert message == (
        f"{path.name}: class/mean has shape [3, 5], expected [3, 4] (C × D: 3 classes, embed_dim 4). "
        "The file is damaged: extract it again."
    )
    assert started == []
    assert file_names(path.parent) == []


def test_an_existing_file_is_kept_unless_overwritten(path: Path) -> None:
    path.write_bytes(b"old")
    assert write_refusal(path, class_tensors()) == (f"{path}: exists. Choose another --out, or pass --overwrite.")
    assert path.read_bytes() == b"old"
    store.write_artifact(path, make_manifest(), class_tensors(), overwrite=True)
    assert_same_bits(read_all(path), class_tensors())
    assert file_names(path.parent) == [path.name]


class _Interrupt(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, _Interrupt])
def test_a_write_that_fails_keeps_the_old_file(path: Path, error: type[BaseException]) -> None:
    def interrupted() -> Iterator[NDArray[Any]]:
        yield ROWS[:1]
        raise error

    path.write_bytes(b"old")
    with pytest.raises(error):
        store.write_artifact(path, make_manifest(), streamed(interrupted()), overwrite=True)
    assert path.read_bytes() == b"old"
    assert file_names(path.parent) == [path.name]


def test_the_old_file_is_there_until_the_new_one_is_whole(path: Path) -> None:
    def look() -> Iterator[NDArray[Any]]:
        assert path.read_bytes() == b"old"
        yield ROWS

    path.write_bytes(b"old")
    store.write_artifact(path, make_manifest(), streamed(look()), overwrite=True)
    assert_same_bits(read_all(path), class_tensors())


def test_one_writer_at_a_time(path: Path) -> None:
    messages = []

    def write_again() -> Iterator[NDArray[Any]]:
        messages.append(write_refusal(path, class_tensors()))
        yield ROWS

    store.write_artifact(path, make_manifest(), streamed(write_again()))
    assert messages == [f"{path}: another process is writing it."]
    assert_same_bits(read_all(path), class_tensors())
    assert file_names(path.parent) == [path.name]


def test_what_a_killed_writer_left_behind_is_written_over(path: Path) -> None:
    left = []

    def look() -> Iterator[NDArray[Any]]:
        left.extend(file_names(path.parent))
        yield ROWS

    store.write_artifact(path, make_manifest(), streamed(look()))
    whole = path.read_bytes()
    path.unlink()
    assert len(left) == 1
    (path.parent / left[0]).write_bytes(b"x" * 100_000)
    store.write_artifact(path, make_manifest(), class_tensors())
    assert path.read_bytes() == whole
    assert file_names(path.parent) == [path.name]


def test_a_missing_folder_is_reported(path: Path) -> None:
    path.parent.rmdir()
    assert write_refusal(path, class_tensors()) == (f"{path}: the folder {path.parent} does not exist. Make it first.")


def test_a_folder_in_the_place_of_the_file_is_reported(path: Path) -> None:
    path.mkdir()
    assert write_refusal(path, class_tensors(), overwrite=True) == f"{path}: is a folder. Choose another --out."
    assert file_names(path.parent) == [path.name]


FULL_DISK = """
import resource, sys
import numpy as np
import store
from tests.store.examples import class_tensors, make_manifest, samples_of
path, gzip, limit = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
noise = np.random.default_rng(0).random((5, 2, 10_000)).astype(np.float16)
tensors = class_tensors(3, 10_000) | samples_of(noise)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    store.write_artifact(path, make_manifest(3, 10_000), tensors, overwrite=True, gzip=gzip)
except store.ArtifactWriteError as error:
    print(error)
"""


@pytest.mark.parametrize("limit_bytes", [0, 1000, 100_000, 300_000])
def test_a_full_disk_keeps_the_old_file(storage: tuple[Path, dict[str, bool]], limit_bytes: int) -> None:
    path, how = storage
    path.write_bytes(b"old")
    command = [sys.executable, "-c", FULL_DISK, str(path), str(how["gzip"]), str(limit_bytes)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert path.read_bytes() == b"old"
    assert file_names(path.parent) == [path.name]
    # HDF5 used to complain at length, and to crash at the end.
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{path}: cannot be written (File too large).\n"


@pytest.fixture
def _handlers_of_a_terminal() -> Iterator[None]:
    """Let Ctrl-C be an exception; in the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_handlers_of_a_terminal")
def test_ctrl_c_ends_the_writing(path: Path) -> None:
    def interrupted() -> Iterator[NDArray[Any]]:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            yield ROWS[:0]

    with pytest.raises(KeyboardInterrupt):
        store.write_artifact(path, make_manifest(), streamed(interrupted()))
    assert file_names(path.parent) == []


def test_an_error_of_the_source_is_not_one_of_writing(path: Path) -> None:
    def missing() -> Iterator[NDArray[Any]]:
        yield ROWS[:1]
        raise FileNotFoundError(2, "No such file or directory", "image.png")

    with pytest.raises(FileNotFoundError):
        store.write_artifact(path, make_manifest(), streamed(missing()))


def test_a_dtype_that_the_format_does_not_have_is_refused(path: Path) -> None:
    write_refusal(path, class_tensors() | {"future/x": np.zeros(3)}, store.ArtifactFormatError)


def test_writing_streams_in_constant_memory(path: Path) -> None:
    num_rows, embed_dim, block_rows = 4096, 1024, 64
    block = np.ones((block_rows, 1, embed_dim), np.float32)
    keys = np.zeros((num_rows, 16), np.uint8)
    keys[:, :2] = np.arange(num_rows, dtype=">u2").view(np.uint8).reshape(-1, 2)
    tensors: dict[str, Any] = class_tensors(1, embed_dim) | {
        "sample/key": keys,
        "sample/label": np.zeros(num_rows, np.int32),
        "sample/embedding": store.RowBlocks(
            (num_rows, 1, embed_dim), "float32", (block for _ in range(num_rows // block_rows))
        ),
    }
    tracemalloc.start()
    try:
        store.write_artifact(path, make_manifest(1, embed_dim, 1), tensors)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert os.path.getsize(path) > 16 * 1024 * 1024  # noqa: PTH202
    assert peak_bytes < 4 * 1024 * 1024


def test_a_manifest_that_no_reader_would_take_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.writing.MAX_MANIFEST_BYTES", 100)
    assert write_refusal(path, class_tensors()) == f"{path}: the manifest is larger than 100 bytes."
    assert file_names(path.parent) == []


def test_progress_is_told_of_each_block_when_the_next_one_is_asked_for(path: Path) -> None:
    reported: list[int] = []

    def blocks() -> Iterator[NDArray[Any]]:
        for row in range(3):
            assert reported == [16] * row
            yield ROWS[row : row + 1]

    rows = store.RowBlocks((3, 4), "float32", blocks())
    reporting = rows.reporting(reported.append)
    assert (reporting.shape, reporting.dtype) == (rows.shape, rows.dtype)
    store.write_artifact(path, make_manifest(), class_tensors() | {"class/mean": reporting})
    assert reported == [16, 16, 16]
    assert_same_bits(read_all(path), class_tensors())


def test_an_endless_source_is_stopped(path: Path) -> None:
    assert write_refusal(path, streamed(itertools.repeat(ROWS))) == ("class/mean: 6 rows were given, 3 were announced.")
    assert file_names(path.parent) == []


def test_a_destination_is_checked_before_there_is_anything_to_write(path: Path) -> None:
    store.check_destination(str(path), overwrite=False)
    path.touch()
    store.check_destination(path, overwrite=True)
    assert destination_refusal(path) == f"{path}: exists. Choose another --out, or pass --overwrite."
    path.unlink()
    path.mkdir()
    assert destination_refusal(path, overwrite=True) == f"{path}: is a folder. Choose another --out."


def test_a_safetensors_file_is_never_compressed(tmp_path: Path) -> None:
    path = tmp_path / "artifact.safetensors"
    expected = f"{path}: .safetensors files are never compressed. Choose a name that ends in .h5."
    assert destination_refusal(path, gzip=True) == expected
    with pytest.raises(store.ArtifactWriteError, match=f"^{re.escape(expected)}$"):
        store.write_artifact(path, make_manifest(), class_tensors(), gzip=True)
    for suffix in (".h5", ".hdf5"):
        store.check_destination(path.with_suffix(suffix), overwrite=False, gzip=True)


def test_a_name_that_the_file_system_refuses_is_reported(path: Path) -> None:
    path = path.with_name("x" * 300 + path.suffix)
    expected = f"{path}: cannot be written (File name too long)."
    assert destination_refusal(path) == expected
    assert write_refusal(path, class_tensors()) == expected


def test_a_closed_folder_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", deny)
    assert destination_refusal(path) == f"{path}: cannot be written (Permission denied)."


def destination_refusal(path: Path, *, overwrite: bool = False, gzip: bool = False) -> str:
    with pytest.raises(store.ArtifactWriteError) as caught:
        store.check_destination(path, overwrite=overwrite, gzip=gzip)
    return str(caught.value)


def test_a_folder_that_is_not_writable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode & os.W_OK))
    with pytest.raises(store.ArtifactWriteError) as error:
        store.check_destination(tmp_path / "a.h5", overwrite=False)
    assert str(error.value) == f"{tmp_path / 'a.h5'}: the folder {tmp_path} is not writable. Choose another --out."
