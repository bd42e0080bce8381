"""Everything that is wrong with some settings, in one line."""

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import PipelineError, describe_problems


class _Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(default=1, ge=1)
    inner: _Inner = _Inner(name="x")


def problems(**settings: Any) -> str:
    with pytest.raises(ValidationError) as error:
        _Settings(**settings)
    return describe_problems(error.value)


def test_a_value_out_of_range_is_shown() -> None:
    assert problems(epochs=0) == "epochs: input should be greater than or equal to 1, found 0"


def test_an_unknown_setting_is_named() -> None:
    assert problems(speed=3) == "speed: unknown setting"


def test_a_missing_setting_is_named_with_its_place() -> None:
    assert problems(inner={}) == "inner.name: missing"


def test_all_problems_stand_in_one_line() -> None:
    assert problems(epochs=-1, inner={"name": "", "colour": "red"}, speed=1) == (
        "epochs: input should be greater than or equal to 1, found -1; "
        "inner.name: string should have at least 1 character, found ''; "
        "inner.colour: unknown setting; "
        "speed: unknown setting"
    )


def test_a_pipeline_error_is_no_error_of_a_library() -> None:
    assert PipelineError.__mro__ == (PipelineError, Exception, BaseException, object)
