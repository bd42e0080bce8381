"""The report of a run: what it says, that names do nothing in it, and that a run does not fail for want of it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import DataSettings
from pipeline.distill import DistillResult, DistillSettings, distill
from pipeline.distill import run as run_module
from pipeline.distill.finished import read_run
from pipeline.distill.report_page import write_run_page
from pipeline.errors import PipelineError
from tests.conftest import CLASS_NAMES, make_split
from tests.pipeline.distill.examples import pairs_of, write_example
from tests.pipeline.test_report import HOSTILE, Page

Change = Callable[[dict[str, Any]], None]


def settings_of(artifact: Path, dataset: Path, out: Path, **fields: Any) -> DistillSettings:
    quick = {"student": "test_resnet", "image_size": 8, "device": "cpu", "precision": "float32"}
    overrides = {"epochs": 2, "batch_size": 8, **fields.pop("overrides", {})}
    data = DataSettings(dataset=str(dataset))
    return DistillSettings.model_validate(
        {"artifact": artifact, "data": data, "out": out, "overrides": overrides, **quick, **fields}
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "a.safetensors"
    return write_example(path, ("dog", *CLASS_NAMES), pairs_of(make_split(30, 0)))


@pytest.fixture(scope="module")
def finished(artifact: Path, saved_data: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    out = tmp_path_factory.mktemp("runs") / "run"
    return distill(settings_of(artifact, saved_data, out, target="both", overrides={"learn_logit_scale": True}))


@pytest.fixture
def copied(finished: DistillResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.run_directory, tmp_path / "run"))


def changed(folder: Path, change: Change) -> Path:
    """Change a run's record."""
    record = json.loads((folder / "run.json").read_text("utf-8"))
    change(record)
    (folder / "run.json").write_text(json.dumps(record), "utf-8")
    return folder


def text_of(folder: Path) -> str:
    return (folder / "report.html").read_text("utf-8")


def picture_titles(page: str) -> list[str]:
    return [title.split(".")[0] for title in re.findall('alt="([^"]+)"', page)]


def test_a_run_ends_with_a_report(finished: DistillResult) -> None:
    assert finished.report == finished.run_directory / "report.html"
    text = text_of(finished.run_directory)
    page = Page(text)
    assert page.texts[:2] == ["run: test_resnet on saved"] * 2
    assert re.findall("<h2>(.*?)</h2>", text) == [
        "Curves",
        "Worst classes",
        "Most confused classes",
        "Alignment with the teacher",
        "Data and artifact",
        "Recipe",
        "Where it ran",
    ]
    for expected in (
        "12 images, split test; in brackets the 95 % interval (Wilson)",
        f"test_resnet, {finished.num_parameters:,} parameters, 8 px",
        "owner/teacher, embeddings of 6 values",
        "saved: 30 images, 3 classes",
        "paper, target both, α₂ = 0.5",
        "All classes, top-1, with 95 % intervals.",
        "augmentation.horizontal_flip",
        "passes over the images",
        "linear CKA of classes",
        "cosine to the own sample",
        "cpu, float32",
    ):
        assert expected in page.texts, expected
    assert f"8 steps in 2 epochs, {finished.images_per_second:,.1f} images/s; " in text
    assert "Joined a.safetensors: 3 of its 4 classes, 30 of 30 images by content; it holds 30." in text


def test_all_curves_are_drawn_and_told_in_words(finished: DistillResult) -> None:
    text = text_of(finished.run_directory)
    assert picture_titles(text) == [
        "Losses, means over the images of an epoch",
        "Accuracy on the evaluation images after each epoch, in percent",
        "Learning rate at the end of each epoch",
        "Logit scale κ at the end of each epoch",
    ]
    lines = [json.loads(line) for line in (finished.run_directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    first, last = lines
    assert f"From the first to the last: total {first['loss']:.3g} to {last['loss']:.3g}, cross-entropy " in text
    assert "learning rate 0.0001 to 0.0001." in text


def test_a_report_loads_nothing(finished: DistillResult) -> None:
    page = Page(text_of(finished.run_directory))
    loaded = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert loaded
    assert all(value.startswith("data:image/") for value in loaded)
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(page.elements)


def test_the_record_holds_what_the_report_says(finished: DistillResult) -> None:
    run = read_run(finished.run_directory)
    assert run.outcome.top1.share == pytest.approx(finished.top1 / 100)
    assert run.outcome.top1.num_images == sum(each.accuracy.num_images for each in run.outcome.worst) == 12
    assert run.outcome.alignment.num_samples == 30
    assert run.result.num_steps == finished.num_steps
    assert [line["epoch"] for line in run.epochs] == [1, 2]


def test_a_report_is_made_again_from_the_directory_alone(copied: Path) -> None:
    first = text_of(copied)
    (copied / "report.html").unlink()
    shutil.rmtree(copied / "student")
    assert write_run_page(copied) == copied / "report.html"
    again = text_of(copied)
    without_pictures = re.sub(r'<img class="pixels" src="[^"]+" alt="">', '<span class="none">no picture</span>', first)
    assert again == without_pictures
    write_run_page(copied)
    assert text_of(copied) == again


def test_a_run_of_one_epoch_on_classes_alone(artifact: Path, saved_data: Path, tmp_path: Path) -> None:
    distill(settings_of(artifact, saved_data, tmp_path / "run", overrides={"epochs": 1, "alpha2": 0}))
    text = text_of(tmp_path / "run")
    assert "in percent. After the only one: top-1 " in text
    assert "There are no cosines: P learned nothing of images, or embeddings are not finite." in Page(text).texts
    assert "cosine to the own class" not in text
    assert picture_titles(text)[-1] == "Learning rate at the end of each epoch"


def test_without_mistakes_nothing_is_confused(copied: Path) -> None:
    changed(copied, lambda record: record["outcome"].update(confused=[], mistakes=[]))
    write_run_page(copied)
    assert "Most confused classes" not in Page(text_of(copied)).texts


def test_without_any_figure_of_alignment_that_is_said(copied: Path) -> None:
    changed(copied, lambda record: record["outcome"].update(alignment={"num_images": 12, "num_classes": 3}))
    write_run_page(copied)
    assert (
        "There are no cosines: P learned nothing of images, or embeddings are not finite."
        in Page(text_of(copied)).texts
    )
    assert "linear CKA of classes" not in text_of(copied)


def test_the_worst_of_many_classes_are_called_so(copied: Path) -> None:
    changed(copied, lambda record: record["outcome"].update(num_classes=21_000))
    write_run_page(copied)
    assert "The 3 of 21,000 classes of lowest accuracy, top-1, with 95 % intervals." in Page(text_of(copied)).texts


def test_a_gpus_memory_is_told_beside_the_processs(copied: Path) -> None:
    changed(copied, lambda record: record["result"]["memory"].update(resident_bytes=2 * 10**9, device_bytes=10**9))
    write_run_page(copied)
    assert "2.0 GB at the peak, libraries included, 1.0 GB on the GPU" in Page(text_of(copied)).texts


def test_paths_do_not_say_how_a_machine_is_set_up(copied: Path) -> None:
    changed(copied, lambda record: record["settings"].update(recipe="/home/eve/my.toml", init="/home/eve/weights"))
    write_run_page(copied)
    text = text_of(copied)
    assert "/home" not in text
    assert "my.toml, target both" in text


def test_names_of_strangers_do_nothing(copied: Path) -> None:
    def rename(name: str) -> Change:
        def change(record: dict[str, Any]) -> None:
            outcome = record["outcome"]
            for each in (*outcome["worst"], *outcome["confused"], *outcome["mistakes"]):
                each.update({key: name for key in ("name", "label", "predicted") if key in each})
            record["artifact"]["teacher"]["name"] = record["artifact"]["file"] = record["data"]["name"] = name
            record["data"]["join"]["artifact"] = record["data"]["evaluated_on"] = record["settings"]["recipe"] = name
            record["software"] = {name: name}
            record["machine"] = {name: name}
            record["recipe"] = {name: name, "augmentation": {name: name}}

        return change

    write_run_page(changed(copied, rename("plain")))
    harmless = Page(text_of(copied))
    for name in (HOSTILE, "", "\u202e", "w" * 10_000):
        write_run_page(changed(copied, rename(name)))
        hostile = Page(text_of(copied))
        assert hostile.elements == harmless.elements
        assert "script" not in hostile.elements
    assert "w" * 59 + "…" in hostile.texts


@pytest.mark.parametrize(
    ("writer", "name", "what"),
    [("write_run_page", "report.html", "report"), ("write_model_card", "student/README.md", "model card")],
)
def test_a_page_that_cannot_be_written_costs_no_run(
    writer: str,
    name: str,
    what: str,
    artifact: Path,
    saved_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(folder: Path, pictures: object = None) -> Path:
        raise PipelineError(f"{folder / name}: cannot be written (No space left on device).")

    monkeypatch.setattr(run_module, writer, fail)
    out = tmp_path / "run"
    result = distill(settings_of(artifact, saved_data, out))
    assert result.report == (None if what == "report" else out / "report.html")
    assert caplog.messages[-1] == f"There is no {what}: {out / name}: cannot be written (No space left on device)."
    assert not (out / name).exists()
    assert json.loads((out / "run.json").read_text("utf-8"))["status"] == "finished"


def test_a_run_is_not_called_finished_before_it_has_its_report(
    artifact: Path, saved_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(folder: Path, pictures: object) -> Path:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_run_page", interrupt)
        with pytest.raises(KeyboardInterrupt):
            distill(settings_of(artifact, saved_data, out))
    assert json.loads((out / "run.json").read_text("utf-8"))["status"] == "interrupted"
    assert distill(settings_of(artifact, saved_data, out, resume=True)).report == out / "report.html"
    assert json.loads((out / "run.json").read_text("utf-8"))["status"] == "finished"


# What cannot be read


def unfinished(record: dict[str, Any]) -> None:
    del record["result"], record["outcome"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unfinished, "result: missing; outcome: missing"),
        (
            lambda record: record["result"].update(num_steps="many"),
            "result.num_steps: input should be a valid integer, unable to parse string as an integer, found 'many'",
        ),
        (
            lambda record: record["result"].update(seconds=float("nan")),
            "result.seconds: input should be a finite number, found nan",
        ),
        (
            lambda record: record["outcome"]["worst"][0].update(accuracy=3),
            "outcome.worst.0.accuracy: ",
        ),
    ],
)
def test_a_damaged_record_is_one_line(change: Change, reason: str, copied: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        write_run_page(changed(copied, change))
    assert str(caught.value).startswith(f"{copied}: does not tell what a report needs ({reason}")
    assert str(caught.value).endswith("). Is it a finished run?")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("run.json", b"[1]", "cannot convert dictionary update sequence element #0 to a sequence"),
        ("run.json", b"null", "'NoneType' object is not iterable"),
        ("run.json", b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("run.json", b"[" * 100_000, "maximum recursion depth exceeded"),
        ("run.json", b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("metrics.jsonl", b'{"epoch": 1}\n{"epo', "Unterminated string starting at: line 1 column 2 (char 1)"),
        ("metrics.jsonl", b'{"epoch": NaN}\n', "epochs.0.epoch: input should be a finite number, found nan; "),
        ("metrics.jsonl", b"", "epochs: tuple should have at least 1 item after validation, not 0"),
    ],
)
def test_a_damaged_file_is_one_line(file: str, content: bytes, reason: str, copied: Path) -> None:
    (copied / file).write_bytes(content)
    with pytest.raises(PipelineError) as caught:
        write_run_page(copied)
    assert str(caught.value).startswith(f"{copied}: does not tell what a report needs ({reason}")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        write_run_page(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: does not tell what a report needs ([Errno 2] No such file or directory: "
        f"'{tmp_path / 'run.json'}'). Is it a finished run?"
    )


def test_metrics_of_another_version_are_drawn_as_far_as_they_go(copied: Path) -> None:
    (copied / "metrics.jsonl").write_text('{"epoch": 1, "accuracy": 3}\n', "utf-8")
    write_run_page(copied)
    assert "After the only one:" not in text_of(copied)
