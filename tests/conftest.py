"""Shared fixtures: a tiny random teacher, tiny data sets, and shapes checked at run time."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before any library looks: no test may reach a network, and no test needs one.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="clip-embed-kd-datasets-")
os.environ["CLIP_EMBED_KD_CACHE"] = tempfile.mkdtemp(prefix="clip-embed-kd-images-")
# Models so small only lose by more, and processes whose threads wait for each other on the same cores take many times
# as long.
os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import numpy as np
import pytest
from jaxtyping import install_import_hook
from PIL import Image

for folder in ("HF_DATASETS_CACHE", "CLIP_EMBED_KD_CACHE"):
    atexit.register(shutil.rmtree, os.environ[folder], ignore_errors=True)
TYPED = (
    "losses",
    "method",
    "feed",
    "held",
    "student",
    "targets",
    "loop",
    "evaluate",
    "predict",
    "augment",
    "boxes",
    "colours",
    "mix",
    "warp",
    "onnx_model",
)
install_import_hook([f"pipeline.distill.{name}" for name in TYPED], "beartype.beartype")
install_import_hook("pipeline.extract.teacher", "beartype.beartype")

CLASS_NAMES = ("ant", "bee", "cat")
SHARED = Path(os.environ.get("CLIP_EMBED_KD_SHARED", Path(__file__).parent.parent.parent / "shared"))


def make_images(num_images: int, seed: int, size: int = 8) -> list[Image.Image]:
    """Make images of noise: every one is different."""
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(num_images)]


def make_split(num_images: int, seed: int, names: tuple[str, ...] = CLASS_NAMES) -> datasets.Dataset:
    """Make a split whose labels go round the classes."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    columns = {"image": make_images(num_images, seed), "label": [row % len(names) for row in range(num_images)]}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Forget that a command was run in this process, which makes the pipeline tell everybody after it what it does."""
    logger = logging.getLogger("clip_embed_kd")
    yield
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


@pytest.fixture(scope="session")
def saved_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved data set: 30 training and 12 test images of 8×8 pixels in three classes."""
    folder = tmp_path_factory.mktemp("data") / "saved"
    datasets.DatasetDict(train=make_split(30, 0), test=make_split(12, 1)).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT: 16×16 pixels, patch 8, two layers, 24 values; no pooler in its checkpoint."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("teachers") / "tiny-vit"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor = transformers.ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)
    return folder
