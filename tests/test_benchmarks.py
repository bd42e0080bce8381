"""Benchmarks run, on little; what they measure is no matter here, but that they would find what is wrong is."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import datasets
import numpy as np
import pytest
from click.testing import CliRunner

import store
from benchmarks.distill import MEASURES, main
from benchmarks.distill_accuracy import ARMS, table
from benchmarks.distill_join import joined_targets, renumbered, right_targets
from benchmarks.distill_loops import Subject, default_step, our_step, released_step, supervised_step
from benchmarks.distill_profile import products_of
from benchmarks.distill_rounds import compare, in_rounds, timer
from benchmarks.distill_runs import begun_ns, left_by, phase
from benchmarks.figure_book import FigureBook
from pipeline.distill.preparation import Prepared
from pipeline.pixels import sample_key, to_rgb
from tests.conftest import CLASS_NAMES, SHARED, make_split
from tests.store.examples import class_tensors, make_manifest

ROOT = Path(__file__).parent.parent
EMBED_DIM = 4


@pytest.fixture(scope="module")
def rows() -> Any:
    return make_split(24, 0).rename_column("label", "fine_label")


@pytest.fixture(scope="module")
def subject(rows: Any, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """24 images of 8×8 pixels, and an artifact of them."""
    folder = tmp_path_factory.mktemp("bench")
    return Subject(write_artifact(folder / "a.safetensors", rows), save(rows, folder / "data"), "cpu")


@pytest.fixture
def prepared(subject: Subject) -> Iterator[Prepared]:
    with subject.prepared(image_size=8, overrides={"batch_size": 8}, precision="float32") as found:
        yield found


def save(rows: Any, folder: Path) -> Path:
    datasets.DatasetDict(train=rows, test=rows.select(range(6))).save_to_disk(str(folder))
    return folder


def write_artifact(path: Path, rows: Any) -> Path:
    pairs = sorted((sample_key(to_rgb(row["image"])), row["fine_label"]) for row in rows)
    tensors = class_tensors(len(CLASS_NAMES), EMBED_DIM)
    tensors["sample/key"] = np.frombuffer(b"".join(key for key, _ in pairs), np.uint8).reshape(-1, 16)
    tensors["sample/label"] = np.array([label for _, label in pairs], np.int32)
    tensors["sample/embedding"] = np.random.default_rng(0).standard_normal((len(pairs), 1, EMBED_DIM)).astype("float16")
    store.write_artifact(path, make_manifest(views=1, classes=CLASS_NAMES), tensors)
    return path


PROGRAMS = [path.name for path in (ROOT / "benchmarks").glob("*.py") if "@click.command" in path.read_text("utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_each_program_starts_as_a_script(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"Usage: {name} "), done.stderr


# The book of figures


def test_figures_of_other_measures_stay_and_what_is_false_makes_it_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    FigureBook(path, {"cores": 2}, {}, is_trial=False).note("before", {"seconds": 1})
    book = FigureBook(path, {"cores": 2}, {"data set": "small"}, is_trial=False)
    book.measure("speed", lambda: {"targets": {"fast": False, "small": True}, "checks": {"right": True}})
    with pytest.raises(SystemExit) as exit_:
        book.finish()
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "false: speed, fast\n"
    figures = json.loads(path.read_text())
    assert figures["before"] == {"of": {}, "seconds": 1}
    assert figures["speed"]["of"] == {"data set": "small"}


def test_a_trial_has_no_targets(tmp_path: Path) -> None:
    book = FigureBook(tmp_path / "figures.json", {}, {}, is_trial=True)
    book.measure("speed", lambda: {"targets": {"fast": False}})
    with pytest.raises(SystemExit) as exit_:
        book.finish()
    assert exit_.value.code == 0


@pytest.mark.parametrize(
    ("error", "noted"),
    [
        (subprocess.CalledProcessError(3, "command"), {"checks": {"the command succeeds": False}, "exit status": 3}),
        (KeyError("x"), {"checks": {"the measure succeeds": False}, "error": "KeyError: 'x'"}),
    ],
)
def test_a_measure_that_fails_is_noted_as_false(error: Exception, noted: Any, tmp_path: Path) -> None:
    def fail() -> Any:
        raise error

    book = FigureBook(tmp_path / "figures.json", {}, {}, is_trial=True)
    book.measure("speed", fail)
    assert book.known("speed") == {"of": {}, **noted}
    with pytest.raises(SystemExit) as exit_:
        book.finish()
    assert exit_.value.code == 1


def test_figures_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    FigureBook(path, {"cores": 2}, {}, is_trial=False).note("speed", {})
    with pytest.raises(click.UsageError) as error:
        FigureBook(path, {"cores": 4}, {}, is_trial=False)
    assert error.value.message == f"{path} is of another machine: {{'cores': 2}}. Choose another --work."


# Stage two


def test_help_names_every_measure() -> None:
    said = CliRunner().invoke(main, ["--help"])
    assert said.exit_code == 0
    assert all(name in said.output for name in [*MEASURES, *ARMS])


def test_sides_take_turns_and_each_is_first_as_often() -> None:
    taken: list[str] = []
    names = ("ours", "theirs")
    sides = {name: timer(lambda name=name: taken.append(name), "cpu") for name in names}  # type: ignore[misc]
    seconds = in_rounds(sides, 2, "cpu")
    assert taken[-4:] == ["ours", "theirs", "theirs", "ours"]
    assert {name: len(each) for name, each in seconds.items()} == {"ours": 2, "theirs": 2}


def test_ratios_are_of_rounds() -> None:
    found = compare([1.0, 2.0, 9.0], [1.0, 1.0, 3.0])
    assert found == {"ratio": 2.0, "quartiles": [1.5, 2.5], "least and most": [1.0, 3.0], "rounds": 3}
    assert compare([1.0], [2.0])["quartiles"] == [0.5, 0.5]


@pytest.mark.parametrize("side", [our_step, supervised_step, released_step, default_step])
def test_all_sides_take_steps_over_more_than_one_epoch(side: Any, prepared: Prepared) -> None:
    step = side(prepared)
    for _ in range(4):
        step()


def test_ours_is_the_trainers_step(prepared: Prepared) -> None:
    step = our_step(prepared)
    step()
    step()
    assert prepared.trainer.progress.num_steps == 2


def test_products_are_those_of_the_blocks(prepared: Prepared) -> None:
    products = products_of(prepared.trainer)
    assert len(products) == 6 * (5 * 3 + 6)  # 5 linear layers, attention's two products and their gradients
    tokens, width, heads = 5, 256, 8
    for first, used in ((0, tokens), (35, 1)):  # the first and the last block forward: of the last one token is used
        shapes = [tuple(product().shape) for product in products[first : first + 7]]
        assert shapes[:2] == [(8 * used, width), (8 * tokens, 2 * width)]
        assert shapes[2:4] == [(8 * heads, used, tokens), (8 * heads, used, width // heads)]
        assert shapes[4:] == [(8 * used, width), (8 * used, 4 * width), (8 * used, width)]


def test_joined_targets_are_those_of_the_file(subject: Subject, rows: Any, tmp_path: Path) -> None:
    right = right_targets(subject.artifact)
    assert joined_targets(subject) == (right, 24)
    moved = renumbered(rows.shuffle(seed=1), np.array([2, 0, 1]))
    assert moved.features["fine_label"].names == ["bee", "cat", "ant"]
    other = Subject(subject.artifact, save(moved, tmp_path / "moved"), "cpu")
    assert joined_targets(other) == (right, 24)


def test_a_wrong_join_is_found(subject: Subject, rows: Any, tmp_path: Path) -> None:
    wrong = [(label + 1) % 3 for label in rows["fine_label"]]
    mislabelled = rows.remove_columns("fine_label").add_column("fine_label", wrong).cast(rows.features)
    joined, _ = joined_targets(Subject(subject.artifact, save(mislabelled, tmp_path / "data"), "cpu"))
    right = right_targets(subject.artifact)
    assert not any(right.get(pair) == digest for pair, digest in joined.items())


def make_run(out: Path, status: str = "finished") -> Path:
    from safetensors.numpy import save_file

    for folder in (out / "student", out / "checkpoints" / "00000008", out / "tensorboard"):
        folder.mkdir(parents=True)
    (out / "student" / "config.json").write_text("{}")
    save_file({"weight": np.zeros(2, np.float32)}, out / "checkpoints" / "00000008" / "tensors.safetensors")
    (out / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2.5, "seconds": 1.5, "images_per_second": 8}\n')
    (out / "run.json").write_text(json.dumps({"status": status}))
    return out


def test_runs_of_other_times_are_equal(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "1" / "run"), make_run(tmp_path / "2" / "run")
    (other / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2.5, "seconds": 9, "images_per_second": 1}\n')
    (other / "tensorboard" / "events.2").write_text("")
    (other / "checkpoints" / "00000007").mkdir()
    assert left_by(one).differing(left_by(other)) == []


def test_all_that_differs_between_runs_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    one, other = make_run(tmp_path / "1" / "run"), make_run(tmp_path / "2" / "run")
    (other / "student" / "config.json").write_text("{ }")
    (other / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2.25}\n')
    save_file({"weight": np.full(2, -0.0, np.float32)}, other / "checkpoints" / "00000008" / "tensors.safetensors")
    (other.parent / ".run.partial").mkdir()
    assert left_by(one).differing(left_by(other)) == [
        "checkpoint, weight",
        "metrics.jsonl",
        "student/config.json",
        "there or not: .run.partial",
    ]


def test_phases_are_told_by_files(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert (phase(out), begun_ns(out)) == ("start", 0)
    hidden = make_run(tmp_path / ".run.partial", "running")
    assert phase(out) == "before the first checkpoint"
    begun = begun_ns(out)
    hidden.rename(out)
    assert (phase(out), begun_ns(out)) == ("training", begun)
    (out / "run.json").write_text('{"status": "finished"}')
    assert phase(out) == "end"


def test_the_table_pairs_seeds() -> None:
    def result(arm: str, seed: int, top1: float) -> Any:
        return {"arm": arm, "seed": seed, "top1": top1, "top5": 2 * top1}

    runs = {
        "supervised-0": result("supervised", 0, 20.0),
        "supervised-1": result("supervised", 1, 22.0),
        "class-0": result("class", 0, 21.0),
        "class-1": result("class", 1, 25.0),
        "views-1": result("views", 1, 30.0),
        "views-0": {"arm": "views", "seed": 0, "exit status": 1},
    }
    assert table(runs)[2:] == [
        "| supervised | 2 | 21.00 ± 1.41 | 42.00 ± 2.83 |  |",
        "| class | 2 | 23.00 ± 2.83 | 46.00 ± 5.66 | +2.00 ± 1.41 |",
        "| views | 1 | 30.00 | 60.00 | +8.00 |",
    ]


@pytest.mark.parametrize("arm", ARMS)
def test_arms_are_settings_that_distill_takes(arm: str) -> None:
    from pipeline.distill.recipe import load_recipe, parse_overrides

    options = list(ARMS[arm].options)
    changes = [options[place + 1] for place, option in enumerate(options) if option == "--set"]
    name = options[options.index("--recipe") + 1] if "--recipe" in options else "paper"
    recipe = load_recipe(name, parse_overrides(changes))
    assert ARMS[arm].against in ARMS
    assert ARMS[arm].kind == "class" or "--target" in options
    assert arm != "views" or recipe.replay_views


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs CIFAR-100")
def test_settings_are_chosen_by_training_images_that_no_student_learns_from(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "distill.py"), "--work", str(tmp_path), "--trial"]
    command += ["--only", "accuracy", "--held-out", "--arm", "supervised", "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "distill.json").read_text())["accuracy"]["runs"]["trial-held-out"]
    assert 0 <= runs["supervised-0"]["top1"] <= 100
    record = json.loads((tmp_path / "accuracy" / "trial-held-out" / "supervised-0" / "run.json").read_text())
    assert record["data"]["evaluated_on"] == "split validation"
    splits = datasets.load_from_disk(str(tmp_path / "cifar100-200-held-out-100"))
    whole = datasets.load_dataset(str(SHARED / "data" / "cifar100"), split="train")
    content = {split: {image.tobytes() for image in splits[split]["img"]} for split in splits}
    assert {split: (len(rows), len(set(rows["fine_label"]))) for split, rows in splits.items()} == {
        "train": (200, 100),
        "validation": (100, 100),
    }
    assert not content["train"] & content["validation"]
    assert content["train"] | content["validation"] <= {image.tobytes() for image in whole["img"]}


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs CIFAR-100")
def test_distillation_keeps_its_promises_on_little_data(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "distill.py"), "--work", str(tmp_path), "--trial"]
    command += ["--kills", "2", "--only", "join", "--only", "opens", "--only", "kills"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "distill.json").read_text())
    assert all(all(figures[name]["checks"].values()) for name in ("join", "opens", "kills"))


# Stage one


@pytest.mark.slow
def test_extraction_keeps_its_promises_when_killed_and_when_shared(tiny_teacher: Path, tmp_path: Path) -> None:
    datasets.DatasetDict(train=make_split(2100, 0)).save_to_disk(str(tmp_path / "data"))  # three chunks
    command = [sys.executable, str(ROOT / "benchmarks" / "extract.py"), "--work", str(tmp_path / "work")]
    command += ["--teacher", str(tiny_teacher), "--dataset", str(tmp_path / "data"), "--label-column", "label"]
    command += ["--images", "2100", "--kills", "2"]
    for measure in ("processes", "kill"):
        done = subprocess.run([*command, "--only", measure], capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "work" / "extract.json").read_text())
    assert set(figures) == {"machine", "processes", "kill"}
    assert all(figures["processes"]["checks"].values())
    assert all(figures["kill"]["checks"].values())
    assert figures["kill"]["SIGKILL"]["processes"] == 1
    assert figures["kill"]["SIGTERM"]["processes"] == 1
