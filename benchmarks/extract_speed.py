"""Two speeds side by side: extraction, and the bare teacher or transformers' pipeline, in turn in one process."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from PIL import Image
from transformers.pipelines.pt_utils import KeyDataset

import store
from benchmarks.extract_setup import Setup, fresh_folder
from benchmarks.figure_book import Figures
from pipeline.data import load_labelled
from pipeline.extract.config import ExtractSettings
from pipeline.extract.embed import Embedder
from pipeline.extract.partial import PartialFolder
from pipeline.extract.preparation import load_settings_teacher, make_embedder
from pipeline.pixels import sample_key, to_rgb
from pipeline.runtime import Precision, resolve_device

WARM_UP_IMAGES, COMPARED_IMAGES = 256, 16


def make_bench_embedder(setup: Setup, precision: Precision, images: int) -> Embedder:
    """Prepare an extraction of so many images, as the command does."""
    out = fresh_folder(setup.work / "scratch") / "a.safetensors"
    data = load_labelled(setup.limited(images))
    given = {"data": data.settings, "out": out, "precision": precision, "device": setup.device}
    settings = ExtractSettings(teacher=str(setup.teacher), **given)
    return make_embedder(
        settings, data, np.arange(len(data)), load_settings_teacher(settings, resolve_device(setup.device))
    )


def rate_of_extraction(setup: Setup, embedder: Embedder) -> Callable[[], float]:
    """Return a function that embeds all images and saves their chunks; returns images/s."""
    indices = range(len(embedder.plan.chunks))

    def run_extraction() -> float:
        folder = fresh_folder(setup.work / "chunks")
        return embedder.plan.num_images(indices) / embedder.run(indices, PartialFolder(folder))

    return run_extraction


def bare_forward(embedder: Embedder) -> Callable[[], float]:
    """Return a function that runs the teacher over one batch until it has seen as many images; returns images/s."""
    teacher, rows = embedder.teacher, embedder.plan.chunks[0][0]
    read = [image for image in embedder.data.read(rows.tolist()) if isinstance(image, Image.Image)]
    pixels = teacher.preprocess(read).to(teacher.model.device, teacher.model.dtype)
    repeats = math.ceil(embedder.plan.num_images(range(len(embedder.plan.chunks))) / len(pixels))

    def run_bare() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            embeddings = teacher.embed(pixels)
        embeddings.cpu()  # waits until all is done
        return repeats * len(pixels) / (time.perf_counter() - start)

    return run_bare


def rate_of_pipeline(setup: Setup, extractor: Any, images: int, *, as_tensors: bool) -> Callable[[], float]:
    """Return a function that gives images to transformers' pipeline, takes [CLS] of each, and returns images/s."""
    rows = decoded_rows(setup, images)

    def run_pipeline() -> float:
        start = time.perf_counter()
        if as_tensors:
            embeddings = [tokens[0, 0] for tokens in extractor(rows, return_tensors=True)]
        else:
            embeddings = [tokens[0][0] for tokens in extractor(rows)]
        return len(embeddings) / (time.perf_counter() - start)

    return run_pipeline


def decoded_rows(setup: Setup, images: int) -> KeyDataset:
    """Return the images that an extraction of so many embeds, as the data set itself decodes them."""
    data = load_labelled(setup.limited(images))
    return KeyDataset(data.rows.cast_column(data.image_column, datasets.Image()), data.image_column)


def least_cosine(setup: Setup, extractor: Any, precision: Precision) -> float:
    """Compare a few embeddings of an artifact with the pipeline's [CLS]; both sides are warm afterwards."""
    images = setup.count(WARM_UP_IMAGES)
    result = setup.extract(images, precision=precision, samples=True, dtype="float32")
    rows = decoded_rows(setup, images)
    with store.open_artifact(result.path) as artifact:
        keys, embeddings = artifact["sample/key"][...], artifact["sample/embedding"][:, 0].astype(np.float64)
    row_of = {key.tobytes(): row for row, key in enumerate(keys)}
    cosines = []
    for index, tokens in enumerate(extractor(rows, return_tensors=True)):
        if index == COMPARED_IMAGES:
            break
        ours, theirs = embeddings[row_of[sample_key(to_rgb(rows[index]))]], tokens[0, 0].double().numpy()
        cosines.append(float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)))
    return min(cosines)


def in_turn(ours: Callable[[], float], reference: Callable[[], float], pairs: int) -> Figures:
    """Warm both sides up and run them in turn, each first as often; the ratios are of images/s, pair by pair."""
    ours()
    reference()
    rates: dict[Callable[[], float], list[float]] = {ours: [], reference: []}
    for turn in range(pairs):
        for side in (ours, reference) if turn % 2 else (reference, ours):
            rates[side].append(side())
    ratios = [one / other for one, other in zip(rates[ours], rates[reference], strict=True)]
    return {
        "images/s": round(statistics.median(rates[ours]), 1),
        "reference images/s": round(statistics.median(rates[reference]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "least and most": [round(min(ratios), 3), round(max(ratios), 3)],
        "pairs": pairs,
    }
