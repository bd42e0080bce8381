"""Measure stage two against plain training loops, and try what it promises.

    python benchmarks/distill.py --work runs/distill [--only NAME]… [--device cpu|cuda] [--trial]

Speeds are compared in one process, the sides in turn, medians over rounds; promises are tried on the commands, in
processes of their own. It needs a folder with `data/cifar100` and `teachers/`, by default ../shared;
CLIP_EMBED_KD_SHARED names another. Artifacts are extracted once, into WORK. Linux only.
A check or a target that is false makes it exit 1, once everything is written; a trial has no targets.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.distill_accuracy import ARMS, SCALES, USUAL_ARMS, measure_accuracy
from benchmarks.distill_join import measure_join
from benchmarks.distill_opens import measure_opens
from benchmarks.distill_profile import measure_profile
from benchmarks.distill_runs import measure_kills
from benchmarks.distill_setup import Setup
from benchmarks.distill_speed import measure_feed, measure_released, measure_step
from benchmarks.distill_times import measure_epochs, measure_plan
from benchmarks.extract_setup import KNOWN_TEACHER, machine
from benchmarks.figure_book import FigureBook, Figures

MEASURES: dict[str, Callable[[Setup], Figures]] = {
    "step": measure_step,
    "released": measure_released,
    "profile": measure_profile,
    "feed": measure_feed,
    "plan": measure_plan,
    "join": measure_join,
    "opens": measure_opens,
    "kills": measure_kills,
    "epochs": measure_epochs,
    "accuracy": measure_accuracy,
}
NOT_ON_CPU = ("epochs",)


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="folder for all that is made; one a machine"
)
@click.option(
    "--only", multiple=True, type=click.Choice(list(MEASURES)), help="measure these only, and keep the other figures"
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda")
@click.option("--pairs", default=15, show_default=True, type=click.IntRange(min=1), help="rounds of a comparison")
@click.option("--kills", default=20, show_default=True, type=click.IntRange(min=1), help="how often runs are killed")
@click.option(
    "--scale",
    type=click.Choice([name for name in SCALES if name != "trial"]),
    default="quick",
    show_default=True,
    help="of accuracy: how many images and epochs",
)
@click.option(
    "--arm",
    "arms",
    multiple=True,
    type=click.Choice(list(ARMS)),
    default=USUAL_ARMS,
    show_default=True,
    help="of accuracy: train these only",
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="of accuracy: runs an arm")
@click.option("--first-seed", default=0, show_default=True, type=click.IntRange(min=0), help="of accuracy: begin there")
@click.option(
    "--held-out", is_flag=True, help="of accuracy: judge by training images that are held out, as settings are chosen"
)
@click.option(
    "--teacher",
    type=click.Path(path_type=Path, file_okay=False),
    default=KNOWN_TEACHER,
    help="of accuracy: folder of the teacher that artifacts are of  [default: ViT-Ti/16 of the shared folder]",
)
@click.option("--trial", is_flag=True, help="little data and short runs, without targets")
def main(work: Path, only: tuple[str, ...], **options: Any) -> None:
    """Print every figure and write them to WORK/distill.json."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CLIP_EMBED_KD_CACHE", str(work / "images"))  # nothing is left elsewhere
    of = {"trial": True} if options["trial"] else {}
    book = FigureBook(work / "distill.json", machine(options["device"]), of, is_trial=options["trial"])
    setup = Setup(work=work, book=book, **options)
    for name in only or usual_measures(setup):
        book.measure(name, partial(MEASURES[name], setup))
    book.finish()


def usual_measures(setup: Setup) -> list[str]:
    """Name the measures that make sense on the device."""
    return [name for name in MEASURES if setup.device_type == "cuda" or name not in NOT_ON_CPU]


if __name__ == "__main__":
    main()
