"""Stage one: `extract`, and its `--check`."""

from typing import Any

import click

from pipeline.commands.options import (
    PATH,
    Finite,
    data_options,
    device_option,
    example,
    json_option,
    overwrite_option,
    precision_option,
    skip_bad_option,
    take_data_settings,
    version_option,
)
from pipeline.commands.printing import emit, memory_rows

# What `extract --check` takes; the rest says what an artifact shall contain, and stands in its manifest.
_CHECK_TAKES = {
    *("check", "fraction", "teacher", "teacher_revision", "dataset", "dataset_config", "dataset_revision", "split"),
    *("image_column", "label_column", "batch_size", "precision", "device", "workers", "as_json"),
}


class _Rows(click.ParamType[Any]):
    name = "A:B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        first, colon, end = value.partition(":")
        if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
            self.fail(f"{value!r} is not A:B with 0 ≤ A < B, such as 0:25000.", param, ctx)
        return int(first), int(end)


class _PerClass(click.ParamType[Any]):
    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "all" else click.IntRange(min=1).convert(value, param, ctx)


@click.command(
    epilog=example(
        "clip-embed-kd extract --teacher google/vit-large-patch16-224-in21k",
        "--dataset uoft-cs/cifar100 --label-column fine_label --out cifar100.safetensors",
    )
)
@click.option("--teacher", required=True, metavar="T", help="transformers image encoder: hub name or folder")
@click.option("--teacher-revision", metavar="REV", help="hub branch, tag or commit")
@data_options("train")
@click.option("--out", type=PATH, help="artifact to write: .safetensors or .h5; required unless --check is given")
@click.option(
    "--check", type=PATH, metavar="A", help="embed some of this artifact's images again and compare; write nothing"
)
@click.option(
    "--fraction",
    type=Finite(0, 1, min_open=True),
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
@skip_bad_option
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="images in a forward pass  [default: 16 on a CPU, 128 with CUDA]"
)
@precision_option
@device_option
@click.option(
    "--workers", type=click.IntRange(0, 1024), help="decoding processes  [default: 0 without CUDA, else up to 8]"
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="of the choice of images, and of views")
@overwrite_option
@json_option
@version_option
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
        result = extract(ExtractSettings(data=take_data_settings(options), **options))
    except ShareDone:
        return
    manifest = result.manifest
    emit(
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
            *memory_rows(result.memory),
            *result.report_card.rows(),
            ("report", str(result.path.with_suffix(".report.html"))),
        ],
    )


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
    from pipeline.errors import PipelineError
    from pipeline.extract import CheckSettings, check_artifact

    given = _given(context)
    given.pop("as_json", None)
    data = take_data_settings(given)
    result = check_artifact(CheckSettings(artifact=given.pop("check"), data=data, **given))
    emit(as_json, result.as_json(), result.rows())
    if not result.matches:
        raise PipelineError(f"{result.path.name}: {result.verdict()}")
