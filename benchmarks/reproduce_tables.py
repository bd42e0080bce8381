"""The tables of the page, as lines of Markdown: what the paper reports beside what was found here at one scale.

What was not run says so, and is never filled in.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks import reproduce_paper as paper
from benchmarks.distill_accuracy import spread
from benchmarks.reproduce_comparisons import differences
from benchmarks.reproduce_results import Results
from benchmarks.reproduce_runs import TUNED, Extraction, Scale, Training
from benchmarks.reproduce_study import KINDS, KNOWN, RECIPES, SIZES
from benchmarks.reproduce_verdicts import NOT_RUN

Lines = list[str]
NOTHING_SAID = "–"  # the paper says nothing
_LEARNED = {
    ("embed", 0.0): "labels alone",
    ("embed", 0.5): "class embeddings",
    ("samples", 0.5): "class and sample embeddings",
    ("views", 0.5): "these of four views",
}


def called(teacher: str) -> str:
    """Return what a table calls a teacher: the paper's own name for it, or that it is not the paper's."""
    own = {hub: name for name, hub in paper.TEACHERS.items()}
    base = teacher.removesuffix(TUNED)
    name = own.get(base, f"{base} (not the paper's)")
    return f"{name}, fine-tuned" if teacher.endswith(TUNED) else name


def base_student(results: Results, scale: Scale) -> Lines:
    """Table II, accuracies."""
    rows = []
    for teacher in _teachers(results, [scale.training("embed", KNOWN), scale.training("teacher-kd", KNOWN)]):
        reported = dict(zip(paper.TEACHERS.values(), paper.BASE_STUDENT.values(), strict=True)).get(teacher)
        cells = []
        for place, method in enumerate(("embed", "teacher-kd")):
            cells += [f"{reported[place]:.2f}" if reported else NOTHING_SAID]
            cells += [accuracy(results, scale.training(method, teacher))]
        rows.append([called(teacher), *cells])
    return table(["teacher", "Embed-KD, paper", "Embed-KD, here", "Teacher-KD, paper", "Teacher-KD, here"], rows)


def larger(results: Results, scale: Scale) -> Lines:
    """Table III."""
    rows = []
    theirs = [paper.TEACHERS[name] for name in ("Large-16", "Large-32")]
    trainings = [scale.training("embed", KNOWN, student=student, image_size=size) for student, size in SIZES[1:]]
    for teacher in _teachers(results, trainings, theirs):
        for student, size in SIZES[1:]:
            reported = paper.LARGER.get((student, size, called(teacher)))
            here = accuracy(results, scale.training("embed", teacher, student=student, image_size=size))
            rows.append([called(teacher), student, str(size), f"{reported:.2f}" if reported else NOTHING_SAID, here])
    return table(["teacher", "student", "px", "Embed-KD, paper", "Embed-KD, here"], rows, words=2)


def over_alpha2(results: Results, scale: Scale) -> Lines:
    """Figure 3 in figures. Of the paper's curve, which is of the large student, only one point is told."""
    reported = [
        f"{paper.LARGER['large', 32, 'Large-32']:.2f}" if alpha2 == 0.5 else NOTHING_SAID for alpha2 in paper.ALPHAS
    ]
    rows = [["Large-32, paper", "large", *reported]]
    for teacher in _teachers(results, over_alpha2_of(scale, KNOWN), [paper.TEACHERS["Large-32"]]):
        found = [accuracy(results, each) for each in over_alpha2_of(scale, teacher)]
        rows.append([called(teacher), scale.weights_student, *found])
    return table(["teacher", "student", *(f"α₂ = {alpha2:g}" for alpha2 in paper.ALPHAS)], rows, words=2)


def few_labels(results: Results, scale: Scale) -> Lines:
    """The study of few labels: labels alone, and with class embeddings of the same images."""
    rows = []
    for teacher in studied(results, lambda each: [scale.few(n, each, "paper", 0.5) for n in scale.labels]):
        for labels in scale.labels:
            cells = []
            for recipe in RECIPES:
                alone, taught = (scale.few(labels, teacher, recipe, alpha2) for alpha2 in (0.0, 0.5))
                found = differences(results.accuracies(taught), results.accuracies(alone))
                gain = spread(list(found.values()), sign="+") if found else NOT_RUN
                cells += [accuracy(results, alone), accuracy(results, taught), gain]
            rows.append([called(teacher), str(labels), str(scale.few(labels, teacher, "paper", 0.5).epochs), *cells])
    columns = [f"{recipe}: {what}" for recipe in RECIPES for what in ("labels alone", "class embeddings", "difference")]
    return table(["teacher", "labels a class", "epochs", *columns], rows)


def kinds(results: Results, scale: Scale) -> Lines:
    """The study of kinds of artifact: how much of what the teacher knows each passes on."""
    rows = []
    for base in studied(results, lambda each: [_of_kind(scale, each, kind) for kind in KINDS]):
        for teacher in (base, base + TUNED):
            extracted = results.of(Extraction(teacher, "samples", scale.images))
            best = extracted.accuracy if extracted else None
            told = [called(teacher), _own_head(results, scale, teacher), NOT_RUN if best is None else f"{best:.2f}"]
            for kind in KINDS:
                training = _of_kind(scale, teacher, kind)
                found = results.accuracies(training).values()
                share = f"{100 * statistics.mean(found) / best:.0f} %" if found and best else NOT_RUN
                rows.append([*told, kind[0], _LEARNED[kind[1:]], accuracy(results, training), share])
    head = ["teacher", "its own classifier, %", "ridge head, %", "recipe", "learned from", "top-1 %"]
    return table([*head, "of the ridge head's"], rows, words=5)


def few_epochs(results: Results, scale: Scale) -> Lines:
    """Accuracy on the way, of the curves of whole runs: of a run that is evaluated once there is none."""
    rows = []
    for teacher in studied(results, lambda each: [scale.training("embed", each)]):
        alone, taught = (results.over_epochs(scale.training("embed", teacher, alpha2=alpha2)) for alpha2 in (0.0, 0.5))
        epochs = _by_halves({*alone, *taught})
        for epoch in epochs if len(epochs) > 1 else []:
            sides = [each.get(epoch, {}) for each in (alone, taught)]
            gain = list(differences(sides[1], sides[0]).values())
            cells = [*(_mean(list(side.values())) for side in sides), spread(gain, sign="+") if gain else NOT_RUN]
            rows.append([called(teacher), str(epoch), *cells])
    return table(["teacher", "epochs", "labels alone", "class embeddings", "difference"], rows) if rows else []


def over_alpha2_of(scale: Scale, teacher: str) -> list[Training]:
    """Return the trainings of figure 3, by α₂."""
    return [scale.weighted(teacher, alpha2) for alpha2 in paper.ALPHAS]


def accuracy(results: Results, training: Training) -> str:
    """Write mean, spread and number of seeds, or that it was not run."""
    return _mean(list(results.accuracies(training).values()))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> Lines:
    """Return a Markdown table; all columns but the first, which are of words, stand to the right."""
    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * words}{' ---: |' * (len(columns) - words)}"]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows)]


def megabytes(number: float) -> str:
    """Write a number of bytes."""
    return f"{number / 1e6:,.1f}"


def studied(results: Results, trainings: Callable[[str], list[Training]]) -> list[str]:
    """Return the teachers of a study of our own: those that there are results of."""
    return [
        teacher
        for teacher in (paper.TEACHERS["Large-32"], KNOWN)
        if any(results.accuracies(training) for training in trainings(teacher) if training.teacher)
    ]


def _teachers(results: Results, of_known: Iterable[Training], theirs: Iterable[str] | None = None) -> list[str]:
    """Return the paper's teachers, and the known one where it was trained from."""
    known = [KNOWN] if any(results.accuracies(training) for training in of_known if training.teacher) else []
    return [*(paper.TEACHERS.values() if theirs is None else theirs), *known]


def _of_kind(scale: Scale, teacher: str, kind: tuple[str, str, float]) -> Training:
    recipe, method, alpha2 = kind
    return scale.training(method, teacher, recipe=recipe, alpha2=alpha2)


def _own_head(results: Results, scale: Scale, teacher: str) -> str:
    """Write how good a fine-tuned teacher's own classifier is; others have none for these classes."""
    if not teacher.endswith(TUNED):
        return NOTHING_SAID
    found = results.of(scale.tuning(teacher.removesuffix(TUNED)))
    return NOT_RUN if found is None or found.accuracy is None else f"{found.accuracy:.2f}"


def _mean(values: list[float]) -> str:
    return f"{spread(values)} ({len(values)})" if values else NOT_RUN


def _by_halves(epochs: Iterable[int]) -> list[int]:
    """Return the last epoch, and of those before it some that lie by halves."""
    kept: list[int] = []
    for epoch in sorted(epochs, reverse=True):
        if not kept or 2 * epoch <= kept[-1]:
            kept.append(epoch)
    return kept[::-1]
