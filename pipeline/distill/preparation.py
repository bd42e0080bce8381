"""Everything before the first step: checks, images, the join, the student and its trainer."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from pipeline.data import Labelled, Splits, evaluation_split, load_labelled, load_splits
from pipeline.distill.cache import cached_images
from pipeline.distill.config import DistillSettings
from pipeline.distill.decoding import ReplayedViews
from pipeline.distill.evaluate import learned_labels
from pipeline.distill.feed import Feed
from pipeline.distill.images import DecodedImages, held_out
from pipeline.distill.initial import initialise
from pipeline.distill.join_report import JoinReport, report_join
from pipeline.distill.loop import Compute, Trainer
from pipeline.distill.recipe import Recipe
from pipeline.distill.student import Student, build_student, student_config
from pipeline.distill.targets import Targets, class_rows, join, replayed_views, verify_for
from pipeline.errors import PipelineError
from pipeline.output import check_output
from pipeline.progress import LOGGER
from pipeline.runtime import resolve_device, resolve_precision
from store import Artifact


@dataclass(frozen=True)
class Images:
    """What is trained on and what is evaluated on."""

    train: DecodedImages
    evaluation: DecodedImages
    evaluation_name: str


@dataclass(frozen=True)
class Prepared:
    """What a run consists of. The trainer stands at the start.

    `initial_sha256`: of the weights that `--init` gave, where it gave some.
    """

    data: Labelled
    images: Images
    targets: Targets
    join_report: JoinReport
    trainer: Trainer
    feed: Feed
    initial_sha256: str | None = None


def compute_for(settings: DistillSettings) -> Compute:
    """Choose where and how a run computes.

    Raises:
        PipelineError: the device is unknown or absent.
    """
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    return Compute(device, precision, settings.seed, settings.micro_batch, settings.compile)


def prepare(settings: DistillSettings, recipe: Recipe, compute: Compute, artifact: Artifact) -> Prepared:
    """Do everything that comes before the first step; what can be checked is checked before images are decoded.

    Args:
        settings: of the run.
        recipe: with the settings laid over it.
        compute: where and how.
        artifact: open.

    Returns:
        What the run consists of.

    Raises:
        PipelineError: anything a user can cause.
        StoreError: the artifact is damaged.
    """
    verify_for(artifact, settings.target, recipe)
    splits = load_splits(settings.data)
    data = load_labelled(settings.data, splits)
    rows = class_rows(artifact, data.class_names, data.classes_named, by_index=settings.join_by_index)
    evaluation = _evaluation_data(settings, splits, data.class_names)
    torch.manual_seed(settings.seed)
    config = student_config(settings.student, settings.image_size, data.class_names, recipe)
    student = build_student(config)
    checkpoints = (settings.out / "checkpoints").glob("[0-9]*")
    is_new = not (settings.resume and any(checkpoints))  # else all weights are in a checkpoint
    initial = initialise(student, settings.init) if is_new else None
    check_output(settings.out, _needed_bytes(student), replaceable=True)
    images = _decode(settings, data, evaluation, replayed_views(artifact, settings.target, recipe))
    targets = join(artifact, images.train, rows, settings.target, recipe)
    report = report_join(targets, images.train, settings.max_missing)
    for line in report.lines():
        LOGGER.info("%s", line)
    LOGGER.info("%s images to evaluate on: %s.", f"{len(images.evaluation):,}", images.evaluation_name)
    if settings.precision == "auto" and not is_sound_in_bfloat16(student.model, compute.device):
        compute = replace(compute, precision=torch.float32)
    trainer = Trainer(student, targets, settings.target, recipe, compute)
    feed = Feed(images.train, targets, recipe, compute.device, settings.seed)
    return Prepared(data, images, targets, report, trainer, feed, initial)


def is_sound_in_bfloat16(model: nn.Module, device: torch.device) -> bool:
    """Tell whether a model may be trained in bfloat16: on a CPU its convolutions must not overlap.

    The weight gradients of some that do (3×3 on 1×1 pixels, for one) read memory that nobody has written: seen in
    PyTorch 2.15, on a CPU with AVX-512 bfloat16. Patch embeddings, which do not overlap, are sound.
    """
    overlap = any(
        isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) != tuple(layer.stride) and max(layer.kernel_size) > 1
        for layer in model.modules()
    )
    return not (overlap and device.type == "cpu")


def _evaluation_data(settings: DistillSettings, splits: Splits, class_names: tuple[str, ...]) -> Labelled | None:
    split = settings.eval_split or evaluation_split(splits, settings.data.split)
    if split is None:
        return None
    data = load_labelled(settings.data.model_copy(update={"split": split, "limit": None}), splits)
    return replace(data, labels=learned_labels(data, class_names), class_names=class_names)


def _decode(
    settings: DistillSettings, data: Labelled, evaluation: Labelled | None, views: ReplayedViews | None
) -> Images:
    train = cached_images(data, settings.image_size, skip_bad=settings.skip_bad, views=views, cache=settings.cache)
    if evaluation is not None:
        test = cached_images(evaluation, settings.image_size, skip_bad=settings.skip_bad, cache=settings.cache)
        images = Images(train, test, f"split {evaluation.settings.split}")
    else:
        apart = held_out(train.keys)
        images = Images(train.select(~apart), train.select(apart), "held-out tenth of the training split")
        LOGGER.info(
            "The data has no evaluation split: %d of its %d images are held out by content.",
            *(len(images.evaluation), len(train)),
        )
    if len(images.train) < 2 or len(images.evaluation) == 0:
        raise PipelineError(
            f"{settings.data.dataset}: {len(images.train)} images are left to train on and {len(images.evaluation)} "
            "to evaluate on; at least 2 and 1 are needed."
        )
    return images


def _needed_bytes(student: Student) -> int:
    weights = sum(parameter.nbytes for parameter in student.parameters())
    return 14 * weights + 10_000_000  # three checkpoints with two moments and an average, two students, metrics
