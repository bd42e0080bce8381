"""The report of a run as a page: accuracies, curves, classes that are confused, alignment, and what made the run.

Measures nothing: `outcome` and `alignment` do, and `finished` reads what they found.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.accuracy import Accuracy, percent
from pipeline.curves import Curve, draw_curves
from pipeline.distill.augment import Augmentation
from pipeline.distill.finished import FinishedRun, read_run
from pipeline.distill.recipe import Recipe
from pipeline.progress import duration, size
from pipeline.report import (
    Bar,
    Block,
    Cell,
    Figure,
    Gallery,
    Section,
    Table,
    Thumbnail,
    render_report,
    short_name,
    write_report,
)

_LOSSES = {
    "loss": "total",
    "loss_ce": "cross-entropy",
    "loss_clip": "L_clip",
    "loss_cosine": "1 − cosine",
    "loss_soft_label": "KL to ridge head",
    "loss_direction": "direction",
    "loss_text": "text",
}
_Row = tuple[str, Cell]


def write_run_page(folder: Path, pictures: Mapping[int, Image.Image] | None = None) -> Path:
    """Make a run's report from what its directory tells; an older one is replaced.

    Args:
        folder: the run directory.
        pictures: as `run_page` takes them. They are in the images only: made again later, the page has none.

    Returns:
        The page's file.

    Raises:
        PipelineError: the run is not finished, a file of it is damaged, or the page cannot be written.
    """
    path = folder / "report.html"
    write_report(run_page(folder.absolute().name, read_run(folder), pictures or {}), path, overwrite=True)
    return path


def run_page(name: str, run: FinishedRun, pictures: Mapping[int, Image.Image]) -> str:
    """Lay a finished run out as an HTML page.

    Args:
        name: of the run directory.
        run: what it tells.
        pictures: images of the outcome's mistakes by their row; of those that are missing only the caption is shown.

    Returns:
        The page: the same arguments give the same text.
    """
    sections = (
        Section("Curves", list(_curves(run))),
        Section("Worst classes", list(_worst(run))),
        Section("Most confused classes", list(_confused(run, pictures))),
        Section("Alignment with the teacher", list(_alignment(run))),
        Section("Data and artifact", list(run.data.join.lines())),
        Section("Recipe", [Table(("setting", "value", "meaning"), list(_settings(run.recipe)))]),
        Section("Where it ran", [Table(("what", "value"), list(_machine(run)))]),
    )
    title = f"{name}: {run.settings.student} on {short_name(run.data.name)}"
    return render_report(title, [Table(("measure", "value"), list(_lead(run)))], sections)


def _lead(run: FinishedRun) -> Iterator[_Row]:
    settings, result, outcome, teacher = run.settings, run.result, run.outcome, run.artifact.teacher
    yield "accuracy, top-1", _bar(outcome.top1)
    yield "accuracy, top-5", _bar(outcome.top5)
    number = f"{outcome.top1.num_images:,} images, {run.data.evaluated_on}"
    yield "measured on", f"{number}; in brackets the 95 % interval (Wilson)"
    yield "student", f"{settings.student}, {result.num_parameters:,} parameters, {settings.image_size} px"
    yield "teacher", f"{short_name(teacher.name)}, embeddings of {teacher.embed_dim:,} values"
    yield "artifact", short_name(run.artifact.file)
    yield (
        "trained on",
        (f"{short_name(run.data.name)}: {run.data.join.num_images:,} images, {run.data.num_classes:,} classes"),
    )
    # A path would say how a machine is set up.
    yield (
        "recipe",
        f"{short_name(Path(settings.recipe).name)}, target {settings.target}, α₂ = {run.recipe.get('alpha2')}",
    )
    yield (
        "training",
        (
            f"{result.num_steps:,} steps in {len(run.epochs):,} epochs, {result.images_per_second:,.1f} images/s; "
            f"{percent(result.feed_share)} of the time waiting for data"
        ),
    )
    took = f"the command that ended it took {duration(result.seconds)}"  # a run may have had several
    yield "time", f"{duration(result.train_seconds)} of training; {took}"
    device_bytes = result.memory.device_bytes
    on_device = f", {size(device_bytes)} on the GPU" if device_bytes else ""
    yield "memory", f"{size(result.memory.resident_bytes)} at the peak, libraries included{on_device}"


def _curves(run: FinishedRun) -> Iterator[Block]:
    losses = {key: name for key, name in _LOSSES.items() if any(line.get(key) for line in run.epochs)}
    explained = "The parts are drawn as they are, before their weights"
    yield from _figure(run, losses or {"loss": "total"}, f"Losses, means over the images of an epoch. {explained}.")
    yield from _figure(
        run, {"top1": "top-1", "top5": "top-5"}, "Accuracy on the evaluation images after each epoch, in percent."
    )
    yield from _figure(run, {"learning_rate": "learning rate"}, "Learning rate at the end of each epoch.")
    if run.recipe.get("learn_logit_scale"):
        yield from _figure(run, {"logit_scale": "κ"}, "Logit scale κ at the end of each epoch.")


def _figure(run: FinishedRun, names: Mapping[str, str], caption: str) -> Iterator[Figure]:
    curves = [
        Curve(name, [(int(line.get("epoch", 0)), line[key]) for line in run.epochs if key in line])
        for key, name in names.items()
        if any(key in line for line in run.epochs)
    ]
    if not curves:
        return
    # In words too, for those who cannot see it.
    if max(len(each.points) for each in curves) == 1:
        words = "After the only one: " + ", ".join(f"{each.name} {each.points[0][1]:.3g}" for each in curves)
    else:
        ends = [f"{each.name} {each.points[0][1]:.3g} to {each.points[-1][1]:.3g}" for each in curves]
        words = "From the first to the last: " + ", ".join(ends)
    yield Figure(draw_curves(caption, curves), f"{caption} {words}.")


def _worst(run: FinishedRun) -> Iterator[Block]:
    worst, number = run.outcome.worst, run.outcome.num_classes
    which = "All classes" if len(worst) == number else f"The {len(worst)} of {number:,} classes of lowest accuracy"
    yield f"{which}, top-1, with 95 % intervals."
    yield Table(
        ("class", "images", "accuracy"),
        [(short_name(each.name), each.accuracy.num_images, _bar(each.accuracy)) for each in worst],
    )


def _confused(run: FinishedRun, pictures: Mapping[int, Image.Image]) -> Iterator[Block]:
    if not run.outcome.confused:
        return
    yield "Evaluation images of one class that the student takes for another, and their share of the class's."
    yield Table(
        ("class", "taken for", "images", "share"),
        [
            (short_name(each.label), short_name(each.predicted), each.num_images, Bar(each.share, percent(each.share)))
            for each in run.outcome.confused
        ],
    )
    yield "The first image of each of the most frequent pairs, as the student saw it."
    yield Gallery(
        [
            Thumbnail(
                pictures.get(each.row),
                (short_name(each.label), f"taken for {short_name(each.predicted)}", f"row {each.row:,}"),
            )
            for each in run.outcome.mistakes
        ]
    )


def _alignment(run: FinishedRun) -> Iterator[Block]:
    found = run.outcome.alignment
    rows: list[tuple[str, str, str]] = []
    for name, value, meaning in (
        (
            "linear CKA of classes",
            found.class_cka,
            "the student's class means lie to each other as the teacher's class embeddings do: 1 if they differ by "
            "rotation and scale alone (arXiv 1905.00414)",
        ),
        ("the same by chance", found.class_cka_by_chance, "its mean over all ways to shuffle the classes"),
        ("cosine to the own class", found.own_class, "of an image's embedding and P of its class embedding, mean"),
        ("cosine to another class", found.other_class, "the same with the nearest of the other classes, mean"),
        ("own class is nearest", found.nearest_own, "share of images whose own class has the highest of these cosines"),
        (
            "cosine to the own sample",
            found.own_sample,
            f"of a training image's embedding and P of the teacher's embedding of it, mean over {found.num_samples:,}",
        ),
        ("cosine to another sample", found.other_sample, "the same with the teacher's embeddings of the others, mean"),
    ):
        if value is not None:
            rows.append((name, f"{value:.3f}".replace("-", "−"), meaning))
    if rows:
        yield f"Measured on {found.num_images:,} evaluation images of {found.num_classes:,} classes."
        yield Table(("measure", "value", "meaning"), rows)
    yield "P is the projection that is learnt with the student, from the teacher's embeddings to the student's."
    if found.own_class is None:
        yield "There are no cosines: P learned nothing of images, or embeddings are not finite."


def _settings(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    fields = Recipe.model_fields | {f"augmentation.{name}": field for name, field in Augmentation.model_fields.items()}
    for name, value in _flat(recipe):
        meaning = fields[name].description if name in fields else None
        yield short_name(name), short_name(json.dumps(value, ensure_ascii=False)), meaning or ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _machine(run: FinishedRun) -> Iterator[_Row]:
    yield "device", f"{run.compute.device}, {run.compute.precision}"
    for name, value in run.machine.items():
        if value is not None:
            yield name.replace("_", " "), str(value)
    yield "seed", str(run.settings.seed)
    yield "weights to begin with", short_name(Path(run.settings.init).name)
    yield "artifact's digest", run.artifact.manifest_sha256
    yield "software", ", ".join(f"{name} {version}" for name, version in run.software.items())


def _bar(accuracy: Accuracy) -> Bar:
    return Bar(accuracy.share, str(accuracy), (accuracy.low, accuracy.high))
