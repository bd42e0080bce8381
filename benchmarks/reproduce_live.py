"""The study of live teachers, as lines of Markdown: what a teacher beside the student costs, and what it is worth."""

import statistics
from collections.abc import Mapping

from benchmarks.distill_accuracy import spread
from benchmarks.reproduce_comparisons import device_of, differences, is_alike, is_same, most_alike
from benchmarks.reproduce_results import Result, Results
from benchmarks.reproduce_runs import LIVE, Scale, Training
from benchmarks.reproduce_tables import NOTHING_SAID, Lines, accuracy, called, megabytes, studied, table
from benchmarks.reproduce_verdicts import FAILS, HOLDS, NOT_RUN, UNDECIDED

_WAYS = {
    "teacher-kd": "Teacher-KD, live teacher",
    "logits": "KD on the probabilities of the stored ridge head, live teacher",
    "released": "the released loop's arithmetic",
    "supervised": "supervised",
    "embed": "Embed-KD, class embeddings of the artifact",
    "sample": "Teacher-KD, sample embeddings of the artifact",
}


def live(results: Results, scale: Scale) -> Lines:
    """The same student with a teacher beside it, and from what the artifact holds; and whether that is as good."""
    rows, told = [], Lines()
    for teacher in studied(results, lambda each: [scale.training(method, each) for method in ("sample", *LIVE[:-1])]):
        reference = results.by_seed(scale.training("teacher-kd", teacher))
        for method, way in _WAYS.items():
            training = scale.training(method, None if method == "supervised" else teacher)
            rows.append([called(teacher), way, accuracy(results, training), *_costs(results, training, reference)])
        told += ["", *_sameness(results, scale, teacher)]
    head = ["teacher", "training", "top-1 %", "on (runs)", "images/s", "over live Teacher-KD", "memory, MB"]
    return [*table([*head, "in the teacher"], rows, words=2), *told]


def _sameness(results: Results, scale: Scale, teacher: str) -> Lines:
    """Return how far sample embeddings are from the live teacher that they are of, and whether that is noise."""
    stored, beside = (results.accuracies(scale.training(method, teacher)) for method in ("sample", "teacher-kd"))
    found = differences(stored, beside)
    what = f"Sample embeddings minus the live teacher, {called(teacher)}"
    if not found:
        return [f"{what}: {NOT_RUN}."]
    word = {True: HOLDS, False: FAILS, None: UNDECIDED}[is_same(found.values())]
    each = ", ".join(f"seed {seed} {difference:+.2f}" for seed, difference in found.items())
    mean = spread(list(found.values()), sign="+")
    return [f"{what}: {mean} points ({each}).", f"The same accuracy within noise: **{word}**."]


def _costs(results: Results, training: Training, reference: Mapping[int, Result]) -> list[str]:
    """Return device and number of runs, speed, its ratio, memory and the share of time in the teacher: of like runs."""
    found = most_alike(results.by_seed(training))
    if not found:
        return [NOT_RUN] * 5
    speed = statistics.mean(result.measured["images_per_second"] for result in found.values())
    ratios = [
        result.measured["images_per_second"] / reference[seed].measured["images_per_second"]
        for seed, result in found.items()
        if seed in reference and is_alike([result, reference[seed]])
    ]
    memory = [result.memory_bytes for result in found.values() if result.memory_bytes]
    shares = [
        result.measured["teacher_seconds"] / result.measured["train_seconds"]
        for result in found.values()
        if result.measured.get("teacher_seconds")
    ]
    return [
        f"{device_of(next(iter(found.values())))} ({len(found)})",
        f"{speed:,.0f}",
        f"{statistics.mean(ratios):.1f}×" if ratios else "not comparable",
        megabytes(statistics.mean(memory)) if memory else NOT_RUN,
        f"{100 * statistics.mean(shares):.0f} %" if shares else NOTHING_SAID,
    ]
