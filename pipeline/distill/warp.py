"""Geometry, one affine map a sample: crop, mirror, shear, translate and rotate become a single reading of pixels.

What lies outside the image is black, as in TrivialAugment and in the crops usual for CIFAR. A map takes a place in
the result, (x, y, 1) in pixels from the image's centre, to the place in the image that it shows.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

# How far full strength goes in TrivialAugment's wide space (arXiv 2103.10158), as torchvision 0.26 has it.
GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_SHEAR = 0.99
_TRANSLATE_PX = 32
_ROTATE_DEGREES = 135.0


def operation_maps(
    chosen: Int[Tensor, " batch"], strengths: Float[Tensor, " batch"], height: int, width: int
) -> Float[Tensor, "batch 3 3"]:
    """Return the map of one operation a sample, as torchvision's TrivialAugmentWide has it.

    Args:
        chosen: places in `GEOMETRY`; any other number changes nothing.
        strengths: −1 to 1, float64. Shears pivot on the top left corner, rotations on the centre,
            anticlockwise; translations are cut to whole pixels.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        float64.
    """
    # An image has one of them; the others are 0 and drop out.
    shear_x, shear_y, right, down, turn = (torch.where(chosen == place, strengths, 0) for place in range(len(GEOMETRY)))
    shear_x, shear_y = _SHEAR * shear_x, _SHEAR * shear_y
    angle = math.radians(_ROTATE_DEGREES) * turn
    x_from = [angle.cos(), shear_x - angle.sin(), shear_x * (height / 2) - (_TRANSLATE_PX * right).trunc()]
    y_from = [shear_y + angle.sin(), angle.cos(), shear_y * (width / 2) - (_TRANSLATE_PX * down).trunc()]
    zero = torch.zeros_like(strengths)
    return torch.stack([*x_from, *y_from, zero, zero, zero + 1], dim=1).view(-1, 3, 3)


def crop_maps(
    boxes: Float[Tensor, "batch 4"], shifts: Float[Tensor, "batch 2"], height: int, width: int
) -> Float[Tensor, "batch 3 3"]:
    """Return the maps that cut out boxes and stretch them to the image's size.

    Args:
        boxes: left, top, right and bottom, 0 to 1 from the centre of the first pixel to that of the last, so that no
            pixel is read half beyond the edge; a mirrored box (left and right exchanged) mirrors its image.
        shifts: by how many pixels the box moves, across and down.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        float64.
    """
    steps = torch.tensor([width - 1, height - 1], dtype=torch.float64)
    start, end = boxes[:, :2], boxes[:, 2:]
    maps = torch.zeros(len(boxes), 3, 3, dtype=torch.float64)
    maps[:, :2, :2] = torch.diag_embed(end - start)
    maps[:, :2, 2] = ((start + end) / 2 - 0.5) * steps + shifts
    maps[:, 2, 2] = 1
    return maps


def warp(
    planes: UInt8[Tensor, "batch 3 height width"], maps: Float[Tensor, "batch 2 3"]
) -> UInt8[Tensor, "batch 3 height width"]:
    """Read every pixel of the result between four pixels of the image, bilinear.

    Args:
        planes: RGB.
        maps: the maps' first two rows, float32, on the planes' device.

    Returns:
        New planes, rounded. Where a map mirrors and shifts by whole pixels only, the pixels are exact.
    """
    batch_size, _, height, width = planes.shape
    grid = torch.empty(batch_size, height, width, 2, device=planes.device)
    # In half sides, as grid_sample wants them. affine_grid computes the same as a matrix product: five times slower
    # on a CPU, and no two devices need round alike.
    for axis, side in enumerate((width, height)):
        by_x, by_y, constant = (maps[:, axis] * (2 / side)).T[..., None]
        along_row, along_column = by_x * _from_centre(width, planes.device), by_y * _from_centre(height, planes.device)
        torch.add(along_row[:, None, :], (along_column + constant)[:, :, None], out=grid[..., axis])
    read = F.grid_sample(planes.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return read.round_().to(torch.uint8)


def whole_places(
    maps: Float[Tensor, "batch 3 3"], height: int, width: int
) -> tuple[Int[Tensor, "batch height"], Int[Tensor, "batch width"]]:
    """Return which rows and columns maps show that only mirror and shift by whole pixels.

    Args:
        maps: on the CPU.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        Rows and columns as `shift` takes them.
    """
    places = []
    for axis, side in ((1, height), (0, width)):
        place = maps[:, axis, axis, None] * _from_centre(side, maps.device) + maps[:, axis, 2:] + (side + 1) / 2
        places.append(torch.where((place < 1) | (place > side), 0, place).long())
    return places[0], places[1]


def shift(
    planes: UInt8[Tensor, "batch 3 height width"],
    rows: Int[Tensor, "batch height"],
    columns: Int[Tensor, "batch width"],
) -> UInt8[Tensor, "batch 3 height width"]:
    """Put images together from their own rows and columns, or black.

    Args:
        planes: RGB.
        rows: the row of the image that each row of the result shows, from 1; 0 is black. On the planes' device.
        columns: the same of columns.

    Returns:
        New planes.
    """
    framed = F.pad(planes, (1, 0, 1, 0))
    places = (rows[:, :, None] * framed.shape[3] + columns[:, None, :]).flatten(1)
    return framed.flatten(2).gather(2, places[:, None].expand(-1, 3, -1)).view(planes.shape)


def mirror(
    planes: UInt8[Tensor, "batch 3 height width"], mirrored: Bool[Tensor, " batch"]
) -> UInt8[Tensor, "batch 3 height width"]:
    """Exchange left and right of some images.

    Args:
        planes: RGB.
        mirrored: which, on the planes' device.

    Returns:
        New planes.
    """
    columns = torch.arange(planes.shape[3], device=planes.device)
    chosen = torch.where(mirrored[:, None], columns.flip(0), columns)
    return planes.gather(3, chosen[:, None, None, :].expand(planes.shape))


def _from_centre(side: int, device: torch.device) -> Float[Tensor, " side"]:
    return torch.arange(side, device=device) - (side - 1) / 2
