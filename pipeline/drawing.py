"""The figure that shows an artifact: a matrix of its classes, a map of them, and a map of its samples.

Draws what `pipeline.pictures` has read and laid out; reads and computes nothing but where names have room.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

_MANY_CLASSES = 150  # of more, the map names only those that it has room for
_MANY_SAMPLES = 3000
_PANEL, _GAP = 8.0, 1.0  # inches


@dataclass(frozen=True)
class Map:
    """Points [N, 2] in the square −1…1, and the class [N] of each: a row of `Contents`."""

    title: str
    points: Floats
    labels: Rows


@dataclass(frozen=True)
class Contents:
    """What is drawn of C classes, alike ones side by side: `counts` [C] images, `similarity` [C, C], maps."""

    title: str
    names: list[str]
    counts: Rows
    similarity: Floats
    maps: list[Map]  # of the classes, then of the samples if there are any
    notes: tuple[str, ...]


def draw(contents: Contents) -> "Figure":
    """Return the figure, not yet rendered; to be called under the style in which it will be saved."""
    from matplotlib.figure import Figure

    num_panels = 1 + len(contents.maps)
    width, height = num_panels * (_PANEL + _GAP) - _GAP, _PANEL + _GAP
    figure = Figure((width, height))
    # The panels fill the figure; saving cuts the picture to what stands around them, names of any length included.
    figure.subplots_adjust(left=0, right=1, bottom=0, top=_PANEL / height, wspace=_GAP / _PANEL)
    figure.text(0, (_PANEL + 0.6) / height, contents.title, fontsize=17, linespacing=1.4)
    axes = figure.subplots(1, num_panels)
    colours = _colours(len(contents.names))
    _draw_matrix(axes[0], contents, colours)
    _draw_classes(axes[1], contents, colours)
    if len(contents.maps) > 1:
        _draw_samples(axes[2], contents, colours)
    return figure


def _colours(num_classes: int) -> Floats:
    """Return [C, 4] colours: distinct ones for few classes, else like ones for neighbours."""
    from matplotlib import colormaps

    few = num_classes <= 10
    return colormaps["tab10"](range(num_classes)) if few else colormaps["turbo"](np.linspace(0.04, 0.96, num_classes))


def _draw_matrix(axes: "Axes", contents: Contents, colours: Floats) -> None:
    num_classes = len(contents.names)
    image = axes.imshow(contents.similarity, "RdBu_r", vmin=-1, vmax=1, interpolation="nearest", rasterized=True)
    axes.set(title="Cosine similarity of class means, centred", xticks=[], yticks=[])
    strip = axes.inset_axes((-0.017, 0, 0.012, 1))  # ties the rows to the points of the maps
    strip.imshow(colours[:, None], aspect="auto", interpolation="nearest", rasterized=True)
    strip.set_axis_off()
    font_size = min(11, 0.9 * 72 * _PANEL / num_classes)
    if font_size >= 4.5:
        axes.set_xticks(range(num_classes), contents.names, rotation=90 if num_classes > 3 else 0, fontsize=font_size)
        axes.set_yticks(range(num_classes), contents.names, fontsize=font_size)
        axes.tick_params(axis="x", length=0)
        axes.tick_params(axis="y", length=0, pad=13)
    if num_classes <= 12:
        for (row, column), value in np.ndenumerate(contents.similarity):
            shown = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
            colour = "white" if abs(value) > 0.6 else "0.15"
            axes.text(column, row, shown, color=colour, ha="center", va="center")
    scale = axes.inset_axes((1.02, 0.25, 0.02, 0.5))
    axes.figure.colorbar(image, cax=scale, ticks=[-1, -0.5, 0, 0.5, 1]).outline.set_visible(False)


def _draw_map(axes: "Axes", drawn: Map, sizes: Floats, colours: Floats) -> None:
    axes.set(title=drawn.title, xlim=(-1.12, 1.12), ylim=(-1.12, 1.12), xticks=[], yticks=[])
    axes.scatter(
        drawn.points[:, 0], drawn.points[:, 1], s=sizes, c=colours[drawn.labels], edgecolors="white", linewidths=0.3
    )


def _draw_classes(axes: "Axes", contents: Contents, colours: Floats) -> None:
    largest = np.interp(len(contents.names), (10, 200), (140, 25))
    sizes = largest * (0.3 + 0.7 * contents.counts / contents.counts.max())
    _draw_map(axes, contents.maps[0], sizes, colours)
    _place_names(axes, contents.maps[0].points, contents.names, np.sqrt(sizes) / 2)


def _draw_samples(axes: "Axes", contents: Contents, colours: Floats) -> None:
    points, labels = contents.maps[1].points, contents.maps[1].labels
    size = np.interp([len(points)], (100, _MANY_SAMPLES), (40, 10))  # one for all keeps an SVG small
    _draw_map(axes, contents.maps[1], size, colours)
    if len(contents.names) <= 20:
        handles = [axes.scatter([], [], s=40, color=colour) for colour in colours]
        empty = [" "] * len(handles)
        legend = axes.legend(handles, empty, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=11)
        for text, name in zip(legend.get_texts(), contents.names, strict=True):
            text.set_text(name)  # given to `legend`, a name that begins with _ would be dropped by matplotlib 3.9
    elif len(contents.names) <= _MANY_CLASSES:
        present = np.unique(labels)
        medians = np.stack([np.median(points[labels == row], axis=0) for row in present])
        _place_names(axes, medians, [contents.names[row] for row in present], np.ones(len(present)))


def _place_names(axes: "Axes", points: Floats, names: list[str], radii: Floats) -> None:
    """Write names beside points [N, 2] without covering each other; far ones get a line, some of many are left out.

    `radii` [N] are those of the markers, in typographic points, as all lengths here.
    """
    from matplotlib.patheffects import withStroke

    scale = 72 / axes.figure.dpi
    at = axes.transData.transform(points) * scale
    frame = np.reshape(axes.get_window_extent().extents, (2, 2)) * scale
    taken = np.stack([at - radii[:, None], at + radii[:, None]], axis=1)  # (boxes, low or high, x or y)
    angles = np.deg2rad([0, 180, 90, 270, 30, 150, 210, 330, 60, 120, 240, 300])
    ways = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    steps = 2 + 4 * np.arange(40 if len(names) <= _MANY_CLASSES else 3)
    font_size = np.interp(len(names), (10, 200), (11, 6))
    ruler = axes.text(0, 0, "", fontsize=font_size)
    halo = withStroke(linewidth=2, foreground="white", alpha=0.8)
    line = {"arrowstyle": "-", "linewidth": 0.5, "color": "0.6", "shrinkA": 0, "shrinkB": 0}
    for row, name in enumerate(names):
        ruler.set_text(name)
        room = np.array(ruler.get_window_extent().size) * scale + (3, 0)  # a gap behind it
        offsets = np.concatenate([ways * (radii[row] + step) + (ways - 1) / 2 * room for step in steps])
        low, high = at[row] + offsets, at[row] + offsets + room
        clear = (low[:, None] >= taken[:, 1]) | (high[:, None] <= taken[:, 0])  # (offsets, boxes, x or y)
        free = clear.any(2).all(1) & (low >= frame[0]).all(1) & (high <= frame[1]).all(1)
        if not free.any():
            continue
        choice = int(free.argmax())
        place = functools.partial(axes.annotate, xy=points[row], textcoords="offset points")
        place(name, xytext=offsets[choice], va="bottom", fontsize=font_size, path_effects=[halo])
        if choice >= len(ways):
            nearest = np.clip(0, offsets[choice], offsets[choice] + room)
            place("", xytext=nearest, arrowprops=line, zorder=0.5)
        taken = np.concatenate([taken, [[low[choice], high[choice]]]])
    ruler.remove()
