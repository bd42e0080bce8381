"""What is run, when, and what is kept of it; the programs are stood in for."""

import json
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import reproduce, reproduce_plan, reproduce_results
from benchmarks import reproduce_paper as paper
from benchmarks.extract_setup import ROOT
from benchmarks.reproduce_commands import Place
from benchmarks.reproduce_processes import Processes, StoppedError, stopping
from benchmarks.reproduce_results import read_results, recipe_digest, settings_of
from benchmarks.reproduce_runs import SCALES, Extraction, Measurement
from benchmarks.reproduce_study import ARTIFACTS, KNOWN, TARGETS, Study
from pipeline.distill.recipe import load_recipe, parse_overrides
from pipeline.errors import PipelineError
from tests.benchmarks.made_results import Programs

TRIAL = SCALES["trial"]
TEACHERS_AT_HAND = reproduce_plan.teachers_at_hand


@pytest.fixture(autouse=True)
def _nothing_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce_plan, "dataset", lambda work, scale: tmp_path / "data")
    monkeypatch.setattr(reproduce_plan, "teachers_at_hand", lambda folder: {KNOWN: tmp_path / KNOWN})
    monkeypatch.setenv("CLIP_EMBED_KD_CACHE", str(tmp_path / "cache"))


def call(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, *arguments: str, scale: str = "trial"
) -> Result:
    monkeypatch.setattr(reproduce, "Processes", lambda: programs)
    folders = ["--work", str(folder / "work"), "--results", str(folder / "results"), "--docs", str(folder / "docs")]
    return CliRunner().invoke(reproduce.main, [*arguments, *folders, "--scale", scale, "--device", "cpu"])


def results(folder: Path) -> dict[str, Any]:
    paths = sorted((folder / "results").glob("*/*/*.json"))
    return {str(path.relative_to(folder / "results")): json.loads(path.read_text("utf-8")) for path in paths}


def test_every_target_lands_its_results_and_a_second_call_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Programs(), Programs()
    said = call(tmp_path, first, monkeypatch, "all", "--seeds", "2")
    assert said.exit_code == 0, said.output
    written = results(tmp_path)
    assert len(written) == len(first.commands)
    # What table 1 and the live teachers are made of is measured for others already, but for these.
    assert {Path(name).parts[:2] for name in written} == {("trial", target) for target in (*TARGETS, ARTIFACTS)}
    for document in written.values():
        assert {"recipe", "artifact", "epochs", "seed", "accuracy", "machine", "versions", "commit"} <= set(document)
    assert call(tmp_path, second, monkeypatch, "all", "--seeds", "2").exit_code == 0
    assert second.commands == []


def test_results_say_nothing_of_folders_and_checkpoints_do_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(tmp_path, Programs(), monkeypatch, "all", "--seeds", "1").exit_code == 0
    assert str(tmp_path) not in json.dumps(results(tmp_path))
    assert list((tmp_path / "work").rglob("metrics.jsonl"))
    assert not list((tmp_path / "work").rglob("checkpoints"))


def test_what_is_kept_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(tmp_path, Programs(), monkeypatch, "fig3", "--seeds", "1").exit_code == 0
    name = f"embed-{KNOWN}-large-32px-paper-alpha2-1-200-images-seed-0"
    document = results(tmp_path)[f"trial/fig3/{name}.json"]
    for part in ("machine", "versions", "commit"):
        del document[part]
    assert document == {
        "recipe": "paper",
        "artifact": f"{KNOWN}-200-images-class",
        "epochs": 1,
        "seed": 0,
        "accuracy": 12.5,
        "settings": {
            "run": "training",
            "method": "embed",
            "teacher": KNOWN,
            "images": 200,
            "epochs": 1,
            "student": "large",
            "image_size": 32,
            "recipe": "paper",
            "alpha2": 1.0,
            "seed": 0,
            "recipe_sha256": document["settings"]["recipe_sha256"],
        },
        "measured": {
            "top5": 40.0,
            "num_steps": 4,
            "train_seconds": 2.0,
            "images_per_second": 100.0,
            "teacher_seconds": 0.0,
            "precision": "bfloat16",
            "memory": {"resident_bytes": 1000, "device_bytes": 0},
        },
        "curve": [{"epoch": 1, "loss": 4.5, "top1": 12.5}],
        "manifest_sha256": "cd" * 32,
        "conditions": {"compiled": False, "jobs": 1},
    }


def test_a_stop_in_the_middle_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Programs()
    assert call(tmp_path / "whole", whole, monkeypatch, "table2", "live").exit_code == 0
    first, second = Programs(stop_after=12), Programs()
    said = call(tmp_path, first, monkeypatch, "table2", "live")
    assert said.exit_code == 0
    assert "runs are left. The same command goes on." in said.output
    assert call(tmp_path, second, monkeypatch, "table2", "live").exit_code == 0
    assert len(first.commands + second.commands) == len(whole.commands)
    assert set(results(tmp_path)) == set(results(tmp_path / "whole"))


def test_a_training_that_another_commit_began_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = next(job for job in Study(TRIAL, 1, [KNOWN], "cpu").jobs(["fig3"]) if job.target == "fig3")
    monkeypatch.setattr(reproduce_plan, "commit", lambda: "one")
    place = Place(tmp_path / "work" / "trial", tmp_path, {}, KNOWN, "cpu", TRIAL)
    kept = place.made_by(job.run) / "checkpoints" / "00000001"
    for commit, is_kept in (("one", True), ("one", True), ("another", False)):
        monkeypatch.setattr(reproduce_plan, "commit", lambda commit=commit: commit)
        kept.mkdir(parents=True, exist_ok=True)
        programs, stayed = Programs(), list[bool]()

        def look(options: Any, programs: Programs = programs, stayed: list[bool] = stayed) -> dict[str, Any]:
            if options["--out"] == str(kept.parents[1]):
                stayed.append(kept.exists())
                programs.stop()
                raise StoppedError
            return Programs._cli(programs, options)

        monkeypatch.setattr(programs, "_cli", look)
        said = call(tmp_path, programs, monkeypatch, "fig3", "--seeds", "1")
        assert stayed == [is_kept]
        assert ("was begun by another commit or under other conditions, and begins anew." in said.output) != is_kept


def test_one_that_fails_does_not_hold_up_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = call(tmp_path, Programs(failing=["--method logits"]), monkeypatch, "live", "--seeds", "1")
    assert said.exit_code == 1
    assert f"failed: live/logits-{KNOWN}-base-32px-paper-200-images-seed-0" in said.output
    trained = [name for name in results(tmp_path) if ARTIFACTS not in name]
    assert len(trained) == 5


def test_what_cannot_be_made_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(failing=["--views"])
    said = call(tmp_path, programs, monkeypatch, "kinds", "--seeds", "2")
    assert said.exit_code == 1
    assert sum("--views" in command for command in programs.commands) == 2  # of two teachers
    assert said.output.count("could not be made") == 4


def test_an_artifact_that_is_not_whole_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the artifact and its report card `extract` may have been stopped."""
    first, second = Programs(), Programs()
    assert call(tmp_path, first, monkeypatch, "fig3", "--seeds", "1").exit_code == 0
    (artifact,) = (tmp_path / "work").rglob("*.safetensors")
    for name in results(tmp_path):
        (tmp_path / "results" / name).unlink()
    shutil.rmtree(tmp_path / "work" / "trial" / "runs")
    artifact.with_name(f"{artifact.name}.partial").mkdir()
    assert call(tmp_path, second, monkeypatch, "fig3", "--seeds", "1").exit_code == 0
    assert [command for command in second.commands if "extract" in command] == [
        command for command in first.commands if "extract" in command
    ]
    assert any(ARTIFACTS in name for name in results(tmp_path))


def test_what_a_program_prints_that_is_no_json_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Programs()
    run = programs.run

    def garbled(command: list[str], name: str) -> dict[str, Any]:
        told = run(command, name)
        return json.loads("{") if "--alpha2" in command and name.endswith("alpha2-1-200-images-seed-0") else told

    monkeypatch.setattr(programs, "run", garbled)
    said = call(tmp_path, programs, monkeypatch, "fig3", "--seeds", "1")
    assert said.exit_code == 1
    assert "alpha2-1-200-images-seed-0: JSONDecodeError: Expecting property name" in said.output
    assert len(list((tmp_path / "results" / "trial").glob("*/embed-*.json"))) == 4


def test_several_trainings_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs()
    assert call(tmp_path, programs, monkeypatch, "kinds", "--seeds", "3", "--jobs", "4").exit_code == 0
    assert len(results(tmp_path)) == len(programs.commands)
    for document in results(tmp_path).values():
        assert document["conditions"] == {"compiled": False, "jobs": 4}


@pytest.mark.parametrize("worked", [True, False])
def test_a_result_says_whether_the_step_was_compiled_and_not_whether_it_was_to_be(
    worked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Programs()
    run = programs.run

    def compiled(command: list[str], name: str) -> dict[str, Any]:
        told = run(command, name)
        return told | ({"compiled": worked and "--compile" in command} if "compiled" in told else {})

    monkeypatch.setattr(programs, "run", compiled)
    assert call(tmp_path, programs, monkeypatch, "fig3", "--seeds", "1", "--compile").exit_code == 0
    found = {name: document["conditions"]["compiled"] for name, document in results(tmp_path).items()}
    assert len(found) == 6
    assert found == {name: worked and ARTIFACTS not in name for name in found}


def test_what_two_runs_need_is_made_once_while_others_make_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, both = Programs(), threading.Barrier(2, timeout=20)
    run = programs.run

    def together(command: list[str], name: str, threads: int | None = None) -> dict[str, Any]:
        if name in (f"{KNOWN}-200-images-class", f"{KNOWN}-200-images-samples"):
            both.wait()  # for the other one to be made at the same time
        return run(command, name, threads)

    monkeypatch.setattr(programs, "run", together)
    assert call(tmp_path, programs, monkeypatch, "live", "--seeds", "2", "--jobs", "2").exit_code == 0
    made = [name for name in results(tmp_path) if ARTIFACTS in name]
    assert len(made) == 2
    assert len(results(tmp_path)) == len(programs.commands)


def test_trainings_side_by_side_share_the_processors_and_measurements_have_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    programs = Programs()
    assert call(tmp_path, programs, monkeypatch, "table2", "--seeds", "1", "--jobs", "3").exit_code == 0
    measured = {name for name in programs.threads if name.startswith(("teacher-cpu", "embed-cpu", "sizes"))}
    assert len(measured) == 13
    assert {name: threads for name, threads in programs.threads.items() if threads is None} == dict.fromkeys(measured)
    assert {programs.threads[name] for name in set(programs.threads) - measured} == {2}
    for name, document in results(tmp_path).items():
        by_itself = Path(name).stem in measured
        assert document["machine"]["threads"] == (torch.get_num_threads() if by_itself else 2)
        assert document["conditions"]["jobs"] == (1 if by_itself else 3)


def test_a_result_of_other_settings_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(tmp_path, Programs(), monkeypatch, "table1").exit_code == 0
    path = next((tmp_path / "results/trial/table1").glob("*-large-32px.json"))
    document = json.loads(path.read_text("utf-8"))
    document["settings"]["image_size"] = 16
    path.write_text(json.dumps(document), "utf-8")
    programs = Programs()
    said = call(tmp_path, programs, monkeypatch, "table1")
    assert f"table1/{path.stem}: the result there is of other settings, and will be replaced." in said.output
    assert len(programs.commands) == 1
    assert json.loads(path.read_text("utf-8"))["settings"]["image_size"] == 32


def test_a_file_that_is_no_result_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(TRIAL, 1, [KNOWN], "cpu")
    job = study.jobs(["table1"])[0]
    path = tmp_path / "results/trial/table1" / f"{job.run.name}.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"recipe": 1}')
    said = call(tmp_path, Programs(), monkeypatch, "table1")
    assert said.exit_code == 1
    assert f"Error: {path}: is not a result (recipe: input should be a valid string, found 1; " in said.output
    assert said.output.endswith("Remove it, and run its target again.\n")


def test_without_a_teacher_accuracies_are_not_run_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce_plan, "teachers_at_hand", lambda folder: {})
    programs = Programs()
    said = call(tmp_path, programs, monkeypatch, "all")
    assert said.exit_code == 0
    assert f"No accuracies: neither {paper.TEACHERS['Large-32']} nor {KNOWN} is at hand." in said.output
    assert {Path(command[0]).name for command in programs.commands} == {"resources.py"}


def test_a_folder_of_teachers_has_at_least_one_of_them(tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as error:
        TEACHERS_AT_HAND(tmp_path)
    expected = ", ".join(paper.TEACHERS.values())
    assert str(error.value) == f"{tmp_path}: has none of the paper's teachers. Expected folders {expected}."
    (tmp_path / paper.TEACHERS["Large-32"]).mkdir()
    assert TEACHERS_AT_HAND(tmp_path)[paper.TEACHERS["Large-32"]] == tmp_path / paper.TEACHERS["Large-32"]


def test_other_contents_of_a_recipe_are_other_settings_and_begin_another_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = TRIAL.training("embed", KNOWN), place_in(tmp_path)
    before, directory = settings_of(run), place.made_by(run)
    assert directory.name == f"{run.name}-1-epochs-{before['recipe_sha256'][:6]}"
    assert settings_of(replace(run, recipe="strong"))["recipe_sha256"] != before["recipe_sha256"]
    changed = load_recipe("paper", {"weight_decay": 0.2})
    monkeypatch.setattr("benchmarks.reproduce_results.load_recipe", lambda name: changed)
    recipe_digest.cache_clear()
    assert settings_of(run) != before
    assert place.made_by(run) != directory
    recipe_digest.cache_clear()


# The study


def test_the_papers_teachers_come_first_and_others_stand_in_for_none_of_them() -> None:
    large = paper.TEACHERS["Large-16"]
    study = Study(SCALES["full"], 1, [large, KNOWN], "cuda")
    assert study.at_hand(*paper.TEACHERS) == [large]
    assert study.usual == [KNOWN]


def test_runs_that_targets_share_are_run_once() -> None:
    study = Study(SCALES["full"], 3, [KNOWN], "cpu")
    jobs = study.jobs(TARGETS)
    assert len(set(jobs)) == len({job.run for job in jobs})
    shared = [job for job in study.jobs(["fig3"]) if job.target != "fig3"]
    assert {(job.target, job.run.name) for job in shared} == {
        ("table3", f"embed-{KNOWN}-large-32px-paper-alpha2-0.5-50000-images-seed-{seed}") for seed in range(3)
    }


def test_figure_3_shares_its_runs_at_the_reduced_scale() -> None:
    jobs = Study(SCALES["reduced"], 1, [KNOWN], "cpu").jobs(["fig3"])
    assert [job.run for job in jobs] == [
        SCALES["reduced"].training("embed", KNOWN, alpha2=alpha2) for alpha2 in paper.ALPHAS
    ]
    assert [job.target for job in jobs] == ["fig3", "fig3", "table2", "fig3", "fig3"]


def test_measurements_of_two_models_of_gpu_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = dict.fromkeys(("processor", "cores", "threads"), 1)
    for model in ("NVIDIA A100-SXM4 80GB", "NVIDIA H100"):
        monkeypatch.setattr(reproduce_plan, "machine", lambda device, model=model: {**facts, "device": model})
        programs = Programs()
        assert call(tmp_path, programs, monkeypatch, "fig2").exit_code == 0
        assert len(programs.commands) == 8
    names = {Path(name).name for name in results(tmp_path)}
    assert len(names) == 16
    large = paper.TEACHERS["Large-32"]
    for model in ("nvidia-a100-sxm4-80gb", "nvidia-h100"):
        assert f"teacher-{model}-{large}-base-64px.json" in names


@pytest.mark.parametrize("scale", SCALES)
def test_results_and_run_directories_have_names_of_their_own(scale: str, tmp_path: Path) -> None:
    study = Study(SCALES[scale], 2, list(paper.TEACHERS.values()), "cpu")
    place = Place(tmp_path, tmp_path, {}, KNOWN, "cpu", study.scale)
    jobs = study.jobs(TARGETS)
    assert len({(job.target, job.run.name) for job in jobs}) == len(jobs)
    trained = [job.run for job in jobs if not isinstance(job.run, Measurement)]
    assert len({place.made_by(run) for run in trained}) == len(trained)


def test_few_labels_have_more_epochs_but_not_without_end() -> None:
    full, reduced = SCALES["full"], SCALES["reduced"]
    assert [full.few(labels, KNOWN, "paper", 0.5).epochs for labels in full.labels] == [800, 800, 800, 800, 200]
    assert [reduced.few(labels, KNOWN, "paper", 0.5).epochs for labels in reduced.labels] == [24, 24, 6, 3, 1]


# Commands


def place_in(folder: Path) -> Place:
    teachers = {KNOWN: Path("teachers") / KNOWN}
    return Place(folder, Path("data"), teachers, KNOWN, "cuda", SCALES["reduced"], compiles=True)


def digest(recipe: str) -> str:
    return recipe_digest(recipe)[:6]


def told(command: list[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])


def test_the_command_of_a_training_from_an_artifact(tmp_path: Path) -> None:
    scale = SCALES["reduced"]
    run = scale.training("views", KNOWN, recipe="strong", seed=2)
    out = (
        tmp_path / "runs" / f"views-{KNOWN}-base-32px-strong-alpha2-0.5-5000-images-seed-2-6-epochs-{digest('strong')}"
    )
    assert told(place_in(tmp_path).command(run)) == (
        f"cli.py distill --artifact {tmp_path}/artifacts/{KNOWN}-5000-images-views.safetensors --dataset data "
        f"--out {out} --student base --image-size 32 --recipe strong --epochs 6 --seed 2 --device cuda "
        "--compile --limit 5000 --resume --json --label-column fine_label --alpha2 0.5 --evaluate-every 6 --target both"
    )


def test_the_command_of_a_training_with_a_live_teacher(tmp_path: Path) -> None:
    run = SCALES["full"].training("teacher-kd", KNOWN)
    out = tmp_path / "runs" / f"teacher-kd-{KNOWN}-base-32px-paper-50000-images-seed-0-200-epochs-{digest('paper')}"
    assert told(place_in(tmp_path).command(run)) == (
        f"baselines.py --method teacher-kd --teacher teachers/{KNOWN} "
        f"--artifact {tmp_path}/artifacts/{KNOWN}-50000-images-class.safetensors --dataset data --out {out} "
        "--student base --image-size 32 --recipe paper --epochs 200 --seed 0 --device cuda --compile --resume --json"
    )


def test_the_command_of_a_measurement(tmp_path: Path) -> None:
    run = Study(SCALES["reduced"], 1, [], "cuda").measured("teacher", "Large-32", "large", 64)
    assert told(place_in(tmp_path).command(run)) == (
        "resources.py --student large --image-size 64 --teacher vit-large-patch32 --method teacher --steps 5 "
        "--device cuda --json"
    )


def test_the_commands_of_a_fine_tuned_teacher(tmp_path: Path) -> None:
    scale, place = SCALES["reduced"], place_in(tmp_path)
    extraction = Extraction(f"{KNOWN}-finetuned", "samples", 5000)
    needs = [job.run for job in Study(scale, 1, [KNOWN], "cuda").needs(extraction)]
    assert [told(place.command(run)) for run in needs] == [
        f"finetune_teacher.py --teacher teachers/{KNOWN} --epochs 2 --seed 0 --dataset data --label-column fine_label "
        f"--limit 5000 --device cuda --out {tmp_path}/teachers/{KNOWN}-finetuned --json"
    ]
    assert told(place.command(extraction)) == (
        f"cli.py extract --teacher {tmp_path}/teachers/{KNOWN}-finetuned --samples --report-split test --dataset data "
        f"--label-column fine_label --limit 5000 --device cuda "
        f"--out {tmp_path}/artifacts/{KNOWN}-finetuned-5000-images-samples.safetensors --json"
    )


@pytest.mark.parametrize("scale", SCALES)
def test_every_training_from_an_artifact_is_one_that_distill_takes(scale: str, tmp_path: Path) -> None:
    import cli

    place, group = place_in(tmp_path), click.Context(cli.cli, **cli.cli.context_settings)
    for job in Study(SCALES[scale], 1, [KNOWN], "cpu").jobs(["table3", "fig3", "labels", "kinds", "live"]):
        command = place.command(job.run)
        if command[1] == "distill":
            context = cli.cli.commands["distill"].make_context("distill", command[2:], group)
            load_recipe(context.params["recipe"], parse_overrides(context.params["changes"]))


# Processes


def test_a_process_prints_json_or_says_that_it_failed() -> None:
    processes = Processes()
    assert processes.run(["-c", "print('{\"a\": 1}')"], "one") == {"a": 1}
    assert processes.output(["-c", "import os; print(os.environ['OMP_NUM_THREADS'])"], "one", threads=3).strip() == b"3"
    with pytest.raises(subprocess.CalledProcessError) as error:
        processes.run(["-c", "raise SystemExit(3)"], "one")
    assert error.value.returncode == 3


def test_what_processes_say_is_logged_by_name_and_goes_on(tmp_path: Path) -> None:
    processes = Processes(tmp_path / "logs")
    for said in ("once", "again"):
        program = f"import sys; print('{said}', file=sys.stderr); print('{{}}')"
        assert processes.run(["-c", program], "one") == {}
    assert (tmp_path / "logs" / "one.log").read_text() == "once\nagain\n"


def stop_when(ready: Path, processes: Processes) -> threading.Thread:
    """Stop processes as soon as a file is there."""

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.01)
        processes.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    return thread


def test_what_a_process_began_is_stopped_with_it(tmp_path: Path) -> None:
    processes, ready = Processes(grace_seconds=0.1), tmp_path / "ready"
    child = f"import pathlib, time\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)"
    program = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"

    thread = stop_when(ready, processes)
    start = time.monotonic()
    with pytest.raises(StoppedError):  # not before the child, which holds the pipe, is gone
        processes.run(["-c", program], "one")
    thread.join()
    assert time.monotonic() - start < 50


def test_processes_are_stopped_and_none_begins_after_it(tmp_path: Path) -> None:
    processes, ready = Processes(), tmp_path / "ready"
    program = f"import pathlib, time\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)"

    thread = stop_when(ready, processes)
    with pytest.raises(StoppedError):
        processes.run(["-c", program], "one")
    thread.join()
    with pytest.raises(StoppedError):
        processes.run(["-c", "print('{}')"], "other")


def test_time_stops_processes_and_signals_end_the_program() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopping(Processes(), 1e-6) as processes, pytest.raises(StoppedError):
        processes.run(["-c", "import time; time.sleep(60)"], "one")
    with pytest.raises(SystemExit) as exit_:
        be_terminated()
    assert exit_.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def be_terminated() -> None:
    with stopping(Processes(), None) as processes:
        signal.raise_signal(signal.SIGTERM)
        while not processes.stopped:
            pass


def test_the_page_that_is_there_is_that_of_the_results_that_are_there() -> None:
    from benchmarks.reproduce_page import page
    from benchmarks.reproduce_sections import SHOWN

    found = {name: read_results(ROOT / "benchmarks" / "results" / name) for name in SHOWN}
    made = (ROOT / "docs" / "reproduction.md").read_text("utf-8")
    assert made == page(found), "run `python benchmarks/reproduce.py page`"


def test_the_page_follows_each_measurement_of_a_scale_that_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "docs" / "reproduction.md"
    assert call(tmp_path, Programs(), monkeypatch, "table1").exit_code == 0
    assert not page.exists()
    assert call(tmp_path, Programs(), monkeypatch, "table1", scale="reduced").exit_code == 0
    assert "Table I" in page.read_text("utf-8")


def test_a_curve_keeps_the_losses_between_evaluations_and_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines: list[dict[str, float]] = [{"epoch": epoch, "step": 9, "loss": 5 - epoch / 100} for epoch in range(1, 101)]
    lines[-1]["top1"] = 12.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    found = reproduce_results._curve(path)
    assert len(found) == 34
    assert found[-1] == {"epoch": 100, "loss": 4.0, "top1": 12.5}
    assert found[0] == {"epoch": 1, "loss": 4.99}
