"""The commands. Each parses, calls one function and prints; heavy imports happen inside the commands.

Results go to stdout, progress and logs to stderr. Exit status: 0 done, 1 failed with one line on stderr,
2 wrong usage, 130 and 143 interrupted.
"""

import dataclasses
import functools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
_PATH = click.Path(path_type=Path)
_BYTES_WITHOUT_BAR = 1_000_000_000  # less is done in a second or so
# What `extract --check` takes; the rest says what an artifact shall contain, and stands in its manifest.
_CHECK_TAKES = {
    *("check", "fraction", "teacher", "teacher_revision", "dataset", "dataset_config", "dataset_revision", "split"),
    *("image_column", "label_column", "batch_size", "precision", "device", "workers", "as_json"),
}


def _example(*lines: str) -> str:
    return "\b\nExample:\n  " + " \\\n      ".join(lines)


class _Rows(click.ParamType[Any]):
    name = "A:B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        first, colon, end = value.partition(":")
        if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
            self.fail(f"{value!r} is not A:B with 0 ≤ A < B, such as 0:25000.", param, ctx)
        return int(first), int(end)


class _Finite(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)  # NaN is in every range
        return number if math.isfinite(number) else self.fail(f"{value} is not a finite number.", param, ctx)


class _PerClass(click.ParamType[Any]):
    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "all" else click.IntRange(min=1).convert(value, param, ctx)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"clip-embed-kd {version('clip-embed-kd')}")
        except PackageNotFoundError:
            click.echo("clip-embed-kd, not installed")
        ctx.exit()


_version_option = click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="show the version",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
_device_option = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
_precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="arithmetic; auto: bfloat16 where the hardware has it",
)
_gzip_option = click.option("--gzip", is_flag=True, help="compress samples, for cold storage; .h5 only")
_overwrite_option = click.option("--overwrite", is_flag=True, help="replace an existing artifact")
_cache_option = click.option(
    "--cache",
    type=_PATH,
    metavar="DIR",
    help="where decoded images are kept  [default: $CLIP_EMBED_KD_CACHE, else ~/.cache/clip-embed-kd/images]",
)
_skip_bad_option = click.option("--skip-bad", is_flag=True, help="leave out and count images that cannot be decoded")


def _data_options(split: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    options = [
        click.option("--dataset", required=True, metavar="D", help="hub name, or a folder that `datasets` loads"),
        click.option("--dataset-config", metavar="NAME", help="configuration of a hub data set"),
        click.option("--dataset-revision", metavar="REV", help="hub branch, tag or commit"),
        click.option("--split", default=split, help="split to use"),
        click.option("--image-column", metavar="NAME", help="found where only one fits"),
        click.option("--label-column", metavar="NAME", help="found where only one fits"),
        click.option("--limit", type=click.IntRange(min=1), help="use this many images, of all classes in turn"),
    ]
    return lambda command: functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def _overrides_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--alpha2", type=_Finite(0, 1), help="weight of the distillation loss  [default: the recipe's]"),
        click.option("--epochs", type=click.IntRange(min=1), help="passes over the images  [default: the recipe's]"),
        click.option("--batch-size", type=click.IntRange(min=2), help="images a step  [default: the recipe's]"),
        click.option(
            "--lr",
            "learning_rate",
            type=_Finite(0, min_open=True),
            help="learning rate  [default: the recipe's]",
        ),
        click.option(
            "--set", "changes", multiple=True, metavar="KEY=VALUE", help="any setting of the recipe; may be repeated"
        ),
    ]
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def _training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options: list[Callable[..., Any]] = [
        click.option("--artifact", required=True, type=_PATH, metavar="A", help="what extract wrote"),
        _data_options("train"),
        click.option(
            "--eval-split",
            metavar="NAME",
            help="split to evaluate on  [default: test, else validation, else a held-out tenth]",
        ),
        click.option("--student", default="base", help="base, large, or any timm model"),
        click.option(
            "--init", default="scratch", metavar="W", help="weights to begin with: scratch, pretrained, or a folder"
        ),
        click.option(
            "--image-size", type=click.IntRange(min=1), default=32, help="side of the student's input, in pixels"
        ),
        click.option("--recipe", default="paper", metavar="R", help="a recipe's name, or a TOML file"),
        click.option(
            "--target",
            type=click.Choice(["class", "sample", "both"]),
            default="class",
            help="teacher embeddings to learn from",
        ),
        _overrides_options,
        click.option(
            "--micro-batch",
            type=click.IntRange(min=2),
            help="images in memory at once; the loss is the batch's all the same  [default: the batch]",
        ),
        _precision_option,
        _device_option,
        click.option(
            "--compile/--no-compile", default=False, help="compile the step; where that fails, say why and go on"
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="of weights, order, flips and dropout"
        ),
        click.option(
            "--max-missing",
            type=_Finite(0, 1),
            default=0.0,
            help="largest share of images without a stored embedding",
        ),
        click.option("--join-by-index", is_flag=True, help="join class i to row i, whatever the names"),
        _skip_bad_option,
        _cache_option,
        click.option(
            "--evaluate-every",
            type=click.IntRange(min=1),
            default=1,
            help="epochs between evaluations; the last is always one",
        ),
    ]
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@click.group(context_settings=_SETTINGS)
@_version_option
def cli() -> None:
    """Distil a huge vision teacher into a small student, from its stored embeddings alone.

    Run `extract` once where the teacher fits, copy the artifact, and run `distill` where the student shall live.
    """


@cli.command(
    epilog=_example(
        "clip-embed-kd extract --teacher google/vit-large-patch16-224-in21k",
        "--dataset uoft-cs/cifar100 --label-column fine_label --out cifar100.safetensors",
    )
)
@click.option("--teacher", required=True, metavar="T", help="transformers image encoder: hub name or folder")
@click.option("--teacher-revision", metavar="REV", help="hub branch, tag or commit")
@_data_options("train")
@click.option("--out", type=_PATH, help="artifact to write: .safetensors or .h5; required unless --check is given")
@click.option(
    "--check", type=_PATH, metavar="A", help="embed some of this artifact's images again and compare; write nothing"
)
@click.option(
    "--fraction",
    type=_Finite(0, 1, min_open=True),
    default=0.01,
    help="share of samples, or of classes where there are none, to --check",
)
@click.option(
    "--per-class",
    type=_PerClass(),
    metavar="N|all",
    help="random images in each class  [default: 100; all with --samples]",
)
@click.option("--rows", type=_Rows(), metavar="A:B", help="only rows A to B - 1, to be merged with the other parts")
@click.option("--samples", is_flag=True, help="also store the embedding of each image")
@click.option(
    "--views", type=click.IntRange(min=1), default=1, help="embeddings a sample, all but the first of augmented views"
)
@click.option("--view-size", type=click.IntRange(1, 4096), default=224, help="side of an augmented view, in pixels")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", help="of stored samples")
@click.option(
    "--pooling",
    type=click.Choice(["auto", "cls", "distilled", "pooled", "mean", "projected"]),
    default="auto",
    help="how one embedding is taken; auto: as the teacher's authors mean it",
)
@click.option(
    "--class-text",
    is_flag=True,
    help="also store text embeddings of the class names; teachers like CLIP only, makes auto pooling projected",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    default=["a photo of a {}."],
    metavar="TEMPLATE",
    help="text with {} for the class name; may be repeated",
)
@click.option("--report-split", metavar="NAME", help="split to measure accuracies on  [default: a held-out fifth]")
@_skip_bad_option
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="images in a forward pass  [default: 16 on a CPU, 128 with CUDA]"
)
@_precision_option
@_device_option
@click.option(
    "--workers", type=click.IntRange(0, 1024), help="decoding processes  [default: 0 without CUDA, else up to 8]"
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="of the choice of images, and of views")
@_overwrite_option
@_json_option
@_version_option
@click.pass_context
def extract(context: click.Context, /, as_json: bool, **options: Any) -> None:
    """Stage one: run the teacher once and write its embeddings."""
    from pipeline.extract import ExtractSettings, ShareDone, extract
    from pipeline.progress import duration, size

    if _checks(context):
        _check(context, as_json)
        return
    del options["check"], options["fraction"]
    try:
        result = extract(ExtractSettings(data=_data_settings(options), **options))
    except ShareDone:
        return
    manifest = result.manifest
    _emit(
        as_json,
        {
            "artifact": str(result.path),
            "manifest_sha256": manifest.sha256(),
            "num_images": result.num_images,
            "num_resumed": result.num_resumed,
            "num_classes": len(manifest.classes),
            "embed_dim": manifest.teacher.embed_dim,
            "artifact_bytes": result.artifact_bytes,
            "seconds": result.seconds,
            "images_per_second": result.images_per_second,
            "peak_memory_bytes": result.memory.resident_bytes,
            "peak_device_memory_bytes": result.memory.device_bytes,
            "report_card": result.report_card.as_json(),
        },
        [
            ("artifact", f"{result.path}, {size(result.artifact_bytes)}"),
            ("digest", manifest.sha256()),
            (
                "content",
                f"{len(manifest.classes)} classes × {manifest.teacher.embed_dim} values"
                + (f", {manifest.tensors['sample/key'].shape[0]:,} samples" if options["samples"] else "")
                + (f" × {options['views']} views" if options["views"] > 1 else ""),
            ),
            ("images", f"{result.num_images:,}, {result.images_per_second:.1f} images/s"),
            ("time", duration(result.seconds)),
            *_memory_rows(result.memory),
            *result.report_card.rows(),
            ("report", str(result.path.with_suffix(".report.html"))),
        ],
    )


@cli.command(
    epilog=_example(
        "clip-embed-kd distill --artifact cifar100.safetensors",
        "--dataset uoft-cs/cifar100 --label-column fine_label --out run",
    )
)
@_training_options
@click.option("--out", required=True, type=_PATH, help="run directory to make")
@click.option("--max-steps", type=click.IntRange(min=1), help="stop after so many steps")
@click.option("--overwrite", is_flag=True, help="replace an existing run directory")
@click.option("--resume", is_flag=True, help="go on with the run in the run directory, if there is one")
@click.option(
    "--checkpoint-minutes",
    type=_Finite(0, min_open=True),
    default=10.0,
    help="between checkpoints within an epoch; an epoch ends with one, unless it takes a few seconds",
)
@_json_option
@_version_option
def distill(as_json: bool, **options: Any) -> None:
    """Stage two: train a student from an artifact."""
    from pipeline.distill import DistillSettings, distill
    from pipeline.progress import duration

    overrides = _overrides(options)
    result = distill(DistillSettings(data=_data_settings(options), overrides=overrides, **options))
    _emit(
        as_json,
        {
            "run_directory": str(result.run_directory),
            "top1": result.top1,
            "top5": result.top5,
            "num_parameters": result.num_parameters,
            "num_steps": result.num_steps,
            "images_per_second": result.images_per_second,
            "train_seconds": result.train_seconds,
            "feed_share": result.feed_share,
            "compiled": result.compiled,
            "seconds": result.seconds,
            "peak_memory_bytes": result.memory.resident_bytes,
            "peak_device_memory_bytes": result.memory.device_bytes,
            "report": None if result.report is None else str(result.report),
        },
        [
            ("student", f"{result.run_directory / 'student'}, {result.num_parameters:,} parameters"),
            ("accuracy", f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %"),
            (
                "training",
                f"{result.num_steps:,} steps, {result.images_per_second:.1f} images/s, "
                f"{duration(result.train_seconds)}, {100 * result.feed_share:.1f} % of it waiting for data",
            ),
            ("time", f"{duration(result.seconds)} in all"),
            *_memory_rows(result.memory),
            *([] if result.report is None else [("report", str(result.report))]),
        ],
    )


@cli.command(
    epilog=_example(
        "clip-embed-kd plan --artifact cifar100.safetensors",
        "--dataset uoft-cs/cifar100 --label-column fine_label --ram 2 --hours 12",
    )
)
@_training_options
@click.option("--out", type=_PATH, default=Path("run"), help="where the run shall be: its disk is tried")
@click.option(
    "--ram",
    type=_Finite(0, 1_000_000, min_open=True),
    metavar="GB",
    help="memory that the run may take; with CUDA, of the GPU",
)
@click.option("--hours", type=_Finite(0, min_open=True), help="time that the run may take")
@_json_option
@_version_option
def plan(as_json: bool, ram: float | None, hours: float | None, **options: Any) -> None:
    """Measure a few steps: how long `distill` will take on this machine, how much memory and disk."""
    from pipeline.distill import DistillSettings
    from pipeline.distill.plan import plan

    overrides = _overrides(options)
    settings = DistillSettings(data=_data_settings(options), overrides=overrides, **options)
    found = plan(settings, ram_bytes=None if ram is None else round(ram * 1e9), hours=hours)
    _emit(as_json, found.as_json(), found.rows())


@cli.command(
    epilog=_example("clip-embed-kd evaluate --student run --dataset uoft-cs/cifar100 --label-column fine_label")
)
@click.option("--student", required=True, type=_PATH, metavar="RUN", help="run directory")
@_data_options("test")
@_skip_bad_option
@_cache_option
@click.option("--batch-size", type=click.IntRange(min=1), default=64, help="images at once")
@_precision_option
@_device_option
@_json_option
@_version_option
def evaluate(as_json: bool, **options: Any) -> None:
    """Measure a student's accuracy on a labelled data set."""
    from pipeline.distill.config import EvaluateSettings
    from pipeline.distill.evaluate import evaluate_run

    result = evaluate_run(EvaluateSettings(data=_data_settings(options), **options))
    _emit(
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
            ("worst", ", ".join(f"{name} {top1:.0f} %" for name, top1 in result.worst())),
        ],
    )


@cli.command(epilog=_example("clip-embed-kd predict --student run photo.jpg"))
@click.option("--student", required=True, type=_PATH, metavar="RUN", help="run directory")
@click.argument("images", nargs=-1, required=True, type=_PATH, metavar="IMAGE…")
@_device_option
@_json_option
@_version_option
def predict(student: Path, images: Sequence[Path], device: str, as_json: bool) -> None:
    """Classify image files."""
    from pipeline.distill.predict import predict
    from pipeline.distill.student import load_student
    from pipeline.runtime import batch_must_fit, resolve_device

    place = resolve_device(device)
    with batch_must_fit(1, "the student"):
        best = predict(load_student(student).to(place), images, place)
    named = dict(zip(map(str, images), best, strict=True))
    _emit(
        as_json,
        {
            path: [{"class": name, "probability": probability} for name, probability in classes]
            for path, classes in named.items()
        },
        [
            (path, ", ".join(f"{name} {probability:.1%}" for name, probability in classes))
            for path, classes in named.items()
        ],
    )


@cli.command(epilog=_example("clip-embed-kd export --student run --out student.onnx"))
@click.option("--student", required=True, type=_PATH, metavar="RUN", help="run directory")
@click.option("--out", required=True, type=_PATH, help="file to write: .onnx")
@click.option("--overwrite", is_flag=True, help="replace an existing file")
@_json_option
@_version_option
def export(student: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    """Write a student as an ONNX file, and check it against PyTorch."""
    from pipeline.distill.export import export_student
    from pipeline.progress import log_to_stderr, size

    log_to_stderr()
    result = export_student(student, out, overwrite=overwrite)
    side = result.image_size
    _emit(
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


@cli.group()
@_version_option
def recipe() -> None:
    """Training settings that ship with the project."""


@recipe.command("list", epilog=_example("clip-embed-kd recipe list"))
@_json_option
@_version_option
def list_recipes(as_json: bool) -> None:
    """Name the recipes."""
    from pipeline.distill.recipe import shipped_recipes

    names = shipped_recipes()
    _emit(as_json, {"recipes": names}, [(name, f"clip-embed-kd recipe show {name}") for name in names])


@recipe.command(epilog=_example("clip-embed-kd recipe show strong > mine.toml"))
@click.argument("name", metavar="RECIPE")
@_overrides_options
@_json_option
@_version_option
def show(name: str, as_json: bool, **options: Any) -> None:
    """Print a recipe as TOML, with what is laid over it."""
    from pipeline.distill.recipe import load_recipe, recipe_as_toml

    found = load_recipe(name, _overrides(options))
    click.echo(_json(found.model_dump()) if as_json else recipe_as_toml(found), nl=as_json)


@cli.group()
@_version_option
def store() -> None:
    """Look into artifacts, check them, and make others of them."""


@store.command(epilog=_example("clip-embed-kd store inspect cifar100.safetensors"))
@click.argument("artifact", type=_PATH)
@_json_option
@_version_option
def inspect(artifact: Path, as_json: bool) -> None:
    """Show what an artifact says of itself; its tensors are not verified."""
    from store import summarise

    summary = summarise(artifact)
    document = {
        "file": summary.file,
        "file_bytes": summary.file_bytes,
        "manifest_sha256": summary.manifest_sha256,
        "images_per_class": summary.images_per_class,
        "verified": False,
        "manifest": summary.manifest,
    }
    _emit(as_json, document, [*summary.rows(), ("", "tensors not verified")])


@store.command(epilog=_example("clip-embed-kd store verify *.safetensors"))
@click.argument("artifacts", nargs=-1, required=True, type=_PATH, metavar="PATH…")
@_json_option
@_version_option
def verify(artifacts: Sequence[Path], as_json: bool) -> None:
    """Check every byte of artifacts, one line each; exit status 1 if any of them failed."""
    from pipeline.errors import printable
    from store import StoreError, verify_artifact

    documents = []
    for path in artifacts:
        document: dict[str, Any] = {"path": str(path), "ok": True, "manifest_sha256": None, "error": None}
        try:
            with _byte_progress("verifying", [path]) as progress:
                document["manifest_sha256"] = verify_artifact(path, progress=progress)
        except (StoreError, OSError, MemoryError) as error:
            text = _explain(error)[0] or "there is not enough memory for it."
            for name in (str(path), path.name):  # each on one line, as `_explain` has it
                text = text.removeprefix(" ".join(f"{name}:".split()) + " ")
            document["ok"], document["error"] = False, text
        documents.append(document)
        if not as_json:
            click.echo(printable(f"{path}: " + ("ok" if document["ok"] else f"FAILED: {document['error']}")))
    if as_json:
        click.echo(_json(documents))
    if not all(document["ok"] for document in documents):
        sys.exit(1)


@store.command(epilog=_example("clip-embed-kd store convert cifar100.safetensors --out small.h5 --dtype int8"))
@click.argument("artifact", type=_PATH)
@click.option("--out", required=True, type=_PATH, help="artifact to write: .safetensors or .h5")
@click.option("--dtype", type=click.Choice(["float32", "float16", "int8"]), help="of stored samples  [default: as is]")
@click.option("--class-only", is_flag=True, help="leave the samples out")
@click.option("--drop-class", "drop_classes", multiple=True, metavar="NAME", help="leave a class out; may be repeated")
@_gzip_option
@_overwrite_option
@_json_option
@_version_option
def convert(artifact: Path, out: Path, overwrite: bool, as_json: bool, **changes: Any) -> None:
    """Write an artifact in another container or type, and say what that lost."""
    from pipeline.progress import size
    from store import Conversion, convert_artifact

    with _byte_progress("converting", [artifact, artifact]) as progress:
        result = convert_artifact(artifact, out, Conversion(**changes), overwrite=overwrite, progress=progress)
    loss, before, after = result.loss, result.bytes_before, result.bytes_after
    document = {
        "artifact": str(out),
        "manifest_sha256": result.manifest.sha256(),
        "bytes_before": before,
        "bytes_after": after,
        "loss": dataclasses.asdict(loss) if loss else None,
        "notes": result.notes,
    }
    rows = [
        ("artifact", f"{out}, {size(after)}, was {size(before)} ({(after - before) / before:+.1%})"),
        ("digest", result.manifest.sha256()),
    ]
    if loss:
        rows += [
            ("cosine", f"mean {loss.mean_cosine:.7f}, worst {loss.worst_cosine:.7f}, of {loss.num_rows:,} samples"),
            (
                "classes",
                f"nearest one unchanged for {loss.nearest_class_agreement:.2%} of {loss.num_compared:,} samples",
            ),
        ]
    else:
        rows.append(("loss", "none: what was kept is kept to the bit"))
    _emit(as_json, document, [*rows, *(("note", note) for note in result.notes)])


@store.command(epilog=_example("clip-embed-kd store merge one.safetensors two.safetensors --out both.safetensors"))
@click.argument("artifacts", nargs=-1, required=True, type=_PATH, metavar="ARTIFACT…")
@click.option("--out", required=True, type=_PATH, help="artifact to write: .safetensors or .h5")
@click.option("--allow-overlap", is_flag=True, help="store an image that several have once, and count it each time")
@_overwrite_option
@_json_option
@_version_option
def merge(artifacts: Sequence[Path], out: Path, as_json: bool, **options: Any) -> None:
    """Merge artifacts of one teacher, as if one extraction had seen all their images."""
    from store import merge_artifacts

    with _byte_progress("merging", [*artifacts, *artifacts]) as progress:
        result = merge_artifacts(artifacts, out, progress=progress, **options)
    manifest = result.manifest
    samples = manifest.tensors.get("sample/key")
    repeats = f", and {result.num_shared:,} repeats of them left out" if result.num_shared else ""
    document = {
        "artifact": str(out),
        "manifest_sha256": manifest.sha256(),
        "num_classes": len(manifest.classes),
        "num_samples": samples.shape[0] if samples else 0,
        "num_shared": result.num_shared,
        "notes": result.notes,
    }
    rows = [
        ("artifact", f"{out}, {out.stat().st_size:,} bytes"),
        ("digest", manifest.sha256()),
        ("classes", f"{len(manifest.classes):,}"),
        ("samples", f"{samples.shape[0] if samples else 0:,}" + repeats),
    ]
    _emit(as_json, document, [*rows, *(("note", note) for note in result.notes)])


@store.command(epilog=_example("clip-embed-kd store plot cifar100.safetensors --out cifar100.png"))
@click.argument("artifact", type=_PATH)
@click.option("--out", required=True, type=_PATH, help="picture to draw: .png or .svg")
@click.option("--method", type=click.Choice(["tsne", "pca"]), default="tsne", help="how the maps are laid out")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="of t-SNE, and of the choice of samples")
@click.option("--overwrite", is_flag=True, help="replace an existing picture")
@_json_option
@_version_option
def plot(artifact: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Draw which classes the teacher finds alike, and maps of classes and samples."""
    from pipeline.pictures import plot_artifact
    from pipeline.progress import log_to_stderr

    log_to_stderr()
    result = plot_artifact(artifact, out, **options)
    document = {
        "picture": str(out),
        "num_classes": result.num_classes,
        "num_samples": result.num_samples,
        "notes": result.notes,
    }
    rows = [("picture", str(out)), ("classes", f"{result.num_classes:,}"), ("samples", f"{result.num_samples:,}")]
    _emit(as_json, document, [*rows, *(("note", note) for note in result.notes)])


@cli.command(epilog=_example("clip-embed-kd demo"))
@click.option("--out", type=_PATH, default=Path("demo-run"), help="folder for all that it makes")
@_json_option
@_version_option
def demo(out: Path, as_json: bool) -> None:
    """Run both stages offline, on handwritten digits and a teacher that ship with the project."""
    from pipeline.demo.run import run_demo

    result = run_demo(out)
    _emit(as_json, result.as_json(), result.rows())


def main() -> NoReturn:
    """Run the command line and exit."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stopped)
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except Exception as error:
        from pipeline.errors import printable

        text, code = _explain(error)
        if text is None:
            raise
        click.echo(f"Error: {printable(text)}", err=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # while Python shuts down, an exception would be shown
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> tuple[str | None, int]:
    """Turn what a user can cause into one line; anything else keeps its traceback."""
    from pydantic import ValidationError

    from pipeline.errors import PipelineError, describe_problems
    from store.errors import StoreError

    if isinstance(error, PipelineError | StoreError):
        return " ".join(str(error).split()), 1
    if isinstance(error, ValidationError):
        return describe_problems(error), 2
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}.", 1
    return None, 1


def _given(context: click.Context) -> dict[str, Any]:
    """Return the options that stand on the command line."""
    return {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }


def _checks(context: click.Context) -> bool:
    """Tell whether `extract` is to check; refuse options that do not go together."""
    given, flags = _given(context), {parameter.name: parameter.opts[0] for parameter in context.command.params}
    if "check" in given:
        if "out" in given:
            raise click.UsageError("--out does not go with --check, which writes nothing.", context)
        if wrong := [str(flags[name]) for name in given if name not in _CHECK_TAKES]:
            do = "do" if len(wrong) > 1 else "does"
            raise click.UsageError(
                f"{', '.join(wrong)} {do} not go with --check: the artifact's manifest says how it was made.", context
            )
        return True
    if "fraction" in given:
        raise click.UsageError("--fraction is a share of what to --check: pass --check A too.", context)
    if "out" not in given:
        raise click.UsageError("Missing option '--out', or '--check'.", context)
    return False


def _check(context: click.Context, as_json: bool) -> None:
    """Check an artifact, print what was found, and fail where something differs."""
    from pipeline.data import DataSettings
    from pipeline.errors import PipelineError
    from pipeline.extract import CheckSettings, check_artifact
    from pipeline.progress import log_to_stderr

    log_to_stderr()
    given = _given(context)
    renamed = {"dataset_config": "config", "dataset_revision": "revision"}
    names = ("dataset", *renamed, "split", "image_column", "label_column")
    data = DataSettings(**{renamed.get(name, name): given.pop(name) for name in names if name in given})
    given.pop("as_json", None)
    result = check_artifact(CheckSettings(artifact=given.pop("check"), data=data, **given))
    _emit(as_json, result.as_json(), result.rows())
    if not result.matches:
        raise PipelineError(f"{result.path.name}: {result.verdict()}")


def _is_importing() -> bool:
    """Tell whether a library is being imported: some of them swallow an exception then, or abort."""
    specs = (getattr(module, "__spec__", None) for module in list(sys.modules.values()))
    return any(getattr(spec, "_initializing", False) for spec in specs)


def _stopped(number: int, frame: Any) -> NoReturn:
    if _is_importing():
        os.write(2, b"Interrupted.\n" if number == signal.SIGINT else b"")
        os._exit(128 + number)  # what was being written, if anything, is left as by a power cut
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Take out of the options what is laid over the recipe."""
    from pipeline.distill.recipe import parse_overrides
    from pipeline.errors import PipelineError

    short = {name: options.pop(name) for name in ("alpha2", "epochs", "batch_size", "learning_rate")}
    given = {name: value for name, value in short.items() if value is not None}
    changes = parse_overrides(options.pop("changes"))
    for name in given:
        if name in changes:
            raise PipelineError(f"--set {name}: is given twice, for there is an option of its own too.")
    return changes | given


def _data_settings(options: dict[str, Any]) -> Any:
    from pipeline.data import DataSettings
    from pipeline.progress import log_to_stderr

    log_to_stderr()
    renamed = {"dataset_config": "config", "dataset_revision": "revision"}
    names = (
        "dataset",
        "dataset_config",
        "dataset_revision",
        "split",
        "image_column",
        "label_column",
        "limit",
    )
    return DataSettings(**{renamed.get(name, name): options.pop(name) for name in names})


@contextmanager
def _byte_progress(what: str, paths: Sequence[Path]) -> Iterator[Callable[[int], None]]:
    """Show a bar over the bytes of some files, where they are many."""
    total = sum(path.stat().st_size for path in paths if path.is_file())
    if total < _BYTES_WITHOUT_BAR:
        yield lambda num_bytes: None
        return
    from pipeline.progress import ProgressBar

    done = 0
    with ProgressBar(what, max(1, total // 10**6), "MB") as bar:

        def advance(num_bytes: int) -> None:
            nonlocal done
            bar.advance((done + num_bytes) // 10**6 - done // 10**6)
            done += num_bytes

        yield advance


def _memory_rows(memory: Any) -> list[tuple[str, str]]:
    from pipeline.progress import size

    rows = [("memory", f"{size(memory.resident_bytes)} at the peak, libraries included")]
    if memory.device_bytes:
        rows.append(("GPU memory", f"{size(memory.device_bytes)} at the peak"))
    return rows


def _emit(as_json: bool, document: dict[str, Any], rows: Sequence[tuple[str, str]]) -> None:
    if as_json:
        click.echo(_json(document))
        return
    from pipeline.errors import printable

    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        click.echo(printable(f"{label:<{width}}  {text}"))


def _json(document: object) -> str:
    """Encode as JSON in UTF-8; what cannot be printed, or not be encoded, is escaped in its strings."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return "".join(part if part.isprintable() or part == "\n" else json.dumps(part)[1:-1] for part in text)


if __name__ == "__main__":
    main()
