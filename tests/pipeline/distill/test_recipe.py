from pathlib import Path
from typing import Any

import pytest

from pipeline.distill import recipe
from pipeline.distill.augment import Augmentation
from pipeline.distill.recipe import Recipe, load_recipe, parse_overrides, recipe_as_toml, shipped_recipes
from pipeline.errors import PipelineError

# The paper's own values, and nothing else: every other setting does nothing.
PAPER = {
    "epochs": 200,
    "batch_size": 64,
    "learning_rate": 1e-4,
    "schedule": "constant",
    "warmup": 0.0,
    "weight_decay": 0.1,
    "decay_all": True,
    "gradient_clip": 0.0,
    "average_decay": 0.0,
    "label_smoothing": 0.0,
    "attention_dropout": 0.1,
    "stochastic_depth": 0.0,
    "alpha2": 0.5,
    "logit_scale": 1.0,
    "learn_logit_scale": False,
    "centre": False,
    "cosine_weight": 0.0,
    "soft_label_weight": 0.0,
    "soft_label_temperature": 0.1,
    "direction_weight": 0.0,
    "text_weight": 0.0,
    "replay_views": False,
    "augmentation": {
        "horizontal_flip": 0.5,
        "random_crop_px": 0,
        "resized_crop_min_area": 1.0,
        "operations": 0,
        "random_erasing": 0.0,
        "mixup_alpha": 0.0,
        "cutmix_alpha": 0.0,
        "mix_probability": 1.0,
    },
}


def refusal(name: str, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(PipelineError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


def parse_refusal(*texts: str) -> str:
    with pytest.raises(PipelineError) as caught:
        parse_overrides(texts)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


# Recipes that ship


def test_recipe_paper_is_what_the_paper_did() -> None:
    assert load_recipe("paper").model_dump() == PAPER


def test_recipe_strong_has_the_papers_epochs_and_more_of_everything_else() -> None:
    paper, strong = load_recipe("paper"), load_recipe("strong")
    assert strong.epochs == paper.epochs
    assert strong.schedule == "cosine"
    assert strong.average_decay > 0
    assert strong.cosine_weight == 0
    assert strong.soft_label_weight > 0
    assert strong.replay_views


def test_recipe_short_is_strong_without_what_wants_many_epochs() -> None:
    short, strong = load_recipe("short"), load_recipe("strong")
    left_out = {"epochs", "average_decay", "label_smoothing", "stochastic_depth", "replay_views", "augmentation"}
    assert short.model_dump(exclude=left_out) == strong.model_dump(exclude=left_out)
    assert short.epochs < strong.epochs
    assert (short.average_decay, short.label_smoothing, short.stochastic_depth) == (0, 0, 0)
    assert (short.augmentation.operations, short.augmentation.mixup_alpha, short.augmentation.cutmix_alpha) == (0, 0, 0)


def test_the_shipped_recipes_are_listed() -> None:
    assert shipped_recipes() == ["paper", "short", "strong"]


@pytest.mark.parametrize("name", ["paper", "short", "strong"])
def test_a_shipped_recipe_names_every_setting_that_is_not_of_augmentation(name: str) -> None:
    assert load_recipe(name).model_fields_set == set(Recipe.model_fields)


# Which file is read


def test_an_unknown_recipe_names_those_that_ship() -> None:
    assert refusal("fast") == "recipe 'fast' does not exist. Choose paper, short, strong, or the path of a .toml file."


def test_a_missing_recipe_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    assert (
        refusal(str(path))
        == f"recipe '{path}' does not exist. Choose paper, short, strong, or the path of a .toml file."
    )
    path.mkdir()
    assert refusal(str(path)).startswith(f"recipe '{path}' does not exist.")


def test_a_name_leads_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    advice = "does not exist. Choose paper, short, strong, or the path of a .toml file."
    for name in ("../recipes/paper", "./paper", str(Path(recipe.__file__).parent / "recipes" / "paper"), "", "."):
        assert refusal(name) == f"recipe {name!r} {advice}"
    assert refusal("a" * 5000) == f"recipe '{'a' * 298}… {advice}"
    long = refusal("a" * 5000 + ".toml")
    assert long.startswith(f"recipe {'a' * 299}…: cannot be read (")
    assert "File name too long" in long


def test_a_recipe_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    name = write(tmp_path / "mine.toml", "epochs: 3")
    assert refusal(name).startswith(f"recipe {name}: cannot be read (Expected '=' after a key")
    Path(name).write_bytes(b"epochs = \xff")
    assert refusal(name).startswith(f"recipe {name}: cannot be read ('utf-8' codec can't decode byte 0xff")
    write(Path(name), "epochs = " + "[" * 100_000)
    assert refusal(name).startswith(f"recipe {name}: cannot be read (")


def test_a_file_can_say_everything_itself(tmp_path: Path) -> None:
    whole = recipe_as_toml(load_recipe("strong", {"epochs": 3}))
    assert load_recipe(write(tmp_path / "mine.toml", whole)) == load_recipe("strong", {"epochs": 3})


def test_a_file_says_only_what_differs_from_its_base(tmp_path: Path) -> None:
    text = 'base = "strong"\nepochs = 3\n[augmentation]\noperations = 2\n'
    found = load_recipe(write(tmp_path / "mine.toml", text))
    strong = load_recipe("strong")
    augmentation = strong.augmentation.model_copy(update={"operations": 2})
    assert found == strong.model_copy(update={"epochs": 3, "augmentation": augmentation})
    assert found.augmentation.mixup_alpha == strong.augmentation.mixup_alpha > 0


@pytest.mark.parametrize("base", ['"mine.toml"', '"fast"', "5", "[]", "{}"])
def test_a_base_is_a_recipe_that_ships(base: str, tmp_path: Path) -> None:
    name = write(tmp_path / "mine.toml", f"base = {base}\nepochs = 3\n")
    message = refusal(name)
    assert message.startswith(f"recipe {name}: base: expected one of paper, short, strong, found ")


def test_a_wrong_base_does_not_hide_what_else_is_wrong(tmp_path: Path) -> None:
    name = write(tmp_path / "mine.toml", 'base = "fast"\nepochs = 0\nspeed = 3\n')
    assert refusal(name) == (
        f"recipe {name}: base: expected one of paper, short, strong, found 'fast'; "
        "epochs: input should be greater than or equal to 1, found 0; speed: unknown setting"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", True), ("epochs", "3"), ("epochs", 3.0), ("alpha2", True), ("centre", 1), ("schedule", 1)],
)
def test_a_value_of_another_type_is_refused(key: str, value: object) -> None:
    message = refusal("paper", {key: value})
    assert message.startswith(f"recipe paper: {key}: ")
    assert message.endswith(f", found {value!r}")


def test_a_whole_number_stands_for_a_fraction() -> None:
    assert load_recipe("paper", {"alpha2": 1}).alpha2 == 1.0


HUGE = "0x" + "f" * 5000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            'base = "paper"\nepochs = 9223372036854775808',
            "epochs: input should be less than 9223372036854775808, found 9",
        ),
        (
            f'base = "paper"\nbatch_size = {HUGE}',
            "batch_size: input should be less than 9223372036854775808, found something too large to show (int)",
        ),
        (
            f'base = "paper"\nepochs{".a" * 5000} = 1',
            "epochs: input should be a valid integer, found ",  # how deep Python writes hangs on its version
        ),
        (f"base = [{HUGE}]", "base: expected one of paper, short, strong, found something too large to show (list)"),
    ],
    ids=["just-too-large", "number", "table", "base"],
)
def test_a_value_without_measure_is_one_line(text: str, problem: str, tmp_path: Path) -> None:
    name = write(tmp_path / "mine.toml", text)
    assert refusal(name).startswith(f"recipe {name}: {problem}")


def test_of_thousands_of_unknown_settings_some_are_named(tmp_path: Path) -> None:
    name = write(tmp_path / "mine.toml", 'base = "paper"\n' + "".join(f"k{index} = 1\n" for index in range(20_000)))
    assert refusal(name).endswith("; k39: unknown setting; and 19,960 more")


def test_without_a_base_everything_that_is_missing_is_named(tmp_path: Path) -> None:
    name = write(tmp_path / "mine.toml", "epochs = 3\n")
    message = refusal(name)
    assert message.startswith(f"recipe {name}: batch_size: missing; learning_rate: missing; ")
    assert message.count(": missing") == len(Recipe.model_fields) - 1


# What it may say


def test_everything_wrong_with_a_recipe_is_said_at_once(tmp_path: Path) -> None:
    text = (
        'base = "paper"\nepochs = 0\nlearning_rate = "fast"\nschedule = "step"\nalpha2 = 1.5\nspeed = 9\n'
        "[augmentation]\nhorizontal_flip = 2\nzoom = 1\n[optimizer]\nname = 1\n"
    )
    name = write(tmp_path / "mine.toml", text)
    assert refusal(name, {"attention_dropout": 1.0}) == (
        f"recipe {name}: epochs: input should be greater than or equal to 1, found 0; "
        "learning_rate: input should be a valid number, found 'fast'; "
        "schedule: input should be 'constant' or 'cosine', found 'step'; "
        "attention_dropout: input should be less than 1, found 1.0; "
        "alpha2: input should be less than or equal to 1, found 1.5; "
        "augmentation.horizontal_flip: input should be less than or equal to 1, found 2; "
        "augmentation.zoom: unknown setting; "
        "speed: unknown setting; "
        "optimizer: unknown setting"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("batch_size", 1),
        ("batch_size", 2.5),
        ("learning_rate", float("inf")),
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("warmup", -1),
        ("warmup", 1),
        ("weight_decay", -0.1),
        ("weight_decay", float("inf")),
        ("gradient_clip", -1),
        ("average_decay", 1.0),
        ("average_decay", float("nan")),
        ("label_smoothing", 1.0),
        ("attention_dropout", 1.0),
        ("stochastic_depth", 1.0),
        ("alpha2", 1.01),
        ("alpha2", float("nan")),
        ("logit_scale", 0.0),
        ("logit_scale", 101),
        ("logit_scale", float("inf")),
        ("learn_logit_scale", 2),
        ("centre", "perhaps"),
        ("cosine_weight", -1.0),
        ("soft_label_weight", float("inf")),
        ("soft_label_temperature", 0),
        ("direction_weight", -1),
        ("text_weight", float("nan")),
        ("augmentation.horizontal_flip", 1.1),
        ("augmentation.mixup_alpha", -1),
        ("augmentation.resized_crop_min_area", 0),
    ],
)
def test_a_value_out_of_range_is_refused(key: str, value: object) -> None:
    message = refusal("paper", {key: value})
    assert message.startswith(f"recipe paper: {key}: ")
    assert ";" not in message


# Single settings laid over it


def test_settings_are_laid_over_a_recipe() -> None:
    found = load_recipe("paper", {"epochs": 7, "augmentation.random_crop_px": 4, "augmentation.mixup_alpha": 0.8})
    assert found.model_dump() == PAPER | {
        "epochs": 7,
        "augmentation": Augmentation(horizontal_flip=0.5, random_crop_px=4, mixup_alpha=0.8).model_dump(),
    }


def test_settings_are_laid_over_a_recipe_with_a_base_too(tmp_path: Path) -> None:
    name = write(tmp_path / "mine.toml", 'base = "paper"\nepochs = 3\nbatch_size = 16\n')
    found = load_recipe(name, {"epochs": 5})
    assert (found.epochs, found.batch_size, found.learning_rate) == (5, 16, 1e-4)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("augmentation", 5, "augmentation: input should be a valid dictionary or instance of Augmentation, found 5"),
        ("epochs.first", 5, "epochs: input should be a valid integer, found {'first': 5}"),
        ("augmentation.horizontal_flip.left", 1, "augmentation.horizontal_flip: input should be a valid number, found"),
        ("augmentation.zoom", 5, "augmentation.zoom: unknown setting"),
        ("horizontal_flip", 0.5, "horizontal_flip: unknown setting"),
        ("base", "strong", "base: unknown setting"),
        ("a..b", 1, "a: unknown setting"),
        ("epochs" + ".a" * 3000, 1, "epochs: input should be a valid integer, found {'a': "),
    ],
)
def test_a_table_is_no_setting_and_a_setting_no_table(key: str, value: object, problem: str) -> None:
    assert refusal("paper", {key: value}).startswith(f"recipe paper: {problem}")


def test_settings_as_deep_as_they_come_are_laid_over_each_other() -> None:
    deep = "augmentation" + ".a" * 3000
    assert refusal("paper", {f"{deep}.b": 1, f"{deep}.c": 2}) == "recipe paper: augmentation.a: unknown setting"


def test_typed_settings_are_read_as_toml_writes_them() -> None:
    texts = ("epochs=3", "learning_rate = 1e-3", "centre=true", 'schedule="cosine"', "augmentation.operations=2")
    assert parse_overrides(texts) == {
        "epochs": 3,
        "learning_rate": 1e-3,
        "centre": True,
        "schedule": "cosine",
        "augmentation.operations": 2,
    }
    assert parse_overrides([]) == {}


def test_what_toml_does_not_know_is_a_word() -> None:
    assert parse_overrides(["schedule=cosine", "x=a = b", "y=True"]) == {
        "schedule": "cosine",
        "x": "a = b",
        "y": "True",
    }
    assert load_recipe("paper", parse_overrides(["schedule=cosine"])).schedule == "cosine"


def test_a_value_of_several_lines_is_no_value() -> None:
    assert parse_overrides(["epochs=3\nbatch_size = 9"]) == {"epochs": "3\nbatch_size = 9"}


@pytest.mark.parametrize("text", ["epochs", "epochs=", "=3", " = ", ""])
def test_a_typed_setting_has_a_key_and_a_value(text: str) -> None:
    assert parse_refusal(text) == f"--set {text!r}: expected KEY=VALUE, such as label_smoothing=0.1."


def test_a_setting_is_typed_once() -> None:
    assert parse_refusal("epochs=3", "alpha2=0", "epochs=4") == "--set epochs: is given twice."


def test_everything_wrong_with_typed_settings_is_named() -> None:
    assert parse_refusal("epochs=3", "alpha2", "epochs=4") == (
        "--set 'alpha2': expected KEY=VALUE, such as label_smoothing=0.1; --set epochs: is given twice."
    )


# Written down


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("paper", {}),
        ("strong", {}),
        ("strong", {"learning_rate": 1.25e-05, "soft_label_temperature": 1 / 3, "weight_decay": 1e16}),
        ("paper", {"augmentation.resized_crop_min_area": 0.1 + 0.2, "learn_logit_scale": True}),
    ],
)
def test_what_is_shown_reads_back_as_the_same_recipe(name: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(name, overrides)
    shown = recipe_as_toml(recipe)
    assert load_recipe(write(tmp_path / "shown.toml", shown)) == recipe
    assert recipe_as_toml(load_recipe(str(tmp_path / "shown.toml"))) == shown


def test_every_setting_is_shown_with_what_it_means() -> None:
    lines = recipe_as_toml(load_recipe("paper", {"augmentation.resized_crop_min_area": 1 / 3})).splitlines()
    assert lines[0] == "epochs = 200                    # passes over the images"
    assert 'schedule = "constant"           # of the learning rate, after the warm-up' in lines
    place = lines.index("[augmentation]")
    assert lines[place - 1] == ""
    settings = [line for line in lines if " = " in line]
    assert all(" # " in line for line in settings)
    assert len(settings) == len(Recipe.model_fields) - 1 + len(Augmentation.model_fields)
