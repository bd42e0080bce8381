"""Runs what is planned and not there yet.

Each result is written as it comes; what was stopped goes on another time.
"""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.extract_setup import ROOT
from benchmarks.reproduce_commands import Place
from benchmarks.reproduce_processes import StoppedError
from benchmarks.reproduce_results import Surroundings, read_result, result_of, settings_of, write_result
from benchmarks.reproduce_runs import Measurement, Run, Training
from benchmarks.reproduce_study import Job, Study
from pipeline.extract.partial import partial_path
from pipeline.output import write_atomically

# Runs a command to its end, under a name, with so many `threads` if they are given, and returns its JSON.
Execute = Callable[..., dict[str, Any]]
_DONE, _LEFT = "done", "left"
ALONE = {"compiled": False, "jobs": 1}  # conditions of a measurement


@dataclass(frozen=True)
class Outcome:
    """What became of the runs: which failed, and how many are left, since all were stopped."""

    failed: Sequence[str] = ()
    num_left: int = 0


class Manner(NamedTuple):
    """How jobs are run: by what, and what results are to say of it."""

    execute: Execute
    around: Surroundings


class Bench:
    """Runs jobs of one study at one place, with results in a folder of the scale."""

    def __init__(self, study: Study, place: Place, results: Path, surroundings: Surroundings) -> None:
        """Bring together what is needed; nothing is looked at.

        Args:
            study: what runs need.
            place: where they take place.
            results: the folder of the scale.
            surroundings: noted beside each result.
        """
        self._study, self._place, self._results, self._surroundings = study, place, results, surroundings
        self._guard = threading.Lock()
        self._making: dict[Run, threading.Lock] = {}  # two runs that need the same thing: one of them waits
        self._broken: set[Run] = set()  # needed, and cannot be made
        self._stopped = False

    def run(self, jobs: Sequence[Job], execute: Execute, num_at_once: int) -> Outcome:
        """Run jobs, and what they need; one that fails does not hold up the others.

        Args:
            jobs: all of them pending.
            execute: runs a command.
            num_at_once: trainings side by side, which share the processors; measurements are alone.

        Returns:
            What became of them.
        """
        alone = [job for job in jobs if isinstance(job.run, Measurement)]
        by_itself = Manner(execute, replace(self._surroundings, conditions=ALONE))
        fates = [self._attempt(job, by_itself) for job in alone]
        others = [job for job in jobs if job not in alone]
        shared = Manner(execute, self._surroundings)
        if num_at_once > 1:  # as many threads each as there are processors slow each other several times over
            threads = max(1, len(os.sched_getaffinity(0)) // num_at_once)
            machine = {**self._surroundings.machine, "threads": threads}
            shared = Manner(partial(execute, threads=threads), replace(self._surroundings, machine=machine))
        with ThreadPoolExecutor(num_at_once) as pool:
            fates += pool.map(self._attempt, others, [shared] * len(others))
        return Outcome([fate for fate in fates if fate not in (_DONE, _LEFT)], fates.count(_LEFT))

    def _attempt(self, job: Job, manner: Manner) -> str:
        """Run a job and what it needs; return what became of it: done, left, or why it failed."""
        if self._stopped:
            return _LEFT
        try:
            self._provide(job, manner)
            self._run(job, manner)
        except StoppedError:
            self._stopped = True
            return _LEFT
        except _NeedError as error:
            why = f"{error} could not be made"
        except subprocess.CalledProcessError as error:  # the program has said why
            why = f"exit status {error.returncode}"
        except (OSError, ValueError, KeyError) as error:  # of what it printed or left; the others go on
            why = f"{type(error).__name__}: {error}"
        else:
            _failure_path(self._results, job).unlink(missing_ok=True)
            return _DONE
        note = _failure_path(self._results, job)
        with suppress(OSError):  # without the note it is tried sooner
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{why}\n", "utf-8")
        return f"{_told(job)}: {why}"

    def _provide(self, job: Job, manner: Manner) -> None:
        """Make what a job needs, unless it is there: an artifact needs no teacher any more."""
        needs = self._study.needs(job.run)
        if not needs or _is_made(self._place.made_by(needs[-1].run)):
            return
        for need in needs:
            with self._guard:
                making = self._making.setdefault(need.run, threading.Lock())
            with making:
                self._make(need, manner)

    def _make(self, need: Job, manner: Manner) -> None:
        if need.run in self._broken:
            raise _NeedError(need.run.name)
        if _is_made(self._place.made_by(need.run)):
            return
        try:
            self._run(need, manner)
        except subprocess.CalledProcessError:
            self._broken.add(need.run)
            raise _NeedError(need.run.name) from None

    def _run(self, job: Job, manner: Manner) -> None:
        made = self._place.made_by(job.run)
        made.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(job.run, Training):
            _begin_anew_elsewhere(made, manner.around)
        click.echo(f"{_told(job)} …", err=True)
        told = manner.execute(self._place.command(job.run), job.run.name)
        result = result_of(job.run, told, made, manner.around)
        write_result(result_path(self._results, job), result)
        shutil.rmtree(made / "checkpoints", ignore_errors=True)  # a hundred runs have tens of gigabytes of them
        accuracy = "" if result.accuracy is None else f": {result.accuracy:.2f} %"
        click.echo(f"{_told(job)}{accuracy}", err=True)


def pending(jobs: Sequence[Job], results: Path) -> list[Job]:
    """Return the jobs without a result of just these settings; those that failed when they were tried come last.

    Args:
        jobs: of one scale.
        results: the folder of the scale.

    Raises:
        PipelineError: a file in the place of a result is none.
    """
    left = []
    for job in jobs:
        path = result_path(results, job)
        is_there = path.exists()
        if is_there and read_result(path).settings == settings_of(job.run):
            continue
        if is_there:
            click.echo(f"{_told(job)}: the result there is of other settings, and will be replaced.", err=True)
        left.append(job)
    return sorted(left, key=lambda job: has_failed(job, results))


def has_failed(job: Job, results: Path) -> bool:
    """Tell whether a job failed when it was tried last: it may do so again, after minutes.

    Args:
        job: of one scale.
        results: the folder of the scale.
    """
    return _failure_path(results, job).exists()


def result_path(results: Path, job: Job) -> Path:
    """Return the file of a job's result."""
    return results / job.target / f"{job.run.name}.json"


def commit() -> str | None:
    """Return the commit that changed the program last, with a + where its files differ from it.

    Later commits, of results for one, leave it as it is: what they are compared with was made by the same program.
    Outside a repository CLIP_EMBED_KD_COMMIT says it, or nothing does.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        parts = ["cli.py", "store", "pipeline", "benchmarks/*.py"]
        last = [*git, "log", "-1", "--abbrev=12", "--format=%h", "--", *parts]
        found = subprocess.run(last, capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *parts], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CLIP_EMBED_KD_COMMIT")
    return found.stdout.strip() + ("+" if changed else "") or None


def _is_made(path: Path) -> bool:
    """Tell whether what a run needs is whole: beside an artifact there is no folder of what is unfinished.

    `extract` writes its artifact before its report card; what was stopped between the two goes on.
    """
    return path.exists() and not partial_path(path).exists()


def _failure_path(results: Path, job: Job) -> Path:
    return result_path(results, job).with_suffix(".failed")


def _begin_anew_elsewhere(made: Path, around: Surroundings) -> None:
    """Remove what there is of a training that was begun with another program or machine, or under other conditions.

    Its result would be said to be of the one that it ended with.
    """
    note = made.with_name(f"{made.name}.begun.json")
    told = json.dumps(asdict(around), sort_keys=True)
    if made.exists() and note.exists() and note.read_text("utf-8") != told:
        click.echo(f"{made.name}: was begun by another commit or under other conditions, and begins anew.", err=True)
        shutil.rmtree(made)
    write_atomically(note, told.encode())


class _NeedError(Exception):
    """What a run needs could not be made: its name."""


def _told(job: Job) -> str:
    return f"{job.target}/{job.run.name}"
