import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from PIL import Image

import cli
from pipeline.commands.options import Finite
from tests.conftest import make_split

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(cli.__file__).parent


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command in this process; returns its exit status and what it printed."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clip-embed-kd", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return int(stopped.value.code or 0), printed.out, printed.err

    yield run_command
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def artifact(tiny_teacher: Path, saved_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipeline.data import DataSettings
    from pipeline.extract import ExtractSettings, extract

    out = tmp_path_factory.mktemp("artifact") / "tiny.safetensors"
    data = DataSettings(dataset=str(saved_data))
    return extract(ExtractSettings(teacher=str(tiny_teacher), data=data, out=out, samples=True)).path


def commands(
    group: click.Group = cli.cli, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


@pytest.mark.parametrize(
    ("name", "command"), list(commands()), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_command_shows_help_with_an_example_and_its_version(
    name: tuple[str, ...], command: click.Command, run: Run
) -> None:
    code, out, _ = run(*name, "--help")
    assert code == 0
    assert f"Example: clip-embed-kd {' '.join(name)}" in " ".join(out.split())
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help
            assert not parameter.help[0].isupper()
    assert run(*name, "--version")[1].startswith("clip-embed-kd ")


def test_help_loads_no_heavy_library() -> None:
    check = (
        "import cli, sys; print([m for m in ('torch', 'numpy', 'datasets', 'pydantic', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_both_stages_run_from_the_command_line(tiny_teacher: Path, saved_data: Path, tmp_path: Path, run: Run) -> None:
    artifact, student = tmp_path / "tiny.h5", tmp_path / "run"
    code, out, _ = run("extract", "--teacher", tiny_teacher, "--dataset", saved_data, "--out", artifact)
    assert code == 0
    assert "3 classes × 24 values" in out
    code, out, _ = run("store", "inspect", artifact)
    assert code == 0
    assert "tiny-vit, ViTModel" in out
    assert "not verified" in out
    command = ("distill", "--artifact", artifact, "--dataset", saved_data, "--out", student, "--student", "test_vit")
    code, out, _ = run(*command, "--image-size", 32, "--epochs", 1, "--batch-size", 8)
    assert code == 0
    assert "accuracy  top-1 " in out
    assert "images/s" in out
    assert "memory" in out
    assert str(student / "report.html") in out
    code, out, _ = run("evaluate", "--student", student, "--dataset", saved_data, "--json")
    assert code == 0
    assert set(json.loads(out)) == {"top1", "top5", "num_images", "images_per_second", "seconds", "per_class"}
    Image.new("L", (40, 30)).save(tmp_path / "grey.png")
    code, out, _ = run("predict", "--student", student, tmp_path / "grey.png")
    assert code == 0
    assert out.startswith(str(tmp_path / "grey.png"))
    code, out, _ = run("predict", "--student", student, tmp_path / "grey.png", "--json")
    assert abs(sum(best["probability"] for best in json.loads(out)[str(tmp_path / "grey.png")]) - 1) < 1e-5


def test_json_of_extract_and_distill_is_all_that_stands_on_stdout(
    tiny_teacher: Path, saved_data: Path, tmp_path: Path, run: Run
) -> None:
    artifact = tmp_path / "tiny.safetensors"
    _, out, _ = run("extract", "--teacher", tiny_teacher, "--dataset", saved_data, "--out", artifact, "--json")
    assert json.loads(out)["num_images"] == 30
    command = ("distill", "--artifact", artifact, "--dataset", saved_data, "--out", tmp_path / "run", "--json")
    _, out, _ = run(*command, "--student", "test_resnet", "--max-steps", 1)
    assert json.loads(out)["num_steps"] == 1
    assert json.loads(out)["report"] == str(tmp_path / "run" / "report.html")
    _, out, _ = run("store", "inspect", artifact, "--json")
    assert json.loads(out)["manifest"]["teacher"]["embed_dim"] == 24


def test_a_run_takes_settings_of_its_recipe_and_is_gone_on_with(
    artifact: Path, saved_data: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "run"
    command: list[object] = ["distill", "--artifact", artifact, "--dataset", saved_data, "--out", out, "--json"]
    command += ["--student", "test_vit", "--image-size", 16, "--target", "both", "--recipe", "strong", "--resume"]
    command += ["--set", "augmentation.operations=0", "--set", "schedule=constant", "--set", "stochastic_depth=0"]
    command += ["--alpha2", 0.25, "--epochs", 2, "--batch-size", 8, "--lr", 0.01]
    code, out_text, err = run(*command, "--max-steps", 3)
    assert code == 0
    assert json.loads(out_text)["num_steps"] == 3
    recipe = json.loads((out / "run.json").read_text())["recipe"]
    assert (recipe["alpha2"], recipe["epochs"], recipe["batch_size"], recipe["learning_rate"]) == (0.25, 2, 8, 0.01)
    assert (recipe["schedule"], recipe["stochastic_depth"], recipe["augmentation"]["operations"]) == ("constant", 0, 0)
    assert recipe["augmentation"]["mixup_alpha"] == 0.8
    code, out_text, err = run(*command)
    assert code == 0
    assert "Going on after step 3, in epoch 1." in err
    assert json.loads(out_text)["num_steps"] == 8
    code, _, err = run(*command, "--seed", 7)
    assert code == 1
    assert err.splitlines()[-1] == (
        f"Error: {out}: is a run of other settings: settings.seed was 0, is 7. Pass the same, or another --out."
    )


def test_recipes_are_listed_and_shown_as_files_that_can_be_trained_with(tmp_path: Path, run: Run) -> None:
    from pipeline.distill.recipe import load_recipe

    names = ["paper", "short", "strong"]
    code, out, _ = run("recipe", "list")
    assert (code, out) == (0, "".join(f"{name:6}  clip-embed-kd recipe show {name}\n" for name in names))
    assert json.loads(run("recipe", "list", "--json")[1]) == {"recipes": names}
    for name in names:
        path = tmp_path / f"{name}.toml"
        path.write_text(run("recipe", "show", name)[1], "utf-8")
        assert load_recipe(str(path)) == load_recipe(name)
        assert run("recipe", "show", path)[1] == path.read_text("utf-8")
        assert json.loads(run("recipe", "show", name, "--json")[1]) == load_recipe(name).model_dump()
    changed = run("recipe", "show", "strong", "--lr", 0.5, "--set", "augmentation.operations=3")[1]
    (tmp_path / "changed.toml").write_text(changed, "utf-8")
    expected = load_recipe("strong", {"learning_rate": 0.5, "augmentation.operations": 3})
    assert load_recipe(str(tmp_path / "changed.toml")) == expected


def test_an_artifact_is_checked_from_the_command_line(
    tiny_teacher: Path, saved_data: Path, artifact: Path, run: Run
) -> None:
    command = ("extract", "--teacher", tiny_teacher, "--dataset", saved_data, "--check", artifact)
    code, out, _ = run(*command)
    assert code == 0
    assert "compared        1 of 30 samples, in " in out
    assert out.splitlines()[-1] == "result          matches: 1 of 30 samples"
    code, out, _ = run(*command, "--fraction", 0.5, "--batch-size", 4, "--workers", 0, "--split", "train", "--json")
    assert code == 0
    assert json.loads(out)["num_compared"] == 15
    code, out, err = run(*command, "--split", "test")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("Error: tiny.safetensors: none of its samples is among 12 images of ")


def test_an_artifact_that_differs_is_one_line_beside_the_report(
    tiny_teacher: Path, saved_data: Path, artifact: Path, tmp_path: Path, run: Run
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher, other)
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [-1.0, 0.5, 0.5]}))
    command = ("extract", "--teacher", other, "--dataset", saved_data, "--check", artifact)
    for options in ((), ("--json",)):
        code, out, err = run(*command, *options)
        assert code == 1
        assert err.splitlines()[-1] == (
            "Error: tiny.safetensors: 1 of 1 samples differ from the file's. "
            "Likely cause: other preprocessing (image_mean)."
        )
        assert json.loads(out)["matches"] is False if options else out.splitlines()[-1] == "result          FAILED"


def bad_inputs(teacher: Path, data: Path, artifact: Path, folder: Path) -> dict[str, tuple[list[object], int, str]]:
    out = folder / "out" / "x.safetensors"
    extract: list[object] = ["extract", "--teacher", teacher, "--dataset", data, "--out", out]
    run = folder / "out" / "run"
    distill: list[object] = ["distill", "--artifact", artifact, "--dataset", data, "--out", run, "--max-steps", 1]
    check: list[object] = ["extract", "--teacher", teacher, "--dataset", data, "--check", artifact]
    manifest = "the artifact's manifest says how it was made."
    two_labels, floats, empty = folder / "two", folder / "floats", folder / "empty"
    return {
        "no teacher": ([*extract, "--teacher", "./nowhere"], 1, "./nowhere: no such teacher folder. Check --teacher."),
        "a folder without a teacher": ([*extract, "--teacher", folder], 1, f"{folder}: the teacher cannot be loaded ("),
        "no data set": ([*extract, "--dataset", "./no"], 1, "./no: no such data set folder. Check --dataset."),
        "no split": ([*extract, "--split", "dev"], 1, f"{data}: no split 'dev'. It has 'train', 'test'."),
        "text beside what is not projected": (
            [*extract, "--class-text", "--pooling", "mean"],
            2,
            "class_text: value error, text shares a space with projected embeddings only, not with --pooling mean",
        ),
        "prompts for no text": (
            [*extract, "--prompt", "the {}"],
            2,
            "prompts: value error, prompts are of text embeddings, and none is stored: pass --class-text",
        ),
        "text of a teacher without a text tower": (
            [*extract, "--class-text", "--prompt", "the {}", "--prompt", "{}"],
            1,
            f"{teacher}: ViTModel has no projection into a space that it shares with a text tower, which --class-text",
        ),
        "no column": (
            [*extract, "--label-column", "kind"],
            1,
            f"{data}: no column 'kind'. Candidates for --label-column: label.",
        ),
        "two label columns": (
            [*extract, "--dataset", two_labels],
            1,
            f"{two_labels}: 2 columns could be the label column (fine, coarse). Pass --label-column.",
        ),
        "labels that are no classes": (
            [*extract, "--dataset", floats, "--label-column", "score"],
            1,
            f"{floats}: column 'score' is Value('float32'), expected classes (class labels, integers or names). "
            "Candidates for --label-column: label.",
        ),
        "a class without images": (
            [*extract, "--dataset", empty],
            1,
            "1 of 4 classes have no image (dog). Every class needs at least one: choose another split, "
            "raise --limit, or remove the class from the data set.",
        ),
        "another suffix": (
            [*extract, "--out", folder / "x.pt"],
            1,
            f"{folder / 'x.pt'}: an artifact's name ends in .safetensors, .h5, .hdf5, found '.pt'.",
        ),
        "no folder": (
            [*extract, "--out", folder / "none" / "x.h5"],
            1,
            f"{folder / 'none' / 'x.h5'}: the folder {folder / 'none'} does not exist. Make it first.",
        ),
        "an artifact in the way": (
            [*extract, "--out", artifact],
            1,
            f"{artifact}: exists. Choose another --out, or pass --overwrite.",
        ),
        "neither an artifact to write nor one to check": (extract[:-2], 2, "Missing option '--out', or '--check'."),
        "rows that are none": (
            [*extract, "--rows", "9:9"],
            2,
            "Invalid value for '--rows': '9:9' is not A:B with 0 ≤ A",
        ),
        "rows beyond the split": ([*extract, "--rows", "0:99"], 1, "--rows 0:99: the split has 30 rows."),
        "a report on what is embedded": (
            [*extract, "--report-split", "train"],
            1,
            "--report-split train: is the split that is embedded, so nothing would be unseen.",
        ),
        "a check that writes": ([*check, "--out", out], 2, "--out does not go with --check, which writes nothing."),
        "a check with a seed": ([*check, "--seed", 1], 2, f"--seed does not go with --check: {manifest}"),
        "a check of one's own sampling": (
            [*check, "--per-class", 3, "--limit", 9, "--samples"],
            2,
            f"--per-class, --limit, --samples do not go with --check: {manifest}",
        ),
        "a fraction of nothing": (
            [*extract, "--fraction", 0.5],
            2,
            "--fraction is a share of what to --check: pass --check A too.",
        ),
        "a fraction out of range": ([*check, "--fraction", 0], 2, "Invalid value for '--fraction': 0.0 is not in the"),
        "a fraction that is no number": (
            [*check, "--fraction", "nan"],
            2,
            "Invalid value for '--fraction': nan is not a",
        ),
        "no artifact to check": (
            [*check, "--check", folder / "no.h5"],
            1,
            f"{folder / 'no.h5'}: artifact does not exist. Make one with `clip-embed-kd extract`.",
        ),
        "no GPU": ([*distill, "--device", "cuda:99"], 1, "device 'cuda:99': PyTorch sees "),
        "an unknown device": ([*distill, "--device", "abacus"], 1, "device 'abacus' is unknown; "),
        "no artifact": (
            [*distill, "--artifact", folder / "no.h5"],
            1,
            f"{folder / 'no.h5'}: artifact does not exist. Make one with `clip-embed-kd extract`.",
        ),
        "a damaged artifact": (
            [*distill, "--artifact", folder / "damaged.safetensors"],
            1,
            "damaged.safetensors: class/mean has SHA-256 ",
        ),
        "classes that the artifact lacks": (
            [*distill, "--dataset", empty],
            1,
            "tiny.safetensors: lacks 1 of the data's 4 classes (dog). It has 3, among them ant, bee, cat. "
            "Is it the artifact of this data set?",
        ),
        "a patch that does not fit": (
            [*distill, "--image-size", 30],
            1,
            "student vit_tiny_patch16_224: image size 30 is not divisible by its patch size 4. "
            "Pass --image-size 28 or 32.",
        ),
        "an unknown student": (
            [*distill, "--student", "hal9000"],
            1,
            "student 'hal9000' is neither base, large nor a ",
        ),
        "an unknown recipe": (
            [*distill, "--recipe", "cake"],
            1,
            "recipe 'cake' does not exist. Choose paper, short, strong, or the path of a .toml file.",
        ),
        "a recipe that is none": (
            [*distill, "--recipe", folder / "recipe.toml"],
            1,
            f"recipe {folder / 'recipe.toml'}: cannot be read (",
        ),
        "settings that the recipe does not have": (
            [*distill, "--set", "speed=9", "--set", "epochs=0", "--set", "augmentation=1"],
            1,
            "recipe paper: epochs: input should be greater than or equal to 1, found 0; augmentation: input should be "
            "a valid dictionary or instance of Augmentation, found 1; speed: unknown setting",
        ),
        "a setting without a value": (
            [*distill, "--set", "epochs"],
            1,
            "--set 'epochs': expected KEY=VALUE, such as label_smoothing=0.1.",
        ),
        "a setting that stands there twice": (
            [*distill, "--set", "epochs=1", "--set", "epochs=2"],
            1,
            "--set epochs: is given twice.",
        ),
        "a setting that is an option too": (
            [*distill, "--set", "epochs=1", "--epochs", "2"],
            1,
            "--set epochs: is given twice, for there is an option of its own too.",
        ),
        "a loss of samples without samples": (
            [*distill, "--set", "cosine_weight=1"],
            1,
            "cosine_weight: needs sample embeddings. Pass --target sample or both.",
        ),
        "weights to begin with that are none": (
            [*distill, "--init", folder / "none"],
            1,
            f"--init {folder / 'none'}: no model.safetensors there. Pass scratch, pretrained, a run directory or a ",
        ),
        "one image in memory at once": (
            [*distill, "--micro-batch", 1],
            2,
            "Invalid value for '--micro-batch': 1 is not",
        ),
        "no time between checkpoints": (
            [*distill, "--checkpoint-minutes", 0],
            2,
            "Invalid value for '--checkpoint-minutes': 0.0 is not in the range",
        ),
        "endless time between checkpoints": (
            [*distill, "--checkpoint-minutes", "inf"],
            2,
            "Invalid value for '--checkpoint-minutes': inf is not a finite number.",
        ),
        "a run to go on with that is none": (
            [*distill, "--out", folder / "two", "--resume"],
            1,
            f"{folder / 'two'}: is not a run directory, so it is not resumed. Choose another --out.",
        ),
        "a run in the way": (
            [*distill, "--out", folder / "two"],
            1,
            f"{folder / 'two'}: exists. Pass --resume to go on with it, --overwrite, or another --out.",
        ),
        "an unknown recipe to show": (
            ["recipe", "show", "cake"],
            1,
            "recipe 'cake' does not exist. Choose paper, short, ",
        ),
        "a wrong setting to show": (
            ["recipe", "show", "paper", "--set", "epochs=x"],
            1,
            "recipe paper: epochs: input should be a valid integer, found 'x'",
        ),
        "a number out of range": (
            [*distill, "--alpha2", 2],
            2,
            "Invalid value for '--alpha2': 2.0 is not in the range",
        ),
        "an unknown option": ([*distill, "--fast"], 2, "No such option"),
        "a student that is none": (
            ["evaluate", "--student", folder, "--dataset", data],
            1,
            f"{folder}: no student here (",
        ),
    }


NAMES = list(bad_inputs(Path(), Path(), Path(), Path()))


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    name: str, tiny_teacher: Path, saved_data: Path, artifact: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "out").mkdir()
    two = make_split(6, 0).rename_column("label", "fine")
    two.add_column("coarse", two["fine"], feature=two.features["fine"]).save_to_disk(str(tmp_path / "two"))
    make_split(6, 0).add_column("score", [0.5] * 6).cast_column("score", _float()).save_to_disk(
        str(tmp_path / "floats")
    )
    split = make_split(6, 0, ("ant", "bee", "cat", "dog")).filter(lambda row: row["label"] != 3)
    split.save_to_disk(str(tmp_path / "empty"))
    damaged = bytearray(artifact.read_bytes())
    position = int.from_bytes(damaged[:8], "little") + 8
    damaged[position + 3 * 8 + 3 * 24 * 4] ^= 1  # class/mean stands behind class/count and class/m2
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    (tmp_path / "recipe.toml").write_text("epochs: 3")

    arguments, expected_code, expected = bad_inputs(tiny_teacher, saved_data, artifact, tmp_path)[name]
    code, out, err = run(*arguments)
    last = err.strip().splitlines()[-1]
    assert (code, out) == (expected_code, "")
    assert last.startswith(f"Error: {expected}")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--alpha2", "nan", "nan is not a finite number."),
        ("--lr", "inf", "inf is not a finite number."),
        ("--max-missing", "nan", "nan is not a finite number."),
        ("--ram", "nan", "nan is not a finite number."),
        ("--ram", "inf", "inf is not in the range 0<x<=1000000."),
        ("--ram", "1e300", "1e+300 is not in the range 0<x<=1000000."),
        ("--hours", "nan", "nan is not a finite number."),
        ("--hours", "inf", "inf is not a finite number."),
    ],
)
def test_a_number_without_measure_is_refused(option: str, value: str, problem: str, run: Run) -> None:
    code, out, err = run("plan", "--artifact", "a.h5", "--dataset", "d", option, value)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == f"Error: Invalid value for '{option}': {problem}"


def test_every_option_that_takes_a_fraction_takes_finite_ones_only() -> None:
    types = [parameter.type for _, command in commands() for parameter in command.params]
    assert {type(each) for each in types if isinstance(each, click.types.FloatParamType)} == {Finite}


def test_a_name_that_is_not_utf8_is_one_line_that_can_be_printed(run: Run) -> None:
    command = ("distill", "--artifact", "s\udcff.safetensors", "--dataset", "d", "--out", "run")
    assert run(*command) == (
        2,
        "",
        "Error: artifact: its name is not UTF-8: give it another, found PosixPath('s\\udcff.safetensors')\n",
    )


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["clip-embed-kd", "store", "inspect", "x.h5"])
    monkeypatch.setattr("store.summarise", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_an_operating_system_error_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("store.summarise", full)
    assert run("store", "inspect", "x.h5")[2] == "Error: x.h5: No space left on device.\n"


def test_names_from_a_strangers_file_cannot_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    import store
    from tests.store.examples import class_tensors, make_manifest

    manifest = make_manifest()
    classes = ("\x1b[2J" + manifest.classes[0], *manifest.classes[1:])
    manifest = manifest.model_copy(update={"classes": classes})
    store.write_artifact(tmp_path / "a.h5", manifest, class_tensors())
    _, out, _ = run("store", "inspect", tmp_path / "a.h5")
    assert "\x1b" not in out
    assert "\\x1b[2J" in out


def signalled(program: str) -> "subprocess.CompletedProcess[str]":
    """Run a program that sends itself a signal, with the handlers of a terminal: in the background some are ignored."""
    given = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" + textwrap.dedent(program)
    return subprocess.run([sys.executable, "-c", given], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "Interrupted.\n"), (signal.SIGTERM, "")])
def test_while_a_library_is_imported_a_signal_ends_the_process_at_once(
    number: signal.Signals, said: str, tmp_path: Path
) -> None:
    module = f"import os, signal\nos.kill(os.getpid(), signal.{number.name})\nprint('went on')"
    (tmp_path / "library.py").write_text(module)
    done = signalled(f"""
        sys.path.insert(0, {str(tmp_path)!r})
        import cli
        cli.cli.main = lambda **options: __import__("library")
        cli.main()
    """)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", said)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_at_any_other_time_a_signal_is_an_exception_that_cleans_up(number: signal.Signals, code: int) -> None:
    done = signalled(f"""
        import cli, os
        def stop(**options):
            try:
                os.kill(os.getpid(), signal.{number.name})
            finally:
                print("cleaned up", flush=True)
        cli.cli.main = stop
        cli.main()
    """)
    assert (done.returncode, done.stdout) == (code, "cleaned up\n")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_leaves_a_whole_student_or_nothing(
    number: signal.Signals, code: int, artifact: Path, saved_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        str(ROOT / "cli.py"),
        "distill",
        "--artifact",
        str(artifact),
        "--dataset",
        str(saved_data),
    ]
    command += ["--out", str(out), "--student", "test_resnet", "--epochs", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    status = json.loads((out / "run.json").read_text())["status"]
    assert status == ("running" if number == signal.SIGKILL else "interrupted")
    from pipeline.distill.student import load_student

    assert load_student(out).config.class_names == ("ant", "bee", "cat")
    assert sorted(path.name for path in (out / "checkpoints").iterdir())[-1].isdecimal()


def _float() -> object:
    import datasets

    return datasets.Value("float32")
