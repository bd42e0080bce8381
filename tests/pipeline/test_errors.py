"""Everything that is wrong with some settings, in one line."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.errors import PipelineError, describe_problems, printable, shortened, shown
from pipeline.errors import check_utf8 as check


class _Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(default=1, ge=1)
    inner: _Inner = _Inner(name="x")
    file: Path = Path("a")
    prompts: tuple[str, ...] = ()

    _names_are_utf8 = field_validator("*")(check)


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


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def test_a_value_that_has_no_end_is_cut() -> None:
    assert problems(epochs="9" * 1_000_000).endswith(f", found '{'9' * 78}…")
    assert shown("a" * 78) == f"'{'a' * 78}'"
    assert shown("a" * 79) == f"'{'a' * 78}…"
    assert shortened("abcd", 3) == "ab…"


@pytest.mark.parametrize(
    ("value", "kind"),
    [(16**5000, "int"), ([16**5000], "list"), (nested(100_000), "dict")],
    ids=["number", "list", "table"],
)
def test_a_value_that_python_does_not_write_is_told_by_its_kind(value: Any, kind: str) -> None:
    assert problems(inner={"name": value}) == (
        f"inner.name: input should be a valid string, found something too large to show ({kind})"
    )


def test_a_name_that_has_no_end_is_cut() -> None:
    assert problems(**{"a" * 1_000_000: 1}) == f"{'a' * 79}…: unknown setting"


def test_of_many_problems_the_first_are_said_and_the_rest_counted() -> None:
    assert problems(**{f"k{index}": 1 for index in range(40)}).endswith("; k39: unknown setting")
    said = problems(**{f"k{index}": 1 for index in range(20_000)})
    assert said.count("unknown setting") == 40
    assert said.endswith("; k39: unknown setting; and 19,960 more")


def test_a_name_that_is_not_utf8_is_refused() -> None:
    assert problems(file=Path("a\udcff"), prompts=("a", "\udcff")) == (
        "file: its name is not UTF-8: give it another, found PosixPath('a\\udcff'); "
        "prompts: its name is not UTF-8: give it another, found ('a', '\\udcff')"
    )
    assert _Settings(file=Path("één"), prompts=("één",)).file == Path("één")


def test_a_key_that_is_not_utf8_has_no_name() -> None:
    assert problems(**{"k\udcff": 1}).endswith("unable to parse raw data as a unicode string, found 'k\\udcff'")


def test_what_could_steer_a_terminal_is_escaped() -> None:
    assert printable("één\x1b[2J\n\udcff\u202e") == "één\\x1b[2J\\n\\udcff\\u202e"


def test_a_pipeline_error_is_no_error_of_a_library() -> None:
    assert PipelineError.__mro__ == (PipelineError, Exception, BaseException, object)
