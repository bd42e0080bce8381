import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file

import store
from pipeline.data import DataSettings
from pipeline.distill import DistillResult, DistillSettings, distill, preparation, training
from pipeline.distill.config import EvaluateSettings
from pipeline.distill.evaluate import evaluate_run, evaluate_student
from pipeline.distill.feed import Feed
from pipeline.distill.images import DecodedImages
from pipeline.distill.loop import Trainer
from pipeline.distill.student import load_student
from pipeline.errors import PipelineError
from tests.conftest import CLASS_NAMES, make_images, make_split
from tests.pipeline.distill.examples import (
    EVERYTHING,
    Extras,
    equal_weights,
    file_names,
    make_coloured,
    make_rows,
    pairs_of,
    settings_for,
    weights_of,
    write_example,
)

ROOT = Path(__file__).parents[3]
NAMES = ("dog", "cat", "ant", "bee")  # the artifact's: other order, one more

Start = Callable[..., DistillSettings]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "a.safetensors"
    return write_example(path, NAMES, pairs_of(make_split(30, 0)), EVERYTHING)


@pytest.fixture
def start(artifact: Path, saved_data: Path, tmp_path: Path) -> Start:
    """Settings of a quick run on the saved data, into a fresh folder."""

    def make(dataset: Path = saved_data, **fields: Any) -> DistillSettings:
        return settings_for(fields.pop("artifact", artifact), dataset, fields.pop("out", tmp_path / "run"), **fields)

    return make


@pytest.fixture(scope="module")
def finished(artifact: Path, saved_data: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    out = tmp_path_factory.mktemp("runs") / "run"
    return distill(settings_for(artifact, saved_data, out, epochs=3, target="both", learning_rate=1e-3))


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return found


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def refusal(settings: DistillSettings) -> str:
    with pytest.raises(PipelineError) as caught:
        distill(settings)
    return str(caught.value)


def save_splits(folder: Path, **splits: datasets.Dataset) -> Path:
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def save_alone(folder: Path, rows: datasets.Dataset) -> Path:
    rows.save_to_disk(str(folder))
    return folder


def student_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "student").iterdir())}


# What a run leaves


def test_a_run_leaves_student_checkpoints_metrics_scalars_and_record(finished: DistillResult) -> None:
    folder = finished.run_directory
    assert file_names(folder) == ["checkpoints", "metrics.jsonl", "report.html", "run.json", "student", "tensorboard"]
    assert file_names(folder / "student") == ["README.md", "config.json", "model.safetensors"]
    assert file_names(folder / "checkpoints") == ["00000008", "00000012"]
    assert file_names(folder.parent) == ["run"]
    metrics = metrics_of(folder)
    assert [(line["epoch"], line["step"]) for line in metrics] == [(1, 4), (2, 8), (3, 12)]
    assert metrics[-1]["top1"] == finished.top1
    assert metrics[-1]["top5"] == finished.top5 == 100
    assert {line["learning_rate"] for line in metrics} == {1e-3}


def test_the_result_is_what_the_run_took(finished: DistillResult) -> None:
    student = load_student(finished.run_directory)
    assert student.config.class_names == CLASS_NAMES
    assert finished.num_parameters == sum(parameter.numel() for parameter in student.parameters())
    assert finished.num_steps == 12
    assert 0 < finished.train_seconds < finished.seconds
    assert finished.images_per_second == pytest.approx(90 / finished.train_seconds)
    assert 0 < finished.feed_share < 1
    assert finished.memory.resident_bytes > 100_000_000
    assert finished.memory.device_bytes == 0


def test_the_record_holds_settings_recipe_artifact_and_result(
    finished: DistillResult, artifact: Path, saved_data: Path
) -> None:
    record = record_of(finished.run_directory)
    assert record["status"] == "finished"
    assert record["settings"]["target"] == "both"
    assert record["settings"]["data"]["dataset"] == str(saved_data)
    assert record["settings"]["overrides"] == {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3}
    for name in ("artifact", "out", "resume", "overwrite", "max_steps", "checkpoint_minutes"):
        assert name not in record["settings"]
    assert record["limits"] == {"checkpoint_minutes": 10.0, "evaluate_every": 1, "max_steps": None}
    assert record["recipe"]["epochs"] == 3
    assert record["recipe"]["weight_decay"] == 0.1
    assert record["recipe"]["augmentation"]["horizontal_flip"] == 0.5
    with store.open_artifact(artifact) as opened:
        assert record["artifact"]["manifest_sha256"] == opened.manifest.sha256()
        assert record["artifact"]["teacher"]["name"] == "owner/teacher"
    digests = {record["data"].pop(f"{name}_sha256") for name in ("train", "evaluation", "classes")}
    assert all(len(digest) == 64 for digest in digests)
    assert len(digests) == 3
    assert record["data"] == {
        "name": "saved",
        "revision": None,
        "licence": None,
        "num_classes": 3,
        "num_evaluation_images": 12,
        "evaluated_on": "split test",
        "join": {
            "artifact": "a.safetensors",
            "num_classes": 3,
            "num_artifact_classes": 4,
            "num_images": 30,
            "num_artifact_samples": 30,
            "num_joined": 30,
            "num_missing": 0,
            "num_known_otherwise": 0,
            "missing_rows": [],
            "num_repeated": 0,
            "num_relabelled": 0,
            "num_views": 1,
        },
    }
    assert record["compute"] == {"device": "cpu", "precision": "float32"}
    assert record["software"]["timm"]
    assert record["result"] == {
        "run_directory": "run",
        "top1": finished.top1,
        "top5": 100.0,
        "num_parameters": finished.num_parameters,
        "num_steps": 12,
        "images_per_second": finished.images_per_second,
        "train_seconds": finished.train_seconds,
        "feed_share": finished.feed_share,
        "compiled": False,
        "seconds": finished.seconds,
        "memory": {"resident_bytes": finished.memory.resident_bytes, "device_bytes": 0},
    }


def test_distill_and_evaluate_agree(finished: DistillResult, saved_data: Path) -> None:
    data = DataSettings(dataset=str(saved_data), split="test")
    found = evaluate_run(EvaluateSettings(student=finished.run_directory, data=data, precision="float32", device="cpu"))
    assert (found.top1, found.top5) == (finished.top1, finished.top5)


def test_the_same_settings_give_the_same_student(start: Start, tmp_path: Path) -> None:
    for out, seed in (("first", 5), ("second", 5), ("third", 6)):
        distill(start(out=tmp_path / out, seed=seed, target="both", max_steps=2))
    first, second, third = (weights_of(load_student(tmp_path / out)) for out in ("first", "second", "third"))
    assert equal_weights(first, second)
    assert not equal_weights(first, third)


# Students and targets


@pytest.mark.parametrize("target", ["class", "sample", "both"])
def test_a_convolutional_student_is_trained_with_each_target(target: str, start: Start) -> None:
    result = distill(start(student="test_efficientnet", target=target, precision="bfloat16"))
    assert result.num_steps == 4
    assert metrics_of(result.run_directory)[0]["loss_clip"] > 0
    assert load_student(result.run_directory).config.architecture == "test_efficientnet"


def test_the_base_student_has_the_recipes_dropout(start: Start) -> None:
    result = distill(start(student="base", max_steps=1, batch_size=2))
    document = json.loads((result.run_directory / "student" / "config.json").read_text("utf-8"))
    assert document["model_args"]["attn_drop_rate"] == 0.1
    assert result.num_steps == 1
    assert result.num_parameters == sum(
        parameter.numel() for parameter in load_student(result.run_directory).parameters()
    )


def test_a_student_learns_what_can_be_learnt(start: Start, tmp_path: Path) -> None:
    data = save_splits(tmp_path / "data", train=make_coloured(24, 0), test=make_coloured(9, 1))
    result = distill(start(data, epochs=8, learning_rate=5e-3))
    assert result.top1 == 100


def test_at_alpha2_one_the_classifier_is_made_of_class_embeddings(start: Start, tmp_path: Path) -> None:
    data = save_splits(tmp_path / "data", train=make_coloured(24, 0), test=make_coloured(9, 1))
    recipe = tmp_path / "sharp.toml"
    recipe.write_text('base = "paper"\nlogit_scale = 10\n', "utf-8")
    result = distill(start(data, epochs=8, learning_rate=5e-3, alpha2=1.0, recipe=str(recipe)))
    assert result.top1 == 100
    assert load_student(result.run_directory).classifier.weight.norm(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_recipe_strong_trains_with_all_that_the_artifact_has(start: Start) -> None:
    result = distill(start(recipe="strong", target="both", student="test_vit", image_size=16, epochs=2))
    line = metrics_of(result.run_directory)[-1]
    assert all(line[name] > 0 for name in ("loss_ce", "loss_clip", "loss_soft_label"))
    assert (line["loss_direction"], line["loss_text"]) == (0, 0)
    document = json.loads((result.run_directory / "student" / "config.json").read_text("utf-8"))
    assert document["model_args"]["drop_path_rate"] == 0.1


def test_recipe_strong_trains_from_class_embeddings_alone(start: Start, tmp_path: Path) -> None:
    path = write_example(tmp_path / "classes.safetensors", NAMES)
    result = distill(start(artifact=path, recipe="strong", overrides={"text_weight": 0.0}))
    line = metrics_of(result.run_directory)[-1]
    assert (line["loss_cosine"], line["loss_soft_label"]) == (0, 0)
    assert line["loss_clip"] > 0


def test_a_run_can_begin_with_the_student_of_another(finished: DistillResult, start: Start) -> None:
    result = distill(start(init=str(finished.run_directory), learning_rate=1e-12, max_steps=1))
    before, after = (load_student(folder) for folder in (finished.run_directory, result.run_directory))
    for (name, earlier), later in zip(before.model.named_parameters(), after.model.parameters(), strict=True):
        assert (earlier - later).abs().max() < 1e-6, name


def test_the_record_keeps_which_weights_a_run_began_with(finished: DistillResult, start: Start) -> None:
    assert "initial" not in record_of(finished.run_directory)
    settings = {"init": str(finished.run_directory), "epochs": 9}
    folder = distill(start(**settings, max_steps=1)).run_directory
    digest = record_of(folder)["initial"]["weights_sha256"]
    assert re.fullmatch("[0-9a-f]{64}", digest)
    distill(start(**settings, max_steps=2, resume=True))
    assert record_of(folder)["initial"] == {"weights_sha256": digest}


def test_a_run_whose_checkpoints_are_gone_begins_again_with_the_weights_it_began_with(
    finished: DistillResult, start: Start
) -> None:
    settings = {"init": str(finished.run_directory), "learning_rate": 1e-12, "max_steps": 1}
    folder = distill(start(**settings)).run_directory
    for checkpoint in (folder / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    distill(start(**settings, resume=True))
    before, after = (load_student(each) for each in (finished.run_directory, folder))
    for (name, earlier), later in zip(before.model.named_parameters(), after.model.parameters(), strict=True):
        assert (earlier - later).abs().max() < 1e-6, name


def test_a_run_stops_after_max_steps_in_the_middle_of_an_epoch(start: Start) -> None:
    result = distill(start(epochs=9, max_steps=6))
    assert result.num_steps == 6
    assert [line["step"] for line in metrics_of(result.run_directory)] == [4, 6]
    assert record_of(result.run_directory)["status"] == "finished"


def test_a_run_stops_after_max_steps_at_the_end_of_an_epoch(start: Start) -> None:
    result = distill(start(epochs=9, max_steps=4))
    assert [line["step"] for line in metrics_of(result.run_directory)] == [4]


def test_missing_samples_are_allowed_up_to_a_share_and_told(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    path = write_example(tmp_path / "some.safetensors", NAMES, pairs_of(make_split(30, 0))[3:])
    distill(start(artifact=path, target="sample", max_missing=0.1))
    assert [message for message in caplog.messages if not message.startswith("Images of")][:3] == [
        "Joined some.safetensors: 3 of its 4 classes, 27 of 30 images by content; it holds 27.",
        "3 images have no embedding, and take no part in the losses of samples (rows 0, 1, 2).",
        "12 images to evaluate on: split test.",
    ]


def test_unnamed_classes_are_joined_by_index_if_asked(start: Start, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    cells = {"image": make_images(6, 0), "label": [0, 1, 2] * 2}
    rows = datasets.Dataset.from_dict(cells, features=features)
    data = save_splits(tmp_path / "data", train=rows, test=rows)
    path = write_example(
        tmp_path / "numbers.safetensors", ("0", "1", "2"), extras=Extras(text=False, head=False, classes_named=False)
    )
    assert refusal(start(data, artifact=path)) == (
        "numbers.safetensors: the data's classes have no names, so they cannot be joined by name. If class i is row "
        "i on both sides, pass --join-by-index."
    )
    result = distill(start(data, artifact=path, join_by_index=True))
    assert load_student(result.run_directory).config.class_names == ("0", "1", "2")


# What a student is evaluated on


def test_evaluation_labels_are_joined_by_name(start: Start, tmp_path: Path) -> None:
    moved = make_coloured(9, 1, ("cat", "ant", "bee"))
    data = save_splits(tmp_path / "data", train=make_coloured(24, 0), test=moved)
    assert distill(start(data, epochs=8, learning_rate=5e-3)).top1 == 100


def test_without_an_evaluation_split_a_tenth_is_held_out_and_said(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    rows = make_split(60, 3)
    path = write_example(tmp_path / "alone.safetensors", NAMES, pairs_of(rows))
    result = distill(start(save_alone(tmp_path / "data", rows), artifact=path, target="sample", max_steps=1))
    record = record_of(result.run_directory)
    num_held_out = sum(int.from_bytes(key[:8], "big") % 10 == 0 for key, _ in pairs_of(rows))
    assert 0 < num_held_out < 20
    assert record["data"]["evaluated_on"] == "held-out tenth of the training split"
    assert record["data"]["num_evaluation_images"] == num_held_out
    assert record["data"]["join"]["num_images"] == 60 - num_held_out
    assert (
        f"The data has no evaluation split: {num_held_out} of its 60 images are held out by content." in caplog.messages
    )


def test_held_out_images_are_not_trained_on(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DecodedImages] = []

    def watch_feed(images: DecodedImages, *arguments: Any) -> Any:
        seen.append(images)
        return Feed(images, *arguments)

    def watch_evaluation(student: Any, images: DecodedImages, *arguments: Any) -> Any:
        seen.append(images)
        return evaluate_student(student, images, *arguments)

    monkeypatch.setattr(preparation, "Feed", watch_feed)
    monkeypatch.setattr(training, "evaluate_student", watch_evaluation)
    rows = make_split(40, 3)
    twice = datasets.concatenate_datasets([rows, rows])
    distill(start(save_alone(tmp_path / "data", twice), max_steps=1))
    trained, evaluated = ({key.tobytes() for key in images.keys} for images in seen)
    assert trained.isdisjoint(evaluated)
    assert len(trained) + len(evaluated) == 40


def test_a_named_evaluation_split_is_used(start: Start, tmp_path: Path) -> None:
    data = save_splits(tmp_path / "data", train=make_split(9, 0), test=make_split(6, 1), extra=make_split(3, 2))
    result = distill(start(data, eval_split="extra", max_steps=1))
    assert record_of(result.run_directory)["data"]["evaluated_on"] == "split extra"
    assert record_of(result.run_directory)["data"]["num_evaluation_images"] == 3


def test_the_limit_is_for_training_only(start: Start, saved_data: Path) -> None:
    settings = start()
    limited = settings.model_copy(update={"data": DataSettings(dataset=str(saved_data), limit=9)})
    data = record_of(distill(limited).run_directory)["data"]
    assert (data["join"]["num_images"], data["num_evaluation_images"]) == (9, 12)


# What is refused, and when


@pytest.fixture
def nothing_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "cached_images", lambda *args, **kwargs: pytest.fail("images were decoded"))


@pytest.mark.usefixtures("nothing_decoded")
class TestBeforeAnyImageIsDecoded:
    def test_an_existing_output_is_refused(self, start: Start, tmp_path: Path) -> None:
        assert refusal(start(out=tmp_path)) == (
            f"{tmp_path}: exists. Pass --resume to go on with it, --overwrite, or another --out."
        )

    def test_an_output_that_is_no_run_is_not_overwritten(self, start: Start, tmp_path: Path) -> None:
        assert refusal(start(out=tmp_path, overwrite=True)) == (
            f"{tmp_path}: is not a run directory, so it is not overwritten. Choose another --out."
        )

    def test_a_missing_folder_is_refused(self, start: Start, tmp_path: Path) -> None:
        out = tmp_path / "missing" / "run"
        assert refusal(start(out=out)) == f"{out}: the folder {out.parent} does not exist. Make it first."

    def test_an_unknown_recipe_is_refused(self, start: Start) -> None:
        assert refusal(start(recipe="fast")).startswith("recipe 'fast' does not exist.")

    def test_a_loss_that_needs_samples_is_refused_beside_class_targets(self, start: Start) -> None:
        assert refusal(start(target="class", cosine_weight=0.5)) == (
            "cosine_weight: needs sample embeddings. Pass --target sample or both."
        )

    def test_a_loss_that_the_artifact_does_not_serve_is_refused(self, start: Start, tmp_path: Path) -> None:
        path = write_example(tmp_path / "plain.safetensors", NAMES, pairs_of(make_split(30, 0)))
        assert refusal(start(artifact=path, text_weight=0.1)).startswith("plain.safetensors: has no text embeddings")
        assert refusal(start(artifact=path, recipe="strong", target="both")).startswith(
            "plain.safetensors: has no ridge head, which soft_label_weight 1 needs."
        )

    def test_views_of_another_version_are_refused(self, start: Start, tmp_path: Path) -> None:
        extras = Extras(num_views=2, views_version=99)
        path = write_example(tmp_path / "views.safetensors", NAMES, pairs_of(make_split(30, 0)), extras)
        assert refusal(start(artifact=path, recipe="strong", target="both")).startswith(
            "views.safetensors: its views are of version 99, this program renders version "
        )

    def test_weights_to_begin_with_that_are_missing_are_refused(self, start: Start, tmp_path: Path) -> None:
        assert refusal(start(init=str(tmp_path / "none"))).startswith(
            f"--init {tmp_path / 'none'}: no model.safetensors there."
        )

    def test_a_disk_that_is_too_full_is_refused(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1_000_000))
        settings = start()
        assert re.fullmatch(
            rf"{settings.out}: about [123]\d\.\d MB are needed, 1\.0 MB are free\. Make room or choose another --out\.",
            refusal(settings),
        )

    def test_an_unknown_device_is_refused(self, start: Start) -> None:
        assert refusal(start(device="abacus")).startswith("device 'abacus' is unknown")

    def test_a_missing_artifact_is_refused(self, start: Start, tmp_path: Path) -> None:
        with pytest.raises(store.ArtifactNotFoundError):
            distill(start(artifact=tmp_path / "none.safetensors"))

    def test_an_artifact_without_samples_is_refused_as_sample_target(self, start: Start, tmp_path: Path) -> None:
        path = write_example(tmp_path / "classes.safetensors", NAMES)
        assert refusal(start(artifact=path, target="both")).startswith("classes.safetensors: has no sample embeddings")

    def test_a_damaged_sample_is_refused(self, start: Start, artifact: Path, tmp_path: Path) -> None:
        with store.open_artifact(artifact) as opened:
            embeddings = opened["sample/embedding"].tobytes()
        path = tmp_path / "damaged.safetensors"
        changed = bytes([embeddings[0] ^ 1]) + embeddings[1:]
        path.write_bytes(artifact.read_bytes().replace(embeddings, changed))
        with pytest.raises(store.ArtifactDigestError, match=r"^damaged\.safetensors: sample/embedding has SHA-256 "):
            distill(start(artifact=path, target="sample"))

    def test_classes_that_the_artifact_lacks_are_refused(self, start: Start, tmp_path: Path) -> None:
        path = write_example(tmp_path / "other.safetensors", ("dog", "cat"))
        assert refusal(start(artifact=path)).startswith("other.safetensors: lacks 2 of the data's 3 classes (ant, bee)")

    def test_a_missing_evaluation_split_is_refused(self, start: Start, saved_data: Path) -> None:
        assert refusal(start(eval_split="nope")) == f"{saved_data}: no split 'nope'. It has 'train', 'test'."

    def test_data_without_splits_has_no_named_evaluation_split(self, start: Start, tmp_path: Path) -> None:
        data = save_alone(tmp_path / "data", make_split(9, 0))
        assert refusal(start(data, eval_split="test")) == f"{data}: no split 'test'. It has 'train'."

    def test_evaluation_classes_unknown_to_the_training_data_are_refused(self, start: Start, tmp_path: Path) -> None:
        test = make_split(6, 1, ("ant", "bee", "yak"))
        data = save_splits(tmp_path / "data", train=make_split(9, 0), test=test)
        assert refusal(start(data)) == (
            f"{data}, split test: 1 of its classes were not learned (yak). Learned were 3 classes, among them "
            "ant, bee, cat."
        )

    def test_a_student_that_does_not_fit_is_refused(self, start: Start) -> None:
        assert refusal(start(student="test_vit")) == (
            "student test_vit: image size 8 is not divisible by its patch size 16. Pass --image-size 16."
        )


def test_a_missing_sample_is_refused_before_training(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "Trainer", lambda *args: pytest.fail("training began"))
    path = write_example(tmp_path / "some.safetensors", NAMES, pairs_of(make_split(30, 0))[3:])
    assert refusal(start(artifact=path, target="both")) == (
        "some.safetensors: 3 of 30 training images have no embedding in it (rows 0, 1, 2). Extract with --samples "
        "--per-class all from this data set, or allow it with --max-missing 0.1."
    )
    assert not (tmp_path / "run").exists()


def test_too_few_images_are_refused(start: Start, tmp_path: Path) -> None:
    data = save_splits(tmp_path / "data", train=make_split(1, 0), test=make_split(3, 1))
    assert refusal(start(data)) == (
        f"{data}: 1 images are left to train on and 3 to evaluate on; at least 2 and 1 are needed."
    )


def test_bad_images_are_left_out_only_if_asked(start: Start, tmp_path: Path) -> None:
    junk = {"bytes": b"junk", "path": None}
    rows = make_rows([junk, *make_images(4, 0)], [2, 0, 1, 2, 0])
    data = save_splits(tmp_path / "data", train=rows, test=rows)
    assert "split train, row 0: the image cannot be decoded" in refusal(start(data))
    record = record_of(distill(start(data, skip_bad=True)).run_directory)
    assert (record["data"]["join"]["num_images"], record["data"]["num_evaluation_images"]) == (4, 4)


def test_a_loss_that_is_not_finite_before_the_first_checkpoint_leaves_nothing(start: Start, tmp_path: Path) -> None:
    assert refusal(start(learning_rate=1e30, epochs=2)) == (
        "the loss is not finite at step 2, in epoch 1 (ce is nan, clip is nan). It is likely that a step was too "
        "long: try a lower --lr than 1e+30, or --set gradient_clip=1."
    )
    assert file_names(tmp_path) == []


def test_two_images_are_enough(start: Start, saved_data: Path) -> None:
    limited = start().model_copy(update={"data": DataSettings(dataset=str(saved_data), limit=2)})
    assert distill(limited).num_steps == 1


# Interrupted runs


def stop_at_evaluation(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1, 100))

    def stop(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return evaluate_student(*args, **kwargs)

    monkeypatch.setattr(training, "evaluate_student", stop)


def interrupt(settings: DistillSettings, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stop_at_evaluation(number, patched)
        with pytest.raises(KeyboardInterrupt):
            distill(settings)


def test_a_run_interrupted_before_its_first_student_keeps_its_checkpoint(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(start(epochs=3), 1, monkeypatch)
    assert file_names(tmp_path / "run") == ["checkpoints", "run.json", "tensorboard"]
    assert record_of(tmp_path / "run")["status"] == "interrupted"


def test_a_run_interrupted_later_keeps_the_student_of_the_epoch_before(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(start(epochs=3, seed=2), 3, monkeypatch)
    assert record_of(tmp_path / "run")["status"] == "interrupted"
    assert "result" not in record_of(tmp_path / "run")
    assert len(metrics_of(tmp_path / "run")) == 2
    distill(start(epochs=2, seed=2, out=tmp_path / "two"))
    kept, whole = (weights_of(load_student(tmp_path / name)) for name in ("run", "two"))
    assert equal_weights(kept, whole)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_interrupted_run_is_gone_on_with_to_the_same_end(
    number: int, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: DistillResult
) -> None:
    fields: dict[str, Any] = {"epochs": 3, "target": "both", "learning_rate": 1e-3}
    interrupt(start(**fields), number, monkeypatch)
    result = distill(start(**fields, resume=True))
    assert (result.top1, result.top5, result.num_steps) == (finished.top1, finished.top5, finished.num_steps)
    assert student_bytes(tmp_path / "run") == student_bytes(finished.run_directory)
    for name in ("recipe", "artifact", "data", "compute"):
        assert record_of(tmp_path / "run")[name] == record_of(finished.run_directory)[name]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(
    artifact: Path, saved_data: Path, tmp_path: Path
) -> None:
    moments = random.Random(0)
    command = [sys.executable, str(ROOT / "cli.py"), "distill", "--artifact", str(artifact), "--dataset"]
    command += [str(saved_data), "--student", "test_resnet", "--image-size", "8", "--target", "both", "--device", "cpu"]
    command += [
        "--precision",
        "float32",
        "--epochs",
        "40",
        "--batch-size",
        "8",
        "--set",
        "average_decay=0.9",
        "--set",
        "learn_logit_scale=true",
    ]
    whole = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    again = [*command, "--out", str(out), "--resume", "--checkpoint-minutes", "0.00001"]
    for _ in range(6):
        before = set((out / "checkpoints").glob("0*")) if out.exists() else set()
        process = subprocess.Popen(again, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and not set((out / "checkpoints").glob("0*")) - before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.5))
        process.kill()
        process.communicate()
    done = subprocess.run(again, capture_output=True, text=True, check=True)
    assert "Going on after step " in done.stderr
    assert student_bytes(out) == student_bytes(tmp_path / "whole")
    newest = [
        load_file(max((folder / "checkpoints").iterdir()) / "tensors.safetensors")
        for folder in (out, tmp_path / "whole")
    ]
    assert newest[0].keys() == newest[1].keys()
    assert all(torch.equal(tensor, newest[1][name]) for name, tensor in newest[0].items())
    assert [line["step"] for line in metrics_of(out)] == [4 * epoch for epoch in range(1, 41)]


def test_a_finished_run_gone_on_with_gives_the_same_result(
    start: Start, tmp_path: Path, finished: DistillResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished.run_directory, tmp_path / "run")
    monkeypatch.setattr(Trainer, "step", lambda *arguments: pytest.fail("a step was done again"))
    result = distill(start(epochs=3, target="both", learning_rate=1e-3, resume=True))
    assert (result.top1, result.top5, result.num_steps) == (finished.top1, finished.top5, finished.num_steps)
    assert result.train_seconds == pytest.approx(finished.train_seconds, abs=0.05)
    assert student_bytes(run) == student_bytes(finished.run_directory)
    assert record_of(run)["status"] == "finished"
    assert len(metrics_of(run)) == 3


def test_more_steps_than_before_may_be_asked_for(start: Start, tmp_path: Path, finished: DistillResult) -> None:
    fields: dict[str, Any] = {"epochs": 3, "target": "both", "learning_rate": 1e-3, "resume": True}
    for max_steps in (2, 7, 7, 5):
        result = distill(start(**fields, max_steps=max_steps))
        assert result.num_steps == max(max_steps, 7 if max_steps == 5 else 0)
    assert distill(start(**fields)).num_steps == 12
    assert student_bytes(tmp_path / "run") == student_bytes(finished.run_directory)


def test_the_artifact_may_stand_elsewhere(start: Start, artifact: Path, tmp_path: Path) -> None:
    distill(start(epochs=2, max_steps=3))
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(artifact, tmp_path / "elsewhere" / artifact.name)
    assert distill(start(epochs=2, artifact=moved, resume=True)).num_steps == 8


def test_a_run_of_other_settings_is_not_gone_on_with_and_all_of_them_are_named(
    start: Start, tmp_path: Path, artifact: Path
) -> None:
    distill(start(max_steps=2))
    before = student_bytes(tmp_path / "run")
    changed: dict[str, Any] = {
        "seed": 3,
        "alpha2": 0.25,
        "batch_size": 4,
        "micro_batch": 2,
        "init": str(tmp_path / "run"),
    }
    assert refusal(start(**changed, resume=True)) == (
        f"{tmp_path / 'run'}: is a run of other settings: recipe.alpha2 was 0.5, is 0.25; "
        "recipe.batch_size was 8, is 4; "
        f'settings.init was "scratch", is "{tmp_path / "run"}"; '
        "settings.seed was 0, is 3. Pass the same, or another --out."
    )
    assert student_bytes(tmp_path / "run") == before
    assert record_of(tmp_path / "run")["status"] == "finished"


def test_other_images_are_another_run(start: Start, tmp_path: Path, artifact: Path) -> None:
    data = save_splits(tmp_path / "data", train=make_split(30, 0), test=make_split(12, 1))
    distill(start(data, max_steps=2))
    shutil.rmtree(tmp_path / "data")
    save_splits(tmp_path / "data", train=make_split(30, 0).shuffle(seed=1), test=make_split(9, 1))
    message = refusal(start(data, resume=True))
    for name in ("train_sha256", "evaluation_sha256", "num_evaluation_images"):
        assert f"data.{name} was " in message


def test_another_artifact_is_another_run(start: Start, tmp_path: Path, artifact: Path) -> None:
    distill(start(max_steps=2))
    path = write_example(tmp_path / artifact.name, NAMES, pairs_of(make_split(30, 0))[:10])
    assert "artifact.manifest_sha256 was " in refusal(start(artifact=path, resume=True))


def test_going_on_with_nothing_begins(start: Start, tmp_path: Path, finished: DistillResult) -> None:
    result = distill(start(epochs=3, target="both", learning_rate=1e-3, resume=True))
    assert student_bytes(result.run_directory) == student_bytes(finished.run_directory)


def test_an_older_run_is_overwritten_if_asked(start: Start, tmp_path: Path) -> None:
    distill(start(max_steps=1))
    assert refusal(start()) == (
        f"{tmp_path / 'run'}: exists. Pass --resume to go on with it, --overwrite, or another --out."
    )
    result = distill(start(max_steps=2, overwrite=True))
    assert record_of(tmp_path / "run")["result"]["num_steps"] == result.num_steps == 2
    assert file_names(tmp_path / "run" / "checkpoints") == ["00000002"]


# Alone: no teacher's libraries, no network

ALONE = """
import os, sys

def watch(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        print(event, arguments, file=sys.stderr)
        os._exit(77)

sys.addaudithook(watch)
sys.modules["transformers"] = None

import json
from pathlib import Path
import store
from pipeline.data import DataSettings
from pipeline.distill import DistillSettings, distill
from pipeline.distill.config import EvaluateSettings
from pipeline.distill.evaluate import evaluate_run
from pipeline.distill.predict import predict
from pipeline.distill.student import load_student
import torch

artifact, dataset, image, out = sys.argv[1:]
with store.open_artifact(artifact) as opened:
    num_classes = len(opened["class/mean"])
data = DataSettings(dataset=dataset)
result = distill(DistillSettings(
    artifact=artifact, data=data, out=out, student="test_resnet", image_size=8, target="both", precision="float32",
    device="cpu", overrides={"epochs": 1, "batch_size": 8},
))
test = data.model_copy(update={"split": "test"})
evaluation = evaluate_run(EvaluateSettings(student=Path(out), data=test, precision="float32", device="cpu"))
(answer,) = predict(load_student(Path(out)), [Path(image)], torch.device("cpu"))
loaded = sorted(name for name in sys.modules if name.startswith("transformers.") or name == "pipeline.extract")
print(json.dumps([num_classes, result.top1, evaluation.top1, len(answer), loaded]))
"""


def test_students_need_neither_transformers_nor_a_network(artifact: Path, saved_data: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    make_images(1, 0)[0].save(image)
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(artifact), str(saved_data), str(image), str(tmp_path / "run")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    num_classes, distilled, evaluated, num_answers, loaded = json.loads(done.stdout)
    assert (num_classes, num_answers) == (4, 3)
    assert distilled == evaluated
    assert loaded == []
