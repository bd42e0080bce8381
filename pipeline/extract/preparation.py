"""What an extraction and a check prepare alike: the teacher that settings name, and what embeds with it."""

import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data import Labelled
from pipeline.errors import PipelineError
from pipeline.extract.batches import Rendering
from pipeline.extract.config import ExtractSettings
from pipeline.extract.embed import Embedder, make_plan
from pipeline.extract.partial import chunk_dtype
from pipeline.extract.pooling import TAKEN
from pipeline.progress import LOGGER
from pipeline.runtime import resolve_precision

if TYPE_CHECKING:
    from pipeline.extract.teacher import Teacher

# Images in a forward pass. On a CPU more than this no longer fit the cache; a GPU is kept busy by this many.
BATCH_SIZES = {"cpu": 16, "cuda": 128, "mps": 64}


def load_settings_teacher(settings: ExtractSettings, device: torch.device) -> "Teacher":
    """Load the teacher that settings name, and say how its embedding is taken.

    Raises:
        PipelineError: its library is not installed, or it cannot be loaded.
    """
    try:
        from pipeline.extract.teacher import load_teacher
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"extract needs {error.name}, which is not installed: pip install 'clip-embed-kd[extract]'"
        ) from None
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory and CUDA contexts go by the current device
    precision = resolve_precision(settings.precision, device)
    teacher = load_teacher(settings.teacher, settings.teacher_revision, settings.resolved_pooling(), device, precision)
    info = teacher.info
    LOGGER.info(
        "Teacher %s (%s): the embedding is %s, %d values, in %s on %s.",
        *(info.name, info.architecture, TAKEN[info.pooling], info.embed_dim, info.precision, device),
    )
    return teacher


def make_embedder(settings: ExtractSettings, data: Labelled, rows: NDArray[np.int64], teacher: "Teacher") -> Embedder:
    """Prepare to embed rows of the data as settings, teacher and its device ask for."""
    device = teacher.model.device
    batch_size = settings.batch_size or BATCH_SIZES[device.type]
    preprocess, precision = teacher.preprocess, teacher.model.dtype
    rendering = Rendering(
        preprocess, settings.views, settings.view_size, settings.seed, precision, preprocess.shortest_edge
    )
    plan = make_plan(rows, batch_size, chunk_dtype(settings.views, teacher.info.embed_dim).itemsize)
    return Embedder(settings, data, teacher, rendering, plan, batch_size, choose_num_workers(settings, device))


def choose_num_workers(settings: ExtractSettings, device: torch.device) -> int:
    """Return how many processes decode images beside this one."""
    if settings.workers is not None:
        return settings.workers
    # On a CPU the teacher itself keeps every core busy, and where processes do not fork (macOS) each would start anew.
    if device.type != "cuda":
        return 0
    num_sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this machine, as torchrun says
    return max(1, min(8, len(os.sched_getaffinity(0)) // num_sharing))
