import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

import store
from store.atomic import replacing
from tests.store.examples import file_names


class _Interrupt(BaseException):
    pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "artifact.h5"


def write(path: Path, data: bytes = b"new") -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def refusal(path: Path, body: Callable[[Path], object] = Path.touch) -> str:
    with pytest.raises(store.ArtifactWriteError) as caught, replacing(path) as temporary:
        body(temporary)
    assert type(caught.value) is store.ArtifactWriteError
    assert caught.value.__cause__ is None
    return str(caught.value)


def temporary_of(path: Path) -> Path:
    with replacing(path) as temporary:
        temporary.touch()
    path.unlink()
    return temporary


def fail(error: BaseException) -> Callable[[Path], object]:
    def body(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    return body


@pytest.mark.parametrize("old", [None, b"old"])
def test_the_new_file_takes_the_place_of_the_old_one_when_the_body_ends(path: Path, old: bytes | None) -> None:
    if old is not None:
        path.write_bytes(old)
    with replacing(path) as temporary:
        assert temporary.parent == path.parent  # a rename across file systems is none
        assert temporary.suffix == path.suffix
        temporary.write_bytes(b"new")
        assert (path.read_bytes() if path.exists() else None) == old
    assert path.read_bytes() == b"new"
    assert file_names(path.parent) == [path.name]


def test_the_folder_is_on_disk_before_the_writer_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    sync = os.fsync

    def watched(handle: int) -> None:
        assert path.read_bytes() == b"new"  # renamed already
        synced.append(os.path.samestat(os.fstat(handle), path.parent.stat()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write(path)
    assert synced == [True]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), _Interrupt()], ids=repr)
def test_a_body_that_fails_keeps_the_old_file(path: Path, error: BaseException) -> None:
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, replacing(path) as temporary:
        fail(error)(temporary)
    assert caught.value is error
    assert path.read_bytes() == b"old"
    assert file_names(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("one line\nanother"), "one line"),
        (RuntimeError("unable to flush\nfile's data"), "unable to flush"),
        (RuntimeError(), "RuntimeError"),
        (OSError(), "OSError"),
    ],
    ids=repr,
)
def test_an_error_of_the_disk_is_reported_in_one_line(path: Path, error: BaseException, reason: str) -> None:
    path.write_bytes(b"old")
    assert refusal(path, fail(error)) == f"{path}: cannot be written ({reason})."
    assert path.read_bytes() == b"old"
    assert file_names(path.parent) == [path.name]


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(
    path: Path, old: bytes | None, link: Callable[[Path, Path], None]
) -> None:
    victim = path.with_name("victim")
    victim.write_bytes(b"kept")
    link(temporary_of(path), victim)
    if old is not None:
        path.write_bytes(old)
    write(path)
    assert (victim.read_bytes(), path.read_bytes(), path.is_symlink()) == (b"kept", b"new", False)
    assert file_names(path.parent) == [path.name, victim.name]


def test_a_link_to_nowhere_and_a_pipe_are_replaced(path: Path) -> None:
    temporary_of(path).symlink_to("nowhere")
    write(path)
    os.mkfifo(temporary_of(path))
    write(path)
    assert path.read_bytes() == b"new"
    assert file_names(path.parent) == [path.name]


def test_a_link_that_is_made_in_the_last_moment_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, open_file = path.with_name("victim"), os.open
    victim.write_bytes(b"kept")

    def late(name: Path, *arguments: int) -> int:
        name.symlink_to(victim)
        return open_file(name, *arguments)

    monkeypatch.setattr(os, "open", late)
    assert refusal(path) == f"{path}: cannot be written ({os.strerror(errno.ELOOP)})."
    assert victim.read_bytes() == b"kept"


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "artifact.h5"
    assert refusal(path) == f"{path}: cannot be written (No such file or directory)."


def test_a_folder_in_the_place_of_the_file_is_reported(path: Path) -> None:
    path.mkdir()
    assert refusal(path) == f"{path}: cannot be written (Is a directory)."
    assert file_names(path.parent) == [path.name]


def test_one_writer_at_a_time(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(b"first")
        assert refusal(path) == f"{path}: another process is writing it."
    assert path.read_bytes() == b"first"
    write(path, b"second")
    assert path.read_bytes() == b"second"


@pytest.mark.parametrize("newcomer", [False, True])
def test_a_lock_that_came_too_late_is_no_lock(path: Path, newcomer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    take_lock = fcntl.flock

    def late(file: BinaryIO, operation: int) -> None:
        (temporary,) = path.parent.iterdir()
        temporary.unlink()
        if newcomer:
            temporary.write_bytes(b"of another writer")
        take_lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert refusal(path) == f"{path}: another process is writing it."


def _failing_lock(number: int) -> Callable[..., None]:
    def lock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return lock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL], ids=os.strerror)
def test_a_file_system_without_locks_is_written_to(path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", _failing_lock(number))
    write(path)
    assert path.read_bytes() == b"new"
    assert file_names(path.parent) == [path.name]


def test_another_error_of_locking_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", _failing_lock(errno.EIO))
    assert refusal(path) == f"{path}: cannot be written ({os.strerror(errno.EIO)})."
