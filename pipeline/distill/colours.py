"""TrivialAugment's colour operations, one a sample, in the arithmetic of torchvision.

Products and sums are steps of their own, never fused, and sums of many pixels whole numbers: so the result is the
same on every device and for any number of threads.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchvision.transforms.v2.functional import autocontrast, equalize

Planes = UInt8[Tensor, "batch 3 height width"]
Strengths = Float[Tensor, "batch 1 1 1"]

# How far full strength goes in TrivialAugment's wide space (arXiv 2103.10158), as torchvision 0.26 has it.
_ENHANCE = 0.99
_POSTERIZE_BITS = 6


def by_colour(chosen: Int[Tensor, " batch"]) -> tuple[Int[Tensor, " batch"], list[int]]:
    """Order images by their operation.

    Args:
        chosen: places in `COLOURS`, on the CPU; those below 0 keep their colours.

    Returns:
        The images, those first that keep their colours; and how many do, and have each of `COLOURS`.
    """
    groups = (chosen + 1).clamp(min=0)
    return groups.argsort(stable=True), groups.bincount(minlength=len(COLOURS) + 1).tolist()


def change_colours(
    planes: Planes, order: Int[Tensor, " batch"], strengths: Float[Tensor, " batch"], counts: Sequence[int]
) -> Planes:
    """Change each image's colours by its own operation.

    Args:
        planes: RGB.
        order: the images as `by_colour` orders them, on the planes' device.
        strengths: −1 to 1, in that order; float32, on the planes' device.
        counts: of `by_colour`. They are numbers, not a tensor, so that nothing waits for a device.

    Returns:
        New planes, in the order of the old ones.
    """
    kept, *groups = torch.split(planes.index_select(0, order), list(counts))
    _, *by = torch.split(strengths[:, None, None, None], list(counts))
    changed = [apply(group, each) for apply, group, each in zip(_OPERATIONS.values(), groups, by, strict=True)]
    return torch.cat([kept, *changed]).index_select(0, order.argsort())


def _blend(images: Tensor, origin: Tensor | float, strengths: Strengths) -> Planes:
    # Away from `origin`, or towards it; what is there stays, to the last digit, since fractions are cut off.
    return (images + _ENHANCE * strengths * (images - origin)).clamp_(0, 255).to(torch.uint8)


def _grey(planes: Planes) -> Float[Tensor, "batch 1 height width"]:
    red, green, blue = (planes[:, channel, None] for channel in range(3))
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor_()


def _autocontrast(planes: Planes, strengths: Strengths) -> Planes:
    return autocontrast(planes)  # type: ignore[no-any-return]


def _equalize(planes: Planes, strengths: Strengths) -> Planes:
    return equalize(planes)  # type: ignore[no-any-return]


def _posterize(planes: Planes, strengths: Strengths) -> Planes:
    dropped_bits = (strengths.abs() * _POSTERIZE_BITS).round().to(torch.uint8)
    return planes >> dropped_bits << dropped_bits


def _solarize(planes: Planes, strengths: Strengths) -> Planes:
    # Thresholds are whole or halves; a quarter below, rounding does not matter.
    threshold = (255 * (1 - strengths.abs()) - 0.25).ceil().to(torch.uint8)
    return planes ^ (planes >= threshold).to(torch.uint8).mul_(255)


def _brightness(planes: Planes, strengths: Strengths) -> Planes:
    return _blend(planes, 0.0, strengths)


def _contrast(planes: Planes, strengths: Strengths) -> Planes:
    grey = _grey(planes)
    mean = grey.int().sum(dim=(1, 2, 3), keepdim=True) / (grey.shape[2] * grey.shape[3])
    return _blend(planes, mean, strengths)


def _saturation(planes: Planes, strengths: Strengths) -> Planes:
    return _blend(planes, _grey(planes), strengths)


def _sharpness(planes: Planes, strengths: Strengths) -> Planes:
    # Against the smoothing kernel (1 1 1, 1 5 1, 1 1 1) / 13; the outermost pixels stay.
    if min(planes.shape[2:]) < 3:
        return planes
    deep = planes.to(torch.int16)
    rows = deep[:, :, :-2] + deep[:, :, 1:-1] + deep[:, :, 2:]
    inner = planes[:, :, 1:-1, 1:-1]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * deep[:, :, 1:-1, 1:-1]
    sharpened = planes.clone()
    sharpened[:, :, 1:-1, 1:-1] = _blend(inner, (sums / 13).round_(), strengths)
    return sharpened


_OPERATIONS: dict[str, Callable[[Planes, Strengths], Planes]] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "posterize": _posterize,
    "solarize": _solarize,
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "sharpness": _sharpness,
}
COLOURS = tuple(_OPERATIONS)
