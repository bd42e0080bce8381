"""Teachers of random weights and JPEG files of random colours, for benchmarks that do not ask what they mean.

Each is made once in a folder, and taken from there afterwards. The same arguments give the same content.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

NUM_CLASSES = 100
SHARD_IMAGES = 2000  # held in memory while they are made
WIDTH_PX, HEIGHT_PX, QUALITY = 500, 375, 90
# Colours that change slowly, and so much detail that a file is about 80 kB, not far from a photograph's.
SLOW_PX, DETAIL_PX, DETAIL = (8, 6), (250, 188), 0.3


def base_teacher(work: Path) -> Path:
    """Return the folder of a ViT-B/16 at 224 px: transformers' own default configuration."""
    return _teacher(work / "vit-base-random", transformers.ViTConfig())


def tiny_teacher(work: Path) -> Path:
    """Return the folder of a ViT of two layers at 32 px, whose embeddings are as long as those of a ViT-Ti: 192."""
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=384,
    )
    return _teacher(work / "vit-two-layers-random", config)


def jpeg_images(work: Path, num_images: int) -> Path:
    """Return the folder of a parquet data set of JPEG files, 500×375, in 100 classes."""
    folder = work / f"jpeg-{num_images}"
    if not folder.exists():
        datasets.disable_progress_bars()
        starts = range(0, num_images, SHARD_IMAGES)
        with whole_folder(folder) as unfinished, ThreadPoolExecutor() as threads:
            for shard, start in enumerate(starts):
                rows = range(start, min(num_images, start + SHARD_IMAGES))
                cells = [{"bytes": content, "path": None} for content in threads.map(_jpeg, rows)]
                features = datasets.Features(
                    image=datasets.Image(), label=datasets.ClassLabel(names=[f"class {c}" for c in range(NUM_CLASSES)])
                )
                columns = {"image": cells, "label": [row % NUM_CLASSES for row in rows]}
                split = datasets.Dataset.from_dict(columns, features=features)
                split.to_parquet(unfinished / f"train-{shard:05d}-of-{len(starts):05d}.parquet")
    return folder


def _teacher(folder: Path, config: transformers.ViTConfig) -> Path:
    if not folder.exists():
        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(0)
        side = {"height": config.image_size, "width": config.image_size}
        with whole_folder(folder) as unfinished:
            transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(unfinished)
            transformers.ViTImageProcessor(size=side).save_pretrained(unfinished)
    return folder


def _jpeg(row: int) -> bytes:
    random = np.random.default_rng(row)
    pixels = (1 - DETAIL) * _noise(random, SLOW_PX) + DETAIL * _noise(random, DETAIL_PX)
    file = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _noise(random: np.random.Generator, grid_px: tuple[int, int]) -> NDArray[np.float32]:
    """Draw a colour for every point of a grid, and spread it over the image."""
    grid = Image.fromarray(random.integers(0, 256, (grid_px[1], grid_px[0], 3), dtype=np.uint8))
    return np.asarray(grid.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.BICUBIC)).astype(np.float32)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets its name when it is full."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(folder)
