"""What a student says of single image files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.distill.images import fit_to
from pipeline.distill.student import Student
from pipeline.errors import PipelineError, first_line
from pipeline.pixels import StripImageError, to_rgb
from pipeline.runtime import full_float32

_NUM_BEST = 5


def predict(student: Student, paths: Sequence[Path], device: torch.device) -> list[list[tuple[str, float]]]:
    """Classify image files, in float32.

    Args:
        student: on `device`, in evaluation mode.
        paths: the files.
        device: where to compute.

    Returns:
        For each file the up to five most probable classes and their probabilities, best first.

    Raises:
        PipelineError: a file is missing or not an image; none is classified then.
    """
    fit = fit_to(student.config.image_size)
    images = [_read(path, fit) for path in paths]
    best = []
    for image in images:
        with torch.inference_mode(), full_float32():
            logits = student(student.normalise(torch.from_numpy(image)[None].to(device)))[1]
        top = logits[0].softmax(dim=0).topk(min(_NUM_BEST, logits.shape[1]))
        names = [student.config.class_names[index] for index in top.indices.tolist()]
        best.append(list(zip(names, top.values.tolist(), strict=True)))
    return best


def _read(path: Path, fit: Callable[[Image.Image], Image.Image]) -> NDArray[np.uint8]:
    try:
        return np.array(fit(_open(path)))
    except StripImageError as error:
        raise PipelineError(f"{path}: is too long for its width ({error}). Crop it first.") from None


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise PipelineError(f"{path}: is not an image that can be read ({reason}).") from None
