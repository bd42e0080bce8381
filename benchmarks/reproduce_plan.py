"""What can be reproduced here: which teachers and data are at hand, where results go, and with what they are made."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click

from benchmarks import reproduce_paper as paper
from benchmarks.distill_setup import subset
from benchmarks.extract_setup import KNOWN_DATA, KNOWN_TEACHER, machine
from benchmarks.reproduce_bench import Bench, Outcome, commit
from benchmarks.reproduce_commands import Place
from benchmarks.reproduce_processes import Processes
from benchmarks.reproduce_results import Surroundings
from benchmarks.reproduce_runs import SCALES, Training
from benchmarks.reproduce_study import KNOWN, Job, Study
from pipeline.errors import PipelineError
from pipeline.runtime import resolve_device, software_versions

TRIAL_IMAGES = (200, 100)  # of the training and the test split
_SOFTWARE = ("torch", "torchvision", "timm", "transformers", "datasets")
_SHARED = "CLIP_EMBED_KD_SHARED"
_MACHINE = ("processor", "cores", "threads", "device")


@dataclass(frozen=True)
class Reproduction:
    """One scale on one machine: a folder to work in, one for the results of all scales, and how runs are made.

    `scale` is a name in `SCALES`, `seeds` the runs of each training, `teachers` a folder of some of the paper's;
    `compiles`: let `distill` compile its step.
    """

    work: Path
    results: Path
    scale: str
    device: str
    seeds: int
    teachers: Path | None
    compiles: bool

    @property
    def folder(self) -> Path:
        """The folder of this scale's results."""
        return self.results.absolute() / self.scale

    @cached_property
    def study(self) -> Study:
        """What can be run with what is at hand.

        Raises:
            PipelineError: the device or every teacher in the folder is absent.
        """
        model = slug(machine(self._device)["device"])
        study = Study(SCALES[self.scale], self.seeds, list(self._at_hand), model)
        if not study.usual:
            click.echo(f"No accuracies: neither {paper.TEACHERS['Large-32']} nor {KNOWN} is at hand.", err=True)
        return study

    def run(self, jobs: Sequence[Job], processes: Processes, num_at_once: int) -> Outcome:
        """Run jobs, so many trainings side by side.

        Args:
            jobs: all of them pending.
            processes: where they run.
            num_at_once: trainings side by side.

        Raises:
            PipelineError: the data is absent.
        """
        work, study = self.work.absolute(), self.study
        os.environ.setdefault("CLIP_EMBED_KD_CACHE", str(work / "images"))  # nothing is left elsewhere
        data = dataset(work, self.scale) if any(isinstance(job.run, Training) for job in jobs) else KNOWN_DATA
        usual = (study.usual or [KNOWN])[0]
        place = Place(work / self.scale, data, self._at_hand, usual, self._device, study.scale, self.compiles)
        around = surroundings(self._device, num_at_once, self.compiles)
        return Bench(study, place, self.folder, around).run(jobs, processes.run, num_at_once)

    @property
    def _device(self) -> str:
        found = resolve_device(self.device)
        return found.type if self.device == "auto" else self.device

    @cached_property
    def _at_hand(self) -> dict[str, Path]:
        return teachers_at_hand(self.teachers)


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


def slug(name: str) -> str:
    """Return a device's name as file names have it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def surroundings(device: str, jobs: int, compiles: bool) -> Surroundings:
    """Describe what results are made with."""
    found = machine(device)
    here = {name: found[name] for name in _MACHINE}
    return Surroundings({"compiled": compiles, "jobs": jobs}, here, software_versions(_SOFTWARE), commit())
