"""Each colour operation of a batch against torchvision's of one image."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as single

from pipeline.distill.colours import COLOURS, by_colour, change_colours

PROPERTY = settings(deadline=None, max_examples=30)
STEPS = torch.arange(-30, 31)
# Fractions are cut off: where a result is nearly whole, the last digit of a product decides.
CUT_OFF = ("brightness", "contrast", "saturation", "sharpness")
SINGLE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "autocontrast": lambda image, strength: single.autocontrast(image),
    "equalize": lambda image, strength: single.equalize(image),
    "posterize": lambda image, strength: single.posterize(image, round(8 - 6 * abs(strength))),
    "solarize": lambda image, strength: single.solarize(image, 255 - 8.5 * round(30 * abs(strength))),
    "brightness": lambda image, strength: single.adjust_brightness(image, 1 + 0.99 * strength),
    "contrast": lambda image, strength: single.adjust_contrast(image, 1 + 0.99 * strength),
    "saturation": lambda image, strength: single.adjust_saturation(image, 1 + 0.99 * strength),
    "sharpness": lambda image, strength: single.adjust_sharpness(image, 1 + 0.99 * strength),
}


def make_image(kind: str, height: int = 16, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (3, height, width), generator=generator)
    ramp = (torch.arange(width) * 255 // max(width - 1, 1)).expand(3, height, width)
    kinds = {
        "noise": noise,
        "ramp": (ramp + torch.tensor([0, 40, 90])[:, None, None]) % 256,
        "pale": 100 + noise % 50,
        "plain": torch.tensor([0, 77, 255])[:, None, None].expand(3, height, width),
        "harsh": noise // 128 * 255,
    }
    return kinds[kind].to(torch.uint8)


def change(planes: Tensor, chosen: Tensor, strengths: Tensor) -> Tensor:
    order, counts = by_colour(chosen)
    return change_colours(planes, order, strengths[order].float(), counts)


def test_these_are_the_operations() -> None:
    assert tuple(SINGLE) == COLOURS


@pytest.mark.parametrize("kind", ["noise", "ramp", "pale", "plain", "harsh"])
@pytest.mark.parametrize("operation", COLOURS)
def test_an_operation_is_torchvisions_at_every_strength(operation: str, kind: str) -> None:
    image = make_image(kind)
    strengths = STEPS.double() / 30
    chosen = torch.full((len(STEPS),), COLOURS.index(operation))
    changed = change(image.expand(len(STEPS), -1, -1, -1), chosen, strengths)
    expected = torch.stack([SINGLE[operation](image, strength) for strength in strengths.tolist()])
    difference = (changed.int() - expected.int()).abs()
    assert changed.dtype == torch.uint8
    assert difference.max() <= (1 if operation in CUT_OFF else 0)
    assert (difference > 0).float().mean() <= 0.01


@pytest.mark.parametrize("operation", COLOURS)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (2, 7), (3, 3)])
def test_small_images_are_changed_too(operation: str, size: tuple[int, int]) -> None:
    image = make_image("noise", *size)
    changed = change(image[None], torch.tensor([COLOURS.index(operation)]), torch.tensor([0.5]))
    difference = (changed[0].int() - SINGLE[operation](image, 0.5).int()).abs()
    assert difference.max() <= (1 if operation in CUT_OFF else 0)


@pytest.mark.parametrize(
    "operation", [name for name in COLOURS if name not in ("autocontrast", "equalize", "solarize")]
)
def test_strength_0_changes_nothing(operation: str) -> None:
    image = make_image("noise")[None]
    assert torch.equal(change(image, torch.tensor([COLOURS.index(operation)]), torch.zeros(1)), image)


def test_sharpness_leaves_plain_images_as_they_are() -> None:
    planes = make_image("plain").expand(61, -1, -1, -1)
    assert torch.equal(change(planes, torch.full((61,), COLOURS.index("sharpness")), STEPS / 30), planes)


@PROPERTY
@given(chosen=st.lists(st.integers(-6, len(COLOURS) - 1), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_a_sample_is_changed_as_if_it_were_alone(chosen: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randint(0, 256, (len(chosen), 3, 5, 4), dtype=torch.uint8, generator=generator)
    strengths = torch.rand(len(chosen), generator=generator) * 2 - 1
    kept = planes.clone()
    together = change(planes, torch.tensor(chosen), strengths)
    alone = [
        change(planes[i : i + 1], torch.tensor(chosen[i : i + 1]), strengths[i : i + 1]) for i in range(len(chosen))
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(planes, kept)
    untouched = torch.tensor(chosen) < 0
    assert torch.equal(together[untouched], planes[untouched])


def test_images_are_ordered_by_operation() -> None:
    order, counts = by_colour(torch.tensor([3, -1, 0, 3, -6, 0]))
    assert order.tolist() == [1, 4, 2, 5, 0, 3]
    assert counts == [2, 2, 0, 0, 2, 0, 0, 0, 0]
