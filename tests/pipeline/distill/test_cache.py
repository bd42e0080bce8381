import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import store
from pipeline.data import DataSettings, Labelled, load_labelled
from pipeline.distill import cache as module
from pipeline.distill import distill
from pipeline.distill.cache import cached_images, default_cache
from pipeline.distill.cache_entry import CacheEntry
from pipeline.distill.config import EvaluateSettings
from pipeline.distill.decoding import Block, ReplayedViews, decode_blocks
from pipeline.distill.evaluate import evaluate_run
from pipeline.distill.images import DecodedImages
from pipeline.distill.preparation import compute_for, prepare
from pipeline.distill.student import load_student
from pipeline.errors import PipelineError
from pipeline.pixels import sample_key
from pipeline.views import render_view
from tests.conftest import make_images, make_split
from tests.pipeline.distill.examples import (
    JUNK,
    Extras,
    equal_weights,
    labelled,
    make_recipe,
    make_rows,
    noise,
    pairs_of,
    png,
    settings_for,
    weights_of,
    write_example,
)

ROOT = Path(__file__).parents[3]
VIEWS = ReplayedViews(count=3, seed=5, view_size=24)


@pytest.fixture(autouse=True)
def _messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "clip_embed_kd")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def decoded_splits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was decoded, and not read from the cache."""
    splits: list[str] = []

    def watch(data: Labelled, image_size: int, views: ReplayedViews | None) -> Generator[Block, None, None]:
        splits.append(data.settings.split)
        return decode_blocks(data, image_size, views)

    monkeypatch.setattr(module, "decode_blocks", watch)
    return splits


def load(path: Path, **fields: Any) -> Labelled:
    return load_labelled(DataSettings(dataset=str(path), **fields))


def get(data: Labelled, folder: Path, image_size: int = 8, skip_bad: bool = False, **options: Any) -> DecodedImages:
    return cached_images(data, image_size, skip_bad=skip_bad, cache=folder, **options)


def entries(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/entry.json"))


def refusal(data: Labelled, folder: Path, **options: Any) -> str:
    with pytest.raises(PipelineError) as caught:
        get(data, folder, **options)
    return str(caught.value)


def equal(left: DecodedImages, right: DecodedImages) -> bool:
    arrays = ("pixels", "places", "source_rows", "keys", "labels")
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in arrays)


# What is kept


def test_images_are_decoded_once(
    saved_data: Path, folder: Path, decoded_splits: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = get(load(saved_data), folder)
    (entry,) = entries(folder)
    assert caplog.messages[0].startswith("Images of split train: decoded in ")
    assert caplog.messages[0].endswith(f" s, kept in the cache {folder / entry} (5.8 kB).")
    second = get(load(saved_data), folder)
    assert caplog.messages[1:] == [f"Images of split train: read from the cache {folder / entry}."]
    assert decoded_splits == ["train"]
    assert equal(first, second)
    images = make_images(30, 0)
    assert (second.pixels[:, 0] == np.stack([np.array(image) for image in images])).all()
    assert second.pixels.shape == (30, 1, 8, 8, 3)
    assert second.keys.tobytes() == b"".join(map(sample_key, images))
    assert second.labels.tolist() == [row % 3 for row in range(30)]
    assert second.source_rows.tolist() == second.places.tolist() == list(range(30))


def test_pixels_are_mapped_and_cannot_be_written(saved_data: Path, folder: Path) -> None:
    found = get(load(saved_data), folder)
    assert isinstance(found.pixels, np.memmap)
    assert not found.pixels.flags.writeable
    (entry,) = entries(folder)
    assert Path(str(found.pixels.filename)) == folder / entry / "pixels"


def test_rows_and_labels_are_those_of_the_split_also_under_a_limit(tmp_path: Path, folder: Path) -> None:
    make_rows(make_images(6, 0), [0, 0, 0, 0, 1, 2]).save_to_disk(str(tmp_path / "data"))
    for _ in range(2):
        found = get(load(tmp_path / "data", limit=4), folder)
        assert found.source_rows.tolist() == [0, 1, 4, 5]
        assert found.places.tolist() == [0, 1, 2, 3]
        assert found.labels.tolist() == [0, 0, 1, 2]
        assert (found.pixels[2, 0] == np.array(make_images(6, 0)[4])).all()


def test_views_are_kept_beside_the_images(
    saved_data: Path, folder: Path, decoded_splits: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = load(saved_data)
    first, second = (get(data, folder, 16, views=VIEWS) for _ in range(2))
    assert decoded_splits == ["train"]
    assert caplog.messages[0].startswith("Images of split train: 3 views rendered in ")
    (expected,) = decode_blocks(data, 16, VIEWS)
    assert equal(first, second)
    assert (second.pixels == expected.pixels).all()
    assert second.pixels.shape == (30, 3, 16, 16, 3)


def test_one_view_is_the_image_itself(saved_data: Path, folder: Path, decoded_splits: list[str]) -> None:
    data = load(saved_data)
    assert equal(get(data, folder), get(data, folder, views=ReplayedViews(1, 7, 99)))
    assert decoded_splits == ["train"]


def test_a_run_shows_the_views_of_its_artifact_and_evaluates_on_the_images(
    saved_data: Path, folder: Path, tmp_path: Path
) -> None:
    pairs = pairs_of(make_split(30, 0))
    path = write_example(tmp_path / "a.safetensors", samples=pairs, extras=Extras(num_views=3))
    settings = settings_for(path, saved_data, tmp_path / "run", target="both", cache=folder)
    with store.open_artifact(path) as artifact:
        images = prepare(settings, make_recipe(replay_views=True), compute_for(settings), artifact).images
    views = [render_view(make_images(30, 0)[7], pairs[7][0], view, seed=0, view_size=8) for view in range(3)]
    assert (images.train.pixels[7] == np.stack([np.array(view) for view in views])).all()
    assert images.evaluation.pixels.shape == (12, 1, 8, 8, 3)


def test_runs_and_evaluations_share_the_cache_that_is_named(
    saved_data: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_example(tmp_path / "a.safetensors")
    first, second = (distill(settings_for(path, saved_data, tmp_path / name, cache=folder)) for name in ("1", "2"))
    data = DataSettings(dataset=str(saved_data), split="test")
    evaluate_run(EvaluateSettings(student=first.run_directory, data=data, device="cpu", cache=folder))
    said = [line.split(" /")[0].split(" in ")[0] for line in caplog.messages if line.startswith("Images of")]
    assert said == [
        "Images of split train: decoded",
        "Images of split test: decoded",
        "Images of split train: read from the cache",
        "Images of split test: read from the cache",
        "Images of split test: read from the cache",
    ]
    assert len(entries(folder)) == 2
    students = [weights_of(load_student(result.run_directory)) for result in (first, second)]
    assert equal_weights(*students)  # whether images were decoded or read makes no difference


def test_a_run_may_be_gone_on_with_beside_another_cache(saved_data: Path, folder: Path, tmp_path: Path) -> None:
    path = write_example(tmp_path / "a.safetensors")
    distill(settings_for(path, saved_data, tmp_path / "run", cache=folder, max_steps=1))
    settings = settings_for(path, saved_data, tmp_path / "run", cache=tmp_path / "other", max_steps=2, resume=True)
    assert distill(settings).num_steps == 2


# Who shares an entry


def test_labels_are_not_kept(tmp_path: Path, folder: Path, decoded_splits: list[str]) -> None:
    rows = make_split(6, 0).add_column("coarse", [0, 1, 1, 0, 0, 0])
    rows.save_to_disk(str(tmp_path / "data"))
    fine = get(load(tmp_path / "data", label_column="label"), folder)
    coarse = get(load(tmp_path / "data", label_column="coarse"), folder)
    some = get(load(tmp_path / "data", label_column="label").of_classes(np.array([1])), folder)
    assert fine.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert coarse.labels.tolist() == [0, 1, 1, 0, 0, 0]
    assert some.labels.tolist() == [-1, 0, -1, -1, 0, -1]
    assert decoded_splits == ["train"]


def test_each_of_what_decides_the_pixels_has_its_own_entry(
    saved_data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(saved_data)
    get(data, folder)
    get(data, folder, 9)
    get(load(saved_data, split="test"), folder)
    get(load(saved_data, limit=4), folder)
    get(data, folder, views=VIEWS)
    get(data, folder, views=ReplayedViews(4, 5, 24))
    get(data, folder, views=ReplayedViews(3, 6, 24))
    get(data, folder, views=ReplayedViews(3, 5, 25))
    for name in ("CACHE_VERSION", "SAMPLE_KEY_VERSION"):
        monkeypatch.setattr(module, name, 99)
        get(data, folder)
    monkeypatch.setattr(module, "VIEWS_VERSION", 99)
    get(data, folder, views=VIEWS)
    for library in ("pillow", "torchvision"):
        monkeypatch.setattr(module, "version", lambda name, library=library: f"{name}{name == library}")
        get(data, folder)
    assert len(entries(folder)) == 13


CHILD = """
import sys
from pathlib import Path
from pipeline.data import DataSettings, load_labelled
from pipeline.distill.cache import cached_images
from pipeline.progress import log_to_stderr
log_to_stderr()
for path, limit in zip(sys.argv[2::2], sys.argv[3::2]):
    data = load_labelled(DataSettings(dataset=path, limit=int(limit) or None))
    cached_images(data, 8, skip_bad=False, cache=Path(sys.argv[1]))
"""


def test_other_processes_find_the_images_of_any_kind_of_data_set(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "parquet").mkdir()
    make_split(6, 0).to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    make_split(6, 0).save_to_disk(str(tmp_path / "saved"))
    save_image_folder(tmp_path / "images")
    named = [(name, limit) for name in ("parquet", "saved", "images") for limit in (0, 4)]
    for name, limit in named:
        get(load(tmp_path / name, limit=limit or None), folder)
    arguments = [word for name, limit in named for word in (str(tmp_path / name), str(limit))]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(entries(folder)) == 6
    assert [line.split(": ")[1].split(" /")[0] for line in done.stderr.splitlines()] == ["read from the cache"] * 6


def test_the_second_of_two_waits_for_the_first_and_uses_what_it_made(
    saved_data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_on, calls = threading.Event(), []

    def slowly(*arguments: Any) -> Generator[Block, None, None]:
        calls.append(arguments)
        go_on.wait()
        return decode_blocks(*arguments)

    monkeypatch.setattr(module, "decode_blocks", slowly)
    found: list[DecodedImages] = []
    threads = [threading.Thread(target=lambda: found.append(get(load(saved_data), folder))) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not any("waiting for it" in message for message in caplog.messages):
        time.sleep(0.001)
    go_on.set()
    for thread in threads:
        thread.join()
    (entry,) = entries(folder)
    assert len(calls) == 1
    assert equal(*found)
    assert caplog.messages[0] == f"Another process decodes the same images into {folder / entry}: waiting for it."
    assert f"Images of split train: read from the cache {folder / entry}." in caplog.messages[1:]


# Data that changes


def save_image_folder(folder: Path) -> None:
    for row, image in enumerate(make_images(6, 0)):
        path = folder / "train" / ("ant", "bee", "cat")[row % 3] / f"{row}.bmp"  # all of one size
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def same_time(path: Path, change: Any) -> None:
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_changed_file_of_an_image_folder_is_seen(tmp_path: Path, folder: Path) -> None:
    save_image_folder(tmp_path / "data")
    path = tmp_path / "data" / "train" / "bee" / "1.bmp"
    old = get(load(tmp_path / "data"), folder)
    make_images(1, 9)[0].save(path)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    new = get(load(tmp_path / "data"), folder)
    assert [row for row in range(6) if not (old.keys[row] == new.keys[row]).all()] == [2]  # ant 0, ant 3, bee 1
    same_time(path, lambda: noise(8, 9).save(path))
    assert get(load(tmp_path / "data"), folder).keys[2].tobytes() == sample_key(noise(8, 9))


def test_a_changed_file_outside_the_data_set_is_seen(tmp_path: Path, folder: Path) -> None:
    """Parquet that names files: `datasets` does not look at these."""
    paths = [str(tmp_path / f"{row}.png") for row in range(3)]
    for path, image in zip(paths, make_images(3, 0), strict=True):
        image.save(path)
    cells = {"image": [*({"bytes": None, "path": path} for path in paths), None], "label": [0, 1, 2, 0]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(cells).to_parquet(str(tmp_path / "data" / "train.parquet"))
    get(load(tmp_path / "data"), folder, skip_bad=True)
    noise(5, 5).save(paths[1])
    found = get(load(tmp_path / "data"), folder, skip_bad=True)
    assert found.source_rows.tolist() == [0, 1, 2]
    assert found.keys[1].tobytes() == sample_key(noise(5, 5))
    Path(paths[2]).unlink()
    assert len(get(load(tmp_path / "data"), folder, skip_bad=True)) == 2


def test_a_data_set_that_was_saved_again_is_seen_whatever_its_fingerprint(tmp_path: Path, folder: Path) -> None:
    make_split(6, 0).save_to_disk(str(tmp_path / "data"))
    get(load(tmp_path / "data"), folder)
    state = (tmp_path / "data" / "state.json").read_bytes()
    shutil.rmtree(tmp_path / "data")
    make_split(6, 1).save_to_disk(str(tmp_path / "data"))
    (tmp_path / "data" / "state.json").write_bytes(state)
    assert (
        get(load(tmp_path / "data"), folder).pixels[:, 0] == np.stack([np.array(image) for image in make_images(6, 1)])
    ).all()


# Images that cannot be decoded


@pytest.fixture
def partly_bad(tmp_path: Path) -> Labelled:
    return labelled(make_rows([png(noise(8, 8)), JUNK, png(noise(9, 9)), JUNK], [0, 1, 2, 2]), tmp_path / "data")


def test_a_bad_image_stops_and_nothing_is_kept(partly_bad: Labelled, tmp_path: Path, folder: Path) -> None:
    for _ in range(2):
        assert refusal(partly_bad, folder) == (
            f"{tmp_path / 'data'}, split train, row 1: the image cannot be decoded (not an image of a known format). "
            "Mend or remove it, or pass --skip-bad to leave such images out and count them."
        )
    assert [path.name for path in folder.glob("*/*")] == ["lock"]


def test_bad_images_are_left_out_and_counted_from_the_cache_too(
    partly_bad: Labelled, folder: Path, decoded_splits: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        caplog.clear()
        found = get(partly_bad, folder, skip_bad=True)
        assert found.source_rows.tolist() == [0, 2]
        assert found.places.tolist() == [0, 1]
        assert found.labels.tolist() == [0, 2]
        assert found.keys[1].tobytes() == sample_key(noise(9, 9))
        assert (found.pixels[found.places[0], 0] == np.array(noise(8, 8))).all()
        assert caplog.messages[-1] == "2 images of split train could not be decoded and were left out."
    assert decoded_splits == ["train"]


def test_a_bad_image_stops_although_the_others_are_in_the_cache(partly_bad: Labelled, folder: Path) -> None:
    plainly = refusal(partly_bad, folder)
    get(partly_bad, folder, skip_bad=True)
    assert refusal(partly_bad, folder) == plainly
    assert len(get(partly_bad, folder, skip_bad=True)) == 2


def test_an_image_that_cannot_be_read_for_a_while_stops_and_is_not_left_out_for_good(
    partly_bad: Labelled, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.open", fail)
        assert refusal(partly_bad, folder, skip_bad=True) == (
            f"{tmp_path / 'data'}, split train, row 0: the image could not be read just now "
            "([Errno 5] Input/output error). Give the same command again; if it fails every time, see to the disk and "
            "to free memory."
        )
    assert entries(folder) == []
    assert get(partly_bad, folder, skip_bad=True).source_rows.tolist() == [0, 2]


def test_a_row_that_can_be_decoded_after_all_is_not_left_out(
    saved_data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, read = load(saved_data), Labelled.read
    bad = labelled(make_rows([JUNK], [0]), folder.with_name("bad")).read([0])
    with monkeypatch.context() as patch:  # a disk that could not be read for a while
        patch.setattr(
            Labelled, "read", lambda self, rows: [*bad, *read(self, rows)[1:]] if 0 in rows else read(self, rows)
        )
        assert len(get(data, folder, skip_bad=True)) == 29
    assert len(get(data, folder)) == 30
    (entry,) = entries(folder)
    assert f"{folder / entry}: is damaged (it lacks row 0, which can be decoded): made anew." in caplog.messages


def test_data_without_any_image_is_refused(tmp_path: Path, folder: Path) -> None:
    data = labelled(make_rows([JUNK, JUNK], [0, 1]), tmp_path / "data")
    assert refusal(data, folder, skip_bad=True) == f"{tmp_path / 'data'}, split train: no image could be decoded."
    assert entries(folder) == []


# Where it is


def test_a_finished_entry_is_read_where_nothing_can_be_written(
    saved_data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = get(load(saved_data), folder)
    monkeypatch.setattr(CacheEntry, "writing", lambda self: pytest.fail("it is written to"))
    assert equal(get(load(saved_data), folder), first)


def test_the_place_is_that_of_the_variable_or_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("CLIP_EMBED_KD_CACHE", "own")
    assert default_cache() == Path("own")
    monkeypatch.setenv("CLIP_EMBED_KD_CACHE", "")
    assert default_cache() == tmp_path / "xdg" / "clip-embed-kd" / "images"
    for nothing in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert default_cache() == tmp_path / ".cache" / "clip-embed-kd" / "images"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == tmp_path / ".cache" / "clip-embed-kd" / "images"


def test_the_default_place_is_used(saved_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_EMBED_KD_CACHE", str(tmp_path / "deep" / "down"))
    cached_images(load(saved_data), 8, skip_bad=False)
    assert len(entries(tmp_path / "deep" / "down")) == 1


def test_a_user_without_a_home_is_told_of_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CLIP_EMBED_KD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(PipelineError) as caught:
        default_cache()
    assert str(caught.value) == "there is no home folder to keep decoded images in. Choose one with --cache."


def test_no_test_writes_to_the_users_own_cache() -> None:
    assert Path(os.environ["CLIP_EMBED_KD_CACHE"]).name.startswith("clip-embed-kd-images-")
