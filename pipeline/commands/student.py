"""What is done with a student: `evaluate`, `predict` and `export`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.commands.options import (
    PATH,
    cache_option,
    data_options,
    device_option,
    example,
    json_option,
    precision_option,
    skip_bad_option,
    take_data_settings,
    version_option,
)
from pipeline.commands.printing import emit


@click.command(
    epilog=example("clip-embed-kd evaluate --student run --dataset uoft-cs/cifar100 --label-column fine_label")
)
@click.option("--student", required=True, type=PATH, metavar="RUN", help="run directory")
@data_options("test")
@skip_bad_option
@cache_option
@click.option("--batch-size", type=click.IntRange(min=1), default=64, help="images at once")
@precision_option
@device_option
@json_option
@version_option
def evaluate(as_json: bool, **options: Any) -> None:
    """Measure a student's accuracy on a labelled data set."""
    from pipeline.distill.config import EvaluateSettings
    from pipeline.distill.evaluate import evaluate_run
    from pipeline.errors import shortened

    result = evaluate_run(EvaluateSettings(data=take_data_settings(options), **options))
    emit(
        as_json,
        {
            "top1": result.top1,
            "top5": result.top5,
            "num_images": int(result.count.sum()),
            "images_per_second": result.images_per_second,
            "seconds": result.seconds,
            "per_class": result.per_class(),
        },
        [
            ("accuracy", f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %"),
            ("images", f"{int(result.count.sum()):,}, {result.images_per_second:.1f} images/s"),
            ("worst", ", ".join(f"{shortened(name)} {top1:.0f} %" for name, top1 in result.worst())),
        ],
    )


@click.command(epilog=example("clip-embed-kd predict --student run photo.jpg"))
@click.option("--student", required=True, type=PATH, metavar="RUN", help="run directory")
@click.argument("images", nargs=-1, required=True, type=PATH, metavar="IMAGE…")
@device_option
@json_option
@version_option
def predict(student: Path, images: Sequence[Path], device: str, as_json: bool) -> None:
    """Classify image files."""
    from pipeline.distill.predict import predict
    from pipeline.distill.student import load_student
    from pipeline.errors import shortened
    from pipeline.runtime import batch_must_fit, resolve_device

    place = resolve_device(device)
    with batch_must_fit(1, "the student"):
        best = predict(load_student(student).to(place), images, place)
    named = dict(zip(map(str, images), best, strict=True))
    emit(
        as_json,
        {
            path: [{"class": name, "probability": probability} for name, probability in classes]
            for path, classes in named.items()
        },
        [
            (path, ", ".join(f"{shortened(name)} {probability:.1%}" for name, probability in classes))
            for path, classes in named.items()
        ],
    )


@click.command(epilog=example("clip-embed-kd export --student run --out student.onnx"))
@click.option("--student", required=True, type=PATH, metavar="RUN", help="run directory")
@click.option("--out", required=True, type=PATH, help="file to write: .onnx")
@click.option("--overwrite", is_flag=True, help="replace an existing file")
@json_option
@version_option
def export(student: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    """Write a student as an ONNX file, and check it against PyTorch."""
    from pipeline.distill.export import export_student
    from pipeline.progress import log_to_stderr, size

    log_to_stderr()
    result = export_student(student, out, overwrite=overwrite)
    side = result.image_size
    emit(
        as_json,
        {**dataclasses.asdict(result), "path": str(out)},
        [
            ("model", f"{out}, {size(result.model_bytes)}, opset {result.opset}"),
            ("input", f"pixels: uint8 [batch, {side}, {side}, 3], RGB; mean and deviation are in the model"),
            ("outputs", f"logits [batch, {result.num_classes}], embedding [batch, {result.embed_dim}]"),
            (
                "checked",
                f"{result.num_compared} random images: logits of up to {result.max_logit:.3g} differ from PyTorch's by "
                f"at most {result.max_difference:.1e}",
            ),
        ],
    )
