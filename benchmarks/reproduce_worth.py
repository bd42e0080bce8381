"""The runs of all targets in the order of their worth, for a machine that is rented by the minute.

How good a student the artifact makes comes before the paper's tables, and one seed of everything before more seeds.
"""

from dataclasses import replace
from typing import NamedTuple

from benchmarks.reproduce_runs import TUNED, Measurement, Run, Training
from benchmarks.reproduce_study import TARGETS, Job, Study

# Each stage by the name that the command has for it.
PAPER, STUDENTS, FIG3, SPEED, REST, SEEDS = STAGES = ("paper", "students", "fig3", "speed", "rest", "seeds")


class Stage(NamedTuple):
    """Jobs in the order of their worth."""

    name: str
    jobs: list[Job]


def stages(study: Study) -> list[Stage]:
    """Return all jobs of a study, each once, first things first.

    Args:
        study: which runs there are.
    """
    left = {job.run: job for job in study.jobs(TARGETS)}
    first = replace(study, seeds=1).planned()
    every = [run for runs in first.values() for run in runs]
    tuned = _kinds(first["kinds"], "strong", is_tuned=True)
    groups: dict[str, list[Run]] = {
        PAPER: [*_kinds(first["kinds"], "paper", is_tuned=False)],
        STUDENTS: [
            *(run for run in tuned if run.method == "embed"),
            *tuned,
            *_kinds(first["kinds"], "strong", is_tuned=False),
        ],
        FIG3: first["fig3"],
        SPEED: [run for run in every if isinstance(run, Measurement)],
        REST: every,
        SEEDS: list(left),
    }
    # Each run has its place in the first group that has it.
    made = {name: [left.pop(run) for run in dict.fromkeys(runs) if run in left] for name, runs in groups.items()}
    return [Stage(name, jobs) for name, jobs in made.items()]


def _kinds(runs: list[Run], recipe: str, *, is_tuned: bool) -> list[Training]:
    """Choose trainings, those that learn from a teacher first."""
    trainings = [run for run in runs if isinstance(run, Training) and run.recipe == recipe]
    found = [run for run in trainings if (run.teacher or "").endswith(TUNED) == is_tuned]
    return sorted(found, key=lambda run: run.teacher is None)
