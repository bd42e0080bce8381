"""Images of one view on the device, a batch at a time: all of them in an order of each epoch, or those asked for."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from pipeline.distill.held import Drawn, Held
from pipeline.distill.images import DecodedImages
from pipeline.distill.order import epoch_order, num_batches, step_generator


class DeviceImages:
    """Images and their labels; the pixels lie on the device where they fit."""

    def __init__(self, images: DecodedImages, device: torch.device) -> None:
        """Bring to the device what fits there.

        Args:
            images: of one view.
            device: where batches are wanted.
        """
        self._num_images, self._device = len(images), device
        self._labels = torch.from_numpy(images.labels).to(device)
        self._pixels = Held(lambda some, views: images.pixels[images.places[some], views], len(images), device)

    def __len__(self) -> int:
        """Return the number of images."""
        return self._num_images

    def batches(
        self, batch_size: int, seed: int, epoch: int, first_step: int
    ) -> Iterator[tuple[NDArray[np.int64], torch.Generator]]:
        """Draw the batches of an epoch.

        Args:
            batch_size: of all but the last, which may be smaller.
            seed: of the run.
            epoch: from 1; with the seed it decides the order.
            first_step: leave out those before.

        Yields:
            Which images, as `take` wants them, and a generator of whatever else is random in the step.
        """
        order = epoch_order(len(self), seed, epoch)
        for step in range(first_step, num_batches(len(self), batch_size)):
            yield order[step * batch_size : (step + 1) * batch_size], step_generator(seed, epoch, step)

    def take(self, chosen: NDArray[np.int64]) -> tuple[UInt8[Tensor, "batch height width 3"], Int[Tensor, " batch"]]:
        """Return pixels and labels of some images, on the device.

        Args:
            chosen: which.
        """
        drawn = Drawn.of(chosen, np.zeros(len(chosen), np.int64), self._device)
        return self._pixels.take(drawn), self._labels[drawn.index]
