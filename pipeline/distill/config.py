"""Settings of stage two."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.data import DataSettings
from pipeline.distill.recipe import SAMPLE_LOSSES, Recipe, load_recipe
from pipeline.errors import PipelineError, check_utf8
from pipeline.progress import LOGGER
from pipeline.runtime import Precision

Target = Literal["class", "sample", "both"]


class DistillSettings(BaseModel):
    """Everything that stage two can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact: Path
    data: DataSettings
    out: Path
    eval_split: str | None = Field(default=None, min_length=1, description="none: the data's own, else 10 % held out")
    evaluate_every: int = Field(default=1, ge=1, description="epochs between evaluations; the last is always evaluated")
    student: str = Field(default="base", min_length=1, description="base, large, or a timm model")
    init: str = Field(default="scratch", min_length=1, description="scratch, pretrained, or a folder of a timm model")
    image_size: int = Field(default=32, ge=1)
    recipe: str = Field(default="paper", description="a recipe's name, or a TOML file")
    overrides: dict[str, Any] = Field(default={}, description="settings laid over the recipe, by name")
    target: Target = "class"
    max_steps: int | None = Field(default=None, ge=1)
    micro_batch: int | None = Field(default=None, ge=2, description="images that are in memory at once")
    precision: Precision = "auto"
    device: str = "auto"
    compile: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    max_missing: float = Field(default=0.0, ge=0, le=1, description="largest share of images without a target")
    join_by_index: bool = False
    skip_bad: bool = False
    cache: Path | None = Field(default=None, description="of decoded images; none: the user's own")
    overwrite: bool = False
    resume: bool = False
    checkpoint_minutes: float = Field(default=10.0, gt=0, allow_inf_nan=False)

    _names_are_utf8 = field_validator("*")(check_utf8)

    def resolved_recipe(self) -> Recipe:
        """Return the recipe with this run's own settings laid over it.

        Losses that need sample embeddings are left out where the target is the class embeddings, and that is said.

        Raises:
            PipelineError: the recipe is unknown or wrong, or a loss of samples is asked for beside target `class`.
        """
        recipe = load_recipe(self.recipe, self.overrides)
        if self.target != "class":
            return recipe
        if asked := [name for name in SAMPLE_LOSSES if self.overrides.get(name)]:
            raise PipelineError(f"{', '.join(asked)}: needs sample embeddings. Pass --target sample or both.")
        update = dict.fromkeys(SAMPLE_LOSSES, 0.0) | {"replay_views": False}
        if left_out := [name for name in update if getattr(recipe, name)]:
            LOGGER.info("Left out of the recipe, since they need --target sample or both: %s.", ", ".join(left_out))
        return recipe.model_copy(update=update)


class EvaluateSettings(BaseModel):
    """Everything that an evaluation can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: Path = Field(description="run directory, or the `student` folder in it")
    data: DataSettings
    batch_size: int = Field(default=64, ge=1)
    precision: Precision = "auto"
    device: str = "auto"
    skip_bad: bool = False
    cache: Path | None = Field(default=None, description="of decoded images; none: the user's own")

    _names_are_utf8 = field_validator("*")(check_utf8)
