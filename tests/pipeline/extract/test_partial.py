"""Finished chunks: kept whole, taken up again by the same settings only."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.extract.chunk_writer import ChunkWriter
from pipeline.extract.partial import Chunk, PartialFolder, chunk_dtype, partial_path

DTYPE = chunk_dtype(2, 3)
SETTINGS = {"seed": 0, "teacher": {"name": "t"}}


def make_chunk(length: int, seed: int = 0) -> Chunk:
    chunk = np.zeros(length, DTYPE)
    chunk["embedding"] = np.random.default_rng(seed).standard_normal((length, 2, 3))
    chunk["row"] = np.arange(length)
    return chunk


@pytest.fixture
def partial(tmp_path: Path) -> PartialFolder:
    folder = PartialFolder(partial_path(tmp_path / "a.safetensors"))
    assert folder.open(SETTINGS, overwrite=False) == 0
    return folder


def refusal(partial: PartialFolder, settings: dict[str, object]) -> str:
    with pytest.raises(PipelineError) as error:
        partial.open(settings, overwrite=False)
    return str(error.value)


def test_chunks_come_back_as_they_were(partial: PartialFolder) -> None:
    for index, length in ((0, 5), (7, 1), (3, 0)):
        partial.save(index, make_chunk(length, index))
    assert sorted(partial.finished()) == [0, 3, 7]
    for index, length in ((0, 5), (7, 1), (3, 0)):
        loaded = partial.read(partial.finished()[index], DTYPE)
        assert loaded is not None
        assert loaded.tobytes() == make_chunk(length, index).tobytes()


def test_the_same_settings_take_it_up(partial: PartialFolder) -> None:
    partial.save(0, make_chunk(2))
    assert partial.open(SETTINGS, overwrite=False) == 1
    assert partial.open(SETTINGS, overwrite=True) == 1


def test_other_settings_are_refused_with_the_fields_that_differ(partial: PartialFolder) -> None:
    partial.save(0, make_chunk(2))
    assert refusal(partial, {"seed": 1, "teacher": {"name": "u"}}) == (
        f"{partial.path}: an interrupted extraction with other settings (seed was 0, is 1; "
        'teacher.name was "t", is "u"). Give the same command to go on with it, or pass '
        "--overwrite to start anew."
    )
    assert len(partial.finished()) == 1
    assert partial.open({"seed": 1}, overwrite=True) == 0
    assert partial.finished() == {}


def test_another_version_is_refused(partial: PartialFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.extract.partial.PARTIAL_VERSION", 2)
    assert "(partial_version was 1, is 2)" in refusal(partial, SETTINGS)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_unreadable_settings_are_one_line(partial: PartialFolder, content: bytes) -> None:
    (partial.path / "settings.json").write_bytes(content)
    message = refusal(partial, SETTINGS)
    assert message.startswith(f"{partial.path}: its settings.json cannot be read (")
    assert message.endswith("). Remove the folder.")


@pytest.mark.parametrize("content", [None, b"[]", b"3"])
def test_a_folder_without_settings_is_not_ours(partial: PartialFolder, content: bytes | None) -> None:
    (partial.path / "settings.json").unlink()
    if content is not None:
        (partial.path / "settings.json").write_bytes(content)
    (partial.path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(PipelineError) as error:
            PartialFolder(partial.path).open(SETTINGS, overwrite=overwrite)
        assert str(error.value) == (
            f"{partial.path}: is in the way: no extraction made it. Move it, or choose another --out."
        )
    assert (partial.path / "thesis.txt").exists()


def test_who_was_stopped_before_the_settings_were_written_goes_on(tmp_path: Path) -> None:
    folder = PartialFolder(tmp_path / "a.partial")
    folder.path.mkdir()
    (folder.path / ".settings.json.tmp").write_bytes(b"{")
    assert folder.open(SETTINGS, overwrite=False) == 0
    folder.join(SETTINGS)


def test_two_extractions_do_not_share_a_folder(partial: PartialFolder) -> None:
    other = PartialFolder(partial.path)
    for settings in (SETTINGS, {"seed": 1}):
        with pytest.raises(PipelineError) as error:
            other.open(settings, overwrite=True)
        assert str(error.value) == (
            f"{partial.path}: another extraction is at work in it. Wait for it, or choose another --out."
        )
    assert not other.is_empty()
    partial.remove()
    assert other.open({"seed": 1}, overwrite=False) == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other type", "pickle"])
def test_a_damaged_chunk_is_removed(partial: PartialFolder, damage: str) -> None:
    partial.save(0, make_chunk(5))
    path = partial.finished()[0]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    elif damage == "other type":
        np.save(path, np.zeros(5), allow_pickle=False)
        content = bytearray(path.read_bytes())
    elif damage == "pickle":
        np.save(path, np.array([{}], object), allow_pickle=True)
        content = bytearray(path.read_bytes())
    path.write_bytes(content[: {"cut": 200, "empty": 0}.get(damage, len(content))])
    assert partial.read(path, DTYPE) is None
    assert partial.finished() == {}


def test_a_disk_that_is_full_says_how_to_go_on(partial: PartialFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(PipelineError) as error:
        partial.save(0, make_chunk(1))
    assert str(error.value) == (
        f"{partial.path}: cannot be written to (No space left on device). What is finished stays: make room, and give "
        "the same command again."
    )
    assert sorted(path.name for path in partial.path.iterdir()) == ["lock", "settings.json"]


def test_other_processes_must_see_the_same(partial: PartialFolder) -> None:
    partial.join(SETTINGS)
    with pytest.raises(PipelineError) as error:
        partial.join({"seed": 1, "teacher": {"name": "t"}})
    assert str(error.value) == (
        f"{partial.path}: this process does not see what the first one sees (seed was 0, is 1). Give all of them the "
        "same teacher, data and versions."
    )
    partial.remove()
    with pytest.raises(PipelineError, match="is not on this machine"):
        partial.join(SETTINGS)
    assert not partial.path.exists()


def test_it_goes_as_a_whole(partial: PartialFolder) -> None:
    assert partial.is_empty()
    partial.save(0, make_chunk(1))
    assert not partial.is_empty()
    partial.remove()
    assert not partial.path.exists()
    assert not partial.is_empty()


def test_a_chunk_that_was_begun_is_gone_on_with(partial: PartialFolder) -> None:
    partial.save(4, make_chunk(3), begun=2)
    assert (partial.finished(), partial.is_empty()) == ({}, False)
    ((index, (num_batches, path)),) = partial.begun().items()
    parts = partial.read_begun(num_batches, path, DTYPE)
    assert (index, [len(part) for part in parts]) == (4, [3, 0])
    assert np.concatenate(parts).tobytes() == make_chunk(3).tobytes()
    partial.save(4, make_chunk(5), begun=3)
    assert {index: number for index, (number, _) in partial.begun().items()} == {4: 3}
    partial.save(4, make_chunk(9))
    assert (list(partial.finished()), partial.begun()) == ([4], {})


def test_a_damaged_beginning_is_forgotten(partial: PartialFolder) -> None:
    partial.save(4, make_chunk(3), begun=2)
    ((num_batches, path),) = partial.begun().values()
    path.write_bytes(path.read_bytes()[:-1])
    assert partial.read_begun(num_batches, path, DTYPE) == []
    assert partial.begun() == {}


def write(partial: PartialFolder, num_chunks: int, error: type[BaseException] | None = None) -> None:
    """Write chunks of two batches; the last one is left behind its first batch where there is an error."""
    with ChunkWriter(partial) as writer:
        for index in range(num_chunks):
            with writer.chunk(index, []) as parts:
                parts.append(make_chunk(2, index))
                if error is not None and index == num_chunks - 1:
                    raise error
                parts.append(make_chunk(1, index))


def test_what_a_failure_leaves_of_a_chunk_is_saved(partial: PartialFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(partial, 2, KeyboardInterrupt)
    assert list(partial.finished()) == [0]
    ((index, (num_batches, path)),) = partial.begun().items()
    chunk = partial.read(path, DTYPE)
    assert chunk is not None
    assert (index, num_batches, chunk.tobytes()) == (1, 1, make_chunk(2, 1).tobytes())


def test_a_chunk_that_cannot_be_written_is_told(partial: PartialFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    for num_chunks in (1, 3):  # the last one at the end, another when the next one is ready
        with pytest.raises(PipelineError, match="No space left"):
            write(partial, num_chunks)
    with pytest.raises(KeyboardInterrupt):
        write(partial, 1, KeyboardInterrupt)
    assert partial.is_empty()
