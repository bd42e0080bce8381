import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.distill.boxes import draw_boxes, erase, inside

PROPERTY = settings(deadline=None)
SHARES = st.floats(0, 1, exclude_max=True)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@PROPERTY
@given(area=st.floats(1e-3, 1), aspect=SHARES, across=SHARES, down=SHARES, most=st.sampled_from([1.0, 4 / 3, 1 / 0.3]))
def test_a_box_has_its_area_and_a_fair_shape_and_lies_in_the_image(
    area: float, aspect: float, across: float, down: float, most: float
) -> None:
    (box,) = draw_boxes(doubles(area), doubles(aspect, across, down)[:, None], most).tolist()
    left, top, right, bottom = box
    assert 0 <= left < right <= 1 + 1e-12
    assert 0 <= top < bottom <= 1 + 1e-12
    assert (right - left) * (bottom - top) == pytest.approx(area)
    assert 1 / most <= (right - left) / (bottom - top) * (1 + 1e-9) <= most * (1 + 1e-6)


def test_the_whole_image_is_its_own_box() -> None:
    assert draw_boxes(doubles(1.0), doubles(0.9, 0.8, 0.7)[:, None], 2.0).tolist() == [[0, 0, 1, 1]]


def test_the_logarithm_of_the_aspect_is_uniform() -> None:
    aspect = torch.linspace(0, 1, 5, dtype=torch.float64)
    boxes = draw_boxes(torch.full_like(aspect, 0.1), torch.stack([aspect, aspect * 0, aspect * 0]), 4.0)
    widths, heights = boxes[:, 2], boxes[:, 3]
    logarithms = (widths / heights).log() / math.log(4)
    torch.testing.assert_close(logarithms, doubles(-1, -0.5, 0, 0.5, 1))


@PROPERTY
@given(data=st.data(), height=st.integers(1, 5), width=st.integers(1, 5))
def test_a_box_holds_its_pixels_and_no_others(data: st.DataObject, height: int, width: int) -> None:
    edges = data.draw(st.lists(st.tuples(*[st.integers(0, 5)] * 4), min_size=1, max_size=3))
    mask = inside(torch.tensor(edges).float(), height, width)
    expected = [
        [[left <= x < right and top <= y < bottom for x in range(width)] for y in range(height)]
        for left, top, right, bottom in edges
    ]
    assert mask.tolist() == expected


def test_erasing_fills_the_box_and_leaves_the_rest() -> None:
    planes = torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8)
    kept = planes.clone()
    boxes = torch.tensor([[1.0, 0, 3, 2], [0, 0, 0, 0], [0, 0, 5, 4]])
    colours = torch.tensor([[1, 2, 255], [9, 9, 9], [0, 128, 255]], dtype=torch.uint8)
    erased = erase(planes, boxes, colours)
    expected = kept.clone()
    expected[0, :, 0:2, 1:3] = colours[0, :, None, None]
    expected[2] = colours[2, :, None, None]
    assert torch.equal(erased, expected)
    assert torch.equal(planes, kept)
