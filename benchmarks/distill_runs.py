"""Runs that are killed at random moments and gone on with, beside one of the same command that nobody killed."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from safetensors.numpy import load_file

from benchmarks.distill_setup import Setup
from benchmarks.extract_processes import run
from benchmarks.extract_setup import fresh_folder
from benchmarks.figure_book import Figures

TRAINED_IMAGES, TEST_IMAGES = 1000, 200
# Small images, and a checkpoint every second or so: many moments to be killed at in half a minute.
QUICK = ("--image-size", "16", "--epochs", "4", "--checkpoint-minutes", "0.02")
AVERAGED = ("--target", "both", "--set", "average_decay=0.9", "--set", "cosine_weight=1")
# The artifact's kind, and what differs. 1,000 images: batches of 64 leave 40; of 111 one, which waits an epoch.
VARIANTS = {
    "class": ("class", ()),
    "samples, averaged": ("samples", AVERAGED),
    "short last batch": ("class", ("--batch-size", "111")),
}
COMPILED = ("class", ("--compile",))
MOST_KILLS = 3  # of one run
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Left:
    """What a run left: the student's files, the last checkpoint's tensors, metrics without times, names of files."""

    student: dict[str, bytes]
    checkpoint: dict[str, tuple[str, bytes]]
    metrics: list[dict[str, Any]]
    names: set[str]

    def differing(self, other: "Left") -> list[str]:
        """Name the parts that are not equal to the last bit, and files that one of both has not."""
        found = {f"student/{name}" for name in _differing(self.student, other.student)}
        found |= {f"checkpoint, {name}" for name in _differing(self.checkpoint, other.checkpoint)}
        found |= {"metrics.jsonl"} if self.metrics != other.metrics else set()
        return sorted(found | {f"there or not: {name}" for name in self.names ^ other.names})


@dataclass
class Outcome:
    """What became of a run: the signals that killed it, in which phases, other exits, and what differs at the end."""

    signals: list[str] = field(default_factory=list)
    killed_in: list[str] = field(default_factory=list)
    odd_exits: list[int] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class KilledRun:
    """A command that resumes, the run directory that it makes, and what it left when nobody killed it.

    `seconds` it took then, `train_seconds` of them in training.
    """

    command: Sequence[str]
    out: Path
    alone: Left
    seconds: float
    train_seconds: float
    chance: random.Random

    def kill(self, signals: Sequence[signal.Signals]) -> Outcome:
        """Run the command from the start, killed by these signals in turn, then let it finish, and compare.

        A signal whose moment comes when the run is finished is not sent: the outcome names those that were.
        """
        outcome = Outcome()
        fresh_folder(self.out.parent)
        for number in signals:
            code = self._kill_once(number)
            if code == 0:
                break
            outcome.signals.append(number.name)
            outcome.killed_in.append(phase(self.out))
            # Python itself dies of a signal while it starts; the command exits with 130 and 143.
            if code not in (-number, 128 + number):
                outcome.odd_exits.append(code)
        else:
            run(self.command)
        outcome.differing = self.alone.differing(left_by(self.out))
        return outcome

    def _kill_once(self, number: signal.Signals) -> int:
        before = begun_ns(self.out)
        process = subprocess.Popen([sys.executable, *self.command], stdout=subprocess.DEVNULL)
        in_training = self.chance.random() < 0.5  # of a short run much is imports
        while in_training and process.poll() is None and begun_ns(self.out) == before:
            time.sleep(_POLL_SECONDS)
        moment = self.chance.uniform(0, self.train_seconds if in_training else self.seconds)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        process.send_signal(number)
        return process.wait()


def measure_kills(setup: Setup) -> Figures:
    """Kill runs at random moments, up to three times each, and resume them; compare with runs left alone.

    Half of the signals are SIGKILL, a quarter SIGTERM, a quarter SIGINT, in random order. One run more is compiled, and
    killed once. Students must be equal to the byte, the last checkpoints' tensors and the metrics without times too.
    """
    chance = random.Random(0)
    signals = [(signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[turn % 4] for turn in range(setup.kills)]
    chance.shuffle(signals)
    runs = {name: _killed_run(setup, kind, options, chance) for name, (kind, options) in VARIANTS.items()}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in runs}
    num_runs = 0
    while signals and num_runs < 3 * setup.kills:  # so that it ends even where no moment is early enough
        name = list(runs)[num_runs % len(runs)]
        outcome = runs[name].kill(signals[: chance.randint(1, MOST_KILLS)])
        num_runs += 1
        signals = signals[len(outcome.signals) :]
        outcomes[name].append(outcome)
        click.echo(f"{name}: {outcome}", err=True)
    compiled = _killed_run(setup, *COMPILED, chance)
    outcomes["compiled"] = []
    while not any(outcome.signals for outcome in outcomes["compiled"]) and len(outcomes["compiled"]) < MOST_KILLS:
        outcomes["compiled"].append(compiled.kill([signal.SIGKILL]))
    every = [outcome for each in outcomes.values() for outcome in each]
    return {
        "images": TRAINED_IMAGES,
        "seconds left alone": {name: round(each.seconds, 1) for name, each in (runs | {"compiled": compiled}).items()},
        "runs": {name: _sum_of(each) for name, each in outcomes.items()},
        "checks": {
            "all signals were sent": not signals and any(outcome.signals for outcome in outcomes["compiled"]),
            "all that is left is equal": not any(outcome.differing for outcome in every),
            "no other exit": not any(outcome.odd_exits for outcome in every),
        },
    }


def left_by(out: Path) -> Left:
    """Read what a finished run left."""
    last = max((out / "checkpoints").iterdir())
    tensors = load_file(last / "tensors.safetensors")
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    names = {str(path.relative_to(out.parent)) for path in out.parent.rglob("*")}
    return Left(
        student=contents_of(out / "student"),
        checkpoint={name: (f"{tensor.dtype} {tensor.shape}", tensor.tobytes()) for name, tensor in tensors.items()},
        metrics=[{name: value for name, value in json.loads(line).items() if "second" not in name} for line in lines],
        names={name for name in names if _is_comparable(name, last.name)},
    )


def contents_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file right in a folder; nothing where there is none."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def phase(out: Path) -> str:
    """Tell by its files what a run was at when it died."""
    if not out.exists():
        return "before the first checkpoint" if out.with_name(f".{out.name}.partial").exists() else "start"
    return "end" if json.loads((out / "run.json").read_text("utf-8"))["status"] == "finished" else "training"


def begun_ns(out: Path) -> int:
    """Return when the training of a run began or went on: its record is written then; 0 before that."""
    for folder in (out, out.with_name(f".{out.name}.partial")):
        with suppress(OSError):
            return (folder / "run.json").stat().st_mtime_ns
    return 0


def _is_comparable(name: str, last_checkpoint: str) -> bool:
    # TensorBoard's files have a clock in their names; when checkpoints within an epoch are made, a clock decides.
    parts = Path(name).parts
    return "tensorboard" not in parts and all(part == last_checkpoint for part in parts if part.isdecimal())


def _differing(mine: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    return [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]


def _killed_run(setup: Setup, kind: str, options: Sequence[str], chance: random.Random) -> KilledRun:
    """Run a variant to its end."""
    subject = setup.subject(kind, setup.subset(TRAINED_IMAGES, TEST_IMAGES))
    out = fresh_folder(setup.work / "killed") / "run"
    command = setup.distill(subject, out, *QUICK, *options, "--resume")
    start = time.monotonic()
    told = run(command)
    return KilledRun(command, out, left_by(out), time.monotonic() - start, told["train_seconds"], chance)


def _sum_of(outcomes: Sequence[Outcome]) -> Figures:
    return {
        "runs": len(outcomes),
        "killed by": dict(Counter(name for outcome in outcomes for name in outcome.signals)),
        "killed in": dict(Counter(each for outcome in outcomes for each in outcome.killed_in)),
        "equal in the end": sum(not outcome.differing for outcome in outcomes),
        "what differs": sorted({name for outcome in outcomes for name in outcome.differing}),
    }
