import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import DataSettings, Labelled, load_labelled
from pipeline.distill import cache_entry
from pipeline.distill.cache import cached_images
from pipeline.distill.cache_entry import CacheEntry, DamagedEntryError
from pipeline.distill.decoding import Block
from pipeline.distill.images import DecodedImages
from pipeline.errors import PipelineError
from pipeline.folder_lock import FolderLock
from tests.conftest import make_images
from tests.pipeline.distill.examples import file_names

CONTENT = {"data_set": "numbers", "views": None}
ENTRY = hashlib.sha256(b'{"data_set": "numbers", "views": null}').hexdigest()[:32]
WHOLE = ["entry.json", "keys", "lock", "pixels", "rows"]


def block(*rows: int) -> Block:
    keys = np.repeat(np.array(rows, np.uint8), 16).reshape(-1, 16)
    pixels = np.repeat(np.array(rows, np.uint8), 2 * 12).reshape(-1, 2, 2, 2, 3)
    return Block(np.array(rows, np.int64), keys, pixels, ())


def entry(cache: Path, num_rows: int = 4) -> CacheEntry:
    return CacheEntry(cache, CONTENT, num_rows, (2, 2, 2, 3))


def write(cache: Path, *blocks: Block) -> CacheEntry:
    made = entry(cache)
    with made.writing():
        made.make_room()
        made.write(blocks or (block(0, 1), block(), block(3)))
        made.read_back()
    return made


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = write(tmp_path / "cache")
    assert made.folder == tmp_path / "cache" / ENTRY
    assert file_names(made.folder) == WHOLE
    stored = entry(tmp_path / "cache").read()
    assert stored is not None
    assert stored.rows.tolist() == [0, 1, 3]
    assert stored.keys[:, 0].tolist() == [0, 1, 3]
    assert (stored.keys == stored.keys[:, :1]).all()
    assert stored.pixels.shape == (3, 2, 2, 2, 3)
    assert (stored.pixels == np.array([0, 1, 3]).reshape(3, 1, 1, 1, 1)).all()


def test_the_index_can_be_read_by_people(tmp_path: Path) -> None:
    made = write(tmp_path)
    document = json.loads((made.folder / "entry.json").read_text("utf-8"))
    files = {name: hashlib.sha256((made.folder / name).read_bytes()).hexdigest() for name in ("pixels", "keys", "rows")}
    assert document == {"content": CONTENT, "num_images": 3, "sha256": files}


def test_what_is_not_there_is_not_read(tmp_path: Path) -> None:
    assert entry(tmp_path / "none").read() is None
    (tmp_path / "file").touch()
    assert entry(tmp_path / "file").read() is None


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def change_index(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")


def replace_rows(folder: Path, *rows: int) -> None:
    content = np.array(rows, "<i8").tobytes()
    (folder / "rows").write_bytes(content)
    digests = json.loads((folder / "entry.json").read_text("utf-8"))["sha256"]
    change_index(folder / "entry.json", sha256={**digests, "rows": hashlib.sha256(content).hexdigest()})


DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: cut(folder / "pixels"), "pixels has 71 bytes, expected 72"),
    (lambda folder: flip(folder / "pixels"), "pixels has another SHA-256 than when it was written"),
    (lambda folder: flip(folder / "keys"), "keys has another SHA-256 than when it was written"),
    (lambda folder: flip(folder / "rows"), "rows has another SHA-256 than when it was written"),
    (lambda folder: (folder / "keys").unlink(), "keys cannot be read: No such file or directory"),
    (lambda folder: cut(folder / "entry.json"), "entry.json is not what was written"),
    (lambda folder: (folder / "entry.json").write_bytes(b"[" * 100_000), "entry.json is not what was written"),
    (lambda folder: change_index(folder / "entry.json", more=1), "entry.json is not what was written"),
    (lambda folder: change_index(folder / "entry.json", num_images=0), "entry.json is not what was written"),
    (lambda folder: change_index(folder / "entry.json", num_images="3"), "entry.json is not what was written"),
    (lambda folder: change_index(folder / "entry.json", num_images=5), "entry.json describes other images"),
    (lambda folder: change_index(folder / "entry.json", content={}), "entry.json describes other images"),
    (lambda folder: change_index(folder / "entry.json", sha256={}), "entry.json describes other images"),
    (lambda folder: change_index(folder / "entry.json", num_images=2), "rows has 24 bytes, expected 16"),
    (lambda folder: replace_rows(folder, 0, 1, 4), "rows are not rows of this split"),
    (lambda folder: replace_rows(folder, -1, 1, 3), "rows are not rows of this split"),
    (lambda folder: replace_rows(folder, 0, 0, 3), "rows are not rows of this split"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_damage_is_found(damage: Callable[[Path], Any], reason: str, tmp_path: Path) -> None:
    damage(write(tmp_path).folder)
    with pytest.raises(DamagedEntryError) as caught:
        entry(tmp_path).read()
    assert str(caught.value) == reason
    again = write(tmp_path).read()
    assert again is not None
    assert again.rows.tolist() == [0, 1, 3]


def test_an_index_that_cannot_be_read_is_damage(tmp_path: Path) -> None:
    made = write(tmp_path)
    (made.folder / "entry.json").unlink()
    (made.folder / "entry.json").mkdir()
    with pytest.raises(DamagedEntryError, match=r"^entry\.json cannot be read: Is a directory$"):
        made.read()


def data_of(saved_data: Path) -> Labelled:
    return load_labelled(DataSettings(dataset=str(saved_data)))


def get(saved_data: Path, cache: Path) -> DecodedImages:
    return cached_images(data_of(saved_data), 8, skip_bad=False, cache=cache)


def refusal(saved_data: Path, cache: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        get(saved_data, cache)
    return str(caught.value)


def test_a_damaged_entry_is_made_anew_and_others_keep_what_they_mapped(
    saved_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "clip_embed_kd")
    first = get(saved_data, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "keys").unlink()
    caplog.clear()
    second = get(saved_data, tmp_path)
    assert caplog.messages[0] == f"{folder}: is damaged (keys cannot be read: No such file or directory): made anew."
    assert caplog.messages[1].startswith("Images of split train: decoded in ")
    shutil.rmtree(tmp_path)
    for found in (first, second):
        assert (found.pixels[:, 0] == np.stack([np.array(image) for image in make_images(30, 0)])).all()


def test_much_is_checked_under_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[Any, ...]] = []

    class Bar:
        def __init__(self, *arguments: Any) -> None:
            shown.append(arguments)

        def __enter__(self) -> None:
            pass

        def __exit__(self, *arguments: Any) -> None:
            pass

        def advance(self, count: int) -> None:
            shown.append((count,))

    made = write(tmp_path)
    monkeypatch.setattr(cache_entry, "ProgressBar", Bar)
    monkeypatch.setattr(cache_entry, "_BYTES_WITHOUT_BAR", 50)
    monkeypatch.setattr(cache_entry, "_HASHED_BYTES", 36)
    assert made.read() is not None
    assert shown == [("checking the image cache", 2, "MB"), (1,), (1,)]


# Killed, full, forbidden


@pytest.mark.parametrize("name", ["pixels", "keys", "rows", "entry.json"])
def test_a_killed_run_leaves_nothing_that_the_next_one_trips_over(
    name: str, saved_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, replace = data_of(saved_data), Path.replace

    def die(self: Path, target: Path) -> Path:
        if target.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(Path, "replace", die)
        try:
            cached_images(data, 8, skip_bad=False, cache=tmp_path)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    assert any(re.fullmatch(rf"{name}\..+\.{child}\.tmp", left) for left in file_names(folder))
    assert (get(saved_data, tmp_path).pixels[:, 0] == np.stack([np.array(image) for image in make_images(30, 0)])).all()
    assert file_names(folder) == WHOLE


def test_what_killed_runs_left_of_other_images_is_removed(tmp_path: Path) -> None:
    made = write(tmp_path)
    left, at_work, foreign = (tmp_path / name for name in ("0" * 32, "1" * 32, "my folder"))
    for folder in (left, at_work, foreign):
        folder.mkdir()
        (folder / "pixels.123.tmp").touch()
    (left / "pixels").touch()
    (tmp_path / ("2" * 32)).touch()
    lock = FolderLock(at_work, "busy")
    lock.take()
    CacheEntry(tmp_path, {}, 4, (2, 2, 2, 3)).folder.mkdir()
    with CacheEntry(tmp_path, {}, 4, (2, 2, 2, 3)).writing():
        pass
    lock.release()
    assert file_names(left) == ["lock"]
    assert file_names(at_work) == ["lock", "pixels.123.tmp"]
    assert file_names(foreign) == ["pixels.123.tmp"]
    assert made.read() is not None


def test_on_a_disk_without_locks_the_unfinished_files_of_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    elsewhere = tmp_path / ("1" * 32)
    for folder in (tmp_path / ENTRY, elsewhere):
        folder.mkdir()
        (folder / "pixels.123.tmp").touch()
    assert write(tmp_path).read() is not None
    assert file_names(tmp_path / ENTRY) == sorted([*WHOLE, "pixels.123.tmp"])
    assert "pixels.123.tmp" in file_names(elsewhere)


def test_hosts_that_share_a_disk_write_files_of_different_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, names = Path.replace, list[str]()

    def watch(self: Path, target: Path) -> Path:
        names.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    for host in ("alpha", "b/[e]*ta.example"):
        monkeypatch.setattr(platform, "node", lambda host=host: host)
        assert write(tmp_path).read() is not None
    process = os.getpid()
    assert [name for name in names if name.startswith("keys")] == [
        f"keys.alpha.{process}.tmp",
        f"keys.b--e--ta-example.{process}.tmp",
    ]


def test_an_entry_that_is_finished_at_the_last_moment_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write(tmp_path)
    take, index = FolderLock.take, (made.folder / "entry.json").read_bytes()
    (made.folder / "entry.json").unlink()

    def late(self: FolderLock) -> None:
        take(self)
        if self._folder == made.folder:
            (made.folder / "entry.json").write_bytes(index)

    monkeypatch.setattr(FolderLock, "take", late)
    with CacheEntry(tmp_path, {}, 4, (2, 2, 2, 3)).writing():
        pass
    assert file_names(made.folder) == WHOLE


def test_a_full_disk_is_said_before_anything_is_decoded(
    saved_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=6_479))
    monkeypatch.setattr(Labelled, "read", lambda self, rows: pytest.fail("images are decoded"))
    assert refusal(saved_data, tmp_path) == (
        f"{tmp_path}: about 6.5 kB are needed for decoded images, 6.5 kB are free. Make room or choose another folder "
        "with --cache."
    )


def test_a_disk_that_becomes_full_is_said_and_what_was_written_is_removed(
    saved_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert refusal(saved_data, tmp_path) == (
        f"{tmp_path}: decoded images cannot be kept there (No space left on device). "
        "Choose another folder with --cache."
    )
    (folder,) = tmp_path.iterdir()
    assert file_names(folder) == ["lock"]


def test_what_cannot_be_removed_does_not_hide_why_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> Iterator[Block]:
        yield block(0)
        monkeypatch.setattr(Path, "unlink", gone)
        raise KeyboardInterrupt

    def gone(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    made = entry(tmp_path)
    with pytest.raises(KeyboardInterrupt), made.writing():
        made.write(stopped())


def test_a_cache_that_is_a_file_is_said(saved_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refusal(saved_data, tmp_path / "file") == (
        f"{tmp_path / 'file'}: decoded images cannot be kept there (Not a directory). "
        "Choose another folder with --cache."
    )


def test_a_cache_that_cannot_be_written_to_is_said(
    saved_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: Path, **options: Any) -> None:  # mode bits would not do: root may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    assert refusal(saved_data, tmp_path) == (
        f"{tmp_path}: decoded images cannot be kept there (Permission denied). Choose another folder with --cache."
    )


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip, "pixels has another SHA-256 than when it was written"),
        (lambda pixels: shutil.rmtree(pixels.parent), "it was removed at once"),
    ],
)
def test_a_disk_that_does_not_keep_what_it_is_given_is_said(
    harm: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    def write_and_harm() -> None:
        with made.writing():
            made.write([block(0)])
            harm(made.folder / "pixels")
            made.read_back()

    made = entry(tmp_path)
    with pytest.raises(PipelineError) as caught:
        write_and_harm()
    assert str(caught.value) == (
        f"{tmp_path}: decoded images cannot be kept there ({reason}). Choose another folder with --cache."
    )
