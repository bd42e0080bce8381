"""The report card beside an artifact: measured, written twice, printed."""

import json
from pathlib import Path

import pytest

import store
from pipeline.data import DataSettings
from pipeline.errors import PipelineError
from pipeline.extract import ExtractResult, ExtractSettings, extract
from pipeline.extract.report_files import report_paths


@pytest.fixture
def settings(tiny_teacher: Path, saved_data: Path, tmp_path: Path) -> ExtractSettings:
    return ExtractSettings(
        teacher=str(tiny_teacher),
        data=DataSettings(dataset=str(saved_data)),
        out=tmp_path / "a.h5",
        device="cpu",
        precision="float32",
    )


@pytest.fixture
def result(settings: ExtractSettings) -> ExtractResult:
    return extract(settings)


def refusal(settings: ExtractSettings) -> str:
    """Return what is said before even the teacher is looked for."""
    with pytest.raises(PipelineError) as error:
        extract(settings.model_copy(update={"teacher": "./nowhere"}))
    return str(error.value)


def test_the_card_is_written_as_json_and_as_a_page(result: ExtractResult) -> None:
    as_json, as_page = report_paths(result.path)
    assert (as_json.name, as_page.name) == ("a.report.json", "a.report.html")
    assert json.loads(as_json.read_text("utf-8")) == result.report_card.as_json()
    page = as_page.read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert "tiny-vit on saved" in page
    assert page.count("<img") >= 1 + len(result.report_card.doubtful)  # the map, and a picture of each doubtful image


def test_the_card_is_of_all_embedded_images(result: ExtractResult) -> None:
    card = result.report_card
    assert (card.num_images, card.num_classes, card.embed_dim) == (30, 3, 24)
    assert {label.row for label in card.doubtful} <= set(range(30))


@pytest.mark.parametrize("suffix", [".report.json", ".report.html"])
def test_a_card_that_is_not_its_own_is_replaced_only_when_asked(settings: ExtractSettings, suffix: str) -> None:
    path = settings.out.with_suffix(suffix)
    path.write_text("mine")
    assert refusal(settings) == f"{path}: exists. Choose another --out, or pass --overwrite."
    assert path.read_text() == "mine"
    extract(settings.model_copy(update={"overwrite": True}))
    assert path.read_text("utf-8") != "mine"


def test_two_artifacts_of_one_name_do_not_share_a_card(result: ExtractResult, settings: ExtractSettings) -> None:
    other = settings.model_copy(update={"out": settings.out.with_suffix(".safetensors")})
    as_json, _ = report_paths(result.path)
    assert refusal(other) == f"{as_json}: exists. Choose another --out, or pass --overwrite."
    assert not other.out.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_its_place_is_noticed_before_anything_is_embedded(
    settings: ExtractSettings, overwrite: bool
) -> None:
    path = settings.out.with_suffix(".report.html")
    path.mkdir()
    assert refusal(settings.model_copy(update={"overwrite": overwrite})) == (
        f"{path}: is a folder, and the report card goes there. Choose another --out."
    )


def test_a_run_that_was_stopped_between_its_files_goes_on(
    settings: ExtractSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("pipeline.extract.report_files.report_card_page", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(settings)
    as_json, as_page = report_paths(settings.out)
    assert (settings.out.exists(), as_json.exists(), as_page.exists()) == (True, True, False)
    extract(settings)
    assert as_page.exists()
    with pytest.raises(store.StoreError, match="exists"):
        extract(settings)
