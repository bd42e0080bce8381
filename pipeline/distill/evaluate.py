"""How good a student is on labelled images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data import Labelled, load_labelled
from pipeline.distill.augment import send
from pipeline.distill.cache import cached_images
from pipeline.distill.config import EvaluateSettings
from pipeline.distill.images import DecodedImages
from pipeline.distill.student import Student, load_student
from pipeline.errors import PipelineError, listed
from pipeline.progress import ProgressBar
from pipeline.runtime import batch_must_fit, full_float32, resolve_device, resolve_precision

MAX_EMBEDDED = 10_000  # images whose embeddings an evaluation keeps: bounds their memory


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent. `correct` and `count` [C] are per class of the student, top-1.

    `predicted` [N] is the class that each image is taken for. `embedded` [M] are places of up to 10,000 images, from
    the first to the last at equal distances, and `embeddings` [M, d] what the student makes of these.
    """

    top1: float
    top5: float
    class_names: tuple[str, ...]
    correct: NDArray[np.int64]
    count: NDArray[np.int64]
    predicted: NDArray[np.int64]
    embedded: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    seconds: float
    images_per_second: float

    def per_class(self) -> dict[str, dict[str, int | float]]:
        """Return number of images and top-1 accuracy in percent of each class that has images."""
        return {
            name: {"num_images": int(count), "top1": 100 * int(correct) / int(count)}
            for name, correct, count in zip(self.class_names, self.correct, self.count, strict=True)
            if count
        }

    def worst(self) -> list[tuple[str, float]]:
        """Return up to five classes of lowest accuracy, with it, in percent."""
        return sorted(((name, figures["top1"]) for name, figures in self.per_class().items()), key=lambda row: row[1])[
            :5
        ]


def evaluate_student(
    student: Student,
    images: DecodedImages,
    device: torch.device,
    precision: torch.dtype,
    batch_size: int,
) -> Evaluation:
    """Classify images and compare with their labels.

    Args:
        student: on `device`; its mode is left as it was.
        images: their labels are indices into the student's classes.
        device: where to compute.
        precision: bfloat16 or float32 arithmetic.
        batch_size: images at once; changes speed and memory only.

    Returns:
        The accuracies.
    """
    num_classes, found = len(student.config.class_names), []
    embedded, embeddings = spread_out(np.arange(len(images)), MAX_EMBEDDED), []
    was_training = student.training
    student.eval()
    try:
        with (
            ProgressBar("evaluating", len(images)) as bar,
            torch.inference_mode(),
            full_float32(),
            torch.autocast(device.type, precision, enabled=precision != torch.float32),
        ):
            for start in range(0, len(images), batch_size):
                pixels = send(torch.from_numpy(images.pixels[images.places[start : start + batch_size], 0]), device)
                embedding, logits = student(student.normalise(pixels))
                # What is found stays on the device: a GPU is not waited for.
                found.append(logits.float().topk(min(5, num_classes), dim=1).indices)
                first, last = np.searchsorted(embedded, (start, start + len(pixels)))
                chosen = send(torch.from_numpy(embedded[first:last] - start), device)
                # A copy: an embedding may be a view of all tokens of its image, and would keep them in memory.
                embeddings.append(embedding.index_select(0, chosen).float())
                bar.advance(len(pixels))
            best = torch.cat(found).cpu().numpy()
    finally:
        student.train(was_training)
    hit = best == images.labels[:, None]
    return Evaluation(
        top1=100 * int(hit[:, 0].sum()) / len(images),
        top5=100 * int(hit.any(axis=1).sum()) / len(images),
        class_names=student.config.class_names,
        correct=np.bincount(images.labels[hit[:, 0]], minlength=num_classes),
        count=np.bincount(images.labels, minlength=num_classes),
        predicted=best[:, 0],
        embedded=embedded,
        embeddings=torch.cat(embeddings).cpu().numpy(),
        seconds=bar.seconds,
        images_per_second=len(images) / bar.seconds,
    )


def spread_out(places: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most so many of some places, from the first to the last at equal distances."""
    if len(places) <= most:
        return places
    return places[np.linspace(0, len(places) - 1, most).astype(np.int64)]


def learned_labels(data: Labelled, class_names: Sequence[str]) -> NDArray[np.int64]:
    """Translate a data set's labels into the classes that a model has learned, by name.

    Args:
        data: the data to evaluate on.
        class_names: the model's.

    Returns:
        [N] indices into `class_names`.

    Raises:
        PipelineError: the data has images of a class that the model does not know.
    """
    index_of = {name: index for index, name in enumerate(class_names)}
    table = np.array([index_of.get(name, -1) for name in data.class_names], np.int64)
    labels: NDArray[np.int64] = table[data.labels]
    if (labels < 0).any():
        unknown = [data.class_names[index] for index in np.unique(data.labels[labels < 0])]
        raise PipelineError(
            f"{data.settings.dataset}, split {data.settings.split}: {len(unknown)} of its classes were not learned "
            f"({listed(unknown)}). Learned were {len(class_names)} classes, among them {', '.join(class_names[:3])}."
        )
    return labels


def evaluate_run(settings: EvaluateSettings) -> Evaluation:
    """Evaluate a student from disk on a data set.

    Args:
        settings: which student, which images, and how.

    Returns:
        The accuracies.

    Raises:
        PipelineError: anything a user can cause.
    """
    device = resolve_device(settings.device)
    with batch_must_fit(settings.batch_size, "the student"):
        student = load_student(settings.student).to(device)
    data = load_labelled(settings.data)
    class_names = student.config.class_names
    data = replace(data, labels=learned_labels(data, class_names), class_names=class_names)
    images = cached_images(data, student.config.image_size, skip_bad=settings.skip_bad, cache=settings.cache)
    precision = resolve_precision(settings.precision, device)
    with batch_must_fit(settings.batch_size, "evaluation"):
        return evaluate_student(student, images, device, precision, settings.batch_size)
