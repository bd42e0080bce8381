"""What results say: tables, figures and the page."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

from benchmarks.reproduce_live import live
from benchmarks.reproduce_page import drawings, page, write_page
from benchmarks.reproduce_results import Result, Results, write_result
from benchmarks.reproduce_runs import SCALES
from benchmarks.reproduce_sections import SECTIONS
from benchmarks.reproduce_study import KNOWN
from benchmarks.reproduce_tables import few_epochs, few_labels, over_alpha2
from tests.benchmarks.made_results import SCALE, made_measurements, made_result, made_trainings, many_results

GOLDEN = Path(__file__).parent / "reproduction.md"


def test_the_page_is_this_one_to_the_byte() -> None:
    assert page({"full": Results([]), "reduced": many_results()}) == GOLDEN.read_text("utf-8")


def test_the_page_and_its_figures_are_written_from_files_alone(tmp_path: Path) -> None:
    for number, result in enumerate(many_results().all()):
        write_result(tmp_path / "results" / "reduced" / result.target / f"{number}.json", result)
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


def test_text_says_which_student_figure_3_is_of_and_how_many_images_an_embedding() -> None:
    texts = {section.heading: section.text for section in SECTIONS}
    assert texts["Figure 3: accuracy over α₂"].startswith(
        "Large student at scale full, base student at scale reduced, 32 px, recipe `paper`; the paper's is the large "
    )
    assert (
        "up to N = 100 training images of each class (50 at reduced)." in texts["Table II: the base student at 32 px"]
    )


def test_figure_3_is_of_the_student_of_the_scale() -> None:
    full = SCALES["full"]
    base, large = (drawn.decode() for drawn in (fig3(many_results(), "reduced"), fig3(of_full(), "full")))
    assert "<!-- Base student, 32 px, recipe paper, scale reduced -->" in base
    assert "<!-- Large student, 32 px, recipe paper, scale full -->" in large
    teacher = f"{KNOWN} (not the paper's)"
    assert over_alpha2(many_results(), SCALE)[-1].startswith(f"| {teacher} | base | 11.13 ± 0.15 (3) |")
    assert (
        over_alpha2(of_full(), full)[-1] == f"| {teacher} | large | not run | not run | 60.00 (1) | not run | not run |"
    )


def fig3(results: Results, name: str) -> bytes:
    return drawings(results, SCALES[name], name)["fig3"]()


def of_full() -> Results:
    return Results([made_result(SCALES["full"].weighted(KNOWN, 0.5), 60.0)])


def test_each_scale_that_is_shown_has_its_own_command() -> None:
    both = page({"full": of_full(), "reduced": many_results()})
    for command in ("fig3 --scale full", "fig3 --scale reduced", "table1 --scale reduced", "live --scale reduced"):
        assert both.count(f"```sh\npython benchmarks/reproduce.py {command}\n```") >= 1
    assert "live --scale full" not in both


# The live teacher


def test_costs_are_of_the_most_runs_of_one_machine() -> None:
    embed, beside = made_trainings("embed", [12.0, 12.1, 12.2]), made_trainings("teacher-kd", [14.0, 14.1, 14.2])
    gpu = {"device": "NVIDIA A100"}
    elsewhere = [
        each.model_copy(update={"machine": gpu, "measured": {**each.measured, "images_per_second": 900.0}})
        for each in (embed[0], beside[0])
    ]
    lines = live(Results([elsewhere[0], *embed[1:], elsewhere[1], *beside[1:]]), SCALE)
    assert f"| {KNOWN} (not the paper's) | {EMBED} | 12.10 ± 0.10 (3) | cpu (2) | 100 | 2.0× | 2,000.0 | – |" in lines


def test_speeds_of_another_pytorch_or_commit_are_not_compared() -> None:
    for change in ({"versions": {"torch": "3.0"}}, {"commit": "fedcba987654"}, {"conditions": {"jobs": 2}}):
        beside = [each.model_copy(update=change) for each in made_trainings("teacher-kd", [14.0])]
        lines = live(Results([*made_trainings("embed", [12.0]), *beside]), SCALE)
        expected = f"| {KNOWN} (not the paper's) | {EMBED} | 12.00 (1) | cpu (1) | 100 | not comparable | 2,000.0 | – |"
        assert expected in lines


EMBED = "Embed-KD, class embeddings of the artifact"


def test_samples_stand_against_the_live_teacher_seed_by_seed() -> None:
    assert told_of([14.2, 14.1, 14.0], [14.0, 14.1, 14.2]) == [
        f"Sample embeddings minus the live teacher, {KNOWN} (not the paper's): +0.00 ± 0.20 points (seed 0 +0.20, "
        "seed 1 +0.00, seed 2 -0.20).",
        "The same accuracy within noise: **holds**.",
    ]
    assert told_of([13.0, 13.1, 13.2], [14.0, 14.1, 14.2])[1] == "The same accuracy within noise: **does not hold**."
    assert told_of([13.0, 15.1], [14.0, 14.1])[1] == "The same accuracy within noise: **undecided**."
    assert told_of([], [14.0]) == [f"Sample embeddings minus the live teacher, {KNOWN} (not the paper's): not run."]


def told_of(stored: list[float], beside: list[float]) -> list[str]:
    lines = live(Results([*made_trainings("sample", stored), *made_trainings("teacher-kd", beside)]), SCALE)
    return lines[lines.index("") + 1 :]


# Few epochs


def test_few_epochs_are_those_on_the_way_by_halves() -> None:
    results = Results([*with_curve(None, 0.0, [0]), *with_curve(KNOWN, 1.0, [0, 1])])
    teacher = f"{KNOWN} (not the paper's)"
    assert few_epochs(results, SCALE) == [
        "| teacher | epochs | labels alone | class embeddings | difference |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| {teacher} | 1 | 10.00 (1) | 11.00 ± 0.00 (2) | +1.00 |",
        f"| {teacher} | 3 | 30.00 (1) | 31.00 ± 0.00 (2) | +1.00 |",
        f"| {teacher} | 8 | 80.00 (1) | 81.00 ± 0.00 (2) | +1.00 |",
    ]


def with_curve(teacher: str | None, more: float, seeds: list[int]) -> list[Result]:
    """Make runs that were evaluated after epochs 1, 2, 3 and 8, not after the fourth."""
    curve = [{"epoch": epoch, "loss": 4.0, "top1": 10.0 * epoch + more} for epoch in (1, 2, 3, 8)]
    curve.insert(3, {"epoch": 4, "loss": 4.0})
    training = SCALE.training("embed", teacher, alpha2=0.5 if teacher else 0.0)
    made = [made_result(replace(training, seed=seed), 80.0 + more) for seed in seeds]
    return [each.model_copy(update={"curve": tuple(curve)}) for each in made]


def test_few_epochs_are_left_out_where_runs_are_evaluated_once() -> None:
    assert few_epochs(many_results(), SCALE) == []
    assert few_labels(many_results(), SCALE)


# Where


def test_where_lists_targets() -> None:
    rows = [line for line in page({"reduced": many_results()}).splitlines() if "0123456789ab" in line]
    around = "cpu, a processor, 2 cores | PyTorch 2.0 | eager, 1 at once | 0123456789ab"
    assert rows == [f"| reduced | fig2 | {around} | 12 |", f"| reduced | live | {around} | 21 |"]


def test_measurements_of_two_models_of_gpu_stand_side_by_side() -> None:
    results = Results([*made_measurements("nvidia-a100"), *made_measurements("nvidia-h100")])
    found = page({"reduced": results})
    for name in ("nvidia-a100", "nvidia-h100"):
        assert f"| Large-32 | base | 32 | {name} | 200.0 | 2,000.0 | 10.0 | 60 | 600 | 10.0 |" in found
