"""Settings of stage one. Importing this loads neither the teacher's library nor its weights."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pipeline.data import DataSettings
from pipeline.errors import check_utf8
from pipeline.runtime import Precision

Pooling = Literal["auto", "cls", "distilled", "pooled", "mean", "projected"]
DEFAULT_PROMPTS = ("a photo of a {}.",)  # CLIP's own default (Radford et al. 2021, section 3.1.4)


class ExtractSettings(BaseModel):
    """Everything that stage one can be told.

    Paper defaults: the mean of N = 100 random images a class (section III).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str = Field(min_length=1, description="hub name or folder of a transformers image encoder")
    teacher_revision: str | None = None
    data: DataSettings
    out: Path
    per_class: Annotated[int, Field(ge=1, lt=2**63)] | Literal["all"] | None = Field(
        default=None, description="random images in each class; none: 100, or all where samples are stored"
    )
    rows: tuple[int, int] | None = Field(
        default=None, description="embed only what stands in rows A to B - 1 of the split, to be merged with the rest"
    )
    samples: bool = Field(default=False, description="also store the embedding of each image")
    views: int = Field(default=1, ge=1, description="embeddings of each sample; view 0 is the image itself")
    view_size: int = Field(default=224, ge=1, le=4096, description="side of a rendered view, in pixels")
    dtype: Literal["float32", "float16"] = Field(default="float16", description="of sample embeddings")
    report_split: str | None = Field(default=None, description="split to measure the report card's accuracies on")
    pooling: Pooling = "auto"
    class_text: bool = Field(default=False, description="also store text embeddings of the class names")
    prompts: tuple[str, ...] = Field(
        default=DEFAULT_PROMPTS, min_length=1, description="templates of the texts, each with one {} for the class name"
    )
    skip_bad: bool = False
    batch_size: int | None = Field(
        default=None, ge=1, lt=2**63, description="images in a forward pass; none: by device"
    )
    precision: Precision = "auto"
    device: str = "auto"
    workers: int | None = Field(default=None, ge=0, le=1024, description="decoding processes; none: by device")
    seed: int = Field(default=0, ge=0, lt=2**63)
    overwrite: bool = False

    _names_are_utf8 = field_validator("*")(check_utf8)

    @field_validator("views")
    @classmethod
    def _views_are_of_samples(cls, views: int, known: ValidationInfo) -> int:
        if views > 1 and not known.data.get("samples"):
            raise ValueError("views are of samples, and none is stored: pass --samples, or --views 1")
        return views

    @field_validator("rows")
    @classmethod
    def _rows_are_some(cls, rows: tuple[int, int] | None) -> tuple[int, int] | None:
        if rows is not None and not 0 <= rows[0] < rows[1]:
            raise ValueError("rows A:B are A to B - 1, with 0 ≤ A < B")
        return rows

    @field_validator("class_text")
    @classmethod
    def _text_shares_a_space_with_images(cls, class_text: bool, known: ValidationInfo) -> bool:
        pooling = known.data.get("pooling", "auto")
        if class_text and pooling not in ("auto", "projected"):
            raise ValueError(f"text shares a space with projected embeddings only, not with --pooling {pooling}")
        return class_text

    @field_validator("prompts")
    @classmethod
    def _prompts_name_the_class_once(cls, prompts: tuple[str, ...], known: ValidationInfo) -> tuple[str, ...]:
        for prompt in prompts:
            if prompt.count("{}") != 1:
                raise ValueError(f"a template needs one {{}} for the class name, {prompt!r} has {prompt.count('{}')}")
        if prompts != DEFAULT_PROMPTS and not known.data.get("class_text", True):
            raise ValueError("prompts are of text embeddings, and none is stored: pass --class-text")
        return prompts

    def resolved_pooling(self) -> Pooling:
        """Return how the teacher is to be pooled: with text embeddings, in the space that they share."""
        return "projected" if self.class_text else self.pooling

    def images_per_class(self) -> int | None:
        """Return how many images of each class to embed; none means all of them."""
        if self.per_class is None:
            return None if self.samples else 100
        return None if self.per_class == "all" else self.per_class


class CheckSettings(BaseModel):
    """Which artifact is checked, against what. What it contains, and how it was made, its manifest says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact: Path
    teacher: str = Field(min_length=1, description="hub name or folder of a transformers image encoder")
    teacher_revision: str | None = None
    data: DataSettings = Field(description="its split and columns are the manifest's where they are not set")
    fraction: float = Field(default=0.01, gt=0, le=1, description="of the samples, or of the classes where none is")
    batch_size: int | None = Field(default=None, ge=1)
    precision: Precision | None = Field(default=None, description="none: the manifest's, where the hardware has it")
    device: str = "auto"
    workers: int | None = Field(default=None, ge=0, le=1024, description="decoding processes; none: by device")

    _names_are_utf8 = field_validator("*")(check_utf8)

    @field_validator("data")
    @classmethod
    def _all_rows(cls, data: DataSettings) -> DataSettings:
        if data.limit is not None:
            raise ValueError("a limit is the manifest's to say: leave it out")
        return data
