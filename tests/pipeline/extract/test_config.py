"""Settings of stage one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.data import DataSettings
from pipeline.errors import describe_problems
from pipeline.extract import CheckSettings, ExtractSettings


def settings(**options: Any) -> ExtractSettings:
    return ExtractSettings(**{"teacher": "org/vit", "data": {"dataset": "org/pets"}, "out": "a.h5", **options})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 100),
        ({"samples": True}, None),
        ({"per_class": "all"}, None),
        ({"per_class": 7}, 7),
        ({"per_class": 7, "samples": True}, 7),
        ({"per_class": "all", "samples": True}, None),
    ],
)
def test_images_of_each_class_are_a_hundred_or_all_with_samples(options: dict[str, Any], expected: int | None) -> None:
    assert settings(**options).images_per_class() == expected


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ValidationError) as error:
        settings(teacher="", data={"dataset": "", "limit": 0}, batch_size=0, workers=-1, seed=-1, dtype="int8", speed=1)
    assert describe_problems(error.value) == (
        "teacher: string should have at least 1 character, found ''; "
        "data.dataset: string should have at least 1 character, found ''; "
        "data.limit: input should be greater than or equal to 1, found 0; "
        "dtype: input should be 'float32' or 'float16', found 'int8'; "
        "batch_size: input should be greater than or equal to 1, found 0; "
        "workers: input should be greater than or equal to 0, found -1; "
        "seed: input should be greater than or equal to 0, found -1; "
        "speed: unknown setting"
    )


@pytest.mark.parametrize("per_class", [0, -1, "some"])
def test_per_class_is_a_number_or_all(per_class: int | str) -> None:
    with pytest.raises(ValidationError):
        settings(per_class=per_class)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        settings().seed = 1  # type: ignore[misc]


@pytest.mark.slow
def test_the_stage_is_imported_without_the_library_of_teachers() -> None:
    command = "import sys, pipeline.extract; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)


def test_views_without_samples_are_refused() -> None:
    with pytest.raises(ValidationError, match="pass --samples, or --views 1"):
        ExtractSettings(teacher="t", data=DataSettings(dataset="d"), out=Path("a.h5"), views=2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "auto"),
        ({"pooling": "mean"}, "mean"),
        ({"class_text": True}, "projected"),
        ({"class_text": True, "pooling": "projected"}, "projected"),
    ],
)
def test_with_text_embeddings_images_lie_in_their_space(options: dict[str, Any], expected: str) -> None:
    assert settings(**options).resolved_pooling() == expected


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"class_text": True, "pooling": "cls"},
            "class_text: value error, text shares a space with projected embeddings only, not with --pooling cls, "
            "found True",
        ),
        (
            {"class_text": True, "prompts": ("a photo",)},
            "prompts: value error, a template needs one {} for the class name, 'a photo' has 0, found ('a photo',)",
        ),
        (
            {"class_text": True, "prompts": ("{}", "{} and {}")},
            "prompts: value error, a template needs one {} for the class name, '{} and {}' has 2, "
            "found ('{}', '{} and {}')",
        ),
        (
            {"class_text": True, "prompts": ()},
            "prompts: tuple should have at least 1 item after validation, not 0, found ()",
        ),
        (
            {"prompts": ("the {}",)},
            "prompts: value error, prompts are of text embeddings, and none is stored: pass --class-text, "
            "found ('the {}',)",
        ),
    ],
)
def test_prompts_and_pooling_that_do_not_fit_text_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError) as error:
        settings(**options)
    assert describe_problems(error.value) == problem


def test_numbers_that_no_manifest_could_hold_are_refused() -> None:
    with pytest.raises(ValidationError) as error:
        settings(data={"dataset": "pets", "limit": 2**63}, batch_size=2**63)
    problem = f"input should be less than {2**63}, found {2**63}"
    assert describe_problems(error.value) == f"data.limit: {problem}; batch_size: {problem}"
    with pytest.raises(ValidationError, match=str(2**63)):
        settings(per_class=2**63)
    assert settings(per_class=2**63 - 1).images_per_class() == 2**63 - 1


def test_a_file_whose_name_no_record_can_hold_is_refused() -> None:
    with pytest.raises(ValidationError) as error:
        settings(out="a\udcff.h5", data={"dataset": "pets", "split": "\udcff"})
    advice = "its name is not UTF-8: give it another"
    assert describe_problems(error.value) == (
        f"data.split: {advice}, found '\\udcff'; out: {advice}, found 'a\\udcff.h5'"
    )
    with pytest.raises(ValidationError, match=advice):
        CheckSettings(artifact=Path("a\udcff.h5"), teacher="t", data=DataSettings(dataset="d"))


@pytest.mark.parametrize("rows", [(3, 3), (5, 2), (-1, 4)])
def test_rows_are_some(rows: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="rows A:B are A to B - 1, with 0 ≤ A < B"):
        ExtractSettings(teacher="t", data=DataSettings(dataset="d"), out=Path("a.h5"), rows=rows)
