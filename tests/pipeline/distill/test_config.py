from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.data import DataSettings
from pipeline.distill.config import DistillSettings, Recipe, load_recipe
from pipeline.errors import PipelineError, describe_problems

PAPER = {
    "epochs": 200,
    "batch_size": 64,
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
    "alpha2": 0.5,
    "logit_scale": 1.0,
    "cosine_weight": 0.0,
    "horizontal_flip": 0.5,
    "attention_dropout": 0.1,
}


def refusal(name: str) -> str:
    with pytest.raises(PipelineError) as caught:
        load_recipe(name)
    return str(caught.value)


def settings(**fields: object) -> DistillSettings:
    required = {"artifact": Path("a.safetensors"), "data": DataSettings(dataset="d"), "out": Path("run")}
    return DistillSettings.model_validate(required | fields)


def write_recipe(path: Path, **changed: object) -> str:
    values = {**PAPER, **changed}
    path.write_text("\n".join(f"{name} = {value!r}" for name, value in values.items()), "utf-8")
    return str(path)


def test_recipe_paper_is_what_the_paper_did() -> None:
    assert load_recipe("paper").model_dump() == PAPER


def test_defaults_are_the_papers_base_student_on_32_pixels() -> None:
    chosen = settings()
    assert (chosen.student, chosen.image_size, chosen.recipe, chosen.target) == ("base", 32, "paper", "class")
    assert chosen.resolved_recipe() == load_recipe("paper")
    assert chosen.max_missing == 0


def test_an_unknown_recipe_names_those_that_ship() -> None:
    assert refusal("fast") == "recipe 'fast' does not exist. Choose paper, or the path of a .toml file."


def test_a_missing_recipe_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    assert refusal(str(path)) == f"recipe '{path}' does not exist. Choose paper, or the path of a .toml file."
    path.mkdir()
    assert refusal(str(path)).startswith(f"recipe '{path}' does not exist.")


def test_a_recipe_can_be_a_file(tmp_path: Path) -> None:
    name = write_recipe(tmp_path / "mine.toml", epochs=3, cosine_weight=0.25)
    assert load_recipe(name) == Recipe.model_validate({**PAPER, "epochs": 3, "cosine_weight": 0.25})


def test_everything_wrong_with_a_recipe_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    write_recipe(path, epochs=0, learning_rate="fast", alpha2=1.5, speed=9, attention_dropout=1.0)
    path.write_text(path.read_text("utf-8").replace("weight_decay = 0.1\n", ""), "utf-8")
    assert refusal(str(path)) == (
        f"recipe {path}: epochs: input should be greater than or equal to 1, found 0; "
        "learning_rate: input should be a valid number, unable to parse string as a number, found 'fast'; "
        "weight_decay: missing; "
        "alpha2: input should be less than or equal to 1, found 1.5; "
        "attention_dropout: input should be less than 1, found 1.0; "
        "speed: unknown setting"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", "inf"),
        ("learning_rate", "nan"),
        ("learning_rate", "0.0"),
        ("weight_decay", "-0.1"),
        ("logit_scale", "0.0"),
        ("logit_scale", "inf"),
        ("cosine_weight", "-1.0"),
        ("horizontal_flip", "1.1"),
        ("batch_size", "0"),
        ("batch_size", "1"),
        ("batch_size", "2.5"),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(f"{name} = {value if name == field else right!r}" for name, right in PAPER.items()))
    message = refusal(str(path))
    assert message.startswith(f"recipe {path}: {field}: ")
    assert ";" not in message


def test_a_recipe_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("epochs: 3")
    assert refusal(str(path)).startswith(f"recipe {path}: cannot be read (Expected '=' after a key")
    path.write_bytes(b"epochs = \xff")
    assert refusal(str(path)).startswith(f"recipe {path}: cannot be read ('utf-8' codec can't decode byte 0xff")


def test_own_settings_go_over_the_recipe() -> None:
    chosen = settings(alpha2=0.0, epochs=7, batch_size=16, learning_rate=0.01).resolved_recipe()
    assert chosen.model_dump() == {**PAPER, "alpha2": 0.0, "epochs": 7, "batch_size": 16, "learning_rate": 0.01}


def test_everything_wrong_with_the_settings_is_said_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        settings(target="teacher", alpha2=-1, epochs=0, image_size=0, max_missing=2, seed=-1, teacher="vit")
    problems = describe_problems(caught.value)
    for field in ("target", "alpha2", "epochs", "image_size", "max_missing", "seed"):
        assert f"{field}: input should be " in problems
    assert "teacher: unknown setting" in problems


@pytest.mark.parametrize(("field", "value"), [("batch_size", 1), ("seed", 2**63), ("seed", 2**80)])
def test_a_setting_that_could_not_be_trained_with_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(**{field: value})
    assert describe_problems(caught.value).startswith(f"{field}: input should be ")


def test_any_seed_of_32_bits_is_taken() -> None:
    assert settings(seed=2**32 - 1).seed == 2**32 - 1
