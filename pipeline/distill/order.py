"""Which images come when, and every seed of a step: all follow from the run's, so that it can be gone on with."""

import numpy as np
import torch
from numpy.typing import NDArray

_ORDER = 2**32 - 1  # a step that never comes: its seed is the order's


def num_batches(num_images: int, batch_size: int) -> int:
    """Return the number of batches in an epoch, of which the last may be smaller.

    One image has no batch statistics (BatchNorm fails) and no negatives: it waits for the next epoch.
    """
    full, rest = divmod(num_images, batch_size)
    return full + (rest > 1)


def epoch_order(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Draw the order of the images in an epoch.

    Args:
        num_images: how many there are.
        seed: of the run.
        epoch: from 1.

    Returns:
        [num_images] each image once.
    """
    order: NDArray[np.int64] = torch.randperm(num_images, generator=step_generator(seed, epoch, _ORDER)).numpy()
    return order


def step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """Return the randomness of one step's batch, on the CPU."""
    return torch.Generator().manual_seed(step_seed(seed, epoch, step))


def step_seed(seed: int, epoch: int, step: int, purpose: int = 0) -> int:
    """Return the seed of something random in one step, without a relation to the seeds of others.

    Args:
        seed: of the run.
        epoch: from 1; 0 is before the run.
        step: of the epoch, from 0.
        purpose: 0 for the batch, 1 for what the student drops.
    """
    return int(np.random.SeedSequence([seed, epoch, step, purpose]).generate_state(1, np.uint64)[0]) >> 1
