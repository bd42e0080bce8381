import errno
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import h5py
import numpy as np
import pytest

from store.patient_file import PatientFile


class _FullDisk(FileIO):
    """Takes some bytes, at most three at a time."""

    room_bytes = 8

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        if not self.room_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = super().write(data[: min(3, self.room_bytes)])
        self.room_bytes -= count
        return count

    def truncate(self, size: int | None = None) -> int:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[_FullDisk]:
    with _FullDisk(tmp_path / "file", "w+") as file:
        yield file


def test_all_bytes_are_written_however_few_the_file_takes_at_a_time(disk: _FullDisk) -> None:
    file = PatientFile(disk)
    assert file.write(b"01234") == 5
    file.seek(1)
    assert file.write(memoryview(b"abc")) == 3
    file.check()
    file.seek(0)
    assert file.read() == b"0abc4"


def test_the_first_error_is_raised_by_the_check_alone(disk: _FullDisk) -> None:
    file = PatientFile(disk)
    assert file.write(bytearray(20)) == 20
    assert file.truncate(10**6) == 10**6
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device"):
            file.check()
    assert os.fstat(disk.fileno()).st_size == 8


def test_hdf5_closes_a_file_on_a_full_disk(disk: _FullDisk) -> None:
    target = PatientFile(disk)
    with h5py.File(target, "w") as file:
        file.create_dataset("a/b", data=np.zeros(1000))
    assert not file
    with pytest.raises(OSError, match="No space left on device"):
        target.check()
