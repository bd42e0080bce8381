"""TrivialAugment's colour operations, one a sample, in the arithmetic of torchvision.

Every step is an operation of its own on whole tensors, in whole numbers where sums are taken: so the pixels are
the same on every device and for any number of threads.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchvision.transforms.v2.functional import autocontrast, equalize, rgb_to_grayscale

Planes = UInt8[Tensor, "batch 3 height width"]
Strengths = Float[Tensor, "batch 1 1 1"]

# TrivialAugment's wide space (arXiv 2103.10158, table 7): how far full strength goes.
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
    changing = order[counts[0] :]
    groups = planes.index_select(0, changing).split(list(counts[1:]))
    strengths_of = strengths[counts[0] :, None, None, None].split(list(counts[1:]))
    changed = [apply(group, by) for apply, group, by in zip(_OPERATIONS.values(), groups, strengths_of, strict=True)]
    return planes.index_copy(0, changing, torch.cat(changed))


def _blend(images: Tensor, origin: Tensor | float, strengths: Strengths) -> Planes:
    # Away from `origin`, or towards it. Pillow and torchvision cut off what lies behind the point, too.
    factors = 1 + _ENHANCE * strengths
    return (images * factors + origin * (1 - factors)).clamp_(0, 255).to(torch.uint8)


def _grey(planes: Planes) -> Float[Tensor, "batch 1 height width"]:
    return rgb_to_grayscale(planes.float()).floor_()  # type: ignore[no-any-return]


def _autocontrast(planes: Planes, strengths: Strengths) -> Planes:
    return autocontrast(planes)  # type: ignore[no-any-return]


def _equalize(planes: Planes, strengths: Strengths) -> Planes:
    return equalize(planes)  # type: ignore[no-any-return]


def _posterize(planes: Planes, strengths: Strengths) -> Planes:
    dropped_bits = (strengths.abs() * _POSTERIZE_BITS).round()
    return planes & (256 - dropped_bits.exp2()).to(torch.uint8)


def _solarize(planes: Planes, strengths: Strengths) -> Planes:
    return torch.where(planes >= 255 * (1 - strengths.abs()), 255 - planes, planes)


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
    inner = planes[:, :, 1:-1, 1:-1].float()
    sums = F.avg_pool2d(planes.float(), kernel_size=3, stride=1, divisor_override=1)
    smooth = ((sums + 4 * inner) / 13).round_()
    sharpened = planes.clone()
    sharpened[:, :, 1:-1, 1:-1] = _blend(inner, smooth, strengths)
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
