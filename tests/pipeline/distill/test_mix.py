"""MixUp and CutMix: what a mixed image is made of, its share, and how often what is drawn."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.distill.augment import Augmentation
from pipeline.distill.mix import Mixed, mix

PROPERTY = settings(deadline=None)
MIXUP: dict[str, Any] = {"mixup_alpha": 0.8}
CUTMIX: dict[str, Any] = {"cutmix_alpha": 1.0}
BOTH = {**MIXUP, **CUTMIX}


def make_pixels(batch_size: int, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch_size, height, width, 3), dtype=torch.uint8, generator=generator)


def run(pixels: Tensor, settings: dict[str, Any], seed: int = 1) -> Mixed:
    return mix(pixels, Augmentation(**settings), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", [{}, {"mix_probability": 0.0, **BOTH}, {"horizontal_flip": 1.0}])
def test_without_mixing_images_are_their_own_partners(settings: dict[str, Any]) -> None:
    pixels = make_pixels(4)
    generator = torch.Generator().manual_seed(1)
    mixed = mix(pixels, Augmentation(**settings), generator)
    assert mixed.pixels is pixels
    assert mixed.partner.tolist() == [0, 1, 2, 3]
    assert mixed.share.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX, BOTH])
@pytest.mark.parametrize("size", [(1, 1), (3, 8)])
def test_any_size_is_mixed_and_kept(settings: dict[str, Any], size: tuple[int, int]) -> None:
    pixels = make_pixels(9, *size)
    kept = pixels.clone()
    mixed = run(pixels, settings)
    assert mixed.pixels.shape == pixels.shape
    assert mixed.pixels.dtype == torch.uint8
    assert (mixed.partner.dtype, mixed.share.dtype) == (torch.int64, torch.float32)
    assert torch.equal(pixels, kept)
    assert run(pixels[:1], settings).partner.tolist() == [0]


@PROPERTY
@given(alpha=st.floats(1e-3, 100), seed=st.integers(0, 99))
def test_mixup_blends_by_the_share(alpha: float, seed: int) -> None:
    pixels = make_pixels(16, 2, 3)
    mixed = run(pixels, {"mixup_alpha": alpha}, seed)
    share = mixed.share.double()[:, None, None, None]
    exact = pixels * share + pixels[mixed.partner] * (1 - share)
    assert torch.equal(mixed.pixels, (exact + 0.5).floor().to(torch.uint8))


@PROPERTY
@given(alpha=st.floats(1e-3, 100), seed=st.integers(0, 99), height=st.integers(1, 9), width=st.integers(1, 9))
def test_cutmix_takes_a_box_whose_area_is_the_partners_share(alpha: float, seed: int, height: int, width: int) -> None:
    colours = torch.arange(16, dtype=torch.uint8)
    pixels = colours[:, None, None, None].expand(16, height, width, 3)
    mixed = run(pixels, {"cutmix_alpha": alpha}, seed)
    own = mixed.pixels[..., 0] == colours[:, None, None]
    taken = mixed.pixels[..., 0] == mixed.partner[:, None, None]
    assert (own | taken).all()
    for image in range(16):
        box = ~own[image]
        if mixed.partner[image] != image:
            assert mixed.share[image].item() == pytest.approx(1 - box.float().mean().item(), abs=1e-6)
        # A box: all of the rows and columns that it touches.
        assert torch.equal(box, box.any(1)[:, None] & box.any(0)[None, :])


def test_the_smallest_alpha_gives_one_image_or_the_other() -> None:
    for name in ("mixup_alpha", "cutmix_alpha"):
        mixed = run(make_pixels(50), {name: 5e-324})
        assert mixed.share.isfinite().all()
    assert set(run(make_pixels(50), {"mixup_alpha": 1e-9}).share.tolist()) == {0.0, 1.0}


def test_partners_are_a_permutation() -> None:
    mixed = run(make_pixels(200, 1, 1), BOTH)
    assert sorted(mixed.partner.tolist()) == list(range(200))
    assert (mixed.partner == torch.arange(200)).sum() < 10


def test_shares_follow_the_beta_distribution() -> None:
    for alpha in (0.2, 1.0, 5.0):
        share = run(make_pixels(20000, 1, 1), {"mixup_alpha": alpha}).share.double()
        assert share.mean().item() == pytest.approx(0.5, abs=0.015)
        assert share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)


def test_a_cutmix_box_lies_around_any_pixel() -> None:
    pixels = torch.arange(4000).remainder(2)[:, None, None, None].expand(4000, 8, 8, 3).to(torch.uint8)
    mixed = run(pixels, {"cutmix_alpha": 100.0})  # boxes of nearly half the area: two pixels to either side
    taken = (mixed.pixels[..., 0] != pixels[..., 0]).float()
    expected = torch.tensor([sum(centre - 2 <= x < centre + 2 for centre in range(8)) for x in range(8)]).float()
    for across in (taken.mean((0, 1)), taken.mean((0, 2))):
        assert torch.allclose(across / across.mean(), expected / expected.mean(), atol=0.06)


def test_each_sample_draws_one_of_both_with_equal_probability() -> None:
    pixels = (torch.arange(4000) % 2 * 254)[:, None, None, None].expand(4000, 8, 8, 3).to(torch.uint8)
    mixed = run(pixels, {"mixup_alpha": 100.0, "cutmix_alpha": 100.0})
    between = ((mixed.pixels > 0) & (mixed.pixels < 254)).flatten(1)
    different = pixels[:, 0, 0, 0] != pixels[mixed.partner, 0, 0, 0]
    assert between.any(1)[different].float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert torch.equal(between.any(1), between.all(1))


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX, BOTH])
def test_images_are_mixed_with_their_probability(settings: dict[str, Any]) -> None:
    pixels = make_pixels(4000, 16, 16)
    mixed = run(pixels, {**settings, "mix_probability": 0.3})
    alone = mixed.partner == torch.arange(4000)
    assert alone.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert (mixed.share[alone] == 1).float().mean() > 0.99  # but for who is its own partner by chance
    unmixed = mixed.share == 1
    assert torch.equal(mixed.pixels[unmixed], pixels[unmixed])


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX, BOTH])
def test_the_same_draws_give_the_same_mixture_for_any_number_of_threads(settings: dict[str, Any]) -> None:
    pixels = make_pixels(300)
    mixed = run(pixels, settings)
    assert not torch.equal(mixed.share, run(pixels, settings, seed=2).share)
    try:
        torch.set_num_threads(3)
        again = run(pixels, settings)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(again.pixels, mixed.pixels)
    assert torch.equal(again.partner, mixed.partner)
    assert torch.equal(again.share, mixed.share)


def test_the_generator_goes_on() -> None:
    pixels = make_pixels(20)
    generator = torch.Generator().manual_seed(1)
    first, second = (mix(pixels, Augmentation(**BOTH), generator) for _ in range(2))
    assert not torch.equal(first.partner, second.partner)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, MIXUP, CUTMIX, BOTH])
def test_cuda_gives_the_same_pixels_and_is_never_waited_for(settings: dict[str, Any]) -> None:
    pixels = make_pixels(64)
    expected = run(pixels, settings)
    on_device = pixels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixed = run(on_device, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(mixed.pixels.cpu(), expected.pixels)
    assert torch.equal(mixed.partner.cpu(), expected.partner)
    assert torch.equal(mixed.share.cpu(), expected.share)
