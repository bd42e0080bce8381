"""The file of a result: what is kept of a program's JSON, beside all that decides it and where it was measured.

    FOLDER/<scale>/<target>/<run>.json

Files say nothing of folders: they go into the repository. Tables are made from them alone.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.finetune_setup import FinetuneSettings
from benchmarks.reproduce_runs import Extraction, FineTuning, Measurement, Run, Training
from pipeline.distill.recipe import load_recipe
from pipeline.errors import PipelineError, describe_problems, first_line
from pipeline.output import write_atomically

# What is kept of what the programs print, by any of their names.
_KEPT = (
    *("top5", "num_parameters", "num_steps", "train_seconds", "images_per_second", "feed_share", "teacher_seconds"),
    *("num_images", "seconds", "artifact_bytes", "memory", "ms_per_step", "epoch_seconds", "memory_bytes"),
    *("file_page_bytes", "weight_bytes", "weight_ratio", "sizes"),
)
_TUNING = ("batch_size", "learning_rate", "operations", "image_size")
_MOST_LINES = 40  # of a curve


class Result(BaseModel):
    """One run's result. `accuracy` is in percent, of the last epoch, and none where nothing was evaluated.

    `settings` decide it; `conditions` only how long it took: whether the step was compiled, and how many ran at once.
    `target` is the folder that its file lies in.
    """

    model_config = ConfigDict(frozen=True)

    recipe: str | None
    artifact: str | None
    epochs: int | None
    seed: int | None
    accuracy: float | None = Field(allow_inf_nan=False, ge=0, le=100)
    settings: Mapping[str, str | int | float | None]
    measured: Mapping[str, Any]
    curve: tuple[Mapping[str, float], ...]
    manifest_sha256: str | None
    conditions: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str | None
    target: str = Field("", exclude=True)

    @property
    def memory_bytes(self) -> int | None:
        """The most that it held on the device, where that has memory of its own, else in RAM."""
        if "memory_bytes" in self.measured:
            return int(self.measured["memory_bytes"])
        memory: Mapping[str, int] = self.measured.get("memory", {})
        return memory.get("device_bytes") or memory.get("resident_bytes")


class Results:
    """The results of one scale, found by what was run."""

    def __init__(self, found: Iterable[Result]) -> None:
        """Take results; of the same settings the last one counts."""
        self._found = {frozenset(result.settings.items()): result for result in found}

    def all(self) -> list[Result]:
        """Return all of them, in order."""
        return list(self._found.values())

    def of(self, run: Run) -> Result | None:
        """Return the result of a run, if there is one."""
        return self._found.get(frozenset(settings_of(run).items()))

    def by_seed(self, training: Training) -> dict[int, Result]:
        """Return the results of a training by seed, whichever seed it says itself."""
        seeds = sorted({result.seed for result in self._found.values() if result.seed is not None})
        found = {seed: self.of(replace(training, seed=seed)) for seed in seeds}
        return {seed: result for seed, result in found.items() if result is not None}

    def accuracies(self, training: Training) -> dict[int, float]:
        """Return the accuracies of a training in percent, by seed."""
        found = self.by_seed(training)
        return {seed: result.accuracy for seed, result in found.items() if result.accuracy is not None}

    def over_epochs(self, training: Training) -> dict[int, dict[int, float]]:
        """Return the accuracies of a training in percent, by epoch that was evaluated and by seed."""
        found: dict[int, dict[int, float]] = {}
        for seed, result in self.by_seed(training).items():
            for line in result.curve:
                if "top1" in line:
                    found.setdefault(int(line["epoch"]), {})[seed] = line["top1"]
        return found


@dataclass(frozen=True)
class Surroundings:
    """Where results are made, and with what. Of `conditions`, whether a step is compiled is what was asked for."""

    conditions: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str | None


def settings_of(run: Run) -> dict[str, Any]:
    """Return everything that decides a run's result: a recipe by its name and by what is in it."""
    settings = {"run": type(run).__name__.lower(), **asdict(run)}
    if isinstance(run, Training):
        settings["recipe_sha256"] = recipe_digest(run.recipe)
    if isinstance(run, FineTuning):
        settings |= {name: FinetuneSettings.model_fields[name].default for name in _TUNING}
    return settings


def result_of(run: Run, told: Mapping[str, Any], made: Path, surroundings: Surroundings) -> Result:
    """Make the result of a run.

    Args:
        run: what was run.
        told: the JSON that its program printed.
        made: what it left: of a training the run directory.
        surroundings: where it ran.
    """
    measured = {name: told[name] for name in _KEPT if not isinstance(told.get(name), str | None)}  # no paths
    if "peak_memory_bytes" in told:
        memory = {"resident_bytes": told["peak_memory_bytes"], "device_bytes": told["peak_device_memory_bytes"]}
        measured["memory"] = memory
    if isinstance(run, Extraction):
        measured["report_card"] = _shares(told["report_card"])
    record = _json(made / "run.json") if isinstance(run, Training) else {}
    if precision := told.get("precision") or record.get("compute", {}).get("precision"):
        measured["precision"] = precision
    # A step that was to be compiled may not have been.
    conditions = {**surroundings.conditions, "compiled": bool(told.get("compiled"))}
    digest = told.get("manifest_sha256") or record.get("artifact", {}).get("manifest_sha256")
    return Result(
        recipe=getattr(run, "recipe", None),
        artifact=None if isinstance(run, Measurement) else _artifact(run, record),
        epochs=getattr(run, "epochs", None),
        seed=getattr(run, "seed", None),
        accuracy=_accuracy(run, told),
        settings=settings_of(run),
        measured=measured,
        curve=_curve(made / "metrics.jsonl") if isinstance(run, Training) else (),
        manifest_sha256=digest,
        **vars(replace(surroundings, conditions=conditions)),
    )


def read_results(folder: Path) -> Results:
    """Read all files of a scale.

    Args:
        folder: of the scale; it may be missing.

    Raises:
        PipelineError: a file is not a result.
    """
    return Results(map(read_result, sorted(folder.glob("*/*.json"))))


def read_result(path: Path) -> Result:
    """Read a result.

    Raises:
        PipelineError: the file is not one.
    """
    try:
        found = Result.model_validate_json(path.read_bytes())
        return found.model_copy(update={"target": path.parent.name})
    except ValidationError as error:
        reason = describe_problems(error)
    except OSError as error:
        reason = first_line(error)
    raise PipelineError(f"{path}: is not a result ({reason}). Remove it, and run its target again.")


def write_result(path: Path, result: Result) -> None:
    """Write a result as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


@cache
def recipe_digest(name: str) -> str:
    """Return the SHA-256 of everything that a recipe says, in hexadecimal digits."""
    told = json.dumps(load_recipe(name).model_dump(), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _accuracy(run: Run, told: Mapping[str, Any]) -> float | None:
    if isinstance(run, Extraction):  # of the others the report card is of training images that are held out
        return _shares(told["report_card"]).get("ridge") if run.kind == "samples" else None
    accuracy: float | None = told.get("top1", told.get("accuracy"))
    return accuracy


def _shares(report_card: Mapping[str, Any]) -> dict[str, float]:
    """Return the accuracies of a report card in percent."""
    names = ("nearest_mean", "ridge", "ten_neighbours")
    return {name: 100 * report_card[name]["share"] for name in names if report_card.get(name)}


def _artifact(run: Run, record: Mapping[str, Any]) -> str | None:
    if isinstance(run, Extraction):
        return run.name
    file: str | None = record.get("artifact", {}).get("file")
    return file and Path(file).stem


def _curve(path: Path) -> tuple[dict[str, float], ...]:
    """Return loss, and accuracy where it was evaluated, of each epoch or, of many, of some up to the last."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    kept = [{name: line[name] for name in ("epoch", "loss", "top1") if name in line} for line in lines]
    step = -(-len(kept) // _MOST_LINES) or 1
    return tuple(kept[::-step][::-1])


def _json(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return document
