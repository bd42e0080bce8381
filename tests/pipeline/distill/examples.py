"""Artifacts, data sets and students for the tests of stage two; no teacher runs."""

import copy
import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import store
from pipeline.data import DataSettings, Labelled, load_labelled
from pipeline.distill.cache import cached_images
from pipeline.distill.config import DistillSettings, Target
from pipeline.distill.images import DecodedImages
from pipeline.distill.loop import Compute, Trainer
from pipeline.distill.recipe import Recipe, load_recipe
from pipeline.distill.student import Student, build_student, student_config
from pipeline.distill.targets import Targets, class_rows, join
from pipeline.pixels import sample_key, to_rgb
from pipeline.views import VIEWS_VERSION
from tests.conftest import CLASS_NAMES

CPU = torch.device("cpu")
EMBED_DIM = 6
TARGETS: tuple[Target, ...] = ("class", "sample", "both")
COLOURS = ((230, 30, 30), (30, 230, 30), (30, 30, 230))

JUNK = {"bytes": b"junk", "path": None}

Pair = tuple[bytes, str]  # sample key and class name


def mean_of(name: str) -> NDArray[np.float32]:
    """Return the class embedding that example artifacts have of a class."""
    return np.random.default_rng(list(name.encode())).standard_normal(EMBED_DIM).astype(np.float32)


def text_of(name: str) -> NDArray[np.float32]:
    """Return the text embedding that example artifacts have of a class."""
    return mean_of(f"a photo of a {name}.")


def head_of(name: str) -> tuple[NDArray[np.float32], float]:
    """Return weight and bias that example artifacts have of a class."""
    return mean_of(f"head of {name}"), len(name) / 10


def embedding_of(pair: Pair, view: int = 0) -> NDArray[np.float16]:
    """Return the sample embedding that example artifacts have of a view of an image under a class name."""
    key, name = pair
    return np.random.default_rng([*key, *name.encode(), view]).standard_normal(EMBED_DIM).astype(np.float16)


@dataclass(frozen=True)
class Extras:
    """What an example artifact has beside class embeddings and samples."""

    text: bool = True
    head: bool = True
    num_views: int = 1
    view_size: int | None = 8
    views_version: int = VIEWS_VERSION
    classes_named: bool = True


EVERYTHING = Extras()
PLAIN = Extras(text=False, head=False)


def write_example(
    path: Path,
    names: Sequence[str] = CLASS_NAMES,
    samples: Iterable[Pair] | None = None,
    extras: Extras = PLAIN,
) -> Path:
    """Write an artifact of these classes and, with `samples`, of these images."""
    tensors: dict[str, NDArray[Any]] = {
        "class/mean": np.stack([mean_of(name) for name in names]),
        "class/count": np.ones(len(names), np.int64),
        "class/m2": np.zeros((len(names), EMBED_DIM), np.float32),
    }
    if extras.text:
        tensors["class/text"] = np.stack([text_of(name) for name in names])
    if extras.head:
        tensors["head/weight"] = np.stack([head_of(name)[0] for name in names])
        tensors["head/bias"] = np.array([head_of(name)[1] for name in names], np.float32)
    if samples is not None:
        row_of = {name: row for row, name in enumerate(names)}
        pairs = sorted(set(samples), key=lambda pair: (pair[0], row_of[pair[1]]))
        tensors["sample/key"] = np.frombuffer(b"".join(key for key, _ in pairs), np.uint8).reshape(-1, 16)
        tensors["sample/label"] = np.array([row_of[name] for _, name in pairs], np.int32)
        tensors["sample/embedding"] = np.stack(
            [[embedding_of(pair, view) for view in range(extras.num_views)] for pair in pairs]
        )
    store.write_artifact(path, _manifest(tuple(names), extras), tensors)
    return path


def pairs_of(rows: datasets.Dataset) -> list[Pair]:
    """Return who the images of a split are, and the names of their classes."""
    names = rows.features["label"].names
    return [(sample_key(to_rgb(row["image"])), names[row["label"]]) for row in rows]


def noise(height: int, width: int) -> Image.Image:
    """Make an image of noise, the same for the same size."""
    random = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> dict[str, Any]:
    """Return the cell of an image, encoded."""
    file = BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def make_rows(cells: Sequence[Any], labels: Sequence[int], names: Sequence[str] = CLASS_NAMES) -> datasets.Dataset:
    """Make a split of images, or of structures of bytes and path."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"image": list(cells), "label": list(labels)}, features=features)


def make_coloured(num_images: int, seed: int, names: Sequence[str] = CLASS_NAMES) -> datasets.Dataset:
    """Make a split that is easily learnt: ants are reddish, bees greenish, cats bluish."""
    random = np.random.default_rng(seed)
    labels = [row % len(names) for row in range(num_images)]
    noise = random.integers(-25, 26, (num_images, 8, 8, 3))
    colours = np.array([COLOURS[CLASS_NAMES.index(names[label])] for label in labels])
    pixels = (colours[:, None, None] + noise).astype(np.uint8)
    return make_rows([Image.fromarray(image) for image in pixels], labels, names)


def labelled(rows: datasets.Dataset, folder: Path) -> Labelled:
    """Save a split and load it as the pipeline does."""
    rows.save_to_disk(str(folder))
    return load_labelled(DataSettings(dataset=str(folder)))


def decoded(rows: datasets.Dataset, folder: Path, image_size: int = 8) -> DecodedImages:
    """Save, load and decode a split."""
    return cached_images(labelled(rows, folder), image_size, skip_bad=False)


def images_of(pixels: NDArray[np.uint8], labels: Sequence[int]) -> DecodedImages:
    """Make decoded images of pixels [N, V, size, size, 3]; the keys follow from view 0, as of real ones."""
    keys = [sample_key(Image.fromarray(views[0])) for views in pixels]
    numbers = np.arange(len(pixels))
    return DecodedImages(
        pixels, numbers, numbers, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16), np.array(labels, np.int64)
    )


def noise_images(num_images: int, seed: int, num_views: int = 1, image_size: int = 8) -> DecodedImages:
    """Make decoded images of noise, whose labels go round the classes; every view is different."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (num_images, num_views, image_size, image_size, 3), dtype=np.uint8)
    return images_of(pixels, [row % len(CLASS_NAMES) for row in range(num_images)])


def pairs_in(images: DecodedImages, names: Sequence[str] = CLASS_NAMES) -> list[Pair]:
    """Return who decoded images are, and the names of their classes."""
    return [(key.tobytes(), names[label]) for key, label in zip(images.keys, images.labels, strict=True)]


def join_example(
    images: DecodedImages,
    folder: Path,
    recipe: Recipe,
    *,
    without: Collection[int] = (),
    extras: Extras = EVERYTHING,
) -> Targets:
    """Join images to an artifact that lacks the samples of some of them; everything is joined that a loss may need."""
    pairs = [pair for row, pair in enumerate(pairs_in(images)) if row not in without] or [(bytes(16), "ant")]
    path = folder / f"{sum(1 for _ in folder.iterdir())}.safetensors"  # a targets' artifact stays open
    write_example(path, ("dog", "cat", "ant", "bee"), pairs, extras)
    with store.open_artifact(path) as artifact:
        return join(artifact, images, class_rows(artifact, CLASS_NAMES, True, by_index=False), "both", recipe)


def settings_for(artifact: Path, dataset: Path, out: Path, **fields: Any) -> DistillSettings:
    """Return settings of a run that takes a moment; what is the recipe's is laid over it."""
    overrides = {"epochs": 1, "batch_size": 8, **fields.pop("overrides", {})}
    overrides |= {name: fields.pop(name) for name in list(fields) if name in Recipe.model_fields}
    quick = {"student": "test_resnet", "image_size": 8, "overrides": overrides}
    plain = {"device": "cpu", "precision": "float32"}
    data = DataSettings(dataset=str(dataset))
    return DistillSettings.model_validate({"artifact": artifact, "data": data, "out": out, **quick, **plain, **fields})


def make_recipe(**fields: Any) -> Recipe:
    """Return recipe `paper` with small batches, without augmentation, and with other values where given."""
    small = {"batch_size": 4, "augmentation.horizontal_flip": 0.0, "learning_rate": 1e-3}
    return load_recipe("paper", {**small, **fields})


def make_trainer(
    targets: Targets,
    recipe: Recipe,
    target: Target = "class",
    student: Student | None = None,
    compute: Compute | None = None,
) -> Trainer:
    """Make a trainer of a small student, on the CPU in float32."""
    compute = Compute(CPU, torch.float32, 0) if compute is None else compute
    return Trainer(make_student() if student is None else student, targets, target, recipe, compute)


def make_student(
    name: str = "test_resnet", image_size: int = 8, class_names: tuple[str, ...] = CLASS_NAMES, seed: int = 0
) -> Student:
    """Build a student of known random weights, BatchNorm's running statistics among them."""
    return copy.deepcopy(_student(name, image_size, class_names, seed))


def weights_of(student: Student) -> dict[str, torch.Tensor]:
    """Return copies of a student's weights and buffers."""
    return {name: tensor.clone() for name, tensor in student.model.state_dict().items()}


def equal_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Tell whether two students are equal to the last bit."""
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def file_names(folder: Path) -> list[str]:
    """Return the names of everything in a folder, hidden files too, sorted."""
    return sorted(entry.name for entry in folder.iterdir())


@functools.cache
def _student(name: str, image_size: int, class_names: tuple[str, ...], seed: int) -> Student:
    torch.manual_seed(seed)
    student = build_student(student_config(name, image_size, class_names, load_recipe("paper")))
    with torch.no_grad():
        for tensor in student.model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand_like(tensor))
    return student


def _manifest(names: tuple[str, ...], extras: Extras) -> store.Manifest:
    views: dict[str, Any] = {"views": extras.num_views}
    if extras.num_views > 1:
        views |= {"view_size": extras.view_size, "views_version": extras.views_version}
    return store.Manifest(
        teacher=store.TeacherInfo(
            name="owner/teacher",
            weights_sha256="a" * 64,
            architecture="vit",
            pooling="cls",
            embed_dim=EMBED_DIM,
            precision="float32",
        ),
        data_set=store.DataSetInfo(
            name="owner/images",
            split="train",
            image_column="image",
            label_column="label",
            rows=30,
            classes_named=extras.classes_named,
        ),
        preprocessing={},
        sampling=store.SamplingInfo(per_class=None, seed=0, batch_size=4, images_sha256="b" * 64, **views),
        classes=names,
        software={"clip-embed-kd": "0.1.0"},
    )
