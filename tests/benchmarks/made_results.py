"""Results that nobody measured, and programs that compute nothing, for tests of what is made of them."""

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from benchmarks import reproduce_paper as paper
from benchmarks.reproduce_processes import StoppedError
from benchmarks.reproduce_results import Result, Results, settings_of
from benchmarks.reproduce_runs import NO_DEVICE, SCALES, Extraction, Measurement, Run
from benchmarks.reproduce_study import KNOWN, SIDES, SIZES

SCALE = SCALES["reduced"]
SIZE = {"layers": 6, "width": 256, "heads": 8, "mlp": 1024, "parameters": 4_794_468}
WEIGHTS = {"teacher": 1_200_000_000, "student": 19_000_000, "projection": 900_000, "class_means": 400_000}


def made_result(run: Run, accuracy: float | None = None, **measured: Any) -> Result:
    """Make the result of a run: of a measurement on its device, of all else on a processor."""
    device = getattr(run, "device", "cpu").replace(NO_DEVICE, "cpu")
    return Result(
        recipe=getattr(run, "recipe", None),
        artifact="a",
        epochs=getattr(run, "epochs", None),
        seed=getattr(run, "seed", None),
        accuracy=accuracy,
        settings=settings_of(run),
        measured=measured,
        curve=(),
        manifest_sha256=None,
        conditions={"compiled": False, "jobs": 1},
        machine={"processor": "a processor", "cores": 2, "threads": 2, "device": device},
        versions={"torch": "2.0"},
        commit="0123456789ab",
        target="fig2" if isinstance(run, Measurement) else "live",
    )


def made_trainings(
    method: str, accuracies: Sequence[float], teacher: str | None = KNOWN, **changes: Any
) -> list[Result]:
    """Make the results of a training, one a seed."""
    speed: dict[str, Any] = {"images_per_second": 50.0 if method == "teacher-kd" else 100.0, "train_seconds": 10.0}
    speed |= {"teacher_seconds": 5.0} if method == "teacher-kd" else {}
    measured: dict[str, Any] = speed | {"memory": {"resident_bytes": 2_000_000_000, "device_bytes": 0}}
    return [
        made_result(SCALE.training(method, teacher, seed=seed, **changes), accuracy, **measured)
        for seed, accuracy in enumerate(accuracies)
    ]


def made_measurements(device: str = "cpu") -> list[Result]:
    """Make the results of sizes and of figure 2: 10 times the memory and 20 times the time with a teacher."""
    sizes: dict[str, Any] = {"sizes": {"student": SIZE, "teacher": SIZE}, "weight_bytes": WEIGHTS, "weight_ratio": 59.1}
    made = [made_result(Measurement("embed", teacher, 0, NO_DEVICE), **sizes) for teacher in paper.TEACHERS.values()]
    for student, image_size in SIZES:
        for side, factor in zip(SIDES, (1, 10), strict=True):
            run = Measurement(side, paper.TEACHERS["Large-32"], SCALE.steps, device, student, image_size)
            made.append(made_result(run, memory_bytes=factor * 200_000_000, epoch_seconds=2.0 * factor * 30))
    return made


def many_results() -> Results:
    """Make results of about everything, with a teacher that is not the paper's."""
    few = [
        made_result(SCALE.few(labels, KNOWN, "paper", alpha2), 10.0 + labels / 100 + alpha2)
        for labels in SCALE.labels[:2]
        for alpha2 in (0.0, 0.5)
    ]
    return Results(
        [
            *made_measurements(),
            *made_trainings("embed", [12.0, 12.4, 12.2]),
            *made_trainings("teacher-kd", [14.0, 14.5, 14.4]),
            *made_trainings("sample", [13.0]),
            *made_trainings("supervised", [11.0], None),
            *made_trainings("embed", [11.0, 11.3, 11.1], alpha2=0.0),
            *made_trainings("embed", [15.0, 15.3, 15.1], student="large"),
            *made_trainings("embed", [11.5], alpha2=1.0),
            *made_trainings("embed", [20.0], recipe="strong"),
            made_result(Extraction(KNOWN, "samples", SCALE.images), 60.0),
            *few,
        ]
    )


class Programs:
    """Stands in for processes: notes every command, leaves what the program would, and prints what it would."""

    def __init__(self, *, stop_after: int | None = None, failing: Sequence[str] = ()) -> None:
        """Begin; `stop_after` so many commands all are stopped, those with a word of `failing` fail."""
        self.commands: list[list[str]] = []
        self.threads: dict[str, int | None] = {}  # by name
        self.stopped, self._stop_after, self._failing = False, stop_after, failing

    def run(self, command: Sequence[str], name: str, threads: int | None = None) -> dict[str, Any]:
        """Stand in for a program."""
        self._note(command)
        self.threads[name] = threads
        if any(word in " ".join(command) for word in self._failing):
            raise CalledProcessError(1, command)
        program = Path(command[0]).stem
        options = dict(itertools.pairwise(command))
        told = {"cli": self._cli, "baselines": _trained, "resources": _measured, "finetune_teacher": _tuned}[program]
        return told(options)

    def output(self, command: Sequence[str], name: str) -> bytes:
        """Stand in for a benchmark, which writes its figures itself."""
        self._note(command)
        program, options = Path(command[0]).stem, dict(itertools.pairwise(command))
        path = Path(options["--work"]) / f"{program}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text("utf-8")) if path.exists() else {}
        fails = any(word in " ".join(command) for word in self._failing)
        path.write_text(json.dumps(known | {options["--only"]: {"error": "it failed"} if fails else {"ms": 1.0}}))
        if fails or options["--only"] == "step":  # whose target is missed
            raise CalledProcessError(1, command)
        return b""

    def _note(self, command: Sequence[str]) -> None:
        self.stopped = self.stopped or len(self.commands) == self._stop_after
        if self.stopped:
            raise StoppedError
        self.commands.append(list(command))

    def stop(self) -> None:
        """Stand in for asking them to stop."""
        self.stopped = True

    def _cli(self, options: Mapping[str, str]) -> dict[str, Any]:
        if "--teacher" not in options:
            memory = {"peak_memory_bytes": 1_000, "peak_device_memory_bytes": 0}
            return {**_trained(options), **memory, "report": f"{options['--out']}/report.html", "top1": 12.5}
        Path(options["--out"]).write_text("an artifact")
        shutil.rmtree(f"{options['--out']}.partial", ignore_errors=True)
        card = {"ridge": {"share": 0.6, "low": 0.5, "high": 0.7}, "nearest_mean": None, "ten_neighbours": None}
        return {"artifact": options["--out"], "manifest_sha256": "ab" * 32, "seconds": 1.5, "report_card": card}


def _trained(options: Mapping[str, str]) -> dict[str, Any]:
    out = Path(options["--out"])
    (out / "checkpoints").mkdir(parents=True)
    record = {"artifact": {"file": Path(options["--artifact"]).name, "manifest_sha256": "cd" * 32}}
    (out / "run.json").write_text(json.dumps(record | {"compute": {"precision": "bfloat16"}}))
    (out / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "loss": 4.5, "step": 4, "top1": 12.5}) + "\n")
    memory = {"resident_bytes": 1_000, "device_bytes": 0}
    told = {"run_directory": str(out), "teacher": "t", "accuracy": 12.5, "top5": 40.0, "memory": memory}
    speed = {"train_seconds": 2.0, "images_per_second": 100.0, "teacher_seconds": 0.0}
    return {**told, **speed, "num_steps": 4, "compiled": "--compile" in options}


def _measured(options: Mapping[str, str]) -> dict[str, Any]:
    told = {"sizes": {"student": SIZE, "teacher": SIZE}, "weight_bytes": WEIGHTS, "weight_ratio": 59.1}
    steps = {"ms_per_step": 5.0, "images_per_second": 9.0, "epoch_seconds": 8.0, "memory_bytes": 7}
    return {**told, "teacher": options["--teacher"], **(steps if options["--steps"] != "0" else {})}


def _tuned(options: Mapping[str, str]) -> dict[str, Any]:
    Path(options["--out"]).mkdir()
    return {"teacher": options["--teacher"], "out": options["--out"], "epochs": 1, "seed": 0, "accuracy": 70.0}
