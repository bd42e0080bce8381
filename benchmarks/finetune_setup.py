"""What a fine-tuning is: its settings, its images, its teacher, and all that decides which weights come out of it."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from pipeline.data import BadImageError, DataSettings, Labelled, Splits, evaluation_split, load_labelled, load_splits
from pipeline.distill.cache import cached_images
from pipeline.distill.evaluate import learned_labels
from pipeline.distill.images import DecodedImages, held_out
from pipeline.distill.loop import Compute
from pipeline.distill.preparation import is_sound_in_bfloat16
from pipeline.errors import PipelineError
from pipeline.extract import ExtractSettings
from pipeline.extract.preparation import load_settings_teacher
from pipeline.extract.teacher import Teacher
from pipeline.output import check_output
from pipeline.progress import LOGGER
from pipeline.runtime import Precision, resolve_device, resolve_precision

RECORD = "finetune.json"
_COPIES = 10  # of the weights: three checkpoints with two moments each, and the teacher itself


class FinetuneSettings(BaseModel):
    """Everything that a fine-tuning can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str = Field(min_length=1, description="hub name or folder of a transformers image encoder")
    data: DataSettings
    out: Path
    eval_split: str | None = Field(default=None, description="none: the data's own, else a tenth held out")
    holdout: bool = Field(default=False, description="evaluate on a tenth of the training images, left out of training")
    image_size: int | None = Field(default=None, ge=8, description="none: the data's own, at most the teacher's")
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False, description="the encoder's, at its highest")
    operations: int = Field(default=1, ge=0, le=14, description="of TrivialAugment, one after another")
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: str = "auto"
    precision: Precision = "auto"
    skip_bad: bool = False
    cache: Path | None = Field(default=None, description="of decoded images; none: the user's own")
    overwrite: bool = False


@dataclass(frozen=True)
class Setup:
    """All that there is before the first step; the teacher is on the device, as it was loaded."""

    settings: FinetuneSettings
    compute: Compute
    data: Labelled
    train: DecodedImages
    evaluated: DecodedImages
    evaluated_on: str
    image_size: int
    teacher: Teacher

    def decides(self) -> dict[str, Any]:
        """Return what decides the weights, as plain JSON: what things are, not what they are called."""
        told = ("epochs", "batch_size", "learning_rate", "operations", "seed", "holdout")
        digest = hashlib.sha256(self.train.keys.tobytes() + self.train.labels.tobytes())
        return {
            "teacher": {"weights_sha256": self.teacher.info.weights_sha256, "pooling": self.teacher.info.pooling},
            "images": {"count": len(self.train), "size": self.image_size, "sha256": digest.hexdigest()},
            "class_names": list(self.data.class_names),
            "evaluated_on": self.evaluated_on,
            "training": {name: getattr(self.settings, name) for name in told},
            "device": self.compute.device.type,
            "precision": str(self.compute.precision).removeprefix("torch."),
        }


def check_out(settings: FinetuneSettings) -> None:
    """Check that the result can be put where it is wanted, before anything is loaded.

    Raises:
        PipelineError: it cannot, or something else than a fine-tuned teacher would be replaced.
    """
    out = settings.out
    check_output(out, 0, replaceable=settings.overwrite)
    if out.exists() and not (out / RECORD).is_file():
        raise PipelineError(
            f"{out}: holds no {RECORD}, so it is no fine-tuned teacher and is not overwritten. Choose another --out."
        )


def set_up(settings: FinetuneSettings) -> Setup:
    """Load and check everything.

    Args:
        settings: of the fine-tuning.

    Returns:
        What it consists of.

    Raises:
        PipelineError: anything a user can cause.
    """
    check_out(settings)
    device = resolve_device(settings.device)
    splits = load_splits(settings.data)
    data = load_labelled(settings.data, splits)
    evaluation = _evaluation_data(settings, splits, data)
    loading = ExtractSettings(teacher=settings.teacher, data=settings.data, out=settings.out, precision="float32")
    teacher = load_settings_teacher(loading, device)
    check_output(settings.out, _COPIES * 4 * teacher.model.num_parameters(), replaceable=settings.overwrite)
    image_size = settings.image_size or _own_size(settings, data, teacher)
    train = cached_images(data, image_size, skip_bad=settings.skip_bad, cache=settings.cache)
    if evaluation is not None:
        evaluated = cached_images(evaluation, image_size, skip_bad=settings.skip_bad, cache=settings.cache)
        name = f"split {evaluation.settings.split}"
    else:
        apart = held_out(train.keys)
        train, evaluated, name = train.select(~apart), train.select(apart), "held-out tenth of the training split"
    if len(train) < 2 or len(evaluated) == 0:
        raise PipelineError(
            f"{settings.data.dataset}: {len(train)} images are left to train on and {len(evaluated)} to evaluate on; "
            "at least 2 and 1 are needed."
        )
    LOGGER.info(
        "%s images of %d px to train on, %s to evaluate on: %s.",
        *(f"{len(train):,}", image_size, f"{len(evaluated):,}", name),
    )
    compute = Compute(device, _precision(settings, device, teacher), settings.seed)
    return Setup(settings, compute, data, train, evaluated, name, image_size, teacher)


def _evaluation_data(settings: FinetuneSettings, splits: Splits, data: Labelled) -> Labelled | None:
    """Load what is evaluated on, labelled by the classes of the training data; none where a tenth is held out."""
    split = None if settings.holdout else settings.eval_split or evaluation_split(splits, settings.data.split)
    if split is None:
        return None
    found = load_labelled(settings.data.model_copy(update={"split": split, "limit": None}), splits)
    labels = learned_labels(found, data.class_names)
    return replace(found, labels=labels, class_names=data.class_names)


def _own_size(settings: FinetuneSettings, data: Labelled, teacher: Teacher) -> int:
    """Return the shorter side of the first image, but no more than the teacher takes in."""
    for row in range(len(data)):
        (image,) = data.read([row])
        if not isinstance(image, BadImageError):
            return min(*image.size, int(teacher.preprocess([image]).shape[-1]))
        if not settings.skip_bad:
            raise image
    raise PipelineError(f"{settings.data.dataset}, split {settings.data.split}: no image could be decoded.")


def _precision(settings: FinetuneSettings, device: torch.device, teacher: Teacher) -> torch.dtype:
    if settings.precision == "auto" and not is_sound_in_bfloat16(teacher.model, device):
        return torch.float32
    return resolve_precision(settings.precision, device)
