"""Whether an artifact joins to its data however they lie: shuffled, in part, in other files, classes renumbered."""

import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from benchmarks import made_inputs
from benchmarks.distill_loops import LABEL_COLUMN, Subject
from benchmarks.distill_setup import Setup, first_rows
from benchmarks.figure_book import Figures
from pipeline.distill.targets import class_rows, join, verify_for
from pipeline.pixels import to_rgb
from store import open_artifact

JOINED_IMAGES, TRIAL_IMAGES, TEST_IMAGES = 50_000, 1000, 100
SUBSET_STEP = 3  # every third image
Joined = dict[tuple[bytes, str], bytes]  # sample key and class name → digest of what was joined to them


def measure_join(setup: Setup) -> Figures:
    """Join one artifact to its data set in several shapes; every image must meet the same two embeddings.

    What is right is read from the artifact's file by the safetensors library: by sample key and class name.
    """
    number = setup.pick(JOINED_IMAGES, TRIAL_IMAGES)
    original = setup.subset(number, TEST_IMAGES)
    artifact = setup.artifact("samples", original, setup.made_teacher)
    right = right_targets(artifact)
    figures: Figures = {
        "images": number,
        "(image, class) pairs in the artifact": len(right),
        "joined": {},
        "checks": {},
    }
    for name, folder in {"as it is": original, **shapes_of(setup, original, number)}.items():
        joined, num_images = joined_targets(Subject(artifact, folder, setup.device))
        figures["joined"][name] = {"images": num_images, "pairs": len(joined)}
        same = all(right.get(pair) == digest for pair, digest in joined.items())
        whole = len(joined) == len(right) or name.startswith("every")
        figures["checks"][f"{name}: the same embeddings"] = same and whole and num_images > 0
    return figures


def shapes_of(setup: Setup, original: Path, number: int) -> dict[str, Path]:
    """Return the folders of the same images in other shapes; each is made once."""
    rows, random = first_rows("train", number), np.random.default_rng(0)
    names = rows.features[LABEL_COLUMN].names
    order, places = random.permutation(len(rows)), random.permutation(len(names))
    shapes: dict[str, Any] = {
        "shuffled, classes renumbered": lambda: renumbered(rows.select(order), places),
        f"every {SUBSET_STEP}rd image": lambda: rows.select(range(0, len(rows), SUBSET_STEP)),
        "as PNG": lambda: encoded(rows, "PNG", {}),
        "as WebP": lambda: encoded(rows, "WEBP", {"lossless": True, "method": 0, "exact": True}),
    }
    folders = {}
    for place, (name, make) in enumerate(shapes.items()):
        folders[name] = folder = original.with_name(f"{original.name}-{place}")
        if not folder.exists():
            with made_inputs.whole_folder(folder) as unfinished:
                splits = {"train": make(), "test": first_rows("test", TEST_IMAGES)}
                if name.endswith("renumbered"):
                    splits["test"] = renumbered(splits["test"], places)
                datasets.DatasetDict(splits).save_to_disk(str(unfinished))
    return folders


def renumbered(rows: Any, places: NDArray[np.int64]) -> Any:
    """Give every class another number; its name stays."""
    names = rows.features[LABEL_COLUMN].names
    moved = [names[index] for index in np.argsort(places)]
    features = rows.features.copy()
    features[LABEL_COLUMN] = datasets.ClassLabel(names=moved)
    labels = [int(places[label]) for label in rows[LABEL_COLUMN]]
    return rows.remove_columns(LABEL_COLUMN).add_column(LABEL_COLUMN, labels).cast(features)


def encoded(rows: Any, file_format: str, options: dict[str, Any]) -> Any:
    """Write every image anew in a format that loses nothing."""
    column = next(name for name, feature in rows.features.items() if isinstance(feature, datasets.Image))
    cells = [{"bytes": _encode(to_rgb(image), file_format, options), "path": None} for image in rows[column]]
    columns = {column: cells, LABEL_COLUMN: list(rows[LABEL_COLUMN])}
    return datasets.Dataset.from_dict(columns, features=rows.features)


def joined_targets(subject: Subject) -> tuple[Joined, int]:
    """Prepare a run, join once more by hand, and note what every training image met.

    Returns:
        That, and the number of images.
    """
    with subject.prepared(target="both", max_missing=1.0) as prepared, open_artifact(subject.artifact) as artifact:
        data, images, recipe = prepared.data, prepared.images.train, prepared.trainer.recipe
        verify_for(artifact, "both", recipe)
        rows = class_rows(artifact, data.class_names, data.classes_named, by_index=False)
        targets = join(artifact, images, rows, "both", recipe)
        every = np.arange(len(images))
        samples = targets.sample_embeddings(every)[:, 0]
        means = targets.class_embeddings.numpy()[images.labels]
    pairs = [(key.tobytes(), data.class_names[label]) for key, label in zip(images.keys, images.labels, strict=True)]
    joined: Joined = {}
    for pair, mean, sample in zip(pairs, means, samples, strict=True):
        digest = _digest(mean, sample)
        if joined.setdefault(pair, digest) != digest:
            joined[pair] = b"copies of one image met different embeddings"
    return joined, len(images)


def right_targets(artifact: Path) -> Joined:
    """Read what belongs to each pair from the file itself."""
    tensors = load_file(artifact)
    with open_artifact(artifact) as opened:
        names = opened.manifest.classes
    rows = zip(tensors["sample/key"], tensors["sample/label"], tensors["sample/embedding"], strict=True)
    return {
        (key.tobytes(), names[label]): _digest(tensors["class/mean"][label], views[0].astype(np.float32))
        for key, label, views in rows
    }


def _digest(mean: NDArray[np.float32], sample: NDArray[np.float32]) -> bytes:
    return hashlib.blake2b(mean.tobytes() + sample.tobytes(), digest_size=16).digest()


def _encode(image: Image.Image, file_format: str, options: dict[str, Any]) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()
