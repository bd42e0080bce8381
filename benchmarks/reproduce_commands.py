"""How a run becomes a command: of `cli.py`, or of the benchmarks that have the teacher itself at hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.distill_loops import LABEL_COLUMN
from benchmarks.distill_setup import KINDS
from benchmarks.extract_setup import ROOT
from benchmarks.reproduce_results import recipe_digest
from benchmarks.reproduce_runs import (
    ALL_IMAGES,
    LIVE,
    METHODS,
    NO_DEVICE,
    TUNED,
    Extraction,
    FineTuning,
    Measurement,
    Run,
    Scale,
    Training,
)

_BENCHMARKS = ROOT / "benchmarks"
_TARGETS = {
    "sample": ("--target", "sample"),
    "samples": ("--target", "both", "--set", "replay_views=false"),
    "views": ("--target", "both"),
}


@dataclass(frozen=True)
class Place:
    """Where runs take place: a folder to work in, the data, folders of teachers by name, a device.

    `usual` is the teacher whose artifact is taken where nothing is learned from a teacher. `compiles`: compile
    the step of a student.
    """

    work: Path
    dataset: Path
    teachers: Mapping[str, Path]
    usual: str
    device: str
    scale: Scale
    compiles: bool = False

    def made_by(self, run: Run) -> Path:
        """Return what a run leaves in the folder: an artifact, a teacher, or a run directory."""
        if isinstance(run, Extraction):
            return self.work / "artifacts" / f"{run.name}.safetensors"
        if isinstance(run, FineTuning):
            return self.work / "teachers" / run.name
        # Run directories of other settings are never mixed: a recipe that has changed begins another one.
        told = f"-{run.epochs}-epochs-{recipe_digest(run.recipe)[:6]}" if isinstance(run, Training) else ""
        return self.work / "runs" / (run.name + told)

    def teacher(self, name: str) -> Path:
        """Return a teacher's folder."""
        if name.endswith(TUNED):
            return self.made_by(self.scale.tuning(name.removesuffix(TUNED)))
        return self.teachers[name]

    def command(self, run: Run) -> list[str]:
        """Return a run's command, without the interpreter: one that goes on where it stopped, and prints JSON."""
        if isinstance(run, Extraction):
            return self._extract(run)
        if isinstance(run, FineTuning):
            return self._fine_tune(run)
        if isinstance(run, Measurement):
            return self._measure(run)
        return self._train_live(run) if run.method in LIVE else self._distill(run)

    def _distill(self, run: Training) -> list[str]:
        every = -(-run.epochs // self.scale.evaluations)
        given = [str(ROOT / "cli.py"), "distill", *self._training(run), "--label-column", LABEL_COLUMN]
        given += ["--alpha2", str(run.alpha2), "--evaluate-every", str(every), *_TARGETS.get(run.method, ())]
        return given

    def _train_live(self, run: Training) -> list[str]:
        teacher = str(self.teacher(run.teacher or self.usual))
        given = [str(_BENCHMARKS / "baselines.py"), "--method", run.method, "--teacher", teacher]
        return [*given, *self._training(run)]

    def _training(self, run: Training) -> list[str]:
        """Return the options that all programs that train have in common."""
        artifact = self.made_by(Extraction(run.teacher or self.usual, METHODS[run.method], run.images))
        options = {
            "artifact": artifact,
            "dataset": self.dataset,
            "out": self.made_by(run),
            "student": run.student,
            "image-size": run.image_size,
            "recipe": run.recipe,
            "epochs": run.epochs,
            "seed": run.seed,
            "device": self.device,
        }
        given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        given += ["--compile"] if self.compiles else []
        return [*given, *_limit(run.images), "--resume", "--json"]

    def _extract(self, run: Extraction) -> list[str]:
        given = [str(ROOT / "cli.py"), "extract", "--teacher", str(self.teacher(run.teacher))]
        # With samples the report card tells how good the teacher is on the images that students are judged by.
        report = ["--report-split", "test"] if run.kind == "samples" else []
        return [
            *given,
            *KINDS[run.kind],
            *report,
            *self._of_data(run.images),
            "--out",
            str(self.made_by(run)),
            "--json",
        ]

    def _fine_tune(self, run: FineTuning) -> list[str]:
        given = [str(_BENCHMARKS / "finetune_teacher.py"), "--teacher", str(self.teacher(run.teacher))]
        given += ["--epochs", str(run.epochs), "--seed", str(run.seed), *self._of_data(run.images)]
        return [*given, "--out", str(self.made_by(run)), "--json"]

    def _of_data(self, images: int) -> list[str]:
        given = ["--dataset", str(self.dataset), "--label-column", LABEL_COLUMN, *_limit(images)]
        return [*given, "--device", self.device]

    def _measure(self, run: Measurement) -> list[str]:
        device = "cpu" if run.device == NO_DEVICE else self.device
        options = {
            "student": run.student,
            "image-size": run.image_size,
            "teacher": run.teacher.removesuffix("-224-in21k"),
            "method": run.method,
            "steps": run.steps,
            "device": device,
        }
        given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return [str(_BENCHMARKS / "resources.py"), *given, "--json"]


def _limit(images: int) -> list[str]:
    return ["--limit", str(images)] if images < ALL_IMAGES else []
