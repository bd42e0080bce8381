"""The command that shows both stages, without network and data."""

from pathlib import Path

import click

from pipeline.commands.options import PATH, example, json_option, version_option
from pipeline.commands.printing import emit


@click.command(epilog=example("clip-embed-kd demo"))
@click.option("--out", type=PATH, default=Path("demo-run"), help="folder for all that it makes")
@json_option
@version_option
def demo(out: Path, as_json: bool) -> None:
    """Run both stages offline, on handwritten digits and a teacher that ship with the project."""
    from pipeline.demo.run import run_demo

    result = run_demo(out)
    emit(as_json, result.as_json(), result.rows())
