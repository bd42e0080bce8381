"""The page: the paper's tables and figures beside ours, from the files of results alone.

The same results give the same page to the byte. Nothing is run.
"""

import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks import reproduce_figures as figures
from benchmarks.reproduce_comparisons import device_of
from benchmarks.reproduce_results import Results, read_results
from benchmarks.reproduce_runs import SCALES, Scale
from benchmarks.reproduce_sections import SECTIONS, SHOWN, Section
from benchmarks.reproduce_tables import Lines, table
from benchmarks.reproduce_verdicts import NOT_RUN, judge
from pipeline.output import write_output

_WIDTH = 118
_INTRODUCTION = """# The paper, reproduced

Made from the files in `benchmarks/results` by `python benchmarks/reproduce.py page`; do not edit. What the paper
reports ([arXiv 2404.06170](https://arxiv.org/abs/2404.06170), section III) stands beside what was found here.
Accuracies are top-1 on the 10,000 test images of CIFAR-100 in percent, after the last epoch; the paper's are of the
best epoch, chosen on the same images. ± is the sample standard deviation over seeds, whose number stands in brackets.
What was not run says so.
"""
_WHERE = "A run that several targets share stands with the first of them."


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
        head = [f"## {section.heading}", "", *textwrap.wrap(section.text, _WIDTH)]
        parts.append("\n".join([*head, *_body(section, found)]))
    return (
        "\n\n".join([*parts, "\n".join(["## Where", "", *textwrap.wrap(_WHERE, _WIDTH), "", *_machines(found)])]) + "\n"
    )


def drawings(results: Results, scale: Scale, name: str) -> dict[str, Callable[[], bytes]]:
    """Return what draws each figure that there is something to draw of."""
    made: dict[str, Callable[[], bytes]] = {}
    if bars := figures.resource_bars(results, scale):
        made["fig2"] = partial(figures.draw_bars, bars)
    if lines := figures.alpha2_lines(results, scale):
        title = f"{scale.weights_student.capitalize()} student, 32 px, recipe paper, scale {name}"
        made["fig3"] = partial(figures.draw_lines, lines, title, "α₂", is_log=False)
    if lines := figures.label_lines(results, scale):
        title = f"Base student, 32 px, scale {name}"
        made["labels"] = partial(figures.draw_lines, lines, title, "labels a class", is_log=True)
    return made


def _body(section: Section, found: Mapping[str, Results]) -> Lines:
    if not section.counts:
        return [line for name, results in found.items() for line in _of_scale(section, name, results)]
    made = ((name, _tables(section, name, results)) for name, results in found.items())
    return next(([*_command(section, name), *lines] for name, lines in made if lines), ["", f"{NOT_RUN.capitalize()}."])


def _of_scale(section: Section, name: str, results: Results) -> Lines:
    """Return the tables of one scale; where nothing of them was run, that alone is said."""
    scale, lines = SCALES[name], _tables(section, name, results)
    if section.figure in drawings(results, scale, name):
        lines += ["", f"![{section.heading}, {name}](figures/{section.figure}-{name}.svg)"]
    told = f"**{name}** ({scale})"
    return ["", f"{told}:", *_command(section, name), *lines] if lines else ["", f"{told}: {NOT_RUN}."]


def _command(section: Section, name: str) -> Lines:
    """Return the command that makes a section's tables at a scale."""
    return ["", "```sh", f"python benchmarks/reproduce.py {section.target} --scale {name}", "```"]


def _tables(section: Section, name: str, results: Results) -> Lines:
    """Return the tables in which anything was run."""
    scale, lines = SCALES[name], []
    for make in section.tables:
        made = make(results, scale)
        if made != make(Results([]), scale):
            lines += ["", *made]
    return lines


def _claims(found: Mapping[str, Results]) -> Lines:
    """Return the table of verdicts; a claim that no scale has numbers of has one line."""
    judged = {name: judge(results, SCALES[name]) for name, results in found.items()}
    rows = []
    for verdicts in zip(*judged.values(), strict=True):
        told = [
            [verdict.claim, name, f"{verdict.word} {verdict.limits}".strip(), verdict.evidence]
            for name, verdict in zip(judged, verdicts, strict=True)
            if verdict.word != NOT_RUN or verdict.evidence
        ]
        rows += told or [[verdicts[0].claim, "", NOT_RUN, ""]]
    return table(["the paper says", "scale", "verdict", "numbers"], rows, words=4)


def _machines(found: Mapping[str, Results]) -> Lines:
    """Return on which machines, and from which commits, how many results of each target come."""
    counts: dict[tuple[str, ...], int] = {}
    for name, results in found.items():
        for each in results.all():
            machine, versions = each.machine, each.versions
            where = f"{device_of(each)}, {machine.get('processor')}, {machine.get('cores')} cores"
            how = "compiled" if each.conditions.get("compiled") else "eager"
            conditions = f"{how}, {each.conditions.get('jobs')} at once"
            key = (name, each.target, where, f"PyTorch {versions.get('torch')}", conditions, each.commit or "unknown")
            counts[key] = counts.get(key, 0) + 1
    rows = [[*key, str(number)] for key, number in sorted(counts.items())]
    head = ["scale", "target", "machine", "software", "conditions", "commit", "runs"]
    return table(head, rows, words=6) if rows else [f"{NOT_RUN.capitalize()}."]
