"""HTML reports: whole, balanced, harmless whatever the names, the same every time; and the page of a report card."""

import base64
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import store
from pipeline.errors import PipelineError
from pipeline.extract.grading import grade
from pipeline.extract.report_card import ReportCard
from pipeline.extract.report_page import draw_class_map, report_card_page
from pipeline.report import (
    Bar,
    Figure,
    Gallery,
    Notice,
    Section,
    Table,
    Thumbnail,
    escaped,
    render_report,
    write_report,
)
from tests.pipeline.test_report_card import clusters
from tests.store.examples import class_tensors, file_names, make_manifest

HOSTILE = "</style></td><script>alert(1)</script>\"' onerror=x &amp; \x00\x1b[31m\r\n\u202eevil\u2066\u2028\ud800"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
VOID = ("meta", "img")


class Page(HTMLParser):
    """Reads a page, and checks that every element is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip().replace("\u00a0%", " %"))


def every_block(text: str) -> str:
    """Render a page with this text in every place."""
    blocks = (
        text,
        Notice(text),
        Table((text, "number", text), [(text, 1234567, Bar(0.5, text, (0.25, 0.75)))]),
        Figure(SVG, text),
        Gallery([Thumbnail(Image.new("RGB", (32, 32)), (text, text)), Thumbnail(None, (text,))]),
    )
    return render_report(text, blocks, [Section(text, blocks), Section("left out", ())])


def thumbnail_of(image: Image.Image) -> Image.Image:
    page = render_report("t", [Gallery([Thumbnail(image, ())])], ())
    content = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return Image.open(io.BytesIO(base64.b64decode(content[0])))


def test_hostile_text_is_shown_and_does_nothing() -> None:
    harmless, hostile = Page(every_block("name")), Page(every_block(HOSTILE))
    assert hostile.elements == harmless.elements
    assert [name for name, _ in hostile.attributes] == [name for name, _ in harmless.attributes]
    assert "script" not in hostile.elements
    shown = HOSTILE[: HOSTILE.index("\x00")] + "\\x00\\x1b[31m\\r\\n\\u202eevil\\u2066\\u2028\\ud800"
    assert [text.replace("name", shown) for text in harmless.texts] == hostile.texts


def test_names_of_every_script_stay_as_they_are() -> None:
    for name in ("猫の写真", "मछली", "שלום", "👩‍🔬", "naïve", "a\u00a0b", "$x^2$", "{title}"):
        assert escaped(name) == name
        assert name in Page(every_block(name)).texts


def test_a_page_loads_nothing() -> None:
    page = Page(every_block("name"))
    loaded = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert loaded
    assert all(value.startswith("data:image/") for value in loaded)
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(page.elements)
    style = every_block("name").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert style.count("{") == style.count("}") > 20
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes


def test_the_same_contents_give_the_same_page() -> None:
    assert every_block("name") == every_block("name")
    assert "left out" not in every_block("name")


def test_a_bar_is_drawn_to_scale() -> None:
    page = render_report("t", [Table(("bar",), [(Bar(0.25, "25 %", (0.2, 0.375)),)])], ())
    assert '<rect class="share" width="25.00" height="8"/>' in page
    assert '<rect class="interval" x="20.00" y="3" width="17.50" height="2"/>' in page
    assert "1,234,567" in every_block("name")


def test_thumbnails_are_small_and_keep_their_shape() -> None:
    assert thumbnail_of(Image.new("RGB", (960, 480), "red")).size == (96, 48)
    assert thumbnail_of(Image.new("L", (1, 5000))).size[1] == 96
    small = thumbnail_of(Image.new("RGB", (32, 20), "red"))
    assert (small.size, small.mode, small.info) == ((32, 20), "RGB", {})
    image = Image.new("RGB", (200, 200))
    image.info["icc_profile"] = b"what a camera says of itself"
    assert thumbnail_of(image).info == {}
    assert image.size == (200, 200)


def test_what_is_no_picture_and_what_does_not_fit_its_table_is_refused() -> None:
    with pytest.raises(ValueError, match="expected PNG or SVG"):
        render_report("t", [Figure(b"GIF89a", "no")], ())
    with pytest.raises(ValueError, match="zip"):
        render_report("t", [Table(("one", "two"), [("only one",)])], ())


def test_a_report_is_written_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.html"
    write_report("één", out)
    assert out.read_bytes() == "één".encode()
    with pytest.raises(PipelineError, match="exists"):
        write_report("new", out)

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(PipelineError, match=r"report\.html: cannot be written \(No space left on device\)\."):
            write_report("new", out, overwrite=True)
    assert (file_names(tmp_path), out.read_text(encoding="utf-8")) == (["report.html"], "één")
    write_report("new", out, overwrite=True)
    assert (file_names(tmp_path), out.read_text(encoding="utf-8")) == (["report.html"], "new")


def a_card(names: tuple[str, ...] = ("ant", "bee", "cat", "dog"), noise: float = 2.0) -> ReportCard:
    return grade(clusters(80, len(names), noise=noise), names)


def test_a_card_becomes_a_page_with_warnings_first() -> None:
    card = a_card()
    rows = [each.row for each in card.doubtful]
    thumbnails = {row: Image.new("RGB", (40, 40), (row, 0, 0)) for row in rows[1:]}
    text = report_card_page(card, "teacher on data", Figure(SVG, "a map"), thumbnails)
    page = Page(text)
    assert page.texts[:3] == ["Report card: teacher on data"] * 2 + ["80 images, 4 classes, embeddings of 6 values."]
    assert page.texts[3 : 3 + len(card.warnings())] == card.warnings()
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == [
        *("Accuracy", "Shape of the embeddings", "Map of classes", "Most confused classes", "Most doubtful labels")
    ]
    for expected in (str(card.ridge), card.confused[0].predicted, f"row {rows[0]}", "no picture"):
        assert expected in page.texts
    assert text.count("data:image/png") == len(rows) - 1
    assert report_card_page(card, "teacher on data", Figure(SVG, "a map"), thumbnails) == text


def test_names_of_strangers_do_nothing_on_the_page_of_a_card() -> None:
    names = (HOSTILE, "", "w" * 1000, "\u202e")
    plain, hostile = (Page(report_card_page(a_card(each), each[0], "no map", {})) for each in (tuple("abcd"), names))
    assert plain.elements == hostile.elements
    assert "(no name)" in hostile.texts
    assert "w" * 59 + "…" in hostile.texts
    assert max(map(len, hostile.texts)) < 400


def test_classes_with_too_few_images_are_listed_up_to_a_limit() -> None:
    names = tuple(f"class {number}" for number in range(40))
    page = Page(report_card_page(a_card(names, 0.1), "teacher on data", "no map", {}))
    assert "Classes with few images" in page.texts
    assert "And 10 more: the card as JSON names all." in page.texts


def test_a_card_without_accuracies_has_a_page() -> None:
    card = grade(clusters(1, 1), ("ant",))
    texts = Page(report_card_page(card, "teacher on data", "no map", {})).texts
    assert "No accuracy is known: no image was left to fit a classifier on." in texts
    assert "Accuracy" not in texts


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact of three classes."""
    path = tmp_path / "artifact.safetensors"
    store.write_artifact(path, make_manifest(3, 5, 1), class_tensors(3, 5))
    return path


def test_the_map_of_classes_is_drawn_from_the_artifact(artifact: Path) -> None:
    drawn = draw_class_map(artifact)
    assert isinstance(drawn, Figure)
    picture = Image.open(io.BytesIO(drawn.picture))
    assert picture.format == "PNG"
    assert np.asarray(picture).std() > 1
    assert file_names(artifact.parent) == [artifact.name]


def test_without_its_extra_the_map_is_left_out_and_said(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    said = draw_class_map(artifact)
    assert said == (
        "There is no picture: store plot needs matplotlib, which is not installed: pip install 'clip-embed-kd[plot]'"
    )
    assert said in Page(report_card_page(a_card(), "teacher on data", said, {})).texts
