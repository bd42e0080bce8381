"""What the numbers say to the paper's claims."""

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks import reproduce_paper as paper
from benchmarks.reproduce_comparisons import direction, is_same
from benchmarks.reproduce_results import Results
from benchmarks.reproduce_runs import NO_DEVICE, SCALES, Measurement
from benchmarks.reproduce_study import KNOWN
from benchmarks.reproduce_verdicts import FAILS, HOLDS, NOT_RUN, UNDECIDED, judge
from tests.benchmarks.made_results import SCALE, made_measurements, made_result, made_trainings


def verdicts(*results: Any) -> Mapping[str, tuple[str, str]]:
    found = judge(Results([each for some in results for each in some]), SCALE)
    return {verdict.claim: (verdict.word, verdict.evidence) for verdict in found}


@pytest.mark.parametrize(
    ("differences", "found"),
    [
        ([], None),
        ([3.0], 1),
        ([2.9], 0),  # one seed tells no difference under three points
        ([-3.5, -3.2], -1),
        ([-3.5, -2.2], 0),
        ([8.0, -1.0], 0),
        ([0.2, 0.22, 0.21], 1),  # three seeds that agree tell a small one
        ([0.2, 0.5, -0.1], 0),
        ([2.0, 5.0, -1.0], 0),
        ([-0.2, -0.22, -0.21, -0.2], -1),
        ([0.0, 0.0, 0.0], 0),
    ],
)
def test_differences_are_told_apart_from_nothing(differences: list[float], found: int | None) -> None:
    assert direction(differences) == found


@pytest.mark.parametrize(
    ("differences", "found"),
    [
        ([0.1, -0.1, 0.2], True),
        ([0.0, 0.0], None),  # two seeds have no spread that could be relied on
        ([1.5, -1.5, 0.1], None),  # nor do three tell anything that lie so far apart
        ([0.5, 0.6, 0.55], False),
        ([-4.0], False),
        ([], None),
    ],
)
def test_the_same_is_what_is_told_to_be_near(differences: list[float], found: bool | None) -> None:
    assert is_same(differences) is found


def test_nothing_is_judged_without_numbers() -> None:
    assert set(verdicts().values()) == {(NOT_RUN, "")}


@pytest.mark.parametrize(
    ("live", "word"),
    [
        ([14.0, 14.1, 14.2], HOLDS),
        ([12.5, 12.6, 12.7], FAILS),
        ([11.0, 11.1, 11.2], FAILS),
        ([13.0, 12.0, 12.3], UNDECIDED),
    ],
)
def test_embed_is_about_two_points_below(live: list[float], word: str) -> None:
    found = verdicts(made_trainings("embed", [12.0, 12.1, 12.2]), made_trainings("teacher-kd", live))
    assert found["Embed-KD is about 2 points below Teacher-KD"][0] == word


def test_the_papers_teachers_count_where_there_are_any() -> None:
    theirs = paper.TEACHERS["Base-16"]
    found = verdicts(
        made_trainings("embed", [12.0, 12.1, 12.2]),
        made_trainings("teacher-kd", [11.0, 11.1, 11.2]),
        made_trainings("embed", [12.0, 12.1, 12.2], theirs),
        made_trainings("teacher-kd", [14.0, 14.1, 14.3], theirs),
    )
    told = found["Embed-KD is about 2 points below Teacher-KD"]
    assert told == (HOLDS, f"Teacher-KD ahead by +2.03 ± 0.06 points, 3 seeds, {theirs}")


def test_teachers_are_compared_seed_by_seed() -> None:
    large, base = (paper.TEACHERS[name] for name in ("Large-32", "Base-32"))
    found = verdicts(
        made_trainings("embed", [12.0, 13.0, 14.0], base),
        made_trainings("embed", [12.4, 13.4, 14.41], large),
        made_trainings("teacher-kd", [20.0], base),
        made_trainings("teacher-kd", [17.5], large),
    )
    assert found["Embed-KD is slightly better with larger teachers"][0] == HOLDS
    assert found["Teacher-KD is better with Base-32 than with Large-32"] == (UNDECIDED, f"+2.50 points, 1 seed, {base}")


def test_all_weights_must_beat_none() -> None:
    def at(alpha2: float, *accuracies: float) -> Any:
        return made_trainings("embed", accuracies, alpha2=alpha2)

    claim = "α₂ of 0.25, 0.5 and 0.75 are each better than α₂ = 0"
    without = at(0.0, 20.0, 20.1)
    better = [at(alpha2, 24.0, 24.1) for alpha2 in (0.25, 0.5)]
    assert verdicts(without, *better)[claim][0] == NOT_RUN
    assert verdicts(without, *better, at(0.75, 24.0, 24.2))[claim][0] == HOLDS
    assert verdicts(without, *better, at(0.75, 22.5, 22.6))[claim][0] == UNDECIDED
    assert verdicts(without, *better, at(0.75, 16.0, 16.1))[claim][0] == FAILS
    assert verdicts(without, at(0.5, 24.0, 24.1))[claim][1] == (
        f"α₂ = 0.5: +4.00 ± 0.00 points, 2 seeds, {KNOWN}, base student"
    )


def test_of_overfitting_test_accuracy_alone_is_told() -> None:
    found = verdicts(
        made_trainings("embed", [22.0, 22.1], alpha2=0.5), made_trainings("embed", [18.0, 18.2], alpha2=1.0)
    )
    assert found["α₂ = 1 overfits: it is worse than α₂ = 0.5"] == (
        HOLDS,
        f"+3.95 ± 0.07 points of test accuracy alone, 2 seeds, {KNOWN}, base student",
    )


def test_claims_of_weights_are_of_the_student_of_the_scale() -> None:
    full = SCALES["full"]
    trainings = [full.training("embed", KNOWN, student="large", alpha2=alpha2) for alpha2 in (0.5, 1.0)]
    made = [made_result(training, accuracy) for training, accuracy in zip(trainings, (60.0, 50.0), strict=True)]
    found = {verdict.claim: verdict.evidence for verdict in judge(Results(made), full)}
    assert found["α₂ = 1 overfits: it is worse than α₂ = 0.5"] == (
        f"+10.00 points of test accuracy alone, 1 seed, {KNOWN}"
    )


def test_averaged_embeddings_are_judged_by_samples() -> None:
    claim = "… since averaged embeddings lose what single samples know: these teach more"
    embed = made_trainings("embed", [12.0, 12.1, 12.2])
    assert verdicts(embed, made_trainings("sample", [14.0, 14.2, 14.3]))[claim] == (
        HOLDS,
        f"+2.07 ± 0.06 points, 3 seeds, {KNOWN}",
    )
    assert verdicts(embed, made_trainings("sample", [10.0, 10.2, 10.3]))[claim][0] == FAILS
    assert verdicts(embed, made_trainings("sample", [14.0]))[claim][0] == UNDECIDED


def test_memory_is_fixed_where_all_but_the_teacher_stays() -> None:
    claim = "The memory of Embed-KD stays the same while the teacher grows"

    def of(growth: float) -> Any:
        made = []
        for name, teacher in paper.TEACHERS.items():
            factor = growth if name.startswith("Large") else 1.0
            bytes_of = {"teacher": 4e8 * factor, "student": 1.9e7, "projection": 9e5, "class_means": 3e5 * factor}
            made.append(
                made_result(Measurement("embed", teacher, 0, NO_DEVICE), weight_bytes=bytes_of, weight_ratio=1.0)
            )
        return made

    each = "teacher 3.00×, all else 1.03×, class embeddings alone 3.00×"
    assert verdicts(of(3.0))[claim] == (HOLDS, f"Base-16 to Large-16: {each}; Base-32 to Large-32: {each}")
    assert verdicts(of(9.0))[claim][0] == FAILS  # the embeddings weigh too much by then
    assert verdicts(of(1.0))[claim][0] == FAILS  # no teacher grows
    assert verdicts(of(3.0)[:3])[claim][0] == NOT_RUN


def test_resources_are_judged_on_the_first_device_that_all_are_known_of() -> None:
    found = verdicts(made_measurements("cpu"), made_measurements("nvidia-h100")[4:5])
    where = "base student, 32 px, Large-32, on cpu"
    assert found["Embed-KD takes 9 times less memory than Teacher-KD"] == (HOLDS, f"10.0×, {where}")
    assert found["Embed-KD takes 8 times less time than Teacher-KD"] == (HOLDS, f"10.0×, {where}")
    assert found["… and takes less memory and time, with Large-32"][0] == HOLDS
    assert found["… and take less memory and time, with Large-32"][0] == HOLDS
    on_gpu = verdicts(made_measurements("cpu"), made_measurements("nvidia-h100"))
    assert on_gpu["Embed-KD takes 8 times less time than Teacher-KD"][1].endswith("Large-32, on nvidia-h100")
    # Both are of 59.1 here.
    claim = "Embeddings take 17 and 59 times less memory than Base-32 and Large-32"
    assert found[claim] == (FAILS, "Base-32 59.1×, Large-32 59.1×")


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("A larger student with Embed-KD beats the base student with Teacher-KD", {"student": "large"}),
        ("Larger images with Embed-KD beat the base student with Teacher-KD", {"image_size": 64}),
    ],
)
def test_students_of_unequal_epochs_decide_nothing(claim: str, changes: dict[str, Any]) -> None:
    base, large = made_trainings("teacher-kd", [14.0]), made_trainings("embed", [19.0], **changes)
    word, evidence = verdicts(base, large)[claim]
    assert word == UNDECIDED
    epochs = SCALE.training("teacher-kd", KNOWN).epochs
    assert evidence == f"+5.00 points, 1 seed, {KNOWN}, but 1 epoch against {epochs}"
    full = SCALES["full"]
    of_full = [made_result(full.training("teacher-kd", KNOWN), 70.0)]
    of_full += [made_result(full.training("embed", KNOWN, **changes), 74.0)]
    found = judge(Results(of_full), full)
    assert [verdict.word for verdict in found if verdict.claim == claim] == [HOLDS]
