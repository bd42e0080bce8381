"""What every image has, e.g. its pixels: on the device for the whole run where it fits, else fetched batch by batch."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from pipeline.distill.augment import send
from pipeline.runtime import fits_device

_BLOCK_BYTES = 1 << 27  # of what is read at once, on its way to the device

# Given images [B] and the view of each, or a slice of views, returns something of each image [B, ...].
Read = Callable[[NDArray[np.int64], Any], NDArray[Any]]


@dataclass(frozen=True)
class Drawn:
    """Which images a batch has, and which view of each: [B] on the CPU, and `index` and `view` on the device."""

    images: NDArray[np.int64]
    views: NDArray[np.int64]
    index: Int[Tensor, " batch"]
    view: Int[Tensor, " batch"]

    @classmethod
    def of(cls, images: NDArray[np.int64], views: NDArray[np.int64], device: torch.device) -> "Drawn":
        """Bring the choice to a device."""
        return cls(images, views, *(send(torch.from_numpy(chosen), device) for chosen in (images, views)))


class Held:
    """One thing of all images, e.g. their pixels."""

    def __init__(self, read: Read, num_images: int, device: torch.device) -> None:
        """Bring it to the device if it fits there.

        Args:
            read: where it comes from.
            num_images: how many there are.
            device: where batches are wanted.
        """
        self._read, self._device = read, device
        self._all: Shaped[Tensor, "images views ..."] | None = None
        first = read(np.arange(1), slice(None))
        if not fits_device(num_images * first.nbytes, device):
            return
        size = max(1, _BLOCK_BYTES // first.nbytes)  # the CPU's memory need not hold all of it
        with suppress(torch.OutOfMemoryError):  # another process may have taken what was free
            held = torch.empty((num_images, *first.shape[1:]), dtype=torch.from_numpy(first).dtype, device=device)
            for start in range(0, num_images, size):
                block = read(np.arange(start, min(start + size, num_images)), slice(None))
                held[start : start + len(block)] = torch.from_numpy(block).to(device)
            self._all = held

    def take(self, drawn: Drawn) -> Shaped[Tensor, "batch ..."]:
        """Return a batch of it, on the device."""
        if self._all is None:
            return send(torch.from_numpy(self._read(drawn.images, drawn.views)), self._device)
        return self._all[drawn.index, drawn.view]
