import os
from pathlib import Path

import pytest

from store import flush
from store.flush import FlushBehind


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush, "_FLUSH_BYTES", 10)


def test_many_bytes_are_flushed_and_few_are_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    with (tmp_path / "file").open("wb") as file:
        with FlushBehind(file.fileno()) as behind:
            behind.wrote(9)
        assert flushed == []
        with FlushBehind(file.fileno()) as behind:
            behind.wrote(9)
            behind.wrote(1)
        assert flushed == [file.fileno()]


def test_a_flush_that_failed_is_not_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(OSError, match="No space left"), FlushBehind(file.fileno()) as behind:
            behind.wrote(10)
        behind = FlushBehind(file.fileno())
        behind.wrote(10)
        behind._thread.shutdown()
        with pytest.raises(OSError, match="No space left"):
            behind.wrote(10)


def test_another_error_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError

    def write_and_fail(descriptor: int) -> None:
        with FlushBehind(descriptor) as behind:
            behind.wrote(10)
            raise ZeroDivisionError

    monkeypatch.setattr(os, "fsync", fail)
    with (tmp_path / "file").open("wb") as file, pytest.raises(ZeroDivisionError):
        write_and_fail(file.fileno())
