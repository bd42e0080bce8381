from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from pipeline import pixels
from pipeline.distill.images import fit_to, held_out
from pipeline.pixels import StripImageError
from tests.conftest import make_split
from tests.pipeline.distill.examples import decoded, noise


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


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1)])
def test_a_strip_is_refused_before_memory_is_taken(size: tuple[int, int]) -> None:
    with pytest.raises(StripImageError) as caught:
        fit_to(32)(Image.new("RGB", size))
    assert str(caught.value) == (
        f"it has {size[0]}×{size[1]} pixels, 66,560,000 with a shorter side of 32; at most 50,000,000 are taken"
    )


def test_a_long_image_of_fewer_pixels_is_fitted_and_so_is_any_square() -> None:
    assert fit_to(32)(Image.new("RGB", (2, 5_000))).size == (32, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "MAX_RESIZED_PX", 100)
        assert fit_to(32)(Image.new("RGB", (9, 9))).size == (32, 32)
