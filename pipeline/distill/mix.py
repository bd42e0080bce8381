"""MixUp and CutMix: images blended with, or patched from, another image of the batch; each sample by its own draw."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from pipeline.distill.augment import Augmentation, send
from pipeline.distill.boxes import inside

# Shares are whole 128ths, so that a blend is whole numbers: the same on every device, and 16 bits hold it.
_WHOLE = 128


@dataclass(frozen=True)
class Mixed:
    """A mixed batch: image i is λ_i of its own and 1 − λ_i of image `partner`[i] before mixing.

    `share` is λ, the weight of the sample's own target, 0 to 1. Where nothing is mixed, it is 1 and the partner the
    image itself. All three are on the batch's device.
    """

    pixels: UInt8[Tensor, "batch height width 3"]
    partner: Int[Tensor, " batch"]
    share: Float[Tensor, " batch"]


def mix(pixels: UInt8[Tensor, "batch height width 3"], settings: Augmentation, generator: torch.Generator) -> Mixed:
    """Mix images of a batch.

    λ ~ Beta(α, α), drawn for each sample. MixUp (arXiv 1710.09412) blends all pixels. CutMix (arXiv 1905.04899)
    takes a box of 1 − λ of the area around any pixel, cut off at the edges; its share is what is left of the image
    then, exactly. Where both are on, each sample draws one. Partners are a permutation of the batch.

    Args:
        pixels: RGB, on any device; not written to.
        settings: `mixup_alpha`, `cutmix_alpha` and `mix_probability`.
        generator: on the CPU.

    Returns:
        The mixed batch; `pixels` themselves where mixing is off.
    """
    batch_size, height, width, _ = pixels.shape
    itself = torch.arange(batch_size)
    if not settings.mix_probability or not (settings.mixup_alpha or settings.cutmix_alpha):
        return Mixed(pixels, send(itself, pixels.device), torch.ones(batch_size, device=pixels.device))
    uniform = torch.rand(4, batch_size, dtype=torch.float64, generator=generator)
    partner = torch.randperm(batch_size, generator=generator)
    # torch's own beta distribution takes no generator.
    random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    blended, cut = (_lambdas(alpha, batch_size, random) for alpha in (settings.mixup_alpha, settings.cutmix_alpha))
    mixed = uniform[0] < settings.mix_probability
    patched = mixed & (uniform[1] < _cutmix_rate(settings))
    boxes = _patches(cut, uniform[2:], (height, width)) * patched[:, None]
    weight = torch.where(mixed & ~patched, (blended * _WHOLE).round(), _WHOLE)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    share = weight / _WHOLE - areas / (height * width)
    tables = torch.stack([torch.where(mixed, partner, itself), weight, share, *boxes.T]).float()
    others, weight, share, *edges = send(tables, pixels.device)
    own = weight.to(torch.int16)[:, None, None] * ~inside(torch.stack(edges, dim=1), height, width)
    partner = others.long()
    return Mixed(_blend(pixels, partner, own), partner, share)


def _lambdas(alpha: float, batch_size: int, random: np.random.Generator) -> Float[Tensor, " batch"]:
    return torch.from_numpy(random.beta(alpha, alpha, batch_size)) if alpha else torch.ones(batch_size)


def _cutmix_rate(settings: Augmentation) -> float:
    return 0.5 if settings.mixup_alpha and settings.cutmix_alpha else float(settings.cutmix_alpha > 0)


def _patches(
    own: Float[Tensor, " batch"], uniform: Float[Tensor, "2 batch"], size: tuple[int, int]
) -> Float[Tensor, "batch 4"]:
    """Return boxes in whole pixels, cut off at the image's edges."""
    height, width = size
    sides = torch.tensor([[width], [height]])
    centres = (uniform * sides).floor()
    halves = (0.5 * (1 - own).sqrt() * sides).floor()
    starts = (centres - halves).clamp(min=0)
    ends = torch.minimum(centres + halves, sides)
    return torch.cat([starts, ends]).T


def _blend(
    pixels: UInt8[Tensor, "batch height width 3"],
    partner: Int[Tensor, " batch"],
    own: Int[Tensor, "batch height width"],
) -> UInt8[Tensor, "batch height width 3"]:
    planes = pixels.permute(0, 3, 1, 2).contiguous()
    other = planes.index_select(0, partner)
    blend = planes.to(torch.int16).sub_(other)
    blend.mul_(own[:, None]).add_(_WHOLE // 2).bitwise_right_shift_(7).add_(other)
    return blend.to(torch.uint8).permute(0, 2, 3, 1)
