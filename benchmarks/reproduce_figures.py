"""The figures of the page: resources of both sides, accuracy over α₂, and over few labels. Drawn from results alone.

What is drawn is gathered first, without a plotting library: a figure without anything to draw is none.
"""

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks import reproduce_paper as paper
from benchmarks.reproduce_comparisons import measurements
from benchmarks.reproduce_results import Results
from benchmarks.reproduce_runs import Measurement, Scale, Training
from benchmarks.reproduce_study import KNOWN, RECIPES, SIDES, SIZES
from benchmarks.reproduce_tables import called, over_alpha2_of
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: dict[str, Any] = {
    "axes.edgecolor": "0.7",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "clip-embed-kd",  # else ids differ from run to run
}
# After Okabe and Ito, "Color universal design", 2008, as in the reports.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a8518a")
_MARKERS = ("o", "s", "^", "D")
_TEACHERS = (paper.TEACHERS["Large-32"], KNOWN)


@dataclass(frozen=True)
class Line:
    """A name, and for each place on the horizontal axis the accuracies of the seeds."""

    name: str
    points: Mapping[float, Sequence[float]]


@dataclass(frozen=True)
class Bars:
    """What is measured, in which unit, and for each student the figures of Embed-KD and of Teacher-KD."""

    title: str
    pairs: Mapping[str, tuple[float, float]]


def resource_bars(results: Results, scale: Scale) -> list[Bars]:
    """Gather figure 2: memory and time of both sides, for each student and image size that was measured."""
    memory: dict[str, tuple[float, float]] = {}
    seconds: dict[str, tuple[float, float]] = {}
    on = set()
    for student, image_size in SIZES:
        sides = [Measurement(side, paper.TEACHERS["Large-32"], scale.steps, "", student, image_size) for side in SIDES]
        if found := measurements(results, scale, *sides):
            name = f"{student.capitalize()}-{image_size}"
            embed, live = (each.measured for each in found[1])
            memory[name] = (embed["memory_bytes"] / 1e6, live["memory_bytes"] / 1e6)
            seconds[name] = (embed["epoch_seconds"], live["epoch_seconds"])
            on.add(found[0])
    where = ", ".join(sorted(on))
    titles = (f"Memory of training on {where}, MB", f"An epoch of 50,000 images on {where}, seconds")
    return [Bars(title, pairs) for title, pairs in zip(titles, (memory, seconds), strict=True) if pairs]


def alpha2_lines(results: Results, scale: Scale) -> list[Line]:
    """Gather figure 3: accuracy over α₂, a line for each teacher."""
    trainings = {called(teacher): over_alpha2_of(scale, teacher) for teacher in _TEACHERS}
    lines = [_line(results, name, dict(zip(paper.ALPHAS, each, strict=True))) for name, each in trainings.items()]
    # A line that has no more than the supervised point is of no teacher.
    return [line for line in lines if set(line.points) - {0.0}]


def label_lines(results: Results, scale: Scale) -> list[Line]:
    """Gather the study of few labels: accuracy over labels a class, a line for each recipe and what is learned from."""
    lines = []
    for teacher in _TEACHERS:
        for recipe in RECIPES:
            for alpha2, learned in ((0.0, "labels alone"), (0.5, f"class embeddings of {called(teacher)}")):
                trainings = {float(n): scale.few(n, teacher, recipe, alpha2) for n in scale.labels}
                lines.append(_line(results, f"{recipe}: {learned}", trainings))
    return list({line.name: line for line in lines if line.points}.values())


def draw_bars(bars: Sequence[Bars]) -> bytes:
    """Draw panels of pairs of bars, each over its ratio.

    Returns:
        An SVG document.

    Raises:
        PipelineError: matplotlib is not installed.
    """

    def draw(each: Bars, panel: "Axes") -> None:
        for place, (side, colour) in enumerate(zip(("Embed-KD", "Teacher-KD"), _COLOURS, strict=False)):
            heights = [pair[place] for pair in each.pairs.values()]
            at = [number + (place - 0.5) * 0.4 for number in range(len(heights))]
            panel.bar(at, heights, 0.38, color=colour, label=side)
        for number, (embed, live) in enumerate(each.pairs.values()):
            panel.annotate(
                f"{live / embed:.1f}×", (number, max(embed, live)), (0, 3), textcoords="offset points", ha="center"
            )
        panel.set(title=each.title, xticks=range(len(each.pairs)))
        panel.set_xticklabels(each.pairs)
        panel.grid(axis="x", visible=False)
        panel.margins(y=0.12)

    return _draw([partial(draw, each) for each in bars])


def draw_lines(lines: Sequence[Line], title: str, across: str, *, is_log: bool) -> bytes:
    """Draw lines of means, with the sample standard deviation where there are several seeds.

    Args:
        lines: at least one point among them.
        title: of the figure.
        across: what the horizontal axis counts.
        is_log: let that axis be logarithmic.

    Returns:
        An SVG document.

    Raises:
        PipelineError: matplotlib is not installed.
    """

    def draw(panel: "Axes") -> None:
        for place, line in enumerate(lines):
            means = [statistics.mean(values) for values in line.points.values()]
            spreads = [statistics.stdev(values) if len(values) > 1 else 0 for values in line.points.values()]
            rounds, colour = divmod(place, len(_COLOURS))  # lines of one colour differ in their markers
            look: dict[str, Any] = {"color": _COLOURS[colour], "marker": _MARKERS[(colour + rounds) % len(_MARKERS)]}
            panel.errorbar(list(line.points), means, spreads, capsize=3, label=line.name, **look)
        ticks = sorted({x for line in lines for x in line.points})
        if is_log:
            panel.set_xscale("log")
        panel.set(title=title, xlabel=across, ylabel="top-1 accuracy on the test split, %")
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks([], minor=True)

    return _draw([draw])


def _line(results: Results, name: str, trainings: Mapping[float, Training]) -> Line:
    found = {place: list(results.accuracies(training).values()) for place, training in trainings.items()}
    return Line(name, {place: values for place, values in found.items() if values})


def _draw(panels: Sequence[Callable[["Axes"], None]]) -> bytes:
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise PipelineError("The figures need matplotlib: pip install 'clip-embed-kd[plot]'") from None
    picture = io.BytesIO()
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure = Figure((7.2 * len(panels), 4.8), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, draw in zip(axes, panels, strict=True):
            draw(panel)
        handles, names = axes[0].get_legend_handles_labels()  # those of all panels
        figure.legend(handles, names, loc="outside lower left", ncols=len(panels))
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()
