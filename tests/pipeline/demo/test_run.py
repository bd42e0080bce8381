import logging
import shlex
from pathlib import Path

import pytest

import cli
from pipeline.commands.distill import take_overrides
from pipeline.commands.options import take_data_settings
from pipeline.data import DataSettings
from pipeline.demo import run as module
from pipeline.demo.run import TEACHER, command_line, distill_settings, extract_settings, run_demo
from pipeline.distill import DistillSettings
from pipeline.distill.augment import Augmentation
from pipeline.distill.recipe import load_recipe
from pipeline.errors import PipelineError
from pipeline.extract import ExtractSettings


def parsed(line: str) -> tuple[str, dict[str, object]]:
    """Parse a printed command as the command line does."""
    program, name, *words = shlex.split(line)
    assert program == "clip-embed-kd"
    parent = cli.cli.make_context(program, [name])
    options = dict(cli.cli.commands[name].make_context(name, words, parent=parent).params)
    del options["as_json"]
    if name == "extract":
        assert options.pop("check") is None
        del options["fraction"]
    return name, options


def test_a_printed_command_says_exactly_what_is_run(tmp_path: Path) -> None:
    _, options = parsed(command_line("extract", extract_settings(tmp_path)))
    assert ExtractSettings(data=take_data_settings(options), **options) == extract_settings(tmp_path)
    for alpha2, seed in ((0.0, 0), (0.5, 2)):
        expected = distill_settings(tmp_path, alpha2, seed)
        _, options = parsed(command_line("distill", expected))
        overrides = take_overrides(options)
        assert DistillSettings(data=take_data_settings(options), overrides=overrides, **options) == expected


def test_a_printed_command_survives_odd_names(tmp_path: Path) -> None:
    data = DataSettings(dataset="it's", config="c", revision="r", label_column="fine label", limit=3)
    settings = ExtractSettings(teacher="a b", data=data, out=tmp_path / "x.h5", per_class=5, skip_bad=True)
    _, options = parsed(command_line("extract", settings))
    assert ExtractSettings(data=take_data_settings(options), **options) == settings


def test_the_shipped_teacher_and_recipe_are_what_the_documentation_says() -> None:
    assert (TEACHER / "model.safetensors").stat().st_size <= 2_000_000
    recipe = load_recipe(str(module.RECIPE))
    assert (recipe.alpha2, recipe.logit_scale, recipe.augmentation) == (0.5, 1.0, Augmentation())
    assert recipe.epochs == 40


def test_the_demonstration_runs_both_stages_and_reports_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tmp_path / "quick.toml"
    recipe.write_text(module.RECIPE.read_text().replace("epochs = 40", "epochs = 1"))
    monkeypatch.setattr(module, "RECIPE", recipe)
    monkeypatch.setattr(module, "SEEDS", (0, 1))
    caplog.set_level(logging.INFO)
    result = run_demo(tmp_path / "demo")
    commands = [record.getMessage() for record in caplog.records if "$ clip-embed-kd" in record.getMessage()]
    assert len(commands) == 5
    assert [len(runs) for runs in result.runs.values()] == [2, 2]
    document = result.as_json()
    assert document["top1"]["0.5"] == [run.top1 for run in result.runs[0.5]]
    assert document["artifact_bytes"] == (tmp_path / "demo" / "digits.safetensors").stat().st_size
    labels = [label for label, _ in result.rows()]
    assert labels == ["artifact", "α₂ = 0", "α₂ = 0.5", "difference", "time", "memory"]
    run_demo(tmp_path / "demo")  # an older demonstration is replaced


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(PipelineError) as refused:
        run_demo(tmp_path)
    assert str(refused.value) == f"{tmp_path}: holds something else than a demonstration. Choose another --out."
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as refused:
        run_demo(tmp_path / "none" / "demo")
    assert str(refused.value) == f"{tmp_path / 'none' / 'demo'}: cannot be made (No such file or directory)."
