"""What the numbers say to each claim of the paper's prose: it holds, it does not, undecided, or not run."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks import reproduce_paper as paper
from benchmarks.distill_accuracy import spread
from benchmarks.reproduce_comparisons import differences, direction, measurements
from benchmarks.reproduce_results import Result, Results
from benchmarks.reproduce_runs import NO_DEVICE, SCALES, SMALLEST, Measurement, Scale, Training
from benchmarks.reproduce_study import KNOWN

HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not run"
_ABOUT_TWO = (1.0, 3.5)  # points: the paper's own differences are 1.6 to 3.3
_SAME = 1.05  # so many times as many bytes are about as many
_LARGE, _LARGE_IMAGES = ("large", 32), ("base", 64)  # student and image size
_TEACHERS = (*paper.TEACHERS.values(), KNOWN)

_POINTS, _ON_CPU = " points", ", on cpu"  # in evidence

_Of = Callable[[str], Training]  # by teacher


@dataclass(frozen=True)
class Verdict:
    """A claim, what the numbers say to it, these numbers, and what of the paper's conditions they lack."""

    claim: str
    word: str
    evidence: str
    limits: str = ""


def judge(results: Results, scale: Scale) -> list[Verdict]:
    """Judge all claims by the results of one scale."""
    claims: Sequence[tuple[str, Callable[[Results, Scale], tuple[str, str]]]] = (
        ("Embed-KD is about 2 points below Teacher-KD", _embed_below_teacher),
        ("… since averaged embeddings lose what single samples know: these teach more", _averaging),
        ("Embed-KD is slightly better with larger teachers", _larger_teachers),
        ("Teacher-KD is better with Base-32 than with Large-32", _base_for_live),
        ("A larger student with Embed-KD beats the base student with Teacher-KD", partial(_larger, size=_LARGE)),
        ("… and takes less memory and time, with Large-32", partial(_cheaper, size=_LARGE)),
        ("Larger images with Embed-KD beat the base student with Teacher-KD", partial(_larger, size=_LARGE_IMAGES)),
        ("… and take less memory and time, with Large-32", partial(_cheaper, size=_LARGE_IMAGES)),
        ("Embeddings take 17 and 59 times less memory than Base-32 and Large-32", _weights),
        ("The memory of Embed-KD stays the same while the teacher grows", _fixed),
        ("Embed-KD takes 9 times less memory than Teacher-KD", _memory),
        ("Embed-KD takes 8 times less time than Teacher-KD", _time),
        ("α₂ = 1 overfits: it is worse than α₂ = 0.5", _overfits),
        ("α₂ of 0.25, 0.5 and 0.75 are each better than α₂ = 0", _beats_supervised),
    )
    return [_limited(Verdict(claim, *judged(results, scale)), scale) for claim, judged in claims]


def _limited(verdict: Verdict, scale: Scale) -> Verdict:
    """Add what holds, or does not, for this scale or this device alone."""
    if verdict.word not in (HOLDS, FAILS):
        return verdict
    limits = "on a CPU" if verdict.evidence.endswith(_ON_CPU) else ""
    if _POINTS in verdict.evidence and scale.epochs < SCALES["full"].epochs:
        limits = f"after {_number(scale.epochs, 'epoch')}"
    return replace(verdict, limits=limits)


def _judged(of_teachers: Mapping[str, Mapping[int, float]], points: str = "points") -> tuple[str, str]:
    """Judge whether differences lie above 0: seed by seed the mean over the paper's teachers, or over any others."""
    known = {name: each for name, each in of_teachers.items() if each}
    theirs = {name: each for name, each in known.items() if name in paper.TEACHERS.values()} or known
    seeds = set.intersection(*(set(each) for each in theirs.values())) if theirs else set()
    means = [statistics.mean(each[seed] for each in theirs.values()) for seed in sorted(seeds)]
    word = {None: NOT_RUN, 1: HOLDS, -1: FAILS, 0: UNDECIDED}[direction(means)]
    if not means:
        return word, ""
    return word, f"{spread(means, sign='+')} {points}, {_number(len(means), 'seed')}, {', '.join(theirs)}"


def _ahead(results: Results, one: _Of, other: _Of) -> dict[str, dict[int, float]]:
    """Return by how much one training with a teacher is ahead of another one, by teacher and seed."""
    return {
        teacher: differences(results.accuracies(one(teacher)), results.accuracies(other(teacher)))
        for teacher in _TEACHERS
    }


def _embed_below_teacher(results: Results, scale: Scale) -> tuple[str, str]:
    word, evidence = _judged(_ahead(results, partial(scale.training, "teacher-kd"), partial(scale.training, "embed")))
    points = float(evidence.split()[0]) if evidence else 0.0
    if word == HOLDS and not _ABOUT_TWO[0] <= points <= _ABOUT_TWO[1]:
        word = FAILS
    return word, evidence and f"Teacher-KD ahead by {evidence}"


def _averaging(results: Results, scale: Scale) -> tuple[str, str]:
    return _judged(_ahead(results, partial(scale.training, "sample"), partial(scale.training, "embed")))


def _larger_teachers(results: Results, scale: Scale) -> tuple[str, str]:
    pairs = {"Large-16": "Base-16", "Large-32": "Base-32"}
    return _judged({paper.TEACHERS[one]: _between(results, scale, "embed", one, pairs[one]) for one in pairs})


def _base_for_live(results: Results, scale: Scale) -> tuple[str, str]:
    return _judged({paper.TEACHERS["Base-32"]: _between(results, scale, "teacher-kd", "Base-32", "Large-32")})


def _between(results: Results, scale: Scale, method: str, one: str, other: str) -> dict[int, float]:
    first, second = (scale.training(method, paper.TEACHERS[name]) for name in (one, other))
    return differences(results.accuracies(first), results.accuracies(second))


def _larger(results: Results, scale: Scale, size: tuple[str, int]) -> tuple[str, str]:
    student, image_size = size
    larger = partial(scale.training, "embed", student=student, image_size=image_size)
    word, evidence = _judged(_ahead(results, larger, partial(scale.training, "teacher-kd")))
    if evidence and scale.larger_epochs:
        return UNDECIDED, f"{evidence}, but {_number(scale.larger_epochs, 'epoch')} against {scale.epochs}"
    return word, evidence


def _cheaper(results: Results, scale: Scale, size: tuple[str, int]) -> tuple[str, str]:
    found = measurements(results, scale, _side("embed", size), _side("teacher"))
    if found is None:
        return NOT_RUN, ""
    device, (embed, live) = found
    shares = [_ratio(live, embed, "memory_bytes"), _ratio(live, embed, "epoch_seconds")]
    told = f"{_less(shares[0])} memory, {_less(shares[1])} time{_precision(embed)}, on {device}"
    return (HOLDS if min(shares) > 1 else FAILS), told


def _weights(results: Results, scale: Scale) -> tuple[str, str]:
    found = {name: results.of(Measurement("embed", paper.TEACHERS[name], 0, NO_DEVICE)) for name in paper.WEIGHT_RATIOS}
    ratios = {name: float(each.measured["weight_ratio"]) for name, each in found.items() if each is not None}
    if len(ratios) < len(found):
        return NOT_RUN, ""
    holds = all(round(ratio) == paper.WEIGHT_RATIOS[name] for name, ratio in ratios.items())
    return (HOLDS if holds else FAILS), ", ".join(f"{name} {ratio:.1f}×" for name, ratio in ratios.items())


def _fixed(results: Results, scale: Scale) -> tuple[str, str]:
    """Judge bytes of weights: the teacher's, and those of student, projection and class embeddings."""
    told, holds = [], True
    for patch in (16, 32):
        pair = [Measurement("embed", paper.TEACHERS[f"{size}-{patch}"], 0, NO_DEVICE) for size in ("Large", "Base")]
        found = [result.measured["weight_bytes"] for result in map(results.of, pair) if result is not None]
        if len(found) < len(pair):
            return NOT_RUN, ""
        large, base = found
        teacher, means = (large[part] / base[part] for part in ("teacher", "class_means"))
        rest = (sum(large.values()) - large["teacher"]) / (sum(base.values()) - base["teacher"])
        holds = holds and rest <= _SAME < teacher
        told.append(
            f"Base-{patch} to Large-{patch}: teacher {teacher:.2f}×, all else {rest:.2f}×, "
            f"class embeddings alone {means:.2f}×"
        )
    return (HOLDS if holds else FAILS), "; ".join(told)


def _memory(results: Results, scale: Scale) -> tuple[str, str]:
    return _at_least(results, scale, "memory_bytes", paper.MEMORY_RATIO)


def _time(results: Results, scale: Scale) -> tuple[str, str]:
    return _at_least(results, scale, "epoch_seconds", paper.TIME_RATIO)


def _at_least(results: Results, scale: Scale, what: str, least: float) -> tuple[str, str]:
    """Judge the ratio of Teacher-KD over Embed-KD, of the base student at 32 px with teacher Large-32."""
    found = measurements(results, scale, _side("teacher"), _side("embed"))
    if found is None:
        return NOT_RUN, ""
    device, (live, embed) = found
    ratio = _ratio(live, embed, what)
    return (
        HOLDS if ratio >= least else FAILS
    ), f"{ratio:.1f}×, base student, 32 px, Large-32{_precision(embed)}, on {device}"


def _overfits(results: Results, scale: Scale) -> tuple[str, str]:
    # Training losses of unequal weights are of unequal things, and no training accuracy is kept.
    both = _ahead(results, partial(scale.weighted, alpha2=0.5), partial(scale.weighted, alpha2=1.0))
    word, evidence = _judged(both, "points of test accuracy alone")
    return word, evidence + _student(scale, evidence)


def _beats_supervised(results: Results, scale: Scale) -> tuple[str, str]:
    alphas, without = paper.ALPHAS[1:-1], partial(scale.weighted, alpha2=0.0)
    each = [_judged(_ahead(results, partial(scale.weighted, alpha2=alpha2), without)) for alpha2 in alphas]
    words = [word for word, _ in each]
    worst = next((word for word in (FAILS, NOT_RUN, UNDECIDED) if word in words), HOLDS)
    told = "; ".join(f"α₂ = {alpha2:g}: {text}" for alpha2, (_, text) in zip(alphas, each, strict=True) if text)
    return worst, told + _student(scale, told)


def _student(scale: Scale, evidence: str) -> str:
    """Return which student evidence is of, where it is not the paper's."""
    return f", {scale.weights_student} student" if evidence and scale.weights_student != "large" else ""


def _side(method: str, size: tuple[str, int] = SMALLEST) -> Measurement:
    return Measurement(method, paper.TEACHERS["Large-32"], 0, NO_DEVICE, *size)


def _ratio(one: Result, other: Result, what: str) -> float:
    return float(one.measured[what]) / float(other.measured[what])


def _less(ratio: float) -> str:
    return f"{ratio:.1f}× less" if ratio >= 1 else f"{1 / ratio:.1f}× more"


def _precision(result: Result) -> str:
    """Return in what both sides of a measurement compute."""
    return f", {result.measured['precision']}" if "precision" in result.measured else ""


def _number(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
