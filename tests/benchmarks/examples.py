"""A data set that anybody can learn, and settings to learn it by."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from benchmarks.finetune_setup import FinetuneSettings
from pipeline.data import DataSettings
from tests.conftest import CLASS_NAMES

COLOURS = ((220, 40, 40), (40, 220, 40), (40, 40, 220))
BATCH_SIZE, NUM_TRAIN, NUM_TEST = 7, 27, 12


def coloured_images(num_images: int, seed: int, size_px: int = 8) -> list[Image.Image]:
    """Make images in the colour of their class, which goes round, with noise: every one is different."""
    random = np.random.default_rng(seed)
    noise = random.integers(-30, 31, (num_images, size_px, size_px, 3))
    colours = np.array(COLOURS)[np.arange(num_images) % len(COLOURS)]
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in noise + colours[:, None, None]]


def coloured_split(num_images: int, seed: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})
    labels = [row % len(COLOURS) for row in range(num_images)]
    return datasets.Dataset.from_dict({"image": coloured_images(num_images, seed), "label": labels}, features=features)


def save_coloured(folder: Path) -> Path:
    splits = datasets.DatasetDict(train=coloured_split(NUM_TRAIN, 0), test=coloured_split(NUM_TEST, 1))
    splits.save_to_disk(str(folder))
    return folder


def settings_of(teacher: Path, dataset: Path, out: Path, **changes: Any) -> FinetuneSettings:
    """Return settings of few steps, four in an epoch, on the CPU."""
    given = {"epochs": 2, "batch_size": BATCH_SIZE, "learning_rate": 1e-3, "device": "cpu", "precision": "float32"}
    data = DataSettings(dataset=str(dataset), **changes.pop("data", {}))
    return FinetuneSettings.model_validate({"teacher": str(teacher), "data": data, "out": out, **given, **changes})
