"""The tables of sizes, memory and time, as lines of Markdown: the paper's beside ours."""

from collections.abc import Iterable, Sequence

from benchmarks import reproduce_paper as paper
from benchmarks.reproduce_comparisons import device_of, devices, measured_on
from benchmarks.reproduce_results import Result, Results
from benchmarks.reproduce_runs import NO_DEVICE, Measurement, Scale
from benchmarks.reproduce_study import SIDES
from benchmarks.reproduce_tables import NOTHING_SAID, Lines, megabytes, table
from benchmarks.reproduce_verdicts import NOT_RUN


def sizes(results: Results, scale: Scale) -> Lines:
    """Table I."""
    rows = []
    for student, teacher in (("base", "Base-16"), ("large", "Large-32")):
        found = results.of(Measurement("embed", paper.TEACHERS[teacher], 0, NO_DEVICE, student))
        rows.append([f"student {student}", _size(paper.STUDENT_SIZES[student]), *_counted(found, "student")])
    for name, teacher in paper.TEACHERS.items():
        found = results.of(Measurement("embed", teacher, 0, NO_DEVICE))
        size = paper.TEACHER_SIZES[name.partition("-")[0]]
        rows.append([f"teacher {name}", _size(size), *_counted(found, "teacher")])
    return table(["model", "paper", "here", "parameters"], rows, words=3)


def weights(results: Results, scale: Scale) -> Lines:
    """Table II, memory of weights: the teacher's over those of student, projection and class means."""
    rows = []
    for name, teacher in paper.TEACHERS.items():
        found = results.of(Measurement("embed", teacher, 0, NO_DEVICE))
        reported = f"{paper.WEIGHT_RATIOS[name]}" if name in paper.WEIGHT_RATIOS else NOTHING_SAID
        cells = [NOT_RUN] * 3
        if found is not None:
            bytes_of = found.measured["weight_bytes"]
            kept = sum(bytes_of[part] for part in ("student", "projection", "class_means"))
            cells = [megabytes(bytes_of["teacher"]), megabytes(kept), f"{found.measured['weight_ratio']:.1f}"]
        rows.append([name, *cells, reported])
    return table(["teacher", "its weights, MB", "all else, MB", "ratio", "ratio, paper"], rows)


def resources(results: Results, scale: Scale, compared: Iterable[tuple[str, str, int]]) -> Lines:
    """Measured memory and time of Embed-KD and Teacher-KD, on each device that there are figures of.

    Args:
        results: of the scale.
        scale: says how many steps were measured.
        compared: teacher by the paper's name, student, image size in pixels.
    """
    rows = []
    for teacher, student, image_size in compared:
        for device in devices(results):
            sides = [Measurement(side, paper.TEACHERS[teacher], 0, device, student, image_size) for side in SIDES]
            if found := measured_on(device, results, scale, *sides):
                embed, live = (each.measured for each in found)
                held = [megabytes(each["memory_bytes"]) for each in (embed, live)]
                seconds = [f"{each['epoch_seconds']:,.0f}" for each in (embed, live)]
                ratios = [f"{live[what] / embed[what]:.1f}" for what in ("memory_bytes", "epoch_seconds")]
                cells = [device_of(found[0]), *held, ratios[0], *seconds, ratios[1]]
                rows.append([teacher, student, str(image_size), *cells])
        if not rows or rows[-1][:3] != [teacher, student, str(image_size)]:
            rows.append([teacher, student, str(image_size), *[NOT_RUN] * 7])
    head = ["teacher", "student", "px", "on", "Embed-KD, MB", "Teacher-KD, MB", "ratio"]
    return table([*head, "Embed-KD, s an epoch of 50,000", "Teacher-KD, s an epoch of 50,000", "ratio"], rows, words=2)


def _counted(found: Result | None, what: str) -> list[str]:
    if found is None:
        return [NOT_RUN, NOT_RUN]
    size = found.measured["sizes"][what]
    return [_size([size[name] for name in ("layers", "width", "heads", "mlp")]), f"{size['parameters']:,}"]


def _size(size: Sequence[int]) -> str:
    layers, width, heads, mlp = size
    return f"{layers} × {width}, {heads} heads, MLP {mlp:,}"
