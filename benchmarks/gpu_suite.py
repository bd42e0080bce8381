"""Run everything that wants a GPU, first things first, in calls of a few minutes: the same command goes on.

    python benchmarks/gpu_suite.py --out OUT [--max-minutes 8] [--jobs 2]     # again and again, until nothing is left

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

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

import benchmarks.gpu_packages  # noqa: F401 (says what is missing)
from benchmarks.extract_setup import ROOT
from benchmarks.gpu_check import check_machine
from benchmarks.reproduce_bench import has_failed, pending
from benchmarks.reproduce_plan import Reproduction
from benchmarks.reproduce_processes import Processes, StoppedError, stopping
from benchmarks.reproduce_runs import SCALES
from benchmarks.reproduce_study import Job
from benchmarks.reproduce_worth import SPEED, STAGES, Stage, stages
from pipeline.errors import PipelineError

MOST_ARTIFACT_BYTES = 2_000_000
# Program, measure, rounds. Each takes minutes, and begins anew where it was stopped.
SPEEDS = (
    ("distill", "step", 7),
    ("distill", "released", 7),
    ("distill", "feed", 7),
    ("extract", "forward", 4),
    ("extract", "pipeline", 4),
    ("distill", "profile", 7),
    ("distill", "epochs", 7),  # as long as the first stage's runs, and cannot be gone on with
)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="folder for everything")
@click.option("--max-minutes", type=click.FloatRange(0, min_open=True), default=8, show_default=True, help="of a call")
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="trainings side by side")
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
@click.option("--stage", "wanted", multiple=True, type=click.Choice(STAGES), default=STAGES, help="these only")
@click.option("--check", "only_check", is_flag=True, help="look at the machine, and run nothing")
def main(out: Path, only_check: bool, jobs: int, max_minutes: float, wanted: Sequence[str], **options: object) -> None:
    """Run the suite for some minutes, and say what is left.

    Stages: recipe paper; students by recipe strong; figure 3; speed and memory; the rest of one seed; more seeds.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    reproduction = Reproduction(work=out / "work", results=out / "results", **options)  # type: ignore[arg-type]
    suite = Suite(reproduction, Processes(out / "logs"), out, jobs)
    try:
        with stopping(suite.processes, max_minutes):
            for line in check_machine(reproduction, jobs):
                click.echo(line, err=True)
            if only_check:
                return
            suite.run(wanted)
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    for text in suite.failed:
        click.echo(f"failed: {text}", err=True)
    left = f"{suite.num_left} are left. The same command goes on." if suite.num_left else "Nothing is left."
    click.echo(f"{left} {out / 'suite.tar.gz'}", err=True)
    sys.exit(1 if suite.failed else 0)


class Suite:
    """All stages, in a folder; `failed` and `num_left` say what became of them."""

    def __init__(self, reproduction: Reproduction, processes: Processes, out: Path, num_at_once: int) -> None:
        """Bring together what is needed; nothing is looked at.

        Args:
            reproduction: what there is to run.
            processes: where it runs.
            out: the folder of the suite.
            num_at_once: trainings side by side.
        """
        self.processes, self.failed, self.num_left = processes, list[str](), 0
        self._reproduction, self._out, self._num_at_once = reproduction, out, num_at_once

    def run(self, wanted: Sequence[str]) -> None:
        """Run what is not there yet, stage by stage, until all is or the processes are stopped.

        What failed in an earlier call waits until all else is done: it may take its minutes and fail again.

        Args:
            wanted: names of stages.

        Raises:
            PipelineError: the data is absent, or a file among the results is none.
        """
        waiting, again = set((self._out / "speed").glob("*/*.unfinished")), list[Job]()
        try:
            for stage in stages(self._reproduction.study):
                if stage.name in wanted:
                    again += self._run_stage(stage)
                if stage.name == SPEED and SPEED in wanted:
                    self._measure_speeds([speed for speed in SPEEDS if self._marker(*speed[:2]) not in waiting])
                bundle(self._out)
            self._run_jobs(again)
            if SPEED in wanted:
                self._measure_speeds([speed for speed in SPEEDS if self._marker(*speed[:2]) in waiting])
        finally:
            bundle(self._out)

    def _run_stage(self, stage: Stage) -> list[Job]:
        """Run what has not failed before; return what has."""
        left = pending(stage.jobs, self._reproduction.folder)
        click.echo(f"{stage.name}: {len(stage.jobs) - len(left)} of {len(stage.jobs)} runs are there.", err=True)
        again = [job for job in left if has_failed(job, self._reproduction.folder)]
        self._run_jobs([job for job in left if job not in again])
        return again

    def _run_jobs(self, jobs: Sequence[Job]) -> None:
        outcome = self._reproduction.run(jobs, self.processes, self._num_at_once)
        self.failed += outcome.failed
        self.num_left += outcome.num_left

    def _measure_speeds(self, speeds: Sequence[tuple[str, str, int]]) -> None:
        """Measure speeds that are not known yet. A target that is missed is a figure like any other."""
        for program, measure, rounds in speeds:
            marker = self._marker(program, measure)
            if self._knows(program, measure):
                continue
            if self.processes.stopped:
                self.num_left += 1
                continue
            click.echo(f"{program}.py, {measure} …", err=True)
            try:
                self.processes.output(self._command(program, measure, rounds), f"{program}-{measure}")
            except subprocess.CalledProcessError as error:
                click.echo(f"{program}.py, {measure}: exit status {error.returncode}", err=True)
                self.failed += [] if self._knows(program, measure) else [f"{program}.py, {measure}"]
            except StoppedError:
                self.num_left += 1
            if self._knows(program, measure):
                marker.unlink(missing_ok=True)
                continue
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()

    def _command(self, program: str, measure: str, rounds: int) -> list[str]:
        options = ["--work", str(self._folder(program)), "--device", self._reproduction.device, "--only", measure]
        options += ["--pairs", str(rounds)]
        if self._reproduction.scale == "trial":
            options += {"distill": ["--trial"], "extract": ["--images", "64"]}[program]
        return [str(ROOT / "benchmarks" / f"{program}.py"), *options]

    def _knows(self, program: str, measure: str) -> bool:
        path = self._folder(program) / f"{program}.json"
        figures = json.loads(path.read_text("utf-8")).get(measure) if path.exists() else None
        return figures is not None and not {"error", "exit status"} & set(figures)

    def _marker(self, program: str, measure: str) -> Path:
        return self._folder(program) / f"{measure}.unfinished"

    def _folder(self, program: str) -> Path:
        return self._out / "speed" / program


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


if __name__ == "__main__":
    main()
