import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

import store
from pipeline.data import DataSettings
from pipeline.distill import DistillResult, DistillSettings, distill
from pipeline.distill import run as module
from pipeline.distill.config import EvaluateSettings
from pipeline.distill.evaluate import evaluate_run, evaluate_student
from pipeline.distill.student import load_student
from pipeline.errors import PipelineError
from tests.conftest import CLASS_NAMES, make_images, make_split
from tests.pipeline.distill.examples import (
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
    return write_example(path, NAMES, pairs_of(make_split(30, 0)))


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


# What a run leaves


def test_a_run_leaves_student_metrics_scalars_and_record(finished: DistillResult) -> None:
    folder = finished.run_directory
    assert file_names(folder) == ["metrics.jsonl", "run.json", "student", "tensorboard"]
    assert file_names(folder / "student") == ["config.json", "model.safetensors"]
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
    assert finished.memory.resident_bytes > 100_000_000
    assert finished.memory.device_bytes == 0


def test_the_record_holds_settings_recipe_artifact_and_result(
    finished: DistillResult, artifact: Path, saved_data: Path
) -> None:
    record = record_of(finished.run_directory)
    assert record["status"] == "finished"
    assert record["settings"]["target"] == "both"
    assert record["settings"]["data"]["dataset"] == str(saved_data)
    assert record["recipe"]["epochs"] == 3
    assert record["recipe"]["weight_decay"] == 0.1
    with store.open_artifact(artifact) as opened:
        assert record["artifact"]["manifest_sha256"] == opened.manifest.sha256()
        assert record["artifact"]["teacher"]["name"] == "owner/teacher"
    assert record["data"] == {
        "name": "saved",
        "revision": None,
        "num_classes": 3,
        "num_train_images": 30,
        "num_evaluation_images": 12,
        "evaluated_on": "split test",
    }
    assert record["software"]["timm"]
    assert record["result"] == {
        "run_directory": "run",
        "top1": finished.top1,
        "top5": 100.0,
        "num_parameters": finished.num_parameters,
        "num_steps": 12,
        "images_per_second": finished.images_per_second,
        "train_seconds": finished.train_seconds,
        "seconds": finished.seconds,
        "memory": {"resident_bytes": finished.memory.resident_bytes, "device_bytes": 0},
    }


def test_distill_and_evaluate_agree(finished: DistillResult, saved_data: Path) -> None:
    data = DataSettings(dataset=str(saved_data), split="test")
    found = evaluate_run(EvaluateSettings(student=finished.run_directory, data=data, precision="float32", device="cpu"))
    assert (found.top1, found.top5) == (finished.top1, finished.top5)


def test_runs_and_evaluations_share_the_cache_that_is_named(
    start: Start, saved_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    folder = tmp_path / "cache"
    first, second = (distill(start(out=tmp_path / name, cache=folder)) for name in ("first", "second"))
    data = DataSettings(dataset=str(saved_data), split="test")
    evaluate_run(EvaluateSettings(student=first.run_directory, data=data, device="cpu", cache=folder))
    said = [message.split(" /")[0] for message in caplog.messages if message.startswith("Images of")]
    assert [line.split(" in ")[0] for line in said] == [
        "Images of split train: decoded",
        "Images of split test: decoded",
        "Images of split train: read from the cache",
        "Images of split test: read from the cache",
        "Images of split test: read from the cache",
    ]
    assert len(file_names(folder)) == 2
    students = [weights_of(load_student(result.run_directory)) for result in (first, second)]
    assert equal_weights(*students)


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
    result = distill(start(data, epochs=15, learning_rate=3e-3))
    assert result.top1 == 100


def test_at_alpha2_one_the_classifier_is_made_of_class_embeddings(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    data = save_splits(tmp_path / "data", train=make_coloured(24, 0), test=make_coloured(9, 1))
    recipe = tmp_path / "sharp.toml"
    paper = (ROOT / "pipeline" / "distill" / "recipes" / "paper.toml").read_text("utf-8")
    recipe.write_text(paper.replace("logit_scale = 1.0", "logit_scale = 10.0"), "utf-8")
    result = distill(start(data, epochs=15, learning_rate=3e-3, alpha2=1.0, recipe=str(recipe)))
    assert result.top1 == 100
    assert load_student(result.run_directory).classifier.weight.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    assert "At α₂ = 1 the classifier is made of the projected class embeddings." in caplog.messages


def test_a_run_stops_after_max_steps_in_the_middle_of_an_epoch(start: Start) -> None:
    result = distill(start(epochs=9, max_steps=6))
    assert result.num_steps == 6
    assert [line["step"] for line in metrics_of(result.run_directory)] == [4, 6]
    assert record_of(result.run_directory)["status"] == "finished"


def test_a_run_stops_after_max_steps_at_the_end_of_an_epoch(start: Start) -> None:
    result = distill(start(epochs=9, max_steps=4))
    assert [line["step"] for line in metrics_of(result.run_directory)] == [4]


def test_missing_samples_are_allowed_up_to_a_share_and_counted(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    path = write_example(tmp_path / "some.safetensors", NAMES, pairs_of(make_split(30, 0))[3:])
    distill(start(artifact=path, target="sample", max_missing=0.1))
    assert "3 training images have no sample embedding and take no part in that loss." in caplog.messages
    assert (
        "Joined some.safetensors: 4 classes, 27 images by content; 30 images to train on, 12 to evaluate on "
        "(split test)." in caplog.messages
    )


def test_unnamed_classes_are_joined_by_index_if_asked(start: Start, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    cells = {"image": make_images(6, 0), "label": [0, 1, 2] * 2}
    rows = datasets.Dataset.from_dict(cells, features=features)
    data = save_splits(tmp_path / "data", train=rows, test=rows)
    path = write_example(tmp_path / "numbers.safetensors", ("0", "1", "2"), classes_named=False)
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
    assert distill(start(data, epochs=15, learning_rate=3e-3)).top1 == 100


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
    assert record["data"]["num_train_images"] == 60 - num_held_out
    assert (
        f"The data has no evaluation split: {num_held_out} of its 60 images are held out by content." in caplog.messages
    )


def test_held_out_images_are_not_trained_on(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    train = module._train

    def watch(trainer: Any, images: Any, directory: Any, max_steps: int | None) -> DistillResult:
        seen.append(images)
        return train(trainer, images, directory, max_steps)

    monkeypatch.setattr(module, "_train", watch)
    rows = make_split(40, 3)
    twice = datasets.concatenate_datasets([rows, rows])
    distill(start(save_alone(tmp_path / "data", twice), max_steps=1))
    trained = {key.tobytes() for key in seen[0].train.keys}
    evaluated = {key.tobytes() for key in seen[0].evaluation.keys}
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
    assert (data["num_train_images"], data["num_evaluation_images"]) == (9, 12)


# What is refused, and when


@pytest.fixture
def nothing_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cached_images", lambda *args, **kwargs: pytest.fail("images were decoded"))


@pytest.mark.usefixtures("nothing_decoded")
class TestBeforeAnyImageIsDecoded:
    def test_an_existing_output_is_refused(self, start: Start, tmp_path: Path) -> None:
        assert refusal(start(out=tmp_path)) == f"{tmp_path}: exists. Choose another --out, or pass --overwrite."

    def test_an_output_that_is_no_run_is_not_overwritten(self, start: Start, tmp_path: Path) -> None:
        assert refusal(start(out=tmp_path, overwrite=True)) == (
            f"{tmp_path}: is not a run directory, so it is not overwritten. Choose another --out."
        )

    def test_a_missing_folder_is_refused(self, start: Start, tmp_path: Path) -> None:
        out = tmp_path / "missing" / "run"
        assert refusal(start(out=out)) == f"{out}: the folder {out.parent} does not exist. Make it first."

    def test_an_unknown_recipe_is_refused(self, start: Start) -> None:
        assert refusal(start(recipe="fast")).startswith("recipe 'fast' does not exist.")

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
            f"{data}, split test: 1 of its classes are unknown to the student (yak). It knows 3, among them ant, bee, "
            "cat."
        )

    def test_a_student_that_does_not_fit_is_refused(self, start: Start) -> None:
        assert refusal(start(student="test_vit")) == (
            "student test_vit: image size 8 is not divisible by its patch size 16. Pass --image-size 16."
        )


def test_a_missing_sample_is_refused_before_training(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Trainer", lambda *args: pytest.fail("training began"))
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
    assert (record["data"]["num_train_images"], record["data"]["num_evaluation_images"]) == (4, 4)


def test_a_loss_that_is_not_finite_in_the_first_epoch_leaves_nothing(start: Start, tmp_path: Path) -> None:
    assert refusal(start(learning_rate=1e30, epochs=2)) == (
        "the loss is not finite in epoch 1. Try a lower --lr than 1e+30, or --precision float32."
    )
    assert file_names(tmp_path) == []


# Interrupted runs


def stop_in_epoch(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1, 100))

    def stop(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return evaluate_student(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate_student", stop)


def test_a_run_interrupted_in_its_first_epoch_leaves_nothing(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in_epoch(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distill(start(epochs=3))
    assert file_names(tmp_path) == []


def test_a_run_interrupted_later_keeps_the_student_of_the_epoch_before(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in_epoch(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distill(start(epochs=3, seed=2))
    monkeypatch.undo()
    assert record_of(tmp_path / "run")["status"] == "interrupted"
    assert "result" not in record_of(tmp_path / "run")
    assert len(metrics_of(tmp_path / "run")) == 2
    distill(start(epochs=2, seed=2, out=tmp_path / "two"))
    kept, whole = (weights_of(load_student(tmp_path / name)) for name in ("run", "two"))
    assert equal_weights(kept, whole)


def test_an_older_run_is_overwritten_if_asked(start: Start, tmp_path: Path) -> None:
    distill(start(max_steps=1))
    assert refusal(start()) == f"{tmp_path / 'run'}: exists. Choose another --out, or pass --overwrite."
    result = distill(start(max_steps=2, overwrite=True))
    assert record_of(tmp_path / "run")["result"]["num_steps"] == result.num_steps == 2


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
    artifact=artifact, data=data, out=out, student="test_resnet", image_size=8, target="both", epochs=1, batch_size=8,
    precision="float32", device="cpu",
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


def test_a_cosine_regression_without_sample_targets_is_refused(start: Start, tmp_path: Path) -> None:
    recipe = tmp_path / "cosine.toml"
    recipe.write_text(load_recipe_text().replace("cosine_weight = 0.0", "cosine_weight = 0.5"))
    with pytest.raises(PipelineError) as refused:
        distill(start(recipe=str(recipe), target="class"))
    assert str(refused.value) == (
        f"recipe {recipe}: cosine_weight 0.5 needs sample embeddings. Pass --target sample or both, or set it to 0."
    )


def load_recipe_text() -> str:
    return (Path(store.__file__).parents[1] / "pipeline/distill/recipes/paper.toml").read_text("utf-8")
