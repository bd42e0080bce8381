"""Curves as a small SVG, for light and dark screens: axes with round numbers, lines, a legend.

No plotting library is needed. No clock and no random ids: the same curves give the same bytes.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 832, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 816, 34, 226  # of the plane, in units of the picture
_FEW = 30  # up to so many points are marked
_LETTER = 6.6  # about the width of one, for the legend
# After Okabe and Ito, "Color universal design", 2008: told apart by people who see few colours, on white and on dark.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#a8518a", "#b27900", "#2f8fc4", "#4d5560")
_DARK = ("#6db6e8", "#f08c4a", "#35c79a", "#e09cc4", "#e9b949", "#9fd0f0", "#b9c1ca")
_DASHES = ("", "7 3", "2 3", "9 3 2 3")  # so that colour alone tells nothing
_PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">
<style>
svg {{ --paper: #fff; --ink: #24292f; --quiet: #656d76; --line: #e3e7eb; {light} }}
@media screen and (prefers-color-scheme: dark) {{
svg {{ --paper: #15181c; --ink: #dce1e6; --quiet: #929ba5; --line: #2f353c; {dark} }}
}}
text {{ font: 12px system-ui, sans-serif; fill: var(--quiet); }} .name {{ fill: var(--ink); }}
.grid {{ stroke: var(--line); }}
polyline, .sample {{ fill: none; stroke-width: 2; stroke-linejoin: round; }}
</style>
<rect width="{width}" height="{height}" fill="var(--paper)"/>{body}
</svg>
"""


@dataclass(frozen=True)
class Curve:
    """A name and points (x, y) from left to right; x counts epochs, from 1."""

    name: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class _Axis:
    """A range of numbers, the step between its ticks, and where it starts and stops in the picture."""

    low: float
    high: float
    step: float
    start: int
    stop: int

    def ticks(self) -> list[float]:
        first, last = math.ceil(self.low / self.step - 1e-6), math.floor(self.high / self.step + 1e-6)
        return [number * self.step for number in range(first, last + 1)]

    def place(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{self.start + share * (self.stop - self.start):.1f}"


def draw_curves(title: str, curves: Sequence[Curve]) -> bytes:
    """Draw curves over epochs. The vertical axis begins at 0 unless all values are far from it.

    Args:
        title: what is drawn, for those who cannot see it.
        curves: at least one point among them; values are within ±1e30. A curve of few points has them marked.

    Returns:
        An SVG document in UTF-8.

    Raises:
        ValueError: there is no point, or a value is out of bounds.
    """
    points = [point for curve in curves for point in curve.points]
    if not points or not all(abs(value) <= 1e30 for _, value in points):  # NaN is not below
        raise ValueError("expected at least one point, and values within ±1e30")
    across, up = _across([epoch for epoch, _ in points]), _up([value for _, value in points])
    body = [*_frame(across, up), *_legend(curves), *(_line(*each, across, up) for each in enumerate(curves))]
    light, dark = (" ".join(f"--c{place}: {each};" for place, each in enumerate(of)) for of in (_LIGHT, _DARK))
    values = {"width": _WIDTH, "height": _HEIGHT, "title": html.escape(title), "body": "\n".join(body)}
    return _PICTURE.format(**values, light=light, dark=dark).encode()


def _across(epochs: Sequence[int]) -> _Axis:
    first, last = min(epochs), max(epochs)
    margin = 0.5 if first == last else 0
    return _Axis(first - margin, last + margin, max(1, _round_step(last - first + 2 * margin, 12)), _LEFT, _RIGHT)


def _up(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    if 0 <= low <= high / 2 or high - low <= 1e-3 * max(abs(low), abs(high)):
        low, high = min(0.0, low), max(0.0, high)
    if high - low < 1e-30:
        high = low + 1
    step = _round_step(high - low, 5)
    # Up to whole steps: the curve ends below the highest tick.
    bottom, top = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return _Axis(bottom * step, top * step, step, _BOTTOM, _TOP)


def _round_step(span: float, most: int) -> float:
    """Return 1, 2 or 5 times a power of ten that goes into a span up to `most` times."""
    power: float = 10.0 ** math.floor(math.log10(span / most))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * most >= 0.999999 * span)


def _frame(across: _Axis, up: _Axis) -> list[str]:
    parts = []
    for value in up.ticks():
        y = up.place(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{_number(value, up.step)}</text>')
    for value in across.ticks():
        start = f'<text x="{across.place(value)}" y="{_BOTTOM + 19}" text-anchor="middle">'
        parts.append(f"{start}{_number(value, across.step)}</text>")
    return [*parts, f'<text x="{(_LEFT + _RIGHT) // 2}" y="{_BOTTOM + 37}" text-anchor="middle">epoch</text>']


def _legend(curves: Sequence[Curve]) -> list[str]:
    parts, x = [], float(_LEFT)
    for place, curve in enumerate(curves):
        parts.append(f'<path class="sample" d="M{x:.1f} 15h22" {_stroke(place)}/>')
        parts.append(f'<text class="name" x="{x + 28:.1f}" y="19">{html.escape(curve.name)}</text>')
        x += 28 + _LETTER * len(curve.name) + 16
    return parts


def _line(place: int, curve: Curve, across: _Axis, up: _Axis) -> str:
    points = [(across.place(epoch), up.place(value)) for epoch, value in curve.points]
    shown = points if len(points) <= _FEW else ()
    marks = "".join(f'<circle cx="{x}" cy="{y}" r="3" fill="{_colour(place)}"/>' for x, y in shown)
    corners = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{corners}" {_stroke(place)}/>{marks}'


def _stroke(place: int) -> str:
    return f'stroke="{_colour(place)}" stroke-dasharray="{_DASHES[place % len(_DASHES)] or "none"}"'


def _colour(place: int) -> str:
    return f"var(--c{place % len(_LIGHT)})"


def _number(value: float, step: float) -> str:
    text = f"{value:,.7g}"
    if value and (step < 1e-3 or abs(value) >= 1e7):
        digits, power = f"{value:.3e}".split("e")
        text = f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return text.replace("-", "−")
