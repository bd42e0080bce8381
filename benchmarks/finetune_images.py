"""Images on the device, taken a batch at a time: all of them in an order drawn for each epoch, or those asked for."""

from collections.abc import Iterator

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from pipeline.distill.augment import send
from pipeline.distill.feed import step_seed
from pipeline.distill.images import DecodedImages
from pipeline.runtime import fits_device

_ORDER = 2**32 - 1  # a step that never comes: its seed is the order's


class DeviceImages:
    """Images and their labels; the pixels lie on the device where they fit."""

    def __init__(self, images: DecodedImages, device: torch.device) -> None:
        """Bring to the device what fits there.

        Args:
            images: of one view.
            device: where batches are wanted.
        """
        self._images, self._device = images, device
        self._labels = torch.from_numpy(images.labels).to(device)
        self._pixels: Tensor | None = None
        if fits_device(images.pixels.nbytes, device):
            self._pixels = torch.from_numpy(images.pixels[images.places, 0]).to(device)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def num_steps(self, batch_size: int) -> int:
        """Return the number of batches in an epoch."""
        full, rest = divmod(len(self), batch_size)
        return full + (rest > 1)  # one image has no batch statistics: it waits for the next epoch

    def batches(
        self, batch_size: int, seed: int, epoch: int, first_step: int
    ) -> Iterator[tuple[Int[Tensor, " batch"], torch.Generator]]:
        """Draw the batches of an epoch.

        Args:
            batch_size: of all but the last, which may be smaller.
            seed: of the run.
            epoch: from 1; with the seed it decides the order.
            first_step: leave out those before.

        Yields:
            Which images, as `take` wants them, and a generator of whatever else is random in the step.
        """
        generator = torch.Generator().manual_seed(step_seed(seed, epoch, _ORDER))
        parts = torch.split(torch.randperm(len(self), generator=generator), batch_size)
        for step in range(first_step, self.num_steps(batch_size)):
            yield parts[step], torch.Generator().manual_seed(step_seed(seed, epoch, step))

    def take(
        self, chosen: Int[Tensor, " batch"]
    ) -> tuple[UInt8[Tensor, "batch height width 3"], Int[Tensor, " batch"]]:
        """Return pixels and labels of some images, on the device.

        Args:
            chosen: which, on the CPU.
        """
        index = send(chosen, self._device)
        if self._pixels is not None:
            return self._pixels[index], self._labels[index]
        pixels = self._images.pixels[self._images.places[chosen.numpy()], 0]
        return torch.from_numpy(pixels).to(self._device), self._labels[index]
