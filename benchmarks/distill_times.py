"""How long whole runs take: beside what `plan` said before, and, on a GPU, all epochs of recipe `paper`."""

import math
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile

from benchmarks.distill_loops import Subject
from benchmarks.distill_setup import Setup
from benchmarks.extract_processes import run
from benchmarks.extract_setup import KNOWN_DATA, fresh_folder
from benchmarks.figure_book import Figures
from pipeline.distill.plan import plan

# On a CPU so few that several epochs fit into ten minutes.
PLANNED_IMAGES = {"cpu": (10_000, 2000), "mps": (10_000, 2000), "cuda": (50_000, 10_000)}
TRIAL_IMAGES = (256, 100)
REAL_SECONDS, TRIAL_SECONDS, LEAST_EPOCHS = 600.0, 60.0, 3
MOST_OFF = 0.15
EPOCHS, EAGER_EPOCHS, EVALUATE_EVERY = 200, 5, 20
MOST_SECONDS, LEAST_TOP1 = 300.0, 52.0
_POLL_SECONDS = 0.05


def measure_plan(setup: Setup) -> Figures:
    """Plan a run, make it, and compare the seconds of an epoch: from one line of metrics to the next.

    The first epoch is not counted, since nothing says when it began.
    """
    subject = setup.subject("class", setup.subset(*setup.pick(PLANNED_IMAGES[setup.device_type], TRIAL_IMAGES)))
    out = fresh_folder(setup.work / "planned") / "run"
    planned = plan(subject.settings(out=out))
    epochs = 1 + max(LEAST_EPOCHS, math.ceil(setup.pick(REAL_SECONDS, TRIAL_SECONDS) / planned.epoch_seconds))
    lines = times_of_lines(setup.distill(subject, out, "--epochs", str(epochs)), out / "metrics.jsonl")
    found = (lines[-1] - lines[0]) / (len(lines) - 1)
    ratio = planned.epoch_seconds / found
    return {
        "images": planned.images_per_epoch,
        "epochs": epochs,
        "planned seconds an epoch": round(planned.epoch_seconds, 3),
        "real seconds an epoch": round(found, 3),
        "planned over real": round(ratio, 3),
        "checks": {"a line for each epoch": len(lines) == epochs},
        "targets": {f"within {MOST_OFF:.0%}": abs(ratio - 1) <= MOST_OFF},
    }


def measure_epochs(setup: Setup) -> Figures:
    """Train the base student by recipe `paper` for 200 epochs of CIFAR-100, compiled: seconds, accuracy.

    Seconds are of the whole process, from its start to its end, with ten evaluations. A few eager epochs tell what
    compiling is worth.
    """
    if setup.device_type != "cuda":
        return {"not run": f"on {setup.device_type}: --device cuda"}
    subject = Subject(setup.artifact("class", KNOWN_DATA), KNOWN_DATA, setup.device)
    figures: Figures = {}
    for name, option, epochs in (("eager", "--no-compile", EAGER_EPOCHS), ("compiled", "--compile", EPOCHS)):
        start, epochs = time.monotonic(), setup.pick(epochs, 2)
        options = ["--epochs", str(epochs), "--evaluate-every", str(EVALUATE_EVERY), "--overwrite", option]
        told = run(setup.distill(subject, setup.work / "epochs", *options))
        kept = {key: told[key] for key in ("top1", "top5", "images_per_second", "train_seconds", "feed_share")}
        figures[name] = {"epochs": epochs, "seconds": round(time.monotonic() - start, 1), **kept}
    figures["targets"] = {
        f"compiled: at most {MOST_SECONDS:.0f} s": figures["compiled"]["seconds"] <= MOST_SECONDS,
        f"compiled: top-1 above {LEAST_TOP1:.0f} %": figures["compiled"]["top1"] > LEAST_TOP1,
    }
    return figures


def times_of_lines(command: list[str], path: Path) -> list[float]:
    """Run a command of the interpreter and return when each line of a file was there, in seconds of some clock."""
    times: list[float] = []
    with TemporaryFile() as told:
        process = subprocess.Popen([sys.executable, *command], stdout=told)
        while True:
            is_over = process.poll() is not None
            lines = path.read_bytes().count(b"\n") if path.exists() else 0
            times += [time.monotonic()] * (lines - len(times))
            if is_over:
                break
            time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return times
