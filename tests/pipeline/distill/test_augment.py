"""Batches: identity, independence of samples, draws that repeat, and how often what happens."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.distill import augment as module
from pipeline.distill.augment import OPERATIONS, Augmentation, augment, send
from pipeline.distill.warp import GEOMETRY
from pipeline.errors import describe_problems
from pipeline.view_operations import OPERATIONS as OPERATIONS_OF_VIEWS

EVERYTHING: dict[str, Any] = {
    "horizontal_flip": 0.5,
    "random_crop_px": 2,
    "resized_crop_min_area": 0.5,
    "operations": 2,
    "random_erasing": 0.5,
}
RECIPES: list[dict[str, Any]] = [
    {"horizontal_flip": 0.5},
    {"horizontal_flip": 0.5, "random_crop_px": 2},
    {"operations": 1},
    EVERYTHING,
]


def make_pixels(batch_size: int, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch_size, height, width, 3), dtype=torch.uint8, generator=generator)


def run(pixels: Tensor, settings: dict[str, Any], seed: int = 1) -> Tensor:
    return augment(pixels, Augmentation(**settings), torch.Generator().manual_seed(seed))


def ramps(batch_size: int, side: int) -> Tensor:
    """Images whose red is the column and green the row, both from 1; blue is 255."""
    place = torch.arange(1, side + 1, dtype=torch.uint8).expand(side, side)
    image = torch.stack([place, place.T, torch.full_like(place, 255)], dim=2)
    return image.expand(batch_size, side, side, 3)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"horizontal_flip": 1.5}, "horizontal_flip: input should be less than or equal to 1, found 1.5"),
        ({"random_crop_px": -1}, "random_crop_px: input should be greater than or equal to 0, found -1"),
        ({"random_crop_px": 1025}, "random_crop_px: input should be less than or equal to 1024, found 1025"),
        ({"resized_crop_min_area": 0.0}, "resized_crop_min_area: input should be greater than 0, found 0.0"),
        ({"resized_crop_min_area": 2}, "resized_crop_min_area: input should be less than or equal to 1, found 2"),
        ({"operations": 15}, "operations: input should be less than or equal to 14, found 15"),
        ({"random_erasing": -0.1}, "random_erasing: input should be greater than or equal to 0, found -0.1"),
        ({"mixup_alpha": 101}, "mixup_alpha: input should be less than or equal to 100, found 101"),
        ({"cutmix_alpha": float("nan")}, "cutmix_alpha: input should be less than or equal to 100, found nan"),
        ({"mix_probability": 2}, "mix_probability: input should be less than or equal to 1, found 2"),
        ({"flip": 1}, "flip: unknown setting"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError) as error:
        Augmentation(**settings)
    assert describe_problems(error.value) == problem


def test_operations_bear_the_names_of_the_views() -> None:
    assert len(OPERATIONS) == len(set(OPERATIONS)) == 14
    assert set(OPERATIONS) - set(OPERATIONS_OF_VIEWS) == {"translate_x", "translate_y"}
    assert set(OPERATIONS_OF_VIEWS) < set(OPERATIONS)


def test_by_default_pixels_stay_as_they_are() -> None:
    pixels = make_pixels(5)
    assert torch.equal(run(pixels, {}), pixels)
    assert torch.equal(run(pixels, {"mixup_alpha": 1.0, "cutmix_alpha": 1.0}), pixels)


@pytest.mark.parametrize("settings", RECIPES)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 6)])
def test_any_size_is_augmented_and_kept(settings: dict[str, Any], size: tuple[int, int]) -> None:
    pixels = make_pixels(20, *size)
    kept = pixels.clone()
    augmented = run(pixels, settings)
    assert augmented.shape == pixels.shape
    assert augmented.dtype == torch.uint8
    assert torch.equal(pixels, kept)
    assert len(run(pixels[:1], settings)) == 1


def test_a_student_takes_the_result_without_moving_it() -> None:
    for settings in ({}, *RECIPES):
        assert run(make_pixels(3), settings).permute(0, 3, 1, 2).is_contiguous()


@pytest.mark.parametrize("settings", RECIPES)
def test_a_sample_does_not_depend_on_the_others(settings: dict[str, Any]) -> None:
    pixels = make_pixels(40)
    others = make_pixels(40, seed=9)
    augmented = run(pixels, settings)
    alone = torch.arange(40)[:, None, None, None]
    for kept in (0, 17, 39):
        assert torch.equal(run(torch.where(alone == kept, pixels, others), settings)[kept], augmented[kept])


@pytest.mark.parametrize("settings", RECIPES)
def test_the_same_draws_give_the_same_pixels_for_any_number_of_threads(settings: dict[str, Any]) -> None:
    pixels = make_pixels(300)
    augmented = run(pixels, settings)
    assert not torch.equal(augmented, run(pixels, settings, seed=2))
    try:
        for num_threads in (2, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(run(pixels, settings), augmented)
    finally:
        torch.set_num_threads(1)


def test_the_precision_of_the_student_does_not_matter() -> None:
    pixels = make_pixels(40)
    augmented = run(pixels, EVERYTHING)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(pixels, EVERYTHING), augmented)


def test_how_many_numbers_are_drawn_depends_on_the_operations_alone() -> None:
    def next_number(settings: dict[str, Any]) -> float:
        generator = torch.Generator().manual_seed(1)
        augment(make_pixels(7), Augmentation(**settings), generator)
        return torch.rand((), generator=generator).item()

    without = {**EVERYTHING, "operations": 0}
    assert next_number({}) == next_number(without) == next_number({"random_erasing": 1.0})
    assert next_number(EVERYTHING) == next_number({"operations": 2}) != next_number(without)


@pytest.mark.parametrize("also", [{}, {"random_crop_px": 1}, {"resized_crop_min_area": 0.999}])
def test_flips_are_as_frequent_as_their_probability(also: dict[str, Any]) -> None:
    augmented = run(ramps(4000, 8), {"horizontal_flip": 0.3, **also})[:, 4, :, 0].float()
    flipped = augmented[:, 6] < augmented[:, 1]
    assert flipped.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_a_flip_that_is_certain_flips_all() -> None:
    pixels = make_pixels(6)
    assert torch.equal(run(pixels, {"horizontal_flip": 1.0}), pixels.flip(2))


def test_crops_shift_by_every_distance_alike_and_keep_pixels_exact() -> None:
    shifted = run(ramps(9000, 5), {"random_crop_px": 1})
    seen = Counter((int(image[2, 2, 0]) - 3, int(image[2, 2, 1]) - 3) for image in shifted)
    assert set(seen) == {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)}
    assert all(abs(number - 1000) < 150 for number in seen.values())
    assert set(shifted[..., 2].flatten().tolist()) == {0, 255}


def test_resized_crops_keep_areas_of_every_size_alike() -> None:
    side = 101
    ramp = (2 * torch.arange(side, dtype=torch.uint8)).expand(side, side)
    image = torch.stack([ramp, ramp.T, torch.full_like(ramp, 255)], dim=2)
    cropped = run(image.expand(500, -1, -1, -1), {"resized_crop_min_area": 0.25}).float()
    widths = (cropped[:, 50, -1, 0] - cropped[:, 50, 0, 0]) / 200
    heights = (cropped[:, -1, 50, 1] - cropped[:, 0, 50, 1]) / 200
    areas, aspects = (widths * heights).sort().values, widths / heights
    assert areas.min() > 0.24
    assert (areas - torch.linspace(0.25, 1, 500)).abs().max() < 0.06
    assert 0.74 < aspects.min() < 0.78
    assert 1.28 < aspects.max() < 1.35
    assert (cropped[..., 2] == 255).all()


def test_operations_and_strengths_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def note(chosen: Tensor, strengths: Tensor, height: int, width: int) -> Tensor:
        seen.append((chosen + OPERATIONS.index(GEOMETRY[0]), strengths))
        return torch.eye(3, dtype=torch.float64).expand(len(chosen), 3, 3)

    monkeypatch.setattr(module, "operation_maps", note)
    run(make_pixels(14 * 61 * 20, 1, 1), {"operations": 1})
    ((chosen, strengths),) = seen
    numbers = chosen.bincount(minlength=14)
    assert len(numbers) == 14
    assert (numbers - 61 * 20).abs().max() < 160
    steps, counts = torch.unique((strengths * 30).round().long(), return_counts=True)
    assert steps.tolist() == list(range(-30, 31))
    assert (strengths * 30 - (strengths * 30).round()).abs().max() < 1e-12
    assert (counts[:30] - 14 * 10 * 61 / 31).abs().max() < 100
    assert counts[30] == pytest.approx(14 * 20 * 61 / 31, abs=150)  # 0 has but one sign


def test_every_operation_reaches_the_pixels() -> None:
    pixels = make_pixels(1, 32, 32).expand(400, -1, -1, -1)
    augmented = run(pixels, {"operations": 1})
    untouched = (augmented == pixels).flatten(1).all(1).float().mean().item()
    assert 1 / 14 < untouched < 0.25  # identity, and what has little strength
    more = run(pixels, {"operations": 3})
    assert (more == pixels).flatten(1).all(1).float().mean().item() < untouched / 2


def test_geometry_comes_before_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noting(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*arguments: Any) -> Tensor:
            order.append(name)
            return function(*arguments)

        return noted

    for name in ("operation_maps", "warp", "change_colours", "erase"):
        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    run(make_pixels(4), EVERYTHING)
    assert order == ["operation_maps", "operation_maps", "warp", "change_colours", "change_colours", "erase"]


def test_erased_boxes_have_their_frequency_area_and_one_colour() -> None:
    pixels = torch.zeros(3000, 20, 20, 3, dtype=torch.uint8)
    erased = run(pixels, {"random_erasing": 0.4})
    mask = (erased > 0).any(3)
    areas = mask.flatten(1).float().mean(1)
    assert (areas > 0).float().mean().item() == pytest.approx(0.4, abs=0.04)
    assert areas[areas > 0].mean().item() == pytest.approx((0.02 + 0.33) / 2, abs=0.015)
    assert areas.max() < 0.38
    for image, inside in zip(erased[:50], mask[:50], strict=True):
        assert (image[inside] == image[inside][:1]).all()
    assert erased[mask].float().mean().item() == pytest.approx(127.5, abs=8)


def test_what_is_drawn_is_sent_without_waiting_to_cuda_only() -> None:
    asked: list[tuple[str, bool]] = []

    class Drawn(Tensor):
        def to(self, device: torch.device, non_blocking: bool = False) -> "Drawn":  # type: ignore[override]
            asked.append((device.type, non_blocking))
            return self

    for name in ("cpu", "mps", "cuda"):
        send(torch.zeros(1).as_subclass(Drawn), torch.device(name))
    assert asked == [("cpu", False), ("mps", False), ("cuda", True)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", RECIPES)
def test_cuda_gives_the_same_pixels_and_is_never_waited_for(settings: dict[str, Any]) -> None:
    pixels = make_pixels(64, 32, 32)
    expected = run(pixels, {**settings, "operations": 0})
    on_device = pixels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmented = run(on_device, settings)
        plain = run(on_device, {**settings, "operations": 0})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert augmented.is_cuda
    assert (plain.cpu().int() - expected.int()).abs().max() <= 1  # rounding where pixels are interpolated
