"""Batches on their way to the teacher: read, keyed, preprocessed, in order."""

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import DataSettings, Labelled, load_labelled
from pipeline.extract import batches
from pipeline.extract.batches import Batch, Rendering, read_batches
from pipeline.pixels import sample_key
from pipeline.views import render_view
from tests.conftest import make_images


def raw_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Stand for a teacher's image processor; worker processes can import it."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image in images])


def read(
    data: Labelled, rows: Sequence[int], batch_size: int, num_workers: int = 0, shortest_edge: int | None = None
) -> list[Batch]:
    chosen = np.array(rows, np.int64)
    cuts = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    rendering = Rendering(cast("Any", raw_pixels), shortest_edge=shortest_edge)
    return list(read_batches(data, cuts, rendering, num_workers))


@pytest.fixture(scope="module")
def damaged_data(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    """Six images of which rows 2 and 3 cannot be decoded."""
    cells = []
    for row, image in enumerate(make_images(6, 0)):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        cells.append({"bytes": stream.getvalue() if row not in (2, 3) else b"", "path": None})
    folder = tmp_path_factory.mktemp("damaged") / "data"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": cells, "label": [0] * 6}, features=features).save_to_disk(str(folder))
    return load_labelled(DataSettings(dataset=str(folder)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_come_in_order_and_the_last_batch_may_be_shorter(saved_data: Path, num_workers: int) -> None:
    data = load_labelled(DataSettings(dataset=str(saved_data)))
    images = make_images(30, 0)
    rows = [9, 3, 4, 29, 0, 11, 12]
    found = read(data, rows, 3, num_workers)
    assert [batch.rows.tolist() for batch in found] == [[9, 3, 4], [29, 0, 11], [12]]
    for batch in found:
        chosen = [images[row] for row in batch.rows]
        assert len(batch.pixels) == 1
        assert torch.equal(batch.pixels[0], raw_pixels(chosen))
        assert (batch.keys.dtype.name, batch.keys.shape) == ("uint8", (len(chosen), 16))
        assert [key.tobytes() for key in batch.keys] == [sample_key(image) for image in chosen]
        assert batch.bad == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_that_cannot_be_decoded_travel_as_errors(damaged_data: Labelled, num_workers: int) -> None:
    first, second = read(damaged_data, range(6), 4, num_workers)
    assert (first.rows.tolist(), second.rows.tolist()) == ([0, 1], [4, 5])
    assert [", row 2: " in str(error) for error in first.bad] == [True, False]
    assert [", row 3: " in str(error) for error in first.bad] == [False, True]
    assert [pixels.shape for pixels in first.pixels] == [(2, 3, 8, 8)]
    assert len(first.keys) == 2
    assert second.bad == []


def test_a_batch_without_any_image_has_no_pixels(damaged_data: Labelled) -> None:
    (batch,) = read(damaged_data, [2, 3], 2)
    assert batch.pixels == []
    assert batch.rows.tolist() == []
    assert batch.keys.shape == (0, 16)
    assert len(batch.bad) == 2


def test_workers_hold_few_originals_and_give_the_same_batches(saved_data: Path) -> None:
    data = load_labelled(DataSettings(dataset=str(saved_data)))
    (whole,), (parts,) = (read(data, range(30), 30, num_workers) for num_workers in (0, 1))  # 16 and 14
    assert parts.rows.tolist() == list(range(30))
    assert np.array_equal(parts.keys, whole.keys)
    assert [pixels.shape for pixels in parts.pixels] == [(30, 3, 8, 8)]
    assert torch.equal(parts.pixels[0], whole.pixels[0])


def test_errors_of_all_parts_of_a_batch_come_with_it(damaged_data: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_ORIGINALS", 2)
    (batch,) = read(damaged_data, range(6), 6, 1)  # of the second part nothing can be decoded
    assert batch.rows.tolist() == [0, 1, 4, 5]
    assert (len(batch.bad), len(batch.keys), [len(pixels) for pixels in batch.pixels]) == (2, 4, [4])
    (none,) = read(damaged_data, [2, 3, 2], 3, 1)
    assert (none.pixels, len(none.bad)) == ([], 3)


def test_a_strip_is_no_use_where_its_shorter_side_is_resized(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = [Image.new("RGB", (5_000, 1)), Image.new("RGB", (8, 8))]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 0]}, features=features)
    rows.save_to_disk(str(tmp_path / "data"))
    data = load_labelled(DataSettings(dataset=str(tmp_path / "data")))
    (batch,) = read(data, [0, 1], 2, shortest_edge=224)
    assert batch.rows.tolist() == [1]
    assert (
        "row 0: the image cannot be decoded (it has 5000×1 pixels, 250,880,000 with a shorter side of 224; at most "
        "50,000,000 are taken)."
    ) in str(batch.bad[0])


def test_each_view_is_rendered_from_seed_key_and_number(saved_data: Path) -> None:
    data = load_labelled(DataSettings(dataset=str(saved_data)))
    rendering = Rendering(cast("Any", raw_pixels), views=3, view_size=8, seed=7)
    (batch,) = read_batches(data, [np.arange(4)], rendering, 0)
    images = make_images(4, 0)
    for view, pixels in enumerate(batch.pixels):
        expected = [render_view(image, sample_key(image), view, seed=7, view_size=8) for image in images]
        assert torch.equal(pixels, raw_pixels(expected))
    assert len(batch.pixels) == 3


def test_one_batch_is_read_ahead_and_no_more(saved_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, read = [], Labelled.read

    def watched(self: Labelled, indices: Sequence[int]) -> list[Any]:
        started.append(len(indices))
        return list(read(self, indices))

    monkeypatch.setattr(Labelled, "read", watched)
    data = load_labelled(DataSettings(dataset=str(saved_data)))
    ahead = read_batches(data, [np.arange(3)] * 5, Rendering(cast("Any", raw_pixels)), 0)
    next(ahead)
    time.sleep(0.2)
    assert len(started) == 2
    assert len(list(ahead)) == 4
