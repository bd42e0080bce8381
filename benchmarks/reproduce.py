"""Reproduce what the paper reports, and measure beside it what else an artifact can teach.

    python benchmarks/reproduce.py TARGET… [--work DIR] [--scale full|reduced|trial] [--device …] [--seeds 3]
    python benchmarks/reproduce.py page

A target is a table or a figure of the paper, or a study of its own (`labels`, `kinds`, `live`); `all` is all of them.
Each run is written to benchmarks/results/<scale>/<target>/ when it comes to its end; what is there is left out, and
what was stopped goes on. `page` makes docs/reproduction.md and its figures from these files alone.

It needs `data/cifar100` and `teachers/` in a folder, by default ../shared; CLIP_EMBED_KD_SHARED names another. The
paper's teachers are taken from `--teachers FOLDER`, by their hub names without the owner; where none is there,
accuracies are of a small teacher in their stead. Linux only.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import reproduce_paper as paper
from benchmarks.distill_setup import subset
from benchmarks.extract_setup import KNOWN_DATA, KNOWN_TEACHER, ROOT, machine
from benchmarks.reproduce_bench import Bench, Outcome, commit, pending
from benchmarks.reproduce_commands import Place
from benchmarks.reproduce_page import write_page
from benchmarks.reproduce_processes import Processes
from benchmarks.reproduce_results import Surroundings
from benchmarks.reproduce_runs import SCALES, Training
from benchmarks.reproduce_study import KNOWN, TARGETS, Study
from pipeline.errors import PipelineError
from pipeline.runtime import resolve_device, software_versions

TRIAL_IMAGES = (200, 100)  # of the training and the test split
_SOFTWARE = ("torch", "torchvision", "timm", "transformers", "datasets")
_SHARED = "CLIP_EMBED_KD_SHARED"
_MACHINE = ("processor", "cores", "threads", "device")


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
    """Run TARGETs: table1, table2, table3, fig2, fig3, labels, kinds, live, all; page writes the tables."""
    try:
        wanted = TARGETS if "all" in targets else [target for target in targets if target != "page"]
        outcome = measure(wanted, results, **options) if wanted else Outcome()
        if "page" in targets:
            write_page(results, docs)
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    for text in outcome.failed:
        click.echo(f"failed: {text}", err=True)
    if outcome.num_left:
        click.echo(f"{outcome.num_left} runs are left. The same command goes on.", err=True)
    sys.exit(1 if outcome.failed else 0)


def measure(targets: Sequence[str], results: Path, **options: Any) -> Outcome:
    """Run what some targets are made of and what is not there yet.

    Args:
        targets: names in `TARGETS`.
        results: the folder of all scales.
        options: those of the command.

    Returns:
        What became of the runs.

    Raises:
        PipelineError: the device or the data is absent, or a file among the results is none.
    """
    work, name = options["work"].absolute(), options["scale"]
    kind = resolve_device(options["device"]).type
    device = kind if options["device"] == "auto" else options["device"]
    teachers = teachers_at_hand(options["teachers"])
    study, folder = Study(SCALES[name], options["seeds"], list(teachers), kind), results.absolute() / name
    jobs = study.jobs(targets)
    left = pending(jobs, folder)
    click.echo(f"{name}: {len(jobs) - len(left)} of {len(jobs)} runs are there.", err=True)
    if not study.usual:
        click.echo(f"No accuracies: neither {paper.TEACHERS['Large-32']} nor {KNOWN} is at hand.", err=True)
    os.environ.setdefault("CLIP_EMBED_KD_CACHE", str(work / "images"))  # nothing is left elsewhere
    data = dataset(work, name) if any(isinstance(job.run, Training) for job in left) else KNOWN_DATA
    place = Place(work / name, data, teachers, (study.usual or [KNOWN])[0], device, study.scale, options["compiles"])
    around = surroundings(device, options["jobs"], options["compiles"])
    with stopping(Processes(), options["max_minutes"]) as processes:
        return Bench(study, place, folder, around).run(left, processes.run, options["jobs"])


def teachers_at_hand(folder: Path | None) -> dict[str, Path]:
    """Find teachers by name: the paper's in a folder, and the known one.

    Raises:
        PipelineError: the folder has none of the paper's.
    """
    named = {name: folder / name for name in paper.TEACHERS.values()} if folder else {}
    found = {name: path for name, path in named.items() if path.is_dir()}
    if folder and not found:
        raise PipelineError(f"{folder}: has none of the paper's teachers. Expected folders {', '.join(named)}.")
    return found | ({KNOWN: KNOWN_TEACHER} if KNOWN_TEACHER.is_dir() else {})


def dataset(work: Path, scale: str) -> Path:
    """Return the folder of the data set: CIFAR-100, of a trial only a little of it.

    Raises:
        PipelineError: it is not there.
    """
    if not KNOWN_DATA.is_dir():
        raise PipelineError(f"{KNOWN_DATA}: CIFAR-100 is not there. Name the folder around data/ by {_SHARED}.")
    return subset(work, *TRIAL_IMAGES) if scale == "trial" else KNOWN_DATA


def surroundings(device: str, jobs: int, compiles: bool) -> Surroundings:
    """Describe what results are made with."""
    found = machine(device)
    here = {name: found[name] for name in _MACHINE}
    return Surroundings({"compiled": compiles, "jobs": jobs}, here, software_versions(_SOFTWARE), commit())


@contextmanager
def stopping(processes: Processes, minutes: float | None) -> Iterator[Processes]:
    """Have processes stopped after some minutes, and by Ctrl-C and SIGTERM, which then end the program."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        threading.Thread(target=processes.stop).start()  # it may have to wait for what was interrupted here

    timer = threading.Timer(60 * (minutes or 0), processes.stop)
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    if minutes:
        timer.start()
    try:
        yield processes
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        sys.exit(128 + received[0])


if __name__ == "__main__":
    main()
