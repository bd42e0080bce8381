import math
import re
from xml.etree import ElementTree as ET

import pytest

from pipeline.curves import Curve, draw_curves
from pipeline.report import Figure, render_report

SVG = "{http://www.w3.org/2000/svg}"
PLAIN = Curve("top-1", [(1, 10.0), (2, 30.0), (3, 40.0)])


def parsed(*curves: Curve) -> ET.Element:
    return ET.fromstring(draw_curves("a title", curves).decode())


def ticks(*curves: Curve) -> tuple[list[str], list[str]]:
    """Return the labels of the epochs and of the values."""
    texts = [text for text in parsed(*curves).iter(SVG + "text") if text.get("class") is None]
    up = [str(text.text) for text in texts if text.get("text-anchor") == "end"]
    across = [str(text.text) for text in texts if text.get("text-anchor") == "middle"]
    assert across.pop() == "epoch"
    return across, up


def corners(*curves: Curve) -> list[list[tuple[float, float]]]:
    lines = [line.get("points", "") for line in parsed(*curves).iter(SVG + "polyline")]
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line.split())] for line in lines]


def test_points_stand_where_the_axes_say() -> None:
    assert ticks(PLAIN) == (["1", "2", "3"], ["0", "10", "20", "30", "40"])
    assert corners(PLAIN) == [[(66, 178), (441, 82), (816, 34)]]
    grid = [path.get("d") for path in parsed(PLAIN).iter(SVG + "path") if path.get("class") == "grid"]
    assert grid == [f"M66 {y}H816" for y in ("226.0", "178.0", "130.0", "82.0", "34.0")]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.69, 4.47], ["4.45", "4.5", "4.55", "4.6", "4.65", "4.7"]),  # 0 is far
        ([1e-4, 1e-4], ["0", "2e−5", "4e−5", "6e−5", "8e−5", "1e−4"]),
        ([0, 1e-3], ["0", "2e−4", "4e−4", "6e−4", "8e−4", "1e−3"]),
        ([4.5e-4, 4.52e-4], ["4.5e−4", "4.505e−4", "4.51e−4", "4.515e−4", "4.52e−4"]),
        ([0, 0], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([-0.3, -2.2], ["−2.5", "−2", "−1.5", "−1", "−0.5", "0"]),
        ([-7, -7], ["−8", "−6", "−4", "−2", "0"]),
        ([-1, 2], ["−1", "0", "1", "2"]),
        ([0, 912345], ["0", "200,000", "400,000", "600,000", "800,000", "1,000,000"]),
        ([0, 3e8], ["0", "1e8", "2e8", "3e8"]),
        ([0, 3e11], ["0", "1e11", "2e11", "3e11"]),
        ([97.2, 99.9], ["97", "98", "99", "100"]),
        ([1000, 1002], ["1,000", "1,000.5", "1,001", "1,001.5", "1,002"]),
    ],
)
def test_values_have_round_ticks_from_end_to_end(values: list[float], expected: list[str]) -> None:
    curve = Curve("x", list(enumerate(values, 1)))
    assert ticks(curve)[1] == expected
    assert all(34 <= y <= 226 for _, y in corners(curve)[0])


def test_epochs_have_whole_ticks() -> None:
    expected = {1: ["1"], 2: ["1", "2"], 12: [str(epoch) for epoch in range(1, 13)], 40: ["5", "10"], 200: ["20", "40"]}
    for number, first in expected.items():
        across, _ = ticks(Curve("x", [(epoch, 1.0) for epoch in range(1, number + 1)]))
        assert across[: len(first)] == first
        assert len(across) <= 13


def test_one_epoch_is_a_mark_in_the_middle() -> None:
    one = Curve("x", [(7, 2.0)])
    assert ticks(one)[0] == ["7"]
    assert corners(one) == [[(441, 34)]]
    assert [(dot.get("cx"), dot.get("cy")) for dot in parsed(one).iter(SVG + "circle")] == [("441.0", "34.0")]


def test_few_points_are_marked_and_many_are_not() -> None:
    few, many = (Curve("x", [(epoch, epoch) for epoch in range(number)]) for number in (30, 31))
    assert len(list(parsed(few).iter(SVG + "circle"))) == 30
    assert not list(parsed(many).iter(SVG + "circle"))


def test_curves_differ_in_colour_and_dashes_and_are_named() -> None:
    picture = parsed(*(Curve(f"loss {number} <&>", [(1, number), (2, 0)]) for number in range(7)))
    names = [text.text for text in picture.iter(SVG + "text") if text.get("class") == "name"]
    assert names == [f"loss {number} <&>" for number in range(7)]
    looks = [(line.get("stroke"), line.get("stroke-dasharray")) for line in picture.iter(SVG + "polyline")]
    samples = [path for path in picture.iter(SVG + "path") if path.get("class") == "sample"]
    assert looks == [(path.get("stroke"), path.get("stroke-dasharray")) for path in samples]
    assert len({colour for colour, _ in looks}) == 7
    assert looks[0][1] == "none"
    assert looks[1][1] == "7 3"
    style = next(picture.iter(SVG + "style")).text or ""
    assert [style.count(f"--c{number}: #") for number in range(7)] == [2] * 7  # light and dark


def test_a_picture_says_what_it_is_and_loads_nothing() -> None:
    picture = draw_curves('Loss "of" <a> & b', [PLAIN])
    assert ET.fromstring(picture.decode()).get("aria-label") == 'Loss "of" <a> & b'
    assert re.findall(rb"(?:href|src|url|@import|script)", picture) == []
    assert picture == draw_curves('Loss "of" <a> & b', [PLAIN])
    assert "data:image/svg+xml;base64," in render_report("t", [Figure(picture, "c")], ())


def test_two_hundred_epochs_of_seven_curves_are_small() -> None:
    curves = [
        Curve(f"loss {place}", [(epoch, place * math.exp(-epoch / 50)) for epoch in range(1, 201)])
        for place in range(7)
    ]
    assert len(draw_curves("losses", curves)) < 24_000


@pytest.mark.parametrize("points", [[], [(1, math.nan)], [(1, math.inf)], [(1, 1e31), (2, 0.0)]])
def test_what_cannot_be_drawn_is_refused(points: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match=r"expected at least one point, and values within ±1e30"):
        draw_curves("t", [Curve("x", points)])
