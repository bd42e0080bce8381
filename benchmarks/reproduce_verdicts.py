"""What the numbers say to each claim of the paper's prose: it holds, it does not, undecided, or not run."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import reproduce_paper as paper
from benchmarks.distill_accuracy import spread
from benchmarks.reproduce_results import Result, Results
from benchmarks.reproduce_runs import NO_DEVICE, Measurement, Scale
from benchmarks.reproduce_study import KNOWN

HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not run"
DEVICES = ("cuda", "mps", "cpu")  # the first that was measured on decides
_ABOUT_TWO = (1.0, 3.5)  # points: the paper's own differences are 1.6 to 3.3
# Student's t, two-sided 95 %, by degrees of freedom; the last one serves for more of them too.
_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_FEW_SEEDS, _LARGE = 3, 1.0  # fewer seeds tell only differences of a point and more


@dataclass(frozen=True)
class Verdict:
    """A claim, what the numbers say to it, and these numbers."""

    claim: str
    word: str
    evidence: str


def judge(results: Results, scale: Scale) -> list[Verdict]:
    """Judge all claims by the results of one scale."""
    claims: Sequence[tuple[str, Callable[[Results, Scale], tuple[str, str]]]] = (
        ("Embed-KD is about 2 points below Teacher-KD", _embed_below_teacher),
        ("Embed-KD is slightly better with larger teachers", _larger_teachers),
        ("Teacher-KD is better with Base-32 than with Large-32", _base_for_live),
        ("A larger student with Embed-KD beats the base student with Teacher-KD", _larger_student),
        ("… and takes less memory and time, with Large-32", _cheaper),
        ("Embeddings take 17 and 59 times less memory than Base-32 and Large-32", _weights),
        ("Embed-KD takes 9 times less memory than Teacher-KD", _memory),
        ("Embed-KD takes 8 times less time than Teacher-KD", _time),
        ("α₂ = 1 overfits: it is worse than α₂ = 0.5", _overfits),
        ("α₂ of 0.25, 0.5 and 0.75 are each better than α₂ = 0", _beats_supervised),
    )
    return [Verdict(claim, *judged(results, scale)) for claim, judged in claims]


def direction(differences: Iterable[float]) -> int | None:
    """Tell on which side of 0 differences lie, of one seed each.

    Returns:
        1 above and −1 below it, 0 where that is not told apart, none without differences. Of three seeds and more the
        95 % interval of the mean decides (Student's t); fewer must agree, and their mean be a point or more.
    """
    found = list(differences)
    if not found:
        return None
    mean = statistics.mean(found)
    if len(found) >= _FEW_SEEDS:
        t = _T[min(len(found) - 1, max(_T))]
        clear = abs(mean) > t * statistics.stdev(found) / math.sqrt(len(found))
    else:
        clear = abs(mean) >= _LARGE and all(each * mean > 0 for each in found)
    return (1 if mean > 0 else -1) if clear else 0


def differences(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    """Subtract accuracies seed by seed, where both are known."""
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def measurements(results: Results, scale: Scale, *sides: Measurement) -> tuple[str, list[Result]] | None:
    """Find measurements on one device: the first in `DEVICES` on which all are known, of one machine."""
    for device in DEVICES:
        each = [Measurement(m.method, m.teacher, scale.steps, device, m.student, m.image_size) for m in sides]
        found = [result for result in map(results.of, each) if result is not None]
        if len(found) == len(sides) and is_alike(found):
            return device, found
    return None


def is_alike(results: Sequence[Result]) -> bool:
    """Tell whether speeds and memory may be compared: of one machine, under the same conditions."""
    first = results[0]
    return all((each.machine, each.conditions) == (first.machine, first.conditions) for each in results)


def _judged(of_teachers: Mapping[str, Mapping[int, float]]) -> tuple[str, str]:
    """Judge whether differences lie above 0: seed by seed the mean over the paper's teachers, or over any others."""
    known = {name: each for name, each in of_teachers.items() if each}
    theirs = {name: each for name, each in known.items() if name in paper.TEACHERS.values()} or known
    seeds = set.intersection(*(set(each) for each in theirs.values())) if theirs else set()
    means = [statistics.mean(each[seed] for each in theirs.values()) for seed in sorted(seeds)]
    word = {None: NOT_RUN, 1: HOLDS, -1: FAILS, 0: UNDECIDED}[direction(means)]
    if not means:
        return word, ""
    return word, f"{spread(means, sign='+')} points, {_seeds(len(means))}, {', '.join(theirs)}"


def _embed_below_teacher(results: Results, scale: Scale) -> tuple[str, str]:
    def ahead(teacher: str) -> dict[int, float]:
        live, embed = (scale.training(method, teacher) for method in ("teacher-kd", "embed"))
        return differences(results.accuracies(live), results.accuracies(embed))

    word, evidence = _judged({teacher: ahead(teacher) for teacher in _TEACHERS})
    points = float(evidence.split()[0]) if evidence else 0.0
    if word == HOLDS and not _ABOUT_TWO[0] <= points <= _ABOUT_TWO[1]:
        word = FAILS
    return word, evidence


def _larger_teachers(results: Results, scale: Scale) -> tuple[str, str]:
    pairs = {"Large-16": "Base-16", "Large-32": "Base-32"}
    return _judged({paper.TEACHERS[one]: _between(results, scale, "embed", one, pairs[one]) for one in pairs})


def _base_for_live(results: Results, scale: Scale) -> tuple[str, str]:
    return _judged({paper.TEACHERS["Base-32"]: _between(results, scale, "teacher-kd", "Base-32", "Large-32")})


def _between(results: Results, scale: Scale, method: str, one: str, other: str) -> dict[int, float]:
    first, second = (scale.training(method, paper.TEACHERS[name]) for name in (one, other))
    return differences(results.accuracies(first), results.accuracies(second))


def _larger_student(results: Results, scale: Scale) -> tuple[str, str]:
    def ahead(teacher: str) -> dict[int, float]:
        large, base = scale.training("embed", teacher, student="large"), scale.training("teacher-kd", teacher)
        return differences(results.accuracies(large), results.accuracies(base))

    word, evidence = _judged({teacher: ahead(teacher) for teacher in _TEACHERS})
    if evidence and scale.larger_epochs:
        return UNDECIDED, f"{evidence}, but {scale.larger_epochs} epochs against {scale.epochs}"
    return word, evidence


def _cheaper(results: Results, scale: Scale) -> tuple[str, str]:
    large, base = _side("embed", student="large"), _side("teacher")
    found = measurements(results, scale, large, base)
    if found is None:
        return NOT_RUN, ""
    device, (embed, live) = found
    shares = [_ratio(live, embed, "memory_bytes"), _ratio(live, embed, "epoch_seconds")]
    told = f"{shares[0]:.1f}× less memory, {shares[1]:.1f}× less time, on {device}"
    return (HOLDS if min(shares) > 1 else FAILS), told


def _weights(results: Results, scale: Scale) -> tuple[str, str]:
    found = {name: results.of(Measurement("embed", paper.TEACHERS[name], 0, NO_DEVICE)) for name in paper.WEIGHT_RATIOS}
    ratios = {name: float(each.measured["weight_ratio"]) for name, each in found.items() if each is not None}
    if len(ratios) < len(found):
        return NOT_RUN, ""
    holds = all(round(ratio) == paper.WEIGHT_RATIOS[name] for name, ratio in ratios.items())
    return (HOLDS if holds else FAILS), ", ".join(f"{name} {ratio:.1f}×" for name, ratio in ratios.items())


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
    return (HOLDS if ratio >= least else FAILS), f"{ratio:.1f}×, base student, 32 px, Large-32, on {device}"


def _overfits(results: Results, scale: Scale) -> tuple[str, str]:
    def behind(teacher: str) -> dict[int, float]:
        return differences(_at_weight(results, scale, teacher, 0.5), _at_weight(results, scale, teacher, 1.0))

    return _judged({teacher: behind(teacher) for teacher in _TEACHERS})


def _beats_supervised(results: Results, scale: Scale) -> tuple[str, str]:
    def ahead(teacher: str, alpha2: float) -> dict[int, float]:
        return differences(_at_weight(results, scale, teacher, alpha2), _at_weight(results, scale, teacher, 0.0))

    each = [_judged({teacher: ahead(teacher, alpha2) for teacher in _TEACHERS}) for alpha2 in paper.ALPHAS[1:-1]]
    words = [word for word, _ in each]
    worst = next((word for word in (FAILS, NOT_RUN, UNDECIDED) if word in words), HOLDS)
    told = [f"α₂ = {alpha2:g}: {text}" for alpha2, (_, text) in zip(paper.ALPHAS[1:-1], each, strict=True) if text]
    return worst, "; ".join(told)


def _at_weight(results: Results, scale: Scale, teacher: str, alpha2: float) -> dict[int, float]:
    return results.accuracies(scale.training("embed", teacher, student="large", alpha2=alpha2))


def _side(method: str, student: str = "base") -> Measurement:
    return Measurement(method, paper.TEACHERS["Large-32"], 0, NO_DEVICE, student)


def _ratio(one: Result, other: Result, what: str) -> float:
    return float(one.measured[what]) / float(other.measured[what])


def _seeds(number: int) -> str:
    return f"{number} seed" if number == 1 else f"{number} seeds"


_TEACHERS = (*paper.TEACHERS.values(), KNOWN)
