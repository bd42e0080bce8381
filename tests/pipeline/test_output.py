"""Output paths: checked before hours are spent, written as a whole."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.output import check_output, write_atomically, write_output


def refusal(path: Path, needed_bytes: int = 0, *, replaceable: bool = False) -> str:
    with pytest.raises(PipelineError) as error:
        check_output(path, needed_bytes, replaceable=replaceable)
    return str(error.value)


def disk(free: int) -> Callable[[Path], object]:
    usage = shutil.disk_usage(".")
    return lambda folder: usage._replace(free=free)


def test_a_new_output_is_fine_and_is_not_made(tmp_path: Path) -> None:
    check_output(tmp_path / "new", 1, replaceable=False)
    assert list(tmp_path.iterdir()) == []


def test_a_name_without_folder_stands_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output(Path("new"), 1, replaceable=False)


def test_an_existing_output_is_refused_unless_replaceable(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.touch()
    assert refusal(path) == f"{path}: exists. Choose another --out, or pass --overwrite."
    check_output(path, 0, replaceable=True)


def test_the_folder_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "none" / "new"
    assert refusal(path) == f"{path}: the folder {tmp_path / 'none'} does not exist. Make it first."


def test_the_folder_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "new"
    assert refusal(path) == f"{path}: the folder {tmp_path / 'file'} does not exist. Make it first."


def test_the_folder_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Mode bits would not do: root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode & os.W_OK))
    path = tmp_path / "new"
    assert refusal(path) == f"{path}: the folder {tmp_path} is not writable. Choose another --out."


def test_the_disk_must_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", disk(free=1_234_567))
    path = tmp_path / "new"
    check_output(path, 1_234_567, replaceable=False)
    assert refusal(path, 1_234_568_000) == (
        f"{path}: about 1.2 GB are needed, 1.2 MB are free. Make room or choose another --out."
    )


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    write_atomically(path, b"old")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    with pytest.raises(PipelineError) as refused:
        write_output(path, b"new")
    assert str(refused.value) == f"{path}: cannot be written (No space left on device)."
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
