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
from pipeline.extract.batches import Batch, Rendering, read_batches
from pipeline.pixels import sample_key
from pipeline.views import render_view
from tests.conftest import make_images


def raw_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Stand for a teacher's image processor; worker processes can import it."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image in images])


def read(data: Labelled, rows: Sequence[int], batch_size: int, num_workers: int = 0) -> list[Batch]:
    chosen = np.array(rows, np.int64)
    cuts = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    return list(read_batches(data, cuts, Rendering(cast("Any", raw_pixels)), num_workers))


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
    batches = read(data, rows, 3, num_workers)
    assert [batch.rows.tolist() for batch in batches] == [[9, 3, 4], [29, 0, 11], [12]]
    for batch in batches:
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
    batches = read_batches(data, [np.arange(3)] * 5, Rendering(cast("Any", raw_pixels)), 0)
    next(batches)
    time.sleep(0.2)
    assert len(started) == 2
    assert len(list(batches)) == 4
