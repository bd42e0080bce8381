"""Recipes: named sets of training settings, as TOML, with single settings laid over them."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.distill.augment import Augmentation
from pipeline.errors import PipelineError, describe_problems, shortened, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SAMPLE_LOSSES = ("cosine_weight", "soft_label_weight")
_SHIPPED = Path(__file__).parent / "recipes"
_MAX_TABLES = 8  # that a key is looked for within; no setting stands so deep
_MAX_NAME = 300  # characters that are shown of a recipe's name


class Recipe(BaseModel):
    """How a student is trained. Symbols as in the paper, section II.

    The loss is α₁ L_CE + α₂ L_clip + the other losses, each times its weight; one whose weight is 0 costs nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    epochs: int = Field(ge=1, lt=2**63, description="passes over the images")
    batch_size: int = Field(ge=2, lt=2**63, description="images a step; one image has no batch statistics")
    learning_rate: float = Field(gt=0, allow_inf_nan=False, description="AdamW's, at its highest")
    schedule: Literal["constant", "cosine"] = Field(description="of the learning rate, after the warm-up")
    warmup: float = Field(ge=0, lt=1, description="share of all steps in which the learning rate rises from 0")
    weight_decay: float = Field(ge=0, allow_inf_nan=False, description="AdamW's, decoupled")
    decay_all: bool = Field(description="decay biases, norms and embeddings of positions too, not weights alone")
    gradient_clip: float = Field(ge=0, allow_inf_nan=False, description="largest norm of the gradient; 0: any")
    average_decay: float = Field(ge=0, lt=1, description="of the moving average of the weights; 0: none")
    label_smoothing: float = Field(ge=0, lt=1, description="of L_CE")
    attention_dropout: float = Field(ge=0, lt=1, description="of students base and large")
    stochastic_depth: float = Field(ge=0, lt=1, description="share of images that skip the deepest block; less above")
    alpha2: float = Field(ge=0, le=1, description="α₂, weight of L_clip; α₁ = 1 − α₂ weighs L_CE")
    logit_scale: float = Field(gt=0, le=100, description="κ, or where it begins")
    learn_logit_scale: bool = Field(description="learn κ, up to 100")
    centre: bool = Field(description="take the mean class embedding off the teacher's embeddings")
    cosine_weight: float = Field(ge=0, allow_inf_nan=False, description="of the cosine regression to samples")
    soft_label_weight: float = Field(ge=0, allow_inf_nan=False, description="of the KL to the ridge head's opinion")
    soft_label_temperature: float = Field(gt=0, allow_inf_nan=False, description="of the ridge head's opinion")
    direction_weight: float = Field(ge=0, allow_inf_nan=False, description="of direction and norm to class means")
    text_weight: float = Field(ge=0, allow_inf_nan=False, description="of the text prototypes")
    replay_views: bool = Field(description="show the student what the teacher saw, where the artifact has views")
    augmentation: Augmentation


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        name: of a recipe that ships with the project, or a path that ends in `.toml`. A file that sets `base` to the
            former says only what differs from it.
        overrides: settings laid over it, by name; those of tables with a point, e.g. `augmentation.mixup_alpha`.

    Returns:
        The recipe, every value checked.

    Raises:
        PipelineError: no such recipe, not TOML, or keys or values are wrong (all of them are named).
    """
    values, problems = _read(name), []
    base = values.pop("base", None)
    if base is not None:
        if base not in shipped_recipes():
            problems.append(f"base: expected one of {', '.join(shipped_recipes())}, found {shown(base)}")
            base = "paper"  # to look at the rest
        values = _laid_over(_read(base), values)
    for key, value in (overrides or {}).items():
        for table in reversed(key.split(".", _MAX_TABLES)):
            value = {table: value}
        values = _laid_over(values, value)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems.append(describe_problems(error))
    if problems:
        raise PipelineError(f"recipe {name}: {'; '.join(problems)}")
    return recipe


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Read settings as they are typed.

    Args:
        texts: each `KEY=VALUE`, the value as TOML writes it; what TOML does not know is a word.

    Returns:
        Values by key.

    Raises:
        PipelineError: some have no `=`, or a key stands there twice (all of them are named).
    """
    overrides: dict[str, Any] = {}
    problems = []
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not (equals and key and value):
            problems.append(f"--set {text!r}: expected KEY=VALUE, such as label_smoothing=0.1")
        elif key in overrides:
            problems.append(f"--set {key}: is given twice")
        else:
            overrides[key] = _value(value)
    if problems:
        raise PipelineError("; ".join(problems) + ".")
    return overrides


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that ship with the project, sorted."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def recipe_as_toml(recipe: Recipe) -> str:
    """Write a recipe as a file that `load_recipe` reads, each setting with what it means."""
    lines, tables = [], []
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        if isinstance(value, BaseModel):
            tables += [(name, value)]
        else:
            lines.append(_line(name, value, field.description))
    for name, table in tables:
        lines += ["", f"[{name}]"]
        lines += [_line(key, getattr(table, key), field.description) for key, field in type(table).model_fields.items()]
    return "\n".join(lines) + "\n"


def _read(name: str) -> dict[str, Any]:
    shipped = shipped_recipes()
    path = _SHIPPED / f"{name}.toml" if name in shipped else Path(name)
    try:
        if not (str(path).endswith(".toml") and path.is_file()):
            raise PipelineError(
                f"recipe {shortened(repr(name), _MAX_NAME)} does not exist. Choose {', '.join(shipped)}, or the path "
                "of a .toml file."
            )
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        reason = shortened(str(error), _MAX_NAME)
        raise PipelineError(f"recipe {shortened(name, _MAX_NAME)}: cannot be read ({reason}).") from None
    return values


def _value(text: str) -> Any:
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return document["value"] if len(document) == 1 else text


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        tables = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = _laid_over(both[key], value) if tables else value
    return both


def _line(name: str, value: object, description: str | None) -> str:
    text = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else repr(value)
    return f"{f'{name} = {text}':31} # {description}" if description else f"{name} = {text}"
