from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.data import DataSettings
from pipeline.distill.config import DistillSettings, EvaluateSettings
from pipeline.distill.recipe import load_recipe
from pipeline.errors import PipelineError, describe_problems


def settings(**fields: object) -> DistillSettings:
    required = {"artifact": Path("a.safetensors"), "data": DataSettings(dataset="d"), "out": Path("run")}
    return DistillSettings.model_validate(required | fields)


def refusal(**fields: object) -> str:
    with pytest.raises(PipelineError) as caught:
        settings(**fields).resolved_recipe()
    return str(caught.value)


def test_defaults_are_the_papers_base_student_on_32_pixels() -> None:
    chosen = settings()
    assert (chosen.student, chosen.image_size, chosen.recipe, chosen.target) == ("base", 32, "paper", "class")
    assert (chosen.init, chosen.precision, chosen.device) == ("scratch", "auto", "auto")
    assert chosen.resolved_recipe() == load_recipe("paper")
    assert chosen.max_missing == 0


def test_own_settings_go_over_the_recipe() -> None:
    overrides = {"alpha2": 0.0, "epochs": 7, "batch_size": 16, "learning_rate": 0.01}
    assert settings(overrides=overrides).resolved_recipe() == load_recipe("paper").model_copy(update=overrides)


@pytest.mark.parametrize("target", ["sample", "both"])
def test_sample_targets_keep_the_losses_of_samples(target: str) -> None:
    assert settings(recipe="strong", target=target).resolved_recipe() == load_recipe("strong")


def test_class_targets_leave_out_what_needs_samples_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    found = settings(recipe="strong", target="class").resolved_recipe()
    assert caplog.messages == [
        "Left out of the recipe, since they need --target sample or both: soft_label_weight, replay_views."
    ]
    assert settings(recipe="paper", target="class").resolved_recipe() == load_recipe("paper")
    assert len(caplog.messages) == 1
    without = {"cosine_weight": 0.0, "soft_label_weight": 0.0, "replay_views": False}
    assert found == load_recipe("strong").model_copy(update=without)


def test_losses_of_samples_that_are_asked_for_are_refused_beside_class_targets() -> None:
    asked = {"cosine_weight": 0.5, "soft_label_weight": 1, "direction_weight": 1}
    assert refusal(overrides=asked) == (
        "cosine_weight, soft_label_weight: needs sample embeddings. Pass --target sample or both."
    )
    assert refusal(overrides={"cosine_weight": 0.5}) == (
        "cosine_weight: needs sample embeddings. Pass --target sample or both."
    )
    assert settings(overrides={"cosine_weight": 0}, target="class").resolved_recipe().cosine_weight == 0
    assert settings(overrides=asked, target="both").resolved_recipe().cosine_weight == 0.5


def test_what_is_wrong_with_the_recipe_is_said_first() -> None:
    assert refusal(overrides={"cosine_weight": -1}) == (
        "recipe paper: cosine_weight: input should be greater than or equal to 0, found -1"
    )
    assert refusal(recipe="fast").startswith("recipe 'fast' does not exist.")


def test_everything_wrong_with_the_settings_is_said_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        settings(target="teacher", image_size=0, max_missing=2, seed=-1, teacher="vit", max_steps=0, micro_batch=1)
    problems = describe_problems(caught.value)
    for field in ("target", "image_size", "max_missing", "seed", "max_steps", "micro_batch"):
        assert f"{field}: input should be " in problems
    assert "teacher: unknown setting" in problems


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 2**32),
        ("seed", 2**80),
        ("checkpoint_minutes", 0),
        ("checkpoint_minutes", float("inf")),
        ("checkpoint_minutes", float("nan")),
        ("max_missing", float("nan")),
        ("eval_split", ""),
    ],
)
def test_a_setting_that_could_not_be_trained_with_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(**{field: value})
    kind = "string" if isinstance(value, str) else "input"
    assert describe_problems(caught.value).startswith(f"{field}: {kind} should ")


def test_a_file_whose_name_no_record_can_hold_is_refused() -> None:
    with pytest.raises(ValidationError) as caught:
        settings(artifact=Path("s\udcff.h5"), out=Path("rs\udcff2"), recipe="r\udcff.toml", cache=Path("c\udcff"))
    advice = "its name is not UTF-8: give it another"
    assert describe_problems(caught.value) == (
        f"artifact: {advice}, found PosixPath('s\\udcff.h5'); out: {advice}, found PosixPath('rs\\udcff2'); "
        f"recipe: {advice}, found 'r\\udcff.toml'; cache: {advice}, found PosixPath('c\\udcff')"
    )
    with pytest.raises(ValidationError, match=advice):
        EvaluateSettings(student=Path("rs\udcff2"), data=DataSettings(dataset="d"))


def test_any_seed_of_32_bits_is_taken() -> None:
    assert settings(seed=2**32 - 1).seed == 2**32 - 1
