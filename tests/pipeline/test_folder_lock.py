"""One process at a time in a folder; another flock of this process stands for another process."""

import errno
import fcntl
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.folder_lock import LOCK_NAME, FolderLock


def test_a_lock_is_taken_once_and_given_back(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path, "busy"), FolderLock(tmp_path, "busy here")
    first.take()
    first.take()
    with pytest.raises(PipelineError, match=r"^busy here$"):
        second.take()
    first.release()
    first.release()
    second.take()
    second.release()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]


def test_who_waits_says_so_and_gets_the_lock_when_it_is_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "clip_embed_kd")
    first, second = FolderLock(tmp_path, "busy"), FolderLock(tmp_path, "busy: waiting")
    first.wait()
    assert caplog.messages == []
    thread = threading.Thread(target=second.wait)
    thread.start()
    while "busy: waiting" not in caplog.messages:
        time.sleep(0.001)
    assert thread.is_alive()
    first.release()
    thread.join()
    with pytest.raises(PipelineError):
        first.take()
    second.release()


def test_a_disk_without_locks_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for lock in (FolderLock(tmp_path, "busy"), FolderLock(tmp_path, "busy")):
        lock.take()
        lock.wait()
        assert not lock.held
        lock.release()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("chapter one")
    (tmp_path / "lock").symlink_to("thesis")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        FolderLock(tmp_path, "busy").take()
    assert (tmp_path / "thesis").read_text() == "chapter one"


def test_a_file_that_is_removed_before_it_is_locked_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, removed = fcntl.flock, list[str]()

    def late(file: Any, operation: int) -> None:
        if not removed:  # whoever had the lock ends just now, and takes the file away
            removed.append(LOCK_NAME)
            (tmp_path / LOCK_NAME).unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    first = FolderLock(tmp_path, "busy")
    first.take()
    assert first.held
    with pytest.raises(PipelineError, match=r"^busy here$"):
        FolderLock(tmp_path, "busy here").take()


def test_who_waits_for_a_file_that_is_removed_meanwhile_locks_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, flock = FolderLock(tmp_path, "busy"), FolderLock(tmp_path, "busy"), fcntl.flock
    first.take()

    def late(file: Any, operation: int) -> None:
        if operation == fcntl.LOCK_EX and first.held:  # whoever has the lock takes the file away, and ends
            assert not second.held
            (tmp_path / LOCK_NAME).unlink()
            first.release()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    second.wait()
    assert second.held
    with pytest.raises(PipelineError, match=r"^busy here$"):
        FolderLock(tmp_path, "busy here").take()


def test_who_gives_up_waiting_has_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(file: Any, operation: int) -> None:
        raise BlockingIOError if operation & fcntl.LOCK_NB else KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", interrupt)
    lock = FolderLock(tmp_path, "busy")
    with pytest.raises(KeyboardInterrupt):
        lock.wait()
    assert not lock.held
