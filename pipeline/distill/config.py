"""Settings of stage two, and recipes: named sets of training settings."""

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.data import DataSettings
from pipeline.errors import PipelineError, describe_problems
from pipeline.runtime import Precision

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Target = Literal["class", "sample", "both"]
_RECIPES = Path(__file__).parent / "recipes"


class Recipe(BaseModel):
    """How a student is trained. Symbols as in the paper, section II."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2, description="one image has no batch statistics")
    learning_rate: float = Field(gt=0, allow_inf_nan=False, description="constant")
    weight_decay: float = Field(ge=0, allow_inf_nan=False, description="AdamW's, decoupled")
    alpha2: float = Field(ge=0, le=1, description="α₂, weight of L_clip; α₁ = 1 − α₂ weighs L_CE")
    logit_scale: float = Field(gt=0, allow_inf_nan=False, description="κ, fixed")
    cosine_weight: float = Field(ge=0, allow_inf_nan=False, description="λ, weight of the cosine regression")
    horizontal_flip: float = Field(ge=0, le=1, description="probability")
    attention_dropout: float = Field(ge=0, lt=1, description="of students base and large")


class DistillSettings(BaseModel):
    """Everything that stage two can be told. `none` in `epochs` … `learning_rate`: as the recipe says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact: Path
    data: DataSettings
    out: Path
    eval_split: str | None = Field(default=None, description="none: the data's own, else 10 % held out")
    student: str = Field(default="base", min_length=1, description="base, large, or a timm model")
    image_size: int = Field(default=32, ge=1)
    recipe: str = Field(default="paper", description="a recipe's name, or a TOML file")
    target: Target = "class"
    alpha2: float | None = Field(default=None, ge=0, le=1)
    epochs: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=2)
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    precision: Precision = "auto"
    device: str = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)
    max_missing: float = Field(default=0.0, ge=0, le=1, description="largest share of images without a target")
    join_by_index: bool = False
    skip_bad: bool = False
    cache: Path | None = Field(default=None, description="of decoded images; none: the user's own")
    overwrite: bool = False

    def resolved_recipe(self) -> Recipe:
        """Return the recipe with this run's own settings laid over it.

        Raises:
            PipelineError: the recipe is unknown or wrong.
        """
        own = {name: getattr(self, name) for name in ("alpha2", "epochs", "batch_size", "learning_rate")}
        return load_recipe(self.recipe).model_copy(update={k: v for k, v in own.items() if v is not None})


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


def load_recipe(name: str) -> Recipe:
    """Read a recipe.

    Args:
        name: of a recipe that ships with the project, or a path that ends in `.toml`.

    Returns:
        The recipe, every value checked.

    Raises:
        PipelineError: no such recipe, not TOML, or keys or values are wrong (all of them are named).
    """
    path = Path(name) if name.endswith(".toml") else _RECIPES / f"{name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(recipe.stem for recipe in _RECIPES.glob("*.toml")))
        raise PipelineError(f"recipe {name!r} does not exist. Choose {shipped}, or the path of a .toml file.")
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise PipelineError(f"recipe {name}: {describe_problems(error)}") from None
    except (ValueError, OSError) as error:
        raise PipelineError(f"recipe {name}: cannot be read ({error}).") from None
