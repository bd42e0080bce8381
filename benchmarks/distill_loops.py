"""Training steps to compare: this program's, and three that are written by hand around the same student.

Each takes one step a call, on the same images. Nothing is timed here, and nothing of stage one is imported: processes
whose memory is measured use this file too.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from pipeline.data import DataSettings
from pipeline.distill.attention import ExplicitAttention
from pipeline.distill.augment import send
from pipeline.distill.config import DistillSettings
from pipeline.distill.fused_block import use_faster_parts
from pipeline.distill.images import DecodedImages
from pipeline.distill.preparation import Prepared, compute_for, prepare
from pipeline.distill.student import Student, build_student
from store import open_artifact

LABEL_COLUMN = "fine_label"
Step = Callable[[], None]
Loss = Callable[[Float[Tensor, "batch 3 height width"], Int[Tensor, " batch"]], Tensor]


@dataclass(frozen=True)
class Subject:
    """What is learned from, and where: an artifact, its data set (a folder), a device."""

    artifact: Path
    dataset: Path
    device: str

    def settings(self, **changes: Any) -> DistillSettings:
        """Return settings of a run whose directory is never made, unless `out` is among the changes."""
        data = DataSettings(dataset=str(self.dataset), label_column=LABEL_COLUMN)
        given = {"artifact": self.artifact, "data": data, "out": self.artifact.with_name("not-made")}
        return DistillSettings.model_validate({**given, "device": self.device, **changes})

    @contextmanager
    def prepared(self, **changes: Any) -> Iterator[Prepared]:
        """Prepare a run as the command does; its artifact is open inside the block.

        Args:
            changes: settings of the run.
        """
        settings = self.settings(**changes)
        with open_artifact(self.artifact) as artifact:
            yield prepare(settings, settings.resolved_recipe(), compute_for(settings), artifact)


def our_step(prepared: Prepared) -> Step:
    """Return this program's step, its batch included."""
    feed, trainer = prepared.feed, prepared.trainer
    batches = itertools.chain.from_iterable(feed.epoch(epoch) for epoch in itertools.count(1))
    return lambda: trainer.step(next(batches), feed.num_steps)


def supervised_step(prepared: Prepared) -> Step:
    """Return a plain supervised step with all that makes ours fast, and with nothing of a teacher.

    The same student, precision, attention, dropout, tokens and fused AdamW; cross-entropy of the labels.
    """
    compute, recipe = prepared.trainer.compute, prepared.trainer.recipe
    student = _new_student(prepared)
    use_faster_parts(student.model, compute.device)
    options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.AdamW(student.parameters(), **options, fused=True)

    explicit_attention = ExplicitAttention(student.model, compute.device)

    def loss_of(pixels: Tensor, labels: Tensor) -> Tensor:
        reduced = compute.precision != torch.float32
        with explicit_attention, torch.autocast(compute.device.type, compute.precision, enabled=reduced):
            logits = student.model(pixels)
        return F.cross_entropy(logits.float(), labels)

    return _step(prepared, student, optimizer, loss_of)


def released_step(prepared: Prepared) -> Step:
    """Return a step with the arithmetic of the code that was released with the paper; the words are ours.

    Eager float32 and PyTorch's fused attention. The classifier's output passes a softmax before cross-entropy takes
    another, cross-entropy has weight 1, L_class 0.5 without a temperature, and AdamW is PyTorch's own default.
    """
    student, means = _new_student(prepared), prepared.trainer.method.class_embeddings
    projection = nn.Linear(means.shape[1], student.embed_dim).to(means.device)
    learned = [*student.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.1)

    def loss_of(pixels: Tensor, labels: Tensor) -> Tensor:
        embeddings, logits = student(pixels)
        cosines = F.normalize(embeddings, dim=1) @ F.normalize(projection(means), dim=1).T
        return F.cross_entropy(logits.softmax(dim=1), labels) + 0.5 * F.cross_entropy(cosines, labels)

    return _step(prepared, student, optimizer, loss_of)


def default_step(prepared: Prepared) -> Step:
    """Return what timm and PyTorch do unless told otherwise: eager float32, cross-entropy, AdamW."""
    student = _new_student(prepared)

    def loss_of(pixels: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(student.model(pixels), labels)

    return _step(prepared, student, torch.optim.AdamW(student.parameters(), lr=1e-4), loss_of)


def _new_student(prepared: Prepared) -> Student:
    trainer = prepared.trainer
    return build_student(trainer.method.student.config).to(trainer.compute.device).train()


def _step(prepared: Prepared, student: Student, optimizer: torch.optim.Optimizer, loss_of: Loss) -> Step:
    size, device = prepared.trainer.recipe.batch_size, prepared.trainer.compute.device
    batches = _flipped_batches(prepared.images.train, size, device)

    def step() -> None:
        pixels, labels = next(batches)
        optimizer.zero_grad(set_to_none=True)
        loss_of(student.normalise(pixels), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _flipped_batches(
    images: DecodedImages, batch_size: int, device: torch.device
) -> Iterator[tuple[UInt8[Tensor, "batch height width 3"], Int[Tensor, " batch"]]]:
    """Yield batches without end, each image mirrored or not; pixels lie on a GPU, as ours do."""
    held = None if device.type == "cpu" else torch.from_numpy(images.pixels[images.places, 0]).to(device)
    labels = torch.from_numpy(images.labels)
    while True:
        for chosen in torch.split(torch.randperm(len(images)), batch_size):
            mirrored = send(torch.rand(len(chosen), 1, 1, 1) < 0.5, device)
            if held is None:
                pixels = torch.from_numpy(images.pixels[images.places[chosen.numpy()], 0])
            else:
                pixels = held[send(chosen, device)]
            yield torch.where(mirrored, pixels.flip(2), pixels), send(labels[chosen], device)
