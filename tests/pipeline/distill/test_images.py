import errno
import logging
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from pipeline.data import DataSettings, load_labelled, sample_key
from pipeline.distill import images
from pipeline.distill.images import decode_images, fit_to, held_out
from pipeline.errors import PipelineError
from tests.conftest import make_images, make_split
from tests.pipeline.distill.examples import decoded, file_names, labelled, make_rows

JUNK = {"bytes": b"junk", "path": None}


def noise(height: int, width: int) -> Image.Image:
    random = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> dict[str, Any]:
    file = BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (57, 33), (33, 100), (31, 45), (300, 200)])
@pytest.mark.parametrize("image_size", [32, 25])
def test_images_are_fitted_as_timm_does_for_evaluation(size: tuple[int, int], image_size: int) -> None:
    image = noise(*size)
    transform = timm.data.create_transform(
        (3, image_size, image_size), interpolation="bicubic", crop_pct=1.0, crop_mode="center", normalize=False
    )
    theirs: torch.Tensor = transform(image)
    assert theirs.dtype == torch.uint8
    ours = torch.from_numpy(np.array(fit_to(image_size)(image)))
    assert ours.shape == (image_size, image_size, 3)
    assert torch.equal(ours.permute(2, 0, 1), theirs)


def test_every_row_is_decoded_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_READ_ROWS", 4)  # the last block is shorter
    found = decoded(make_split(10, 3), tmp_path / "data")
    originals = make_images(10, 3)
    assert len(found) == 10
    assert found.pixels.shape == (10, 8, 8, 3)
    assert found.pixels.dtype == np.uint8
    assert found.source_rows.tolist() == found.places.tolist() == list(range(10))
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    for row, image in enumerate(originals):
        assert (found.pixels[row] == np.array(image)).all()
        assert found.keys[row].tobytes() == sample_key(image)


def test_keys_are_of_the_original_whatever_the_students_size(tmp_path: Path) -> None:
    rows = make_rows([noise(20, 30), noise(9, 9)], [0, 1])
    small, large = (decoded(rows, tmp_path / str(size), size) for size in (8, 24))
    assert large.pixels.shape == (2, 24, 24, 3)
    assert (small.keys == large.keys).all()
    assert small.keys[0].tobytes() == sample_key(noise(20, 30))


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 51))
    found = decoded(make_rows([png(grey), png(clear), png(half)], [0, 1, 2]), tmp_path / "data")
    assert (found.pixels[0] == np.arange(64).reshape(8, 8, 1)).all()
    assert (found.pixels[1] == 255).all()  # on white
    assert (found.pixels[2] == (255, 204, 204)).all()
    assert found.keys[1].tobytes() == sample_key(Image.new("RGB", (8, 8), "white"))


def test_rows_are_those_of_the_split_also_under_a_limit(tmp_path: Path) -> None:
    rows = make_rows(make_images(6, 0), [0, 0, 0, 0, 1, 2])
    rows.save_to_disk(str(tmp_path / "data"))
    data = load_labelled(DataSettings(dataset=str(tmp_path / "data"), limit=4))
    found = decode_images(data, 8, skip_bad=False)
    assert found.source_rows.tolist() == [0, 1, 4, 5]
    assert found.places.tolist() == [0, 1, 2, 3]
    assert found.labels.tolist() == [0, 0, 1, 2]
    assert (found.pixels[2] == np.array(make_images(6, 0)[4])).all()


def test_some_images_can_be_selected_by_mask_or_index(tmp_path: Path) -> None:
    every = decoded(make_split(6, 0), tmp_path / "data")
    odd = every.select(np.array([False, True] * 3))
    again = odd.select(np.array([2, 0]))
    assert odd.source_rows.tolist() == [1, 3, 5]
    assert again.places.tolist() == again.source_rows.tolist() == [5, 1]
    assert again.labels.tolist() == [2, 1]
    assert (again.keys == every.keys[[5, 1]]).all()
    assert again.pixels is every.pixels
    assert len(again) == 2


def test_an_image_that_cannot_be_decoded_stops(tmp_path: Path) -> None:
    data = labelled(make_rows([png(noise(8, 8)), JUNK], [0, 1]), tmp_path / "data")
    with pytest.raises(PipelineError, match=r"split train, row 1: the image cannot be decoded \(.* --skip-bad"):
        decode_images(data, 8, skip_bad=False)


def test_images_that_cannot_be_decoded_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "clip_embed_kd")
    first, second = noise(8, 8), noise(9, 9)
    data = labelled(make_rows([JUNK, png(first), JUNK, png(second)], [0, 1, 2, 2]), tmp_path / "data")
    found = decode_images(data, 8, skip_bad=True)
    assert found.source_rows.tolist() == [1, 3]
    assert found.places.tolist() == [0, 1]
    assert found.labels.tolist() == [1, 2]
    assert found.keys[1].tobytes() == sample_key(second)
    assert (found.pixels[found.places[0]] == np.array(first)).all()
    assert "2 images of split train could not be decoded and were left out." in caplog.messages


def test_data_without_any_image_is_refused(tmp_path: Path) -> None:
    data = labelled(make_rows([JUNK, JUNK], [0, 1]), tmp_path / "data")
    with pytest.raises(PipelineError) as caught:
        decode_images(data, 8, skip_bad=True)
    assert str(caught.value) == f"{tmp_path / 'data'}, split train: no image could be decoded."


def test_pixels_lie_in_a_file_without_a_name(saved_data: Path, tmp_path: Path) -> None:
    found = decode_images(load_labelled(DataSettings(dataset=str(saved_data))), 8, skip_bad=False, folder=tmp_path)
    assert isinstance(found.pixels, np.memmap)
    assert file_names(tmp_path) == []


def test_a_full_disk_is_said(saved_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(BytesIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(PipelineError) as caught:
        decode_images(load_labelled(DataSettings(dataset=str(saved_data))), 8, skip_bad=False)
    assert str(caught.value) == "the decoded images cannot be kept in a temporary file (No space left on device)."


def test_a_missing_place_for_temporary_files_is_said(saved_data: Path, tmp_path: Path) -> None:
    data = load_labelled(DataSettings(dataset=str(saved_data)))
    with pytest.raises(PipelineError) as caught:
        decode_images(data, 8, skip_bad=False, folder=tmp_path / "missing")
    assert str(caught.value) == "the decoded images cannot be kept in a temporary file (No such file or directory)."


def test_copies_of_an_image_are_held_out_together() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (50, 16), dtype=np.uint8)
    apart = held_out(np.concatenate([keys, keys[::-1]]))
    assert apart.any()
    assert (apart[:50] == apart[50:][::-1]).all()


def test_about_a_tenth_is_held_out() -> None:
    keys = np.random.default_rng(1).integers(0, 256, (20_000, 16), dtype=np.uint8)
    assert 1800 < held_out(keys).sum() < 2200


def test_the_same_images_are_held_out_on_every_machine() -> None:
    keys = np.zeros((4, 16), np.uint8)
    keys[:, 7] = (10, 11, 20, 0)  # the first eight bytes are a big-endian number
    keys[1:, 8:] = 10
    keys[3, 0] = 1  # 2⁵⁶ ends in 6
    assert held_out(keys).tolist() == [True, False, True, False]
