"""The page: the paper's tables and figures beside ours, from the files of results alone.

The same results give the same page to the byte. Nothing is run.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import reproduce_figures as figures
from benchmarks import reproduce_paper as paper
from benchmarks import reproduce_resources as resources
from benchmarks import reproduce_tables as tables
from benchmarks.reproduce_results import Results, read_results
from benchmarks.reproduce_runs import SCALES, Scale
from benchmarks.reproduce_study import SIZES
from benchmarks.reproduce_verdicts import NOT_RUN, judge
from pipeline.output import write_output

SHOWN = ("full", "reduced")
_WIDTH = 118
_INTRODUCTION = """# The paper, reproduced

Made from the files in `benchmarks/results` by `python benchmarks/reproduce.py page`; do not edit. What the paper
reports ([arXiv 2404.06170](https://arxiv.org/abs/2404.06170), section III) stands beside what was found here.
Accuracies are top-1 on the 10,000 test images of CIFAR-100 in percent, after the last epoch; the paper's are of the
best epoch, chosen on the same images. ± is the sample standard deviation over seeds, whose number stands in brackets.
What was not run says so.
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: heading, what is compared, the target that fills it, its tables, and its figure if any.

    What `counts` is the same at every scale.
    """

    heading: str
    text: str
    target: str
    tables: Sequence[Callable[[Results, Scale], tables.Lines]]
    figure: str | None = None
    counts: bool = False


_MEMORY = (
    "Memory is what the process holds at its peak above an idle one that has imported PyTorch, on a GPU what PyTorch "
    f"allocated there; times are medians of {SCALES['full'].steps} steps at scale full, {SCALES['reduced'].steps} at "
    "reduced. Neither hangs on what weights are worth: teachers have random ones."
)
SECTIONS = (
    Section("Table I: sizes", "Counted from the models themselves.", "table1", [resources.sizes], counts=True),
    Section(
        "Table II: memory of weights",
        "Bytes of the teacher's weights in float32, over those of student, projection and class means: the paper's "
        "17× and 59×. Base student, 32 px.",
        "table1",
        [resources.weights],
        counts=True,
    ),
    Section(
        "Table II: the base student at 32 px",
        "Recipe `paper`, α₂ = 0.5, class embeddings of N = 100 images a class. Teacher-KD runs the teacher on every "
        f"batch. {_MEMORY}",
        "table2",
        [tables.base_student, partial(resources.resources, compared=[(name, "base", 32) for name in paper.TEACHERS])],
    ),
    Section(
        "Table III: larger students and images",
        "Recipe `paper`, α₂ = 0.5.",
        "table3",
        [tables.larger],
    ),
    Section(
        "Figure 2: memory and time",
        _MEMORY,
        "fig2",
        [partial(resources.resources, compared=[("Large-32", *size) for size in SIZES])],
        "fig2",
    ),
    Section(
        "Figure 3: accuracy over α₂",
        "Large student, 32 px, recipe `paper`. At α₂ = 1 no loss teaches the classifier: an image's class is that "
        "of the nearest projected class embedding.",
        "fig3",
        [tables.over_alpha2],
        "fig3",
    ),
    Section(
        "Few labels",
        "α₂ = 0 against class embeddings, base student. The artifact is of the student's own images, so that no other "
        "label comes in through it. Fewer labels have more epochs: as many steps, but at most four times the epochs.",
        "labels",
        [tables.few_labels],
        "labels",
    ),
    Section(
        "What each kind of artifact passes on",
        "Base student, 32 px. The ridge head is the artifact's own, fitted in closed form to the teacher's embeddings "
        "of the training images: how good the teacher is on this data. Fine-tuned means on the same training images.",
        "kinds",
        [tables.kinds],
    ),
    Section(
        "A live teacher, and the artifact instead",
        "Base student, 32 px, recipe `paper`. Speed is of training steps, the ratio is over Teacher-KD with the live "
        "teacher, seed by seed, of runs on one machine under the same conditions. Memory is the process's at its peak, "
        "on a GPU what PyTorch allocated there. The released loop computes in float32.",
        "live",
        [tables.live],
    ),
)


def write_page(results: Path, docs: Path) -> None:
    """Write reproduction.md and its figures.

    Args:
        results: the folder of all scales.
        docs: the folder of the page; figures go to `figures/` in it.

    Raises:
        PipelineError: a file is not a result, matplotlib is missing, or the page cannot be written.
    """
    found = {name: read_results(results / name) for name in SHOWN}
    drawn = {
        f"{name}-{scale}.svg": draw()
        for scale in SHOWN
        for name, draw in drawings(found[scale], SCALES[scale], scale).items()
    }
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        write_output(docs / "figures" / name, picture)
    write_output(docs / "reproduction.md", page(found).encode())


def page(found: Mapping[str, Results]) -> str:
    """Return the page.

    Args:
        found: results by scale, the first one first on the page.
    """
    scales = [f"- **{name}**: {SCALES[name]}" for name in found]
    parts = ["\n".join([_INTRODUCTION, *scales]), "\n".join(["## Claims", "", *_claims(found)])]
    for section in SECTIONS:
        head = [
            f"## {section.heading}",
            "",
            *textwrap.wrap(section.text, _WIDTH),
            "",
            "```sh",
            _command(section),
            "```",
        ]
        parts.append("\n".join([*head, *_body(section, found)]))
    return "\n\n".join([*parts, "\n".join(["## Where", "", *_machines(found)])]) + "\n"


def drawings(results: Results, scale: Scale, name: str) -> dict[str, Callable[[], bytes]]:
    """Return what draws each figure that there is something to draw of."""
    made: dict[str, Callable[[], bytes]] = {}
    if bars := figures.resource_bars(results, scale):
        made["fig2"] = partial(figures.draw_bars, bars)
    if lines := figures.alpha2_lines(results, scale):
        title = f"Large student, 32 px, recipe paper\n{name}: {scale}"
        made["fig3"] = partial(figures.draw_lines, lines, title, "α₂", is_log=False)
    if lines := figures.label_lines(results, scale):
        title = f"Base student, 32 px, scale {name}"
        made["labels"] = partial(figures.draw_lines, lines, title, "labels a class", is_log=True)
    return made


def _command(section: Section) -> str:
    return f"python benchmarks/reproduce.py {section.target}" + ("" if section.counts else " --scale full")


def _body(section: Section, found: Mapping[str, Results]) -> tables.Lines:
    if not section.counts:
        return [line for name, results in found.items() for line in _of_scale(section, name, results)]
    made = (_tables(section, name, results) for name, results in found.items())
    return next(filter(None, made), ["", f"{NOT_RUN.capitalize()}."])


def _of_scale(section: Section, name: str, results: Results) -> tables.Lines:
    """Return the tables of one scale; where nothing of them was run, that alone is said."""
    scale, lines = SCALES[name], _tables(section, name, results)
    if section.figure in drawings(results, scale, name):
        lines += ["", f"![{section.heading}, {name}](figures/{section.figure}-{name}.svg)"]
    return ["", f"**{name}** ({scale}):", *lines] if lines else ["", f"**{name}** ({scale}): {NOT_RUN}."]


def _tables(section: Section, name: str, results: Results) -> tables.Lines:
    """Return the tables in which anything was run."""
    scale, lines = SCALES[name], []
    for make in section.tables:
        made = make(results, scale)
        if made != make(Results([]), scale):
            lines += ["", *made]
    return lines


def _claims(found: Mapping[str, Results]) -> tables.Lines:
    """Return the table of verdicts; a claim that no scale has numbers of has one line."""
    judged = {name: judge(results, SCALES[name]) for name, results in found.items()}
    rows = []
    for verdicts in zip(*judged.values(), strict=True):
        told = [
            [verdict.claim, name, verdict.word, verdict.evidence]
            for name, verdict in zip(judged, verdicts, strict=True)
            if verdict.word != NOT_RUN or verdict.evidence
        ]
        rows += told or [[verdicts[0].claim, "", NOT_RUN, ""]]
    return tables.table(["the paper says", "scale", "verdict", "numbers"], rows, words=4)


def _machines(found: Mapping[str, Results]) -> tables.Lines:
    """Return on which machines, and from which commits, how many results come."""
    counts: dict[tuple[str, ...], int] = {}
    for name, results in found.items():
        for each in results.all():
            machine, versions = each.machine, each.versions
            where = f"{machine.get('device')}, {machine.get('processor')}, {machine.get('cores')} cores"
            how = "compiled" if each.conditions.get("compiled") else "eager"
            conditions = f"{how}, {each.conditions.get('jobs')} at once"
            key = (name, where, f"PyTorch {versions.get('torch')}", conditions, each.commit or "unknown")
            counts[key] = counts.get(key, 0) + 1
    rows = [[*key, str(number)] for key, number in sorted(counts.items())]
    head = ["scale", "machine", "software", "conditions", "commit", "runs"]
    return tables.table(head, rows, words=5) if rows else [f"{NOT_RUN.capitalize()}."]
