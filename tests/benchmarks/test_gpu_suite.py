"""What the suite runs first, what it leaves, and what it says of a machine; the programs are stood in for."""

import importlib.util
import json
import runpy
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import gpu_check, gpu_suite, reproduce_plan
from benchmarks.extract_setup import ROOT
from benchmarks.reproduce_runs import SCALES, Measurement, Training
from benchmarks.reproduce_study import KNOWN, TARGETS, Study
from benchmarks.reproduce_worth import STAGES, stages
from tests.benchmarks.made_results import Programs

FULL = SCALES["full"]
Call = Callable[..., Result]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setattr(reproduce_plan, "dataset", lambda work, scale: tmp_path / "data")
    monkeypatch.setattr(reproduce_plan, "teachers_at_hand", lambda folder: {KNOWN: tmp_path / KNOWN})
    monkeypatch.setattr(gpu_check, "teachers_at_hand", lambda folder: {KNOWN: tmp_path / KNOWN})
    monkeypatch.setenv("CLIP_EMBED_KD_CACHE", str(tmp_path / "cache"))
    has_data(monkeypatch)

    def make_call(programs: Programs, *arguments: str, device: str = "cpu") -> Result:
        monkeypatch.setattr(gpu_suite, "Processes", lambda logs: programs)
        given = ["--out", str(tmp_path / "out"), "--scale", "trial", "--device", device]
        return CliRunner().invoke(gpu_suite.main, [*given, *arguments])

    return make_call


def has_data(monkeypatch: pytest.MonkeyPatch, **counts: int) -> None:
    class Split(list[int]):
        class_names = range(100)

    monkeypatch.setattr(
        gpu_check,
        "load_labelled",
        lambda settings: Split(range(counts.get(settings.split, gpu_check.NUM_IMAGES[settings.split]))),
    )


# The order


def test_every_run_has_one_place() -> None:
    study = Study(FULL, 3, [KNOWN], "cuda")
    jobs = [job for stage in stages(study) for job in stage.jobs]
    assert len(jobs) == len(set(jobs))
    assert set(jobs) == set(study.jobs(TARGETS))


def test_what_matters_comes_first() -> None:
    made = stages(Study(FULL, 3, [KNOWN], "cuda"))
    assert [stage.name for stage in made] == list(STAGES)
    paper, students, weights, speed, rest, seeds = ([job.run for job in stage.jobs] for stage in made)
    assert paper == [FULL.training("embed", KNOWN), FULL.training("embed", KNOWN, alpha2=0.0)]
    tuned = f"{KNOWN}-finetuned"
    kinds = ("embed", "samples", "views")
    assert students == [
        *(FULL.training(kind, tuned, recipe="strong") for kind in kinds),
        *(FULL.training(kind, KNOWN, recipe="strong") for kind in kinds),
        FULL.training("embed", None, recipe="strong", alpha2=0.0),
    ]
    assert weights == [FULL.weighted(KNOWN, alpha2) for alpha2 in (0, 0.25, 0.5, 0.75, 1)]
    assert all(isinstance(run, Measurement) for run in speed)
    assert {run.seed for run in rest if isinstance(run, Training)} == {0}
    assert {run.seed for run in seeds if isinstance(run, Training)} == {1, 2}


# The suite


def test_all_lands_in_one_archive_and_a_second_call_runs_nothing(call: Call, tmp_path: Path) -> None:
    first, second = Programs(), Programs()
    said = call(first, "--seeds", "2")
    assert said.exit_code == 0, said.output
    assert said.output.endswith(f"Nothing is left. {tmp_path / 'out' / 'suite.tar.gz'}\n")
    with tarfile.open(tmp_path / "out" / "suite.tar.gz") as tar:
        names = tar.getnames()
    speeds = {"speed/distill/distill.json", "speed/extract/extract.json"}
    results = {name for name in names if name.startswith("results/trial/")}
    artifacts = {name for name in names if name.endswith(".safetensors")}
    assert set(names) == speeds | results | artifacts
    assert len(results) + len(gpu_suite.SPEEDS) == len(first.commands)
    assert len(artifacts) == len(list((tmp_path / "out").rglob("*.safetensors"))) > 0
    assert call(second, "--seeds", "2").exit_code == 0
    assert second.commands == []


def test_large_artifacts_stay_where_they_are(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "MOST_ARTIFACT_BYTES", 1)
    assert call(Programs(), "--seeds", "1").exit_code == 0
    with tarfile.open(tmp_path / "out" / "suite.tar.gz") as tar:
        assert not [name for name in tar.getnames() if name.endswith(".safetensors")]


@pytest.mark.parametrize("stop_after", [0, 3, 40])
def test_a_stop_anywhere_goes_on(stop_after: int, call: Call, tmp_path: Path) -> None:
    whole = len([job for stage in stages(Study(SCALES["trial"], 1, [KNOWN], "cpu")) for job in stage.jobs])
    first, second = Programs(stop_after=stop_after), Programs()
    said = call(first, "--seeds", "1")
    assert said.exit_code == 0, said.output
    assert "are left. The same command goes on." in said.output
    assert (tmp_path / "out" / "suite.tar.gz").is_file()
    assert "Nothing is left." in call(second, "--seeds", "1").output
    artifacts = len(list((tmp_path / "out" / "results").glob("*/artifacts/*.json")))
    assert len(first.commands) + len(second.commands) == whole + artifacts + len(gpu_suite.SPEEDS)


def test_a_missed_target_is_a_figure(call: Call) -> None:
    said = call(Programs(), "--seeds", "1")
    assert said.exit_code == 0, said.output
    assert "distill.py, step: exit status 1" in said.output
    assert "failed" not in said.output


def test_a_run_that_fails_is_told(call: Call) -> None:
    said = call(Programs(failing=["--seed 1"]), "--seeds", "2")
    assert said.exit_code == 1
    assert "failed: " in said.output


def test_a_run_that_fails_waits_in_later_calls_until_all_else_is_done(call: Call) -> None:
    failing = ["--method logits"]  # one of each seed
    assert call(Programs(failing=failing), "--seeds", "1").exit_code == 1
    programs = Programs()
    assert call(programs, "--seeds", "2").exit_code == 0
    trained = [" ".join(command) for command in programs.commands if "--seed" in command]
    assert len(trained) > 2
    assert ["--method logits" in command and "--seed 0" in command for command in trained].index(True) + 1 == len(
        trained
    )


def test_a_speed_that_fails_is_told_and_tried_again_when_all_else_is_done(call: Call) -> None:
    said = call(Programs(failing=["--only released"]), "--seeds", "1")
    assert said.exit_code == 1
    assert said.output.count("failed: distill.py, released\n") == 1
    programs = Programs()
    assert call(programs, "--seeds", "1").exit_code == 0
    assert [command[command.index("--only") + 1] for command in programs.commands] == ["released"]


def test_a_speed_that_takes_longer_than_a_call_holds_nothing_up(call: Call, tmp_path: Path) -> None:
    assert call(Programs(), "--seeds", "1", "--stage", "paper", "--stage", "students").exit_code == 0
    assert call(Programs(), "--seeds", "1", "--stage", "speed").exit_code == 0
    for path in (tmp_path / "out" / "speed").rglob("*.json"):
        path.unlink()
    said = call(Programs(stop_after=0), "--seeds", "1", "--stage", "speed")  # in the first measure
    assert f"{len(gpu_suite.SPEEDS)} are left." in said.output
    programs = Programs()
    assert call(programs, "--seeds", "2").exit_code == 0
    measured = [command[command.index("--only") + 1] for command in programs.commands if "--only" in command]
    names = [measure for _, measure, _ in gpu_suite.SPEEDS]
    assert measured == [*names[1:], names[0]]
    assert "--only" in programs.commands[-1]
    assert "--only" not in programs.commands[-2]  # runs of the last stages


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_run_for_itself(stage: str, call: Call) -> None:
    programs = Programs()
    assert call(programs, "--seeds", "2", "--stage", stage).exit_code == 0
    assert any("--only" in command for command in programs.commands) == (stage == "speed")
    assert programs.commands


def test_speeds_are_known_by_their_measure(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "speed" / "distill"
    folder.mkdir(parents=True)
    (folder / "distill.json").write_text(json.dumps({"machine": {}, "step": {}}))
    programs = Programs()
    assert call(programs, "--seeds", "1").exit_code == 0
    measured = [command[command.index("--only") + 1] for command in programs.commands if "--only" in command]
    assert measured == [measure for _, measure, _ in gpu_suite.SPEEDS if measure != "step"]


# The machine


def test_a_check_runs_nothing(call: Call) -> None:
    programs = Programs()
    said = call(programs, "--check")
    assert said.exit_code == 0, said.output
    assert programs.commands == []
    for text in (
        "program     commit ",
        f"torch {torch.__version__.partition('+')[0]}",
        "device      cpu, ",
    ):
        assert text in said.output
    assert "data        split train: 50,000 images of 100 classes\n" in said.output
    assert f"teachers    {KNOWN}\n" in said.output


def test_where_no_repository_names_the_commit_it_is_said_what_would(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "commit", lambda: None)
    told = "program     commit unknown: no repository here, and no CLIP_EMBED_KD_COMMIT, Python "
    assert told in call(Programs(), "--check").output
    said = call(Programs(), "--check", "--scale", "full")
    assert said.exit_code == 1
    assert "Program: its commit is unknown: no repository here, and no CLIP_EMBED_KD_COMMIT." in said.output


def test_all_that_is_missing_is_said_at_once(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_data(monkeypatch, test=9999)
    monkeypatch.setattr(gpu_check, "teachers_at_hand", lambda folder: {})
    programs = Programs()
    said = call(programs, device="abacus")
    assert said.exit_code == 1
    assert said.output == (
        "Error: the suite cannot be run here. Device: device 'abacus' is "
        "unknown; expected auto, cpu, cuda, cuda:N or mps. Data: split test: 9,999 images of 100 classes; CIFAR-100 "
        "has 10,000 of 100. Teachers: none is at hand: --teachers, or CLIP_EMBED_KD_SHARED.\n"
    )
    assert programs.commands == []
    assert not (tmp_path / "out" / "suite.tar.gz").exists()


def test_packages_are_missed_at_once_before_anything_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent = ("datasets", "pydantic")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu_packages.py"))
    assert exit_.value.code == "Error: the suite cannot be run here: not installed: datasets, pydantic."


def test_a_full_run_wants_room(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5_000_000_000))
    said = call(Programs(), "--scale", "full")
    assert said.exit_code == 1
    where = tmp_path / "out"
    assert said.output == f"Error: the suite cannot be run here. Disk: 5.0 GB free at {where}, 20 are needed.\n"


def test_jobs_side_by_side_want_memory(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(gpu_check, "resolve_precision", lambda name, device: torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20_000_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    said = call(Programs(), "--check", "--jobs", "4")
    assert said.output == ("Error: the suite cannot be run here. Device: 20 GB free, 24 are needed: fewer --jobs.\n")
    said = call(Programs(), "--check", "--jobs", "3")
    assert "device      a GPU, 20 of 80 GB free, bfloat16\n" in said.output
