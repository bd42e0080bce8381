"""Options that commands of several files have, and what they become; each is described once."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
PATH = click.Path(path_type=Path)


def example(*lines: str) -> str:
    """Put an example below a command's help, one argument of this a line."""
    return "\b\nExample:\n  " + " \\\n      ".join(lines)


class Finite(click.FloatRange):
    """A number within a range; infinity and NaN are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Turn the option's text into the number."""
        number: float = super().convert(value, param, ctx)  # NaN is in every range
        return number if math.isfinite(number) else self.fail(f"{value} is not a finite number.", param, ctx)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"clip-embed-kd {version('clip-embed-kd')}")
        except PackageNotFoundError:
            click.echo("clip-embed-kd, not installed")
        ctx.exit()


version_option = click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="show the version",
)
json_option = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
device_option = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="arithmetic; auto: bfloat16 where the hardware has it",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="replace an existing artifact")
cache_option = click.option(
    "--cache",
    type=PATH,
    metavar="DIR",
    help="where decoded images are kept  [default: $CLIP_EMBED_KD_CACHE, else ~/.cache/clip-embed-kd/images]",
)
skip_bad_option = click.option("--skip-bad", is_flag=True, help="leave out and count images that cannot be decoded")


def together(*options: Decorator) -> Decorator:
    """Make one decorator of several, in the order in which the help shall name them."""
    return lambda command: functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def data_options(split: str) -> Decorator:
    """Say which images to use.

    Args:
        split: that is used where none is named.
    """
    return together(
        click.option("--dataset", required=True, metavar="D", help="hub name, or a folder that `datasets` loads"),
        click.option("--dataset-config", metavar="NAME", help="configuration of a hub data set"),
        click.option("--dataset-revision", metavar="REV", help="hub branch, tag or commit"),
        click.option("--split", default=split, help="split to use"),
        click.option("--image-column", metavar="NAME", help="found where only one fits"),
        click.option("--label-column", metavar="NAME", help="found where only one fits"),
        click.option("--limit", type=click.IntRange(min=1), help="use this many images, of all classes in turn"),
    )


def take_data_settings(options: dict[str, Any]) -> Any:
    """Take out of the options those of `data_options`, as many as there are.

    Returns:
        `pipeline.data.DataSettings`.
    """
    from pipeline.data import DataSettings
    from pipeline.progress import log_to_stderr

    log_to_stderr()
    renamed = {"dataset_config": "config", "dataset_revision": "revision"}
    names = ("dataset", *renamed, "split", "image_column", "label_column", "limit")
    return DataSettings(**{renamed.get(name, name): options.pop(name) for name in names if name in options})
