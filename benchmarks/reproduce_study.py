"""Which runs each table and figure is made of, and what must be made before one.

Nothing is run here, and nothing is looked for: a study is told which teachers are at hand.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks import reproduce_paper as paper
from benchmarks.reproduce_runs import (
    LIVE,
    METHODS,
    NO_DEVICE,
    SMALLEST,
    TUNED,
    Extraction,
    Measurement,
    Run,
    Scale,
    Training,
)

TARGETS = ("table1", "table2", "table3", "fig2", "fig3", "labels", "kinds", "live")
ARTIFACTS = "artifacts"  # in place of a target's name: what others need
KNOWN = "vit_tiny_patch16_224"  # stands in where none of the paper's teachers is at hand
SIZES = (SMALLEST, ("base", 64), ("large", 32), ("large", 64))
SIDES = ("embed", "teacher")  # that are measured
RECIPES = ("paper", "strong")
# Recipe, method and α₂ of each row of the study of kinds.
KINDS = (
    ("paper", "embed", 0.0),
    ("paper", "embed", 0.5),
    ("strong", "embed", 0.0),
    ("strong", "embed", 0.5),
    ("strong", "samples", 0.5),
    ("strong", "views", 0.5),
)


class Job(NamedTuple):
    """A run, and the target in whose folder its result lies."""

    target: str
    run: Run


@dataclass(frozen=True)
class Study:
    """What can be run: a scale, seeds, the names of the teachers that are at hand, and the device that measures.

    `device` is cpu, mps, or the name of a GPU's model: figures of two models are two results.
    """

    scale: Scale
    seeds: int
    teachers: Sequence[str]
    device: str

    def jobs(self, targets: Iterable[str]) -> list[Job]:
        """Return the runs of some targets. One that several share has its place with the first of them all."""
        planned = self.planned()
        homes: dict[Run, str] = {}
        for target, runs in planned.items():
            for run in runs:
                homes.setdefault(run, target)
        wanted = dict.fromkeys(run for target in targets for run in planned[target])
        return [Job(homes[run], run) for run in wanted]

    def needs(self, run: Run) -> list[Job]:
        """Return what must be made before a run, first things first."""
        if isinstance(run, Training):
            # `distill` wants an artifact where α₂ is 0 too.
            extraction = Extraction(run.teacher or self.usual[0], METHODS[run.method], run.images)
            return [*self.needs(extraction), Job(ARTIFACTS, extraction)]
        if isinstance(run, Extraction) and run.teacher.endswith(TUNED):
            return [Job(ARTIFACTS, self.scale.tuning(run.teacher.removesuffix(TUNED)))]
        return []

    def planned(self) -> dict[str, list[Run]]:
        """Return the runs of each target, seed by seed."""
        measured: dict[str, list[Measurement]] = {
            "table1": sizes(),
            "table2": [*sizes(), *(self.measured(side, name) for name in paper.TEACHERS for side in SIDES)],
            "fig2": [self.measured(side, "Large-32", *size) for size in SIZES for side in SIDES],
        }
        trained = {
            "table2": self._base_student(),
            "table3": self._larger(),
            "fig3": self._weights(),
            "labels": self._labels(),
            "kinds": self._kinds(),
            "live": self._live(),
        }
        return {
            target: [
                *measured.get(target, []),
                *(replace(run, seed=seed) for seed in range(self.seeds) for run in trained.get(target, [])),
            ]
            for target in TARGETS
        }

    def at_hand(self, *names: str) -> list[str]:
        """Return which of the paper's teachers, by the paper's names, are at hand; where none is, the known one."""
        wanted = [paper.TEACHERS[name] for name in names]
        found = [teacher for teacher in wanted if teacher in self.teachers]
        return found or [teacher for teacher in self.teachers if teacher == KNOWN]

    @property
    def usual(self) -> list[str]:
        """The teacher of figures 2 and 3, else the known one; in a list, which is empty where neither is at hand."""
        return self.at_hand("Large-32")

    def measured(self, side: str, teacher: str, student: str = "base", image_size: int = 32) -> Measurement:
        """Describe a measurement with a teacher's architecture, by the paper's name."""
        return Measurement(side, paper.TEACHERS[teacher], self.scale.steps, self.device, student, image_size)

    def _base_student(self) -> list[Training]:
        teachers = self.at_hand(*paper.TEACHERS)
        return [self.scale.training(method, teacher) for teacher in teachers for method in ("embed", "teacher-kd")]

    def _larger(self) -> list[Training]:
        return [
            self.scale.training("embed", teacher, student=student, image_size=image_size)
            for teacher in self.at_hand("Large-16", "Large-32")
            for student, image_size in SIZES[1:]
        ]

    def _weights(self) -> list[Training]:
        return [self.scale.weighted(teacher, alpha2) for teacher in self.usual for alpha2 in paper.ALPHAS]

    def _labels(self) -> list[Training]:
        return [
            self.scale.few(labels, teacher, recipe, alpha2)
            for teacher in self.usual
            for labels in self.scale.labels
            for recipe in RECIPES
            for alpha2 in (0.0, 0.5)
        ]

    def _kinds(self) -> list[Training]:
        return [
            self.scale.training(method, name, recipe=recipe, alpha2=alpha2)
            for teacher in self.usual
            for name in (teacher, teacher + TUNED)
            for recipe, method, alpha2 in KINDS
        ]

    def _live(self) -> list[Training]:
        return [
            self.scale.training(method, None if method == "supervised" else teacher)
            for teacher in self.usual
            for method in ("embed", "sample", *LIVE)
        ]


def sizes() -> list[Measurement]:
    """Return what counts sizes only: the base student with each teacher, and the large one with the largest."""
    of_base = [Measurement("embed", teacher, 0, NO_DEVICE) for teacher in paper.TEACHERS.values()]
    return [*of_base, replace(of_base[-1], student="large")]
