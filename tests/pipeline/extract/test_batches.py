"""Batches on their way to the teacher: read, keyed, preprocessed, in order."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import DataSettings, Labelled, load_labelled, sample_key
from pipeline.extract.batches import Batch, read_batches
from tests.conftest import make_images


def raw_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Stand for a teacher's image processor; worker processes can import it."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image in images])


def read(data: Labelled, rows: Sequence[int], batch_size: int, num_workers: int = 0) -> list[Batch]:
    chosen = np.array(rows, np.int64)
    return list(read_batches(data, chosen, cast("Any", raw_pixels), batch_size, num_workers))


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
        assert batch.pixels is not None
        assert torch.equal(batch.pixels, raw_pixels(chosen))
        assert (batch.keys.dtype.name, batch.keys.shape) == ("uint8", (len(chosen), 16))
        assert [key.tobytes() for key in batch.keys] == [sample_key(image) for image in chosen]
        assert batch.bad == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_that_cannot_be_decoded_travel_as_errors(damaged_data: Labelled, num_workers: int) -> None:
    first, second = read(damaged_data, range(6), 4, num_workers)
    assert (first.rows.tolist(), second.rows.tolist()) == ([0, 1], [4, 5])
    assert [", row 2: " in str(error) for error in first.bad] == [True, False]
    assert [", row 3: " in str(error) for error in first.bad] == [False, True]
    assert first.pixels is not None
    assert first.pixels.shape == (2, 3, 8, 8)
    assert len(first.keys) == 2
    assert second.bad == []


def test_a_batch_without_any_image_has_no_pixels(damaged_data: Labelled) -> None:
    (batch,) = read(damaged_data, [2, 3], 2)
    assert batch.pixels is None
    assert batch.rows.tolist() == []
    assert batch.keys.shape == (0, 16)
    assert len(batch.bad) == 2
