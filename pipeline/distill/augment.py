"""Augmentation of a batch that lies on the device: every sample by its own draw, without a loop over samples.

The order is crop and flip, shapes and colours, erasing. Mixing two images is `mix`'s, since it changes targets too.
"""

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pipeline.distill.boxes import draw_boxes, erase
from pipeline.distill.colours import COLOURS, by_colour, change_colours
from pipeline.distill.warp import GEOMETRY, crop_maps, mirror, operation_maps, shift, warp, whole_places

OPERATIONS = ("identity", *GEOMETRY, *COLOURS)
_MAX_CROP_ASPECT = 4 / 3
# Erased boxes as torchvision draws them; the paper (arXiv 1708.04896) goes up to 0.4 of the area.
_ERASED_AREA = (0.02, 0.33)
_MAX_ERASED_ASPECT = 1 / 0.3
_NUM_STRENGTHS = 31
_STAGED_BYTES = 1 << 16  # https://docs.nvidia.com/cuda/cuda-driver-api/api-sync-behavior.html
# Numbers that a sample draws: flip, shift and window; whether it is erased, box and colour; those of an operation.
_NUM_OF_CROP, _NUM_OF_ERASING, _NUM_OF_OPERATION = 7, 8, 3

Planes = UInt8[Tensor, "batch 3 height width"]


class Augmentation(BaseModel):
    """What the student's images undergo, each by its own draw; by default nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    horizontal_flip: float = Field(default=0.0, ge=0, le=1, description="probability")
    random_crop_px: int = Field(default=0, ge=0, le=1024, description="largest shift each way, black beyond; 0: off")
    resized_crop_min_area: float = Field(
        default=1.0, gt=0, le=1, description="smallest share of the area that a random resized crop keeps; 1: off"
    )
    operations: int = Field(default=0, ge=0, le=14, description="of TrivialAugment, one after another; 0: off")
    random_erasing: float = Field(default=0.0, ge=0, le=1, description="probability")
    mixup_alpha: float = Field(default=0.0, ge=0, le=100, description="λ ~ Beta(α, α); 0: off")
    cutmix_alpha: float = Field(default=0.0, ge=0, le=100, description="λ ~ Beta(α, α); 0: off; as often as mixup")
    mix_probability: float = Field(default=1.0, ge=0, le=1, description="that an image is mixed with another")


def augment(
    pixels: UInt8[Tensor, "batch height width 3"], settings: Augmentation, generator: torch.Generator
) -> UInt8[Tensor, "batch height width 3"]:
    """Augment each image by itself.

    Operations are TrivialAugment's (arXiv 2103.10158), of uniform kind and strength. All geometry becomes one
    reading of pixels before all colours: a rotation after a crop shows what the crop left out, and black only
    beyond the image. An image that is but mirrored and shifted keeps its exact pixels.

    Args:
        pixels: RGB, on any device; not written to.
        settings: what to do, except for mixing.
        generator: on the CPU. How many numbers it gives follows from the batch's size and `operations` alone.

    Returns:
        On the same device; plane by plane in memory, as a student takes them. The same draws give the same pixels
        for any number of threads, and on another kind of device but for rounding where pixels are interpolated.
    """
    num_drawn = [_NUM_OF_CROP, _NUM_OF_ERASING, _NUM_OF_OPERATION * settings.operations]
    uniform = torch.rand(sum(num_drawn), len(pixels), dtype=torch.float64, generator=generator)
    crop, erasing, operations = torch.split(uniform, num_drawn)
    chosen, strengths = _operations(operations.view(settings.operations, _NUM_OF_OPERATION, len(pixels)))
    planes = pixels.permute(0, 3, 1, 2).contiguous()
    size = (planes.shape[2], planes.shape[3])
    if settings.resized_crop_min_area < 1 or settings.operations:
        maps = _crops(crop, settings, size)
        for each, by in zip(chosen, strengths, strict=True):
            maps = maps @ operation_maps(each - OPERATIONS.index(GEOMETRY[0]), by, *size)
        planes = warp(planes, send(maps[:, :2].float(), planes.device))
    elif settings.random_crop_px:
        rows, columns = whole_places(_crops(crop, settings, size), *size)
        planes = shift(planes, send(rows, planes.device), send(columns, planes.device))
    elif settings.horizontal_flip:
        planes = mirror(planes, send(crop[0] < settings.horizontal_flip, planes.device))
    for each, by in zip(chosen, strengths, strict=True):
        order, counts = by_colour(each - OPERATIONS.index(COLOURS[0]))
        planes = change_colours(planes, send(order, planes.device), send(by[order].float(), planes.device), counts)
    if settings.random_erasing:
        planes = _erase(planes, erasing, settings.random_erasing)
    return planes.permute(0, 2, 3, 1)


def send(drawn: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """Bring to a device what was drawn on the CPU, without waiting for the device where that is safe.

    Args:
        drawn: may be freed at once.
        device: where it is wanted.

    Returns:
        It or its copy.
    """
    if device.type != "cuda":
        # MPS would read the memory later, when it may be something else's
        # (https://github.com/pytorch/pytorch/issues/189690).
        return drawn.to(device)
    # CUDA copies up to 64 KiB aside before it returns. With more it would wait for the device, unless that is pinned;
    # PyTorch keeps pinned memory until it has been read.
    return (drawn if drawn.nbytes <= _STAGED_BYTES else drawn.pin_memory()).to(device, non_blocking=True)


def _operations(
    uniform: Float[Tensor, "operations 3 batch"],
) -> tuple[Int[Tensor, "operations batch"], Float[Tensor, "operations batch"]]:
    """Return places in `OPERATIONS`, and strengths of −1 to 1 in steps of 1/30."""
    which, strength, sign = uniform.unbind(1)
    strengths = (strength * _NUM_STRENGTHS).floor() / (_NUM_STRENGTHS - 1)
    return (which * len(OPERATIONS)).long(), torch.where(sign < 0.5, -strengths, strengths)


def _crops(
    uniform: Float[Tensor, "7 batch"], settings: Augmentation, size: tuple[int, int]
) -> Float[Tensor, "batch 3 3"]:
    areas = 1 - (1 - settings.resized_crop_min_area) * uniform[3]
    boxes = draw_boxes(areas, uniform[4:], _MAX_CROP_ASPECT)
    left, top, right, bottom = boxes.T
    mirrored = uniform[0] < settings.horizontal_flip
    boxes = torch.stack([torch.where(mirrored, right, left), top, torch.where(mirrored, left, right), bottom], dim=1)
    reach = settings.random_crop_px
    shifts = (uniform[1:3] * (2 * reach + 1)).floor() - reach
    return crop_maps(boxes, shifts.T, *size)


def _erase(planes: Planes, uniform: Float[Tensor, "8 batch"], probability: float) -> Planes:
    smallest, largest = _ERASED_AREA
    boxes = draw_boxes(smallest + (largest - smallest) * uniform[1], uniform[2:5], _MAX_ERASED_ASPECT)
    boxes = (boxes * boxes.new_tensor([planes.shape[3], planes.shape[2]] * 2)).round()
    boxes *= (uniform[0] < probability)[:, None]  # empty, so that nothing is erased
    colours = (uniform[5:] * 256).T.to(torch.uint8)
    return erase(planes, send(boxes.float(), planes.device), send(colours, planes.device))
