"""Run everything that wants a GPU, first things first, in calls of a few minutes: the same command goes on.

    python benchmarks/gpu_suite.py --out OUT [--max-minutes 8] [--jobs 4]     # again and again, until nothing is left

It looks at the machine, the data and the teacher first, and says all that is missing at once. No network is needed:
CIFAR-100 as parquet (`data/cifar100`) and a teacher (`teachers/vit_tiny_patch16_224`) lie in ../shared;
CLIP_EMBED_KD_SHARED names another folder. What is there afterwards:

    OUT/results/<scale>/      a JSON file for each run, as benchmarks/reproduce.py writes them
    OUT/speed/                figures of benchmarks/distill.py and benchmarks/extract.py
    OUT/logs/                 what each program said
    OUT/suite.tar.gz          all of these, and artifacts of less than 2 MB; written by each call
    OUT/work/                 what the next call goes on from
"""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.extract_setup import ROOT
from benchmarks.gpu_check import check_machine
from benchmarks.reproduce_bench import pending
from benchmarks.reproduce_plan import Reproduction
from benchmarks.reproduce_processes import Processes, StoppedError, stopping
from benchmarks.reproduce_runs import SCALES
from benchmarks.reproduce_worth import SPEED, stages
from pipeline.errors import PipelineError

MOST_ARTIFACT_BYTES = 2_000_000
# Program and measure: each takes minutes, and begins anew where it was stopped. How long all epochs of recipe `paper`
# take stands in the results of the first stage.
SPEEDS = (
    ("distill", "step"),
    ("distill", "released"),
    ("distill", "feed"),
    ("distill", "profile"),
    ("extract", "forward"),
    ("extract", "pipeline"),
)


class Progress(NamedTuple):
    """What became of a call: which runs failed, and how many are left."""

    failed: list[str]
    num_left: int


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="folder for everything")
@click.option("--max-minutes", type=click.FloatRange(0, min_open=True), default=8, show_default=True, help="of a call")
@click.option("--jobs", type=click.IntRange(min=1), default=4, show_default=True, help="trainings side by side")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="runs of each training")
@click.option("--scale", type=click.Choice(list(SCALES)), default="full", show_default=True, help="how much is trained")
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:N, or cpu for a trial")
@click.option(
    "--compile/--no-compile", "compiles", default=True, show_default=True, help="let distill compile its step"
)
@click.option(
    "--teachers",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="folder of the paper's teachers: vit-base-patch16-224-in21k, …",
)
@click.option("--check", "only_check", is_flag=True, help="look at the machine, and run nothing")
def main(out: Path, only_check: bool, jobs: int, max_minutes: float, **options: object) -> None:
    """Run the suite for some minutes, and say what is left."""
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    reproduction = Reproduction(work=out / "work", results=out / "results", **options)  # type: ignore[arg-type]
    try:
        for line in check_machine(reproduction, jobs):
            click.echo(line, err=True)
        if only_check:
            return
        with stopping(Processes(out / "logs"), max_minutes) as processes:
            try:
                progress = run_suite(reproduction, processes, jobs)
            finally:
                bundle(out)
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    for text in progress.failed:
        click.echo(f"failed: {text}", err=True)
    left = f"{progress.num_left} are left. The same command goes on." if progress.num_left else "Nothing is left."
    click.echo(f"{left} {out / 'suite.tar.gz'}", err=True)
    sys.exit(1 if progress.failed else 0)


def run_suite(reproduction: Reproduction, processes: Processes, num_at_once: int) -> Progress:
    """Run what is not there yet, stage by stage, until all is or the processes are stopped.

    Args:
        reproduction: what there is to run.
        processes: where it runs.
        num_at_once: trainings side by side.

    Returns:
        What became of it.

    Raises:
        PipelineError: the data is absent, or a file among the results is none.
    """
    failed: list[str] = []
    num_left = 0
    for stage in stages(reproduction.study):
        left = pending(stage.jobs, reproduction.folder)
        click.echo(f"{stage.name}: {len(stage.jobs) - len(left)} of {len(stage.jobs)} runs are there.", err=True)
        outcome = reproduction.run(left, processes, 1 if stage.is_alone else num_at_once)
        failed += outcome.failed
        num_left += outcome.num_left
        if stage.name == SPEED:
            num_left += measure_speeds(reproduction, processes)
    return Progress(failed, num_left)


def measure_speeds(reproduction: Reproduction, processes: Processes) -> int:
    """Measure the speeds that are not known yet.

    A target that is missed is a figure like any other; a program that fails says so in its log, and in its figures.

    Args:
        reproduction: says where, and on what device.
        processes: where it runs.

    Returns:
        How many are not known yet, since all were stopped.
    """
    left = [speed for speed in SPEEDS if speed[1] not in _known(reproduction, speed[0])]
    for place, (program, measure) in enumerate(left):
        trial = ["--trial"] if reproduction.scale == "trial" else []
        options = ["--work", str(_speed_folder(reproduction, program)), "--device", reproduction.device]
        limits = {"distill": trial, "extract": ["--images", "64", "--pairs", "1"] if trial else []}[program]
        command = [str(ROOT / "benchmarks" / f"{program}.py"), *options, "--only", measure, *limits]
        click.echo(f"{program}.py, {measure} …", err=True)
        try:
            processes.output(command, f"{program}-{measure}")
        except subprocess.CalledProcessError as error:
            click.echo(f"{program}.py, {measure}: exit status {error.returncode}", err=True)
        except StoppedError:
            return len(left) - place
    return 0


def bundle(out: Path) -> None:
    """Put everything that is worth carrying away into one archive.

    Args:
        out: the folder of the suite.
    """
    archive = out / "suite.tar.gz"
    unfinished = archive.with_name(f".{archive.name}")
    with tarfile.open(unfinished, "w:gz") as tar:
        for path in _worth_keeping(out):
            tar.add(path, arcname=path.relative_to(out))
    unfinished.replace(archive)


def _worth_keeping(out: Path) -> Iterator[Path]:
    for folder, pattern in (("results", "*/*/*.json"), ("speed", "*/*.json"), ("logs", "*.log")):
        yield from sorted((out / folder).glob(pattern))
    artifacts = sorted((out / "work").glob("*/artifacts/*.safetensors"))
    yield from (path for path in artifacts if path.stat().st_size < MOST_ARTIFACT_BYTES)


def _known(reproduction: Reproduction, program: str) -> Sequence[str]:
    path = _speed_folder(reproduction, program) / f"{program}.json"
    return list(json.loads(path.read_text("utf-8"))) if path.exists() else []


def _speed_folder(reproduction: Reproduction, program: str) -> Path:
    return reproduction.results.parent / "speed" / program


if __name__ == "__main__":
    main()
