"""What results say: verdicts, tables, figures and the page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks import reproduce_paper as paper
from benchmarks.reproduce_page import drawings, page, write_page
from benchmarks.reproduce_results import Results, write_result
from benchmarks.reproduce_runs import SCALES
from benchmarks.reproduce_study import KNOWN
from benchmarks.reproduce_verdicts import FAILS, HOLDS, NOT_RUN, UNDECIDED, direction, judge
from tests.benchmarks.made_results import SCALE, made_measurements, made_result, made_trainings, many_results

GOLDEN = Path(__file__).parent / "reproduction.md"


def verdicts(*results: Any) -> Mapping[str, tuple[str, str]]:
    found = judge(Results([each for some in results for each in some]), SCALE)
    return {verdict.claim: (verdict.word, verdict.evidence) for verdict in found}


@pytest.mark.parametrize(
    ("differences", "found"),
    [
        ([], None),
        ([2.0], 1),
        ([0.9], 0),  # one seed tells no difference under a point
        ([-1.5, -1.2], -1),
        ([4.0, -1.0], 0),
        ([0.2, 0.22, 0.21], 1),  # three seeds that agree tell a small one
        ([0.2, 0.5, -0.1], 0),
        ([2.0, 5.0, -1.0], 0),
        ([-0.2, -0.22, -0.21, -0.2], -1),
        ([0.0, 0.0, 0.0], 0),
    ],
)
def test_differences_are_told_apart_from_nothing(differences: list[float], found: int | None) -> None:
    assert direction(differences) == found


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
    assert told == (HOLDS, f"+2.03 ± 0.06 points, 3 seeds, {theirs}")


def test_teachers_are_compared_seed_by_seed() -> None:
    large, base = (paper.TEACHERS[name] for name in ("Large-32", "Base-32"))
    found = verdicts(
        made_trainings("embed", [12.0, 13.0, 14.0], base),
        made_trainings("embed", [12.4, 13.4, 14.41], large),
        made_trainings("teacher-kd", [20.0], base),
        made_trainings("teacher-kd", [19.5], large),
    )
    assert found["Embed-KD is slightly better with larger teachers"][0] == HOLDS
    assert found["Teacher-KD is better with Base-32 than with Large-32"] == (UNDECIDED, f"+0.50 points, 1 seed, {base}")


def test_all_weights_must_beat_none() -> None:
    def at(alpha2: float, *accuracies: float) -> Any:
        return made_trainings("embed", accuracies, student="large", alpha2=alpha2)

    claim = "α₂ of 0.25, 0.5 and 0.75 are each better than α₂ = 0"
    without = at(0.0, 20.0, 20.1)
    better = [at(alpha2, 22.0, 22.1) for alpha2 in (0.25, 0.5)]
    assert verdicts(without, *better)[claim][0] == NOT_RUN
    assert verdicts(without, *better, at(0.75, 22.0, 22.2))[claim][0] == HOLDS
    assert verdicts(without, *better, at(0.75, 20.5, 20.6))[claim][0] == UNDECIDED
    assert verdicts(without, *better, at(0.75, 17.0, 17.1))[claim][0] == FAILS
    overfits = "α₂ = 1 overfits: it is worse than α₂ = 0.5"
    assert verdicts(*better, at(1.0, 19.0, 19.2))[overfits] == (HOLDS, f"+2.95 ± 0.07 points, 2 seeds, {KNOWN}")


def test_resources_are_judged_on_the_first_device_that_all_are_known_of() -> None:
    found = verdicts(made_measurements("cpu"), made_measurements("cuda")[4:5])
    where = "base student, 32 px, Large-32, on cpu"
    assert found["Embed-KD takes 9 times less memory than Teacher-KD"] == (HOLDS, f"10.0×, {where}")
    assert found["Embed-KD takes 8 times less time than Teacher-KD"] == (HOLDS, f"10.0×, {where}")
    assert found["… and takes less memory and time, with Large-32"][0] == HOLDS
    # Both are of 59.1 here.
    claim = "Embeddings take 17 and 59 times less memory than Base-32 and Large-32"
    assert found[claim] == (FAILS, "Base-32 59.1×, Large-32 59.1×")


def test_students_of_unequal_epochs_decide_nothing() -> None:
    claim = "A larger student with Embed-KD beats the base student with Teacher-KD"
    base, large = made_trainings("teacher-kd", [14.0]), made_trainings("embed", [19.0], student="large")
    word, evidence = verdicts(base, large)[claim]
    assert word == UNDECIDED
    assert evidence == f"+5.00 points, 1 seed, {KNOWN}, but 3 epochs against 10"
    full = SCALES["full"]
    of_full = [made_result(full.training("teacher-kd", KNOWN), 70.0)]
    of_full += [made_result(full.training("embed", KNOWN, student="large"), 72.0)]
    found = judge(Results(of_full), full)
    assert [verdict.word for verdict in found if verdict.claim == claim] == [HOLDS]


def test_the_page_is_this_one_to_the_byte() -> None:
    assert page({"full": Results([]), "reduced": many_results()}) == GOLDEN.read_text("utf-8")


def test_the_page_and_its_figures_are_written_from_files_alone(tmp_path: Path) -> None:
    for number, result in enumerate(many_results().all()):
        write_result(tmp_path / "results" / "reduced" / "any" / f"{number}.json", result)
    write_page(tmp_path / "results", tmp_path / "docs")
    assert (tmp_path / "docs" / "reproduction.md").read_text("utf-8") == GOLDEN.read_text("utf-8")
    drawn = sorted(path.name for path in (tmp_path / "docs" / "figures").iterdir())
    assert drawn == ["fig2-reduced.svg", "fig3-reduced.svg", "labels-reduced.svg"]


def test_figures_are_svg_and_the_same_each_time() -> None:
    first, second = (drawings(many_results(), SCALE, "reduced") for _ in range(2))
    assert set(first) == {"fig2", "fig3", "labels"}
    picture = first["fig3"]()
    assert ET.fromstring(picture).tag.endswith("svg")
    assert picture == second["fig3"]()


def test_nothing_is_drawn_of_nothing() -> None:
    assert drawings(Results([]), SCALE, "reduced") == {}
