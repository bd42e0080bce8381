"""Stage two: `distill` trains a student, `plan` tells what that will take, `recipe` with which settings."""

from pathlib import Path
from typing import Any

import click

from pipeline.commands.options import (
    PATH,
    Finite,
    cache_option,
    data_options,
    device_option,
    example,
    json_option,
    precision_option,
    skip_bad_option,
    take_data_settings,
    together,
    version_option,
)
from pipeline.commands.printing import as_json_text, emit, memory_rows

_overrides_options = together(
    click.option("--alpha2", type=Finite(0, 1), help="weight of the distillation loss  [default: the recipe's]"),
    click.option("--epochs", type=click.IntRange(min=1), help="passes over the images  [default: the recipe's]"),
    click.option("--batch-size", type=click.IntRange(min=2), help="images a step  [default: the recipe's]"),
    click.option(
        "--lr",
        "learning_rate",
        type=Finite(0, min_open=True),
        help="learning rate  [default: the recipe's]",
    ),
    click.option(
        "--set", "changes", multiple=True, metavar="KEY=VALUE", help="any setting of the recipe; may be repeated"
    ),
)


_training_options = together(
    click.option("--artifact", required=True, type=PATH, metavar="A", help="what extract wrote"),
    data_options("train"),
    click.option(
        "--eval-split",
        metavar="NAME",
        help="split to evaluate on  [default: test, else validation, else a held-out tenth]",
    ),
    click.option("--student", default="base", help="base, large, or any timm model"),
    click.option(
        "--init", default="scratch", metavar="W", help="weights to begin with: scratch, pretrained, or a folder"
    ),
    click.option("--image-size", type=click.IntRange(min=1), default=32, help="side of the student's input, in pixels"),
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
    precision_option,
    device_option,
    click.option("--compile/--no-compile", default=False, help="compile the step; where that fails, say why and go on"),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="of weights, order, flips and dropout"),
    click.option(
        "--max-missing",
        type=Finite(0, 1),
        default=0.0,
        help="largest share of images without a stored embedding",
    ),
    click.option("--join-by-index", is_flag=True, help="join class i to row i, whatever the names"),
    skip_bad_option,
    cache_option,
    click.option(
        "--evaluate-every",
        type=click.IntRange(min=1),
        default=1,
        help="epochs between evaluations; the last is always one",
    ),
)


@click.command(
    epilog=example(
        "clip-embed-kd distill --artifact cifar100.safetensors",
        "--dataset uoft-cs/cifar100 --label-column fine_label --out run",
    )
)
@_training_options
@click.option("--out", required=True, type=PATH, help="run directory to make")
@click.option("--max-steps", type=click.IntRange(min=1), help="stop after so many steps")
@click.option("--overwrite", is_flag=True, help="replace an existing run directory")
@click.option("--resume", is_flag=True, help="go on with the run in the run directory, if there is one")
@click.option(
    "--checkpoint-minutes",
    type=Finite(0, min_open=True),
    default=10.0,
    help="between checkpoints within an epoch; an epoch ends with one, unless it takes a few seconds",
)
@json_option
@version_option
def distill(as_json: bool, **options: Any) -> None:
    """Stage two: train a student from an artifact."""
    from pipeline.distill import DistillSettings, distill
    from pipeline.progress import duration

    overrides = take_overrides(options)
    result = distill(DistillSettings(data=take_data_settings(options), overrides=overrides, **options))
    emit(
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
            *memory_rows(result.memory),
            *([] if result.report is None else [("report", str(result.report))]),
        ],
    )


@click.command(
    epilog=example(
        "clip-embed-kd plan --artifact cifar100.safetensors",
        "--dataset uoft-cs/cifar100 --label-column fine_label --ram 2 --hours 12",
    )
)
@_training_options
@click.option("--out", type=PATH, default=Path("run"), help="where the run shall be: its disk is tried")
@click.option(
    "--ram",
    type=Finite(0, 1_000_000, min_open=True),
    metavar="GB",
    help="memory that the run may take; with CUDA, of the GPU",
)
@click.option("--hours", type=Finite(0, min_open=True), help="time that the run may take")
@json_option
@version_option
def plan(as_json: bool, ram: float | None, hours: float | None, **options: Any) -> None:
    """Measure a few steps: how long `distill` will take on this machine, how much memory and disk."""
    from pipeline.distill import DistillSettings
    from pipeline.distill.plan import plan

    overrides = take_overrides(options)
    settings = DistillSettings(data=take_data_settings(options), overrides=overrides, **options)
    found = plan(settings, ram_bytes=None if ram is None else round(ram * 1e9), hours=hours)
    emit(as_json, found.as_json(), found.rows())


@click.group()
@version_option
def recipe() -> None:
    """Training settings that ship with the project."""


@recipe.command("list", epilog=example("clip-embed-kd recipe list"))
@json_option
@version_option
def list_recipes(as_json: bool) -> None:
    """Name the recipes."""
    from pipeline.distill.recipe import shipped_recipes

    names = shipped_recipes()
    emit(as_json, {"recipes": names}, [(name, f"clip-embed-kd recipe show {name}") for name in names])


@recipe.command(epilog=example("clip-embed-kd recipe show strong > mine.toml"))
@click.argument("name", metavar="RECIPE")
@_overrides_options
@json_option
@version_option
def show(name: str, as_json: bool, **options: Any) -> None:
    """Print a recipe as TOML, with what is laid over it."""
    from pipeline.distill.recipe import load_recipe, recipe_as_toml

    found = load_recipe(name, take_overrides(options))
    click.echo(as_json_text(found.model_dump()) if as_json else recipe_as_toml(found), nl=as_json)


def take_overrides(options: dict[str, Any]) -> dict[str, Any]:
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
