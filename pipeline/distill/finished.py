"""A finished run as its directory tells it: the parts of `run.json` that a report needs, and the epochs' metrics."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.distill.join_report import JoinReport
from pipeline.distill.outcome import Outcome
from pipeline.errors import PipelineError, describe_problems, first_line
from pipeline.runtime import PeakMemory

Number = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]  # what `draw_curves` takes


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class RunSettings(_Part):
    """What the run was told."""

    student: str
    init: str
    image_size: int
    recipe: str
    target: str
    seed: int


class Teacher(_Part):
    """Who made the embeddings."""

    name: str
    embed_dim: int


class RunArtifact(_Part):
    """Where the embeddings came from."""

    file: str
    manifest_sha256: str
    teacher: Teacher


class RunData(_Part):
    """What was trained and evaluated on."""

    name: str
    num_classes: int
    evaluated_on: str
    join: JoinReport


class RunCompute(_Part):
    """Where it was computed."""

    device: str
    precision: str


class RunResult(_Part):
    """What it took. Seconds of training are of all parts of a run that was gone on with, `seconds` of the last."""

    num_parameters: int
    num_steps: int
    images_per_second: Number
    train_seconds: Number
    feed_share: Number
    seconds: Number
    memory: PeakMemory


class FinishedRun(_Part):
    """All of it. `epochs` are the lines of `metrics.jsonl`, the names of values as `Training` chose them."""

    settings: RunSettings
    recipe: Mapping[str, Any]
    artifact: RunArtifact
    data: RunData
    compute: RunCompute
    machine: Mapping[str, str | int | None]
    software: Mapping[str, str]
    result: RunResult
    outcome: Outcome
    epochs: tuple[Mapping[str, Number], ...] = Field(min_length=1)


def read_run(folder: Path) -> FinishedRun:
    """Read a run directory.

    Args:
        folder: of a run that came to its end.

    Returns:
        What it tells.

    Raises:
        PipelineError: it is not one, it is not finished, or a file in it is damaged.
    """
    try:
        record = json.loads((folder / "run.json").read_text("utf-8"))
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        return FinishedRun.model_validate(dict(record) | {"epochs": [json.loads(line) for line in lines]})
    except ValidationError as error:
        reason = describe_problems(error)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = first_line(error)
    raise PipelineError(f"{folder}: does not tell what a report needs ({reason}). Is it a finished run?")
