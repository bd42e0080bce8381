import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cli
from pipeline.distill.provenance import base_name, plain, read_json, read_record, recorded, training_command
from pipeline.distill.recipe import load_recipe, parse_overrides
from pipeline.errors import PipelineError

RECORD: dict[str, Any] = {
    "status": "finished",
    "settings": {
        "data": {"dataset": "/home/me/images", "split": "train", "label_column": "fine label", "limit": None},
        "student": "test_resnet",
        "init": "pretrained",
        "image_size": 8,
        "recipe": "/home/me/my own.toml",
        "overrides": {"epochs": 3, "augmentation.mixup_alpha": 0.8, "schedule": "cosine", "centre": True},
        "target": "class",
        "compile": True,
        "seed": 3,
        "join_by_index": False,
    },
    "recipe": load_recipe("paper").model_dump(),
    "artifact": {
        "file": "a.h5",
        "manifest_sha256": "c" * 64,
        "teacher": {
            "name": "owner/teacher",
            "revision": "main",
            "weights_sha256": "a" * 64,
            "architecture": "ViTModel",
            "pooling": "cls",
            "embed_dim": 1024,
            "precision": "bfloat16",
            "licence": "apache-2.0",
        },
    },
    "data": {
        "name": "owner/images",
        "revision": "d" * 40,
        "licence": "cc-by-4.0",
        "num_classes": 3,
        "num_evaluation_images": 10_000,
        "evaluated_on": "split test",
        "join": {"num_images": 50_000},
    },
    "compute": {"device": "cuda", "precision": "bfloat16"},
    "machine": {"system": "Linux", "gpu": None, "device": "cpu"},
    "software": {"clip-embed-kd": "0.1.0", "torch": "2.15.0"},
    "result": {"top1": 51.234, "top5": 80.0, "num_parameters": 4_794_468, "num_steps": 156_400},
}


def words(record: Any) -> list[str]:
    return shlex.split(training_command(record).replace("\\\n", ""))


# The command


def test_the_command_is_that_of_the_run_without_paths_of_the_machine() -> None:
    assert words(RECORD) == [
        *("clip-embed-kd", "distill", "--artifact", "a.h5", "--dataset", "owner/images"),
        *("--dataset-revision", "d" * 40, "--label-column", "fine label"),
        *("--student", "test_resnet", "--init", "pretrained", "--image-size", "8", "--recipe", "my own.toml"),
        *("--compile", "--seed", "3"),
        *("--set", "epochs=3", "--set", "augmentation.mixup_alpha=0.8"),
        *("--set", 'schedule="cosine"', "--set", "centre=true"),
        *("--precision", "bfloat16", "--device", "cuda", "--max-steps", "156400", "--out", "run"),
    ]


def test_only_paths_are_shortened() -> None:
    data = {"config": "a/b", "split": "a/c", "image_column": "a/img", "label_column": "a/label"}
    settings = {"data": data, "init": "/home/me/run", "recipe": "own/recipe.toml", "eval_split": "a/dev"}
    found = words(RECORD | {"data": {"name": "owner/images", "revision": "refs/convert/parquet"}, "settings": settings})
    options = dict(zip(found[2::2], found[3::2], strict=True))
    assert options["--dataset-revision"] == "refs/convert/parquet"
    assert options["--dataset-config"] == "a/b"
    assert options["--split"] == "a/c"
    assert options["--image-column"] == "a/img"
    assert options["--label-column"] == "a/label"
    assert options["--eval-split"] == "a/dev"
    assert (options["--init"], options["--recipe"]) == ("run", "recipe.toml")


def test_overrides_are_read_again_as_they_were() -> None:
    table = parse_overrides(["augmentation={mixup_alpha=0.8, cutmix_alpha=0.5}", "learning_rate=1e-5", "epochs=3"])
    found = words({"settings": {"overrides": table}})
    again = parse_overrides([value for flag, value in itertools.pairwise(found) if flag == "--set"])
    assert again == {
        "augmentation.mixup_alpha": 0.8,
        "augmentation.cutmix_alpha": 0.5,
        "learning_rate": 1e-5,
        "epochs": 3,
    }
    assert load_recipe("paper", again) == load_recipe("paper", table)


def test_the_command_has_options_that_exist() -> None:
    every = {
        "data": {"config": "small", "split": "half", "image_column": "img", "label_column": "x", "limit": 5},
        **{"eval_split": "dev", "student": "s", "init": "i", "image_size": 8, "recipe": "strong", "target": "both"},
        **{"micro_batch": 4, "compile": True, "seed": 3, "max_missing": 0.5, "join_by_index": True, "skip_bad": True},
    }
    found = words(RECORD | {"settings": every})
    known = {name for parameter in cli.cli.commands["distill"].params for name in parameter.opts}
    flags = [word for word in found if word.startswith("--")]
    assert set(flags) <= known
    assert len(flags) == len(set(flags)) == 2 + 5 + 1 + 12 + 2 + 2


def test_what_is_hostile_stays_one_word() -> None:
    hostile = "$(rm -rf ~) `x`; '\n\"\\"
    found = words({"artifact": {"file": hostile}, "data": {"name": hostile}})
    assert found[3] == found[5] == hostile.replace("\n", " ")


# Values


def test_values_are_found_in_nested_objects_only() -> None:
    assert recorded({"a": {"b": 1}}, "a", "b") == 1
    assert recorded({"a": [{"b": 1}]}, "a", "b") is None
    assert recorded(None, "a") is None


def test_of_a_path_the_last_part_is_named() -> None:
    assert base_name("/home/me/a b.toml") == "a b.toml"
    assert base_name("strong") == "strong"
    assert base_name(5) == 5


@given(st.text())
def test_any_text_becomes_one_printable_line(text: str) -> None:
    found = plain(text)
    assert found.isprintable()
    assert len(found) == min(len(text), 200)
    assert found.encode().decode() == found


def test_other_values_are_written_as_json() -> None:
    assert [plain(value) for value in (None, True, 0.5, [1], "x" * 300)] == [
        *("not recorded", "true", "0.5", "[1]"),
        "x" * 199 + "…",
    ]


# Files


def test_a_record_is_found_from_the_run_and_from_its_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps(RECORD))
    assert read_record(tmp_path / "run") == read_record(tmp_path / "run" / "student") == RECORD
    monkeypatch.chdir(tmp_path / "run" / "student")
    assert read_record(Path()) == RECORD
    (tmp_path / "run" / "run.json").unlink()
    assert read_record(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b" " * 200_000, "larger than 150,000 bytes"),
        (None, "No such file or directory"),
    ],
    ids=["cut", "not text", "deep", "large", "missing"],
)
def test_a_file_that_cannot_be_read_is_named(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.distill.provenance._MAX_BYTES", 150_000)
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PipelineError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: cannot be read ({reason}")
    assert "\n" not in str(caught.value)
