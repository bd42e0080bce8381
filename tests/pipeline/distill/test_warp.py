"""Maps against torchvision's geometry of one image, and against slices where pixels stay whole."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as single

from pipeline.distill.warp import GEOMETRY, crop_maps, mirror, operation_maps, shift, warp, whole_places

PROPERTY = settings(deadline=None)
STEPS = torch.arange(-30, 31)
WHOLE = [0.0, 0.0, 1.0, 1.0]
MIRRORED = [1.0, 0.0, 0.0, 1.0]
SIZES = [(16, 16), (9, 14), (40, 33)]


def single_affine(image: Tensor, shear: tuple[float, float], move: tuple[int, int] = (0, 0)) -> Tensor:
    degrees = [math.degrees(math.atan(factor)) for factor in shear]
    pivot = [0, 0] if any(shear) else None
    moved: Tensor = single.affine(image, 0.0, list(move), 1.0, degrees, InterpolationMode.BILINEAR, center=pivot)
    return moved


SINGLE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "shear_x": lambda image, strength: single_affine(image, (0.99 * strength, 0)),
    "shear_y": lambda image, strength: single_affine(image, (0, 0.99 * strength)),
    "translate_x": lambda image, strength: single_affine(image, (0, 0), (int(32 * strength), 0)),
    "translate_y": lambda image, strength: single_affine(image, (0, 0), (0, int(32 * strength))),
    "rotate": lambda image, strength: single.rotate(image, 135 * strength, InterpolationMode.BILINEAR),
}


def make_planes(batch_size: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8, generator=generator)


def operate(planes: Tensor, operation: str, strengths: Tensor) -> Tensor:
    chosen = torch.full((len(planes),), GEOMETRY.index(operation))
    maps = operation_maps(chosen, strengths.double(), planes.shape[2], planes.shape[3])
    return warp(planes, maps[:, :2].float())


def crop(planes: Tensor, boxes: list[list[float]], shifts: list[list[float]]) -> Tensor:
    maps = torch.tensor(boxes, dtype=torch.float64), torch.tensor(shifts, dtype=torch.float64)
    return warp(planes, crop_maps(*maps, planes.shape[2], planes.shape[3])[:, :2].float())


def test_these_are_the_operations() -> None:
    assert tuple(SINGLE) == GEOMETRY


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("operation", GEOMETRY)
def test_an_operation_is_torchvisions_at_every_strength(operation: str, size: tuple[int, int]) -> None:
    planes = make_planes(1, *size)
    strengths = STEPS.double() / 30
    changed = operate(planes.expand(len(STEPS), -1, -1, -1), operation, strengths)
    expected = torch.stack([SINGLE[operation](planes[0], strength) for strength in strengths.tolist()])
    difference = (changed.int() - expected.int()).abs()
    # Bilinear weights round apart in the last digits.
    assert difference.max() <= (0 if operation.startswith("translate") else 1)
    assert (difference > 0).float().mean() <= 0.001


@pytest.mark.parametrize("operation", GEOMETRY)
def test_strength_0_changes_nothing(operation: str) -> None:
    planes = make_planes(1, 9, 14)
    assert torch.equal(operate(planes, operation, torch.zeros(1)), planes)


@pytest.mark.parametrize("place", [-1, len(GEOMETRY), 13])
def test_other_operations_have_no_geometry(place: int) -> None:
    maps = operation_maps(torch.tensor([place]), torch.ones(1, dtype=torch.float64), 8, 8)
    assert torch.equal(maps[0], torch.eye(3, dtype=torch.float64))


def test_a_quarter_turn_is_exact_and_anticlockwise() -> None:
    planes = make_planes(2, 11, 11)
    turned = operate(planes, "rotate", torch.tensor([20 / 30, -20 / 30]))
    assert torch.equal(turned[0], planes[0].rot90(1, (1, 2)))
    assert torch.equal(turned[1], planes[1].rot90(-1, (1, 2)))


def test_maps_multiply_in_the_order_of_their_operations() -> None:
    planes = make_planes(1, 32, 32)
    moved = operation_maps(torch.tensor([2]), torch.tensor([0.25], dtype=torch.float64), 32, 32)
    turned = operation_maps(torch.tensor([4]), torch.tensor([2 / 3], dtype=torch.float64), 32, 32)
    expected = operate(operate(planes, "translate_x", torch.tensor([0.25])), "rotate", torch.tensor([2 / 3]))
    assert torch.equal(warp(planes, (moved @ turned)[:, :2].float()), expected)


@PROPERTY
@given(data=st.data(), height=st.integers(1, 9), width=st.integers(1, 9))
def test_shifts_and_mirrors_are_exact_by_either_way(data: st.DataObject, height: int, width: int) -> None:
    across, down = data.draw(st.integers(-11, 11)), data.draw(st.integers(-11, 11))
    mirrored = data.draw(st.booleans())
    planes = make_planes(1, height, width)
    box, move = [MIRRORED if mirrored else WHOLE], [[float(across), float(down)]]
    maps = crop_maps(torch.tensor(box).double(), torch.tensor(move).double(), height, width)
    shifted = shift(planes, *whole_places(maps, height, width))
    black = np.pad(planes[0].numpy(), ((0, 0), (11, 11), (11, 11)))
    expected = black[:, 11 + down : 11 + down + height, 11 + across : 11 + across + width]
    np.testing.assert_array_equal(shifted[0].numpy(), expected[..., ::-1] if mirrored else expected)
    assert torch.equal(crop(planes, box, move), shifted)


def test_mirroring_turns_some_images_over() -> None:
    planes = make_planes(3, 4, 5)
    turned = mirror(planes, torch.tensor([True, False, True]))
    assert torch.equal(turned, torch.stack([planes[0].flip(2), planes[1], planes[2].flip(2)]))


@PROPERTY
@given(
    edges=st.tuples(*[st.floats(0, 1)] * 4).filter(lambda e: abs(e[0] - e[2]) > 0.05 and abs(e[1] - e[3]) > 0.05),
    size=st.sampled_from([(16, 16), (8, 30)]),
)
def test_a_crop_stretches_its_box_from_edge_to_edge(
    edges: tuple[float, float, float, float], size: tuple[int, int]
) -> None:
    height, width = size
    left, top, right, bottom = edges
    x = torch.linspace(0, 240, width).expand(height, width)
    y = torch.linspace(0, 240, height)[:, None].expand(height, width)
    planes = torch.stack([x, y, x * 0 + 255]).round().to(torch.uint8)[None]
    cropped = crop(planes, [[left, top, right, bottom]], [[0.0, 0.0]])[0].float()
    across = 240 * torch.linspace(left, right, width).expand(height, width)
    down = 240 * torch.linspace(top, bottom, height)[:, None].expand(height, width)
    assert (cropped[0] - across).abs().max() <= 1.01
    assert (cropped[1] - down).abs().max() <= 1.01
    assert (cropped[2] == 255).all()  # nothing from beyond the edge


def test_warping_writes_to_nothing_that_it_was_given() -> None:
    planes = make_planes(2, 8, 8)
    kept = planes.clone()
    maps = torch.tensor([[[0.5, 0.1, 1.0], [0.0, 0.7, -2.0]]]).repeat(2, 1, 1)
    kept_maps = maps.clone()
    warp(planes, maps)
    assert torch.equal(planes, kept)
    assert torch.equal(maps, kept_maps)
