"""The report card beside an artifact: measured, written twice, printed."""

import json
from pathlib import Path

import pytest

from pipeline.data import DataSettings
from pipeline.extract import ExtractResult, ExtractSettings, extract
from pipeline.extract.report_files import report_paths


@pytest.fixture
def result(tiny_teacher: Path, saved_data: Path, tmp_path: Path) -> ExtractResult:
    settings = ExtractSettings(
        teacher=str(tiny_teacher),
        data=DataSettings(dataset=str(saved_data)),
        out=tmp_path / "a.h5",
        device="cpu",
        precision="float32",
    )
    return extract(settings)


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
