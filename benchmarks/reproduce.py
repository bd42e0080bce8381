"""Reproduce what the paper reports, and measure beside it what else an artifact can teach.

    python benchmarks/reproduce.py TARGET… [--work DIR] [--scale full|reduced|trial] [--device …] [--seeds 3]
    python benchmarks/reproduce.py page

A target is a table or a figure of the paper, or a study of its own (`labels`, `kinds`, `live`); `all` is all of them.
Each run is written to benchmarks/results/<scale>/<target>/ when it comes to its end; what is there is left out, and
what was stopped goes on. Then docs/reproduction.md and its figures are made from these files; `page` makes them alone.

It needs `data/cifar100` and `teachers/` in a folder, by default ../shared; CLIP_EMBED_KD_SHARED names another. The
paper's teachers are taken from `--teachers FOLDER`, by their hub names without the owner; where none is there,
accuracies are of a small teacher in their stead. Linux only.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.extract_setup import ROOT
from benchmarks.reproduce_bench import Outcome, pending
from benchmarks.reproduce_page import write_page
from benchmarks.reproduce_plan import Reproduction
from benchmarks.reproduce_processes import Processes, stopping
from benchmarks.reproduce_runs import SCALES
from benchmarks.reproduce_sections import SHOWN
from benchmarks.reproduce_study import TARGETS
from pipeline.errors import PipelineError


@click.command()
@click.argument("targets", nargs=-1, required=True, type=click.Choice([*TARGETS, "all", "page"]))
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/reproduce"),
    show_default=True,
    help="folder for artifacts, teachers and runs",
)
@click.option("--scale", type=click.Choice(list(SCALES)), default="full", show_default=True, help="how much is trained")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="runs of each training")
@click.option(
    "--teachers",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="folder of the paper's teachers: vit-base-patch16-224-in21k, …",
)
@click.option("--max-minutes", type=click.FloatRange(0, min_open=True), help="stop then, keeping what is finished")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="trainings side by side")
@click.option("--compile", "compiles", is_flag=True, help="let distill compile its step")
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "benchmarks" / "results",
    help="folder of the results  [default: benchmarks/results]",
)
@click.option(
    "--docs",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "docs",
    help="folder of the page  [default: docs]",
)
def main(targets: Sequence[str], docs: Path, results: Path, **options: Any) -> None:
    """Run TARGETs: table1, table2, table3, fig2, fig3, labels, kinds, live, all; page only writes the tables."""
    try:
        wanted = TARGETS if "all" in targets else [target for target in targets if target != "page"]
        outcome = measure(wanted, results=results, **options) if wanted else Outcome()
        if "page" in targets or options["scale"] in SHOWN:
            write_page(results, docs)
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    for text in outcome.failed:
        click.echo(f"failed: {text}", err=True)
    if outcome.num_left:
        click.echo(f"{outcome.num_left} runs are left. The same command goes on.", err=True)
    sys.exit(1 if outcome.failed else 0)


def measure(targets: Sequence[str], *, jobs: int, max_minutes: float | None, **options: Any) -> Outcome:
    """Run what some targets are made of and what is not there yet.

    Args:
        targets: names in `TARGETS`.
        jobs: trainings side by side.
        max_minutes: stop then, if at all.
        options: the fields of a `Reproduction`.

    Returns:
        What became of the runs.

    Raises:
        PipelineError: the device or the data is absent, or a file among the results is none.
    """
    reproduction = Reproduction(**options)
    wanted = reproduction.study.jobs(targets)
    left = pending(wanted, reproduction.folder)
    click.echo(f"{reproduction.scale}: {len(wanted) - len(left)} of {len(wanted)} runs are there.", err=True)
    with stopping(Processes(), max_minutes) as processes:
        return reproduction.run(left, processes, jobs)


if __name__ == "__main__":
    main()
