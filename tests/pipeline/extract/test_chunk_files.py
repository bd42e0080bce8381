"""Finished chunks as one sequence: any number of them, few files open."""

import resource
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.extract.chunk_files import _OTHER_FILES, ChunkFiles
from pipeline.extract.partial import chunk_dtype


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    made = []
    for index in range(5):
        chunk = np.zeros(index, chunk_dtype(1, 2))
        chunk["label"] = index
        made.append(tmp_path / f"{index}.npy")
        np.save(made[-1], chunk, allow_pickle=False)
    return made


def test_they_are_a_sequence(paths: list[Path]) -> None:
    chunks = ChunkFiles(paths)
    assert [len(chunk) for chunk in chunks] == [0, 1, 2, 3, 4]
    assert chunks[3]["label"].tolist() == [3, 3, 3]
    assert [len(chunk) for chunk in chunks[1:3]] == [1, 2]
    assert chunks[3] is chunks[3]


def test_no_more_are_mapped_than_files_may_be_open(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    limit = (_OTHER_FILES + 2, _OTHER_FILES + 2)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limit)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: None)
    chunks = ChunkFiles(paths)
    for index in (0, 1, 2, 0, 4, 3):
        assert len(chunks[index]) == index
    assert list(chunks._mapped) == [4, 3]


@pytest.mark.parametrize("refused", [False, True])
def test_the_limit_is_raised_as_far_as_it_goes(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    asked = []

    def set_limit(kind: int, limits: tuple[int, int]) -> None:
        asked.append(limits)
        if refused:
            raise ValueError("not allowed")

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, _OTHER_FILES + 3))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    chunks = ChunkFiles(paths)
    assert asked == [(_OTHER_FILES + 3, _OTHER_FILES + 3)]
    assert chunks._most == (64 - _OTHER_FILES if refused else 3)
    assert [len(chunk) for chunk in chunks] == [0, 1, 2, 3, 4]


def test_a_file_that_cannot_be_read_any_more_is_one_line(paths: list[Path]) -> None:
    chunks = ChunkFiles(paths)
    paths[2].unlink()
    with pytest.raises(PipelineError) as error:
        chunks[2]
    assert str(error.value) == (f"{paths[2]}: cannot be read (No such file or directory). Give the same command again.")
