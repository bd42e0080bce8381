"""The speed of steps: this program's beside those written by hand, in turn in one process, and its wait for data."""

from contextlib import ExitStack
from typing import Any

from benchmarks.distill_loops import Subject, default_step, our_step, released_step, supervised_step
from benchmarks.distill_memory import measure_memory
from benchmarks.distill_rounds import WARM_STEPS, compare, in_rounds, seconds_of, step_times, timer
from benchmarks.distill_setup import Setup
from benchmarks.distill_sides import COMPILED, DEFAULTS, OURS, RELEASED, side_process
from benchmarks.extract_processes import run
from benchmarks.figure_book import Figures
from pipeline.runtime import keep_freed_memory

# 40 batches of 64 without a short one: a short one would be compared with a whole one.
TIMED_IMAGES, TIMED_TEST_IMAGES = 2560, 200
FED_STEPS, TRIAL_FED_STEPS = 40, 4
MEMORY_TIMES = 3
MOST_OVER, LEAST_RATE, MOST_FED = 1.01, 3.0, 0.02
DROPOUTS = {"dropout 0.1, as in recipe paper": 0.1, "without dropout": 0.0}
FED: dict[str, dict[str, Any]] = {
    "paper": {},
    "strong": {"recipe": "strong"},
    "strong, samples": {"recipe": "strong", "target": "both", "overrides": {"replay_views": False}},
    "strong, views": {"recipe": "strong", "target": "both"},
}
FED_KINDS = {"strong, samples": "samples", "strong, views": "views"}  # others: class


def measure_step(setup: Setup) -> Figures:
    """Take steps of recipe `paper` with class embeddings, and plain supervised steps of the same student, in turn.

    Then each in processes of their own, for their memory.
    """
    keep_freed_memory()  # as the command does; the plain step gains as much
    with timed_subject(setup).prepared() as prepared:
        steps = {"ours": our_step(prepared), "supervised": supervised_step(prepared)}
        sides = {name: timer(step, setup.device) for name, step in steps.items()}
        seconds = in_rounds(sides, setup.pick(16 * setup.pairs, setup.pairs), setup.device)
        figures = {"precision": str(prepared.trainer.compute.precision), **step_times(seconds)}
    found = compare(seconds["ours"], seconds["supervised"])
    memory = measure_memory(timed_subject(setup), setup.pick(MEMORY_TIMES, 1))
    ratios = {"time": found["ratio"], "memory": memory["ratio"]}
    targets = {f"{name}: at most {MOST_OVER}": ratio <= MOST_OVER for name, ratio in ratios.items()}
    return {**figures, "time over supervised": found, "memory": memory, "targets": targets}


def measure_released(setup: Setup) -> Figures:
    """Take our steps, compiled and not, those of the paper's released loop, and those of timm with defaults, in turn.

    With attention dropout and without: with it, PyTorch's fused attention takes a slow path on a CPU. Once with all
    sides in this process, which keeps freed memory for all of them: arithmetic alone; and once each in a process of its
    own, as programs are run.
    """
    keep_freed_memory()
    figures: Figures = {"targets": {}}
    for case, dropout in DROPOUTS.items():
        for place, seconds in (
            ("one process", _seconds_here(setup, dropout)),
            ("a process each", _seconds_apart(setup, dropout)),
        ):
            found = figures[f"{case}, {place}"] = step_times(seconds)
            ratios = []
            for ours in (OURS, COMPILED):
                for other in (RELEASED, DEFAULTS):
                    found[f"rate of {ours} over {other}"] = compare(seconds[other], seconds[ours])
                ratios.append(found[f"rate of {ours} over {RELEASED}"]["ratio"])
            target = f"{case}, {place}: over the released loop, at least {LEAST_RATE}"
            figures["targets"][target] = max(ratios) >= LEAST_RATE
    return figures


def measure_feed(setup: Setup) -> Figures:
    """Take steps and note for which share of the time they waited for batches; then let a whole short run say it."""
    keep_freed_memory()
    figures: Figures = {"share of step time": {}}
    for name, changes in FED.items():
        with timed_subject(setup, FED_KINDS.get(name, "class")).prepared(**changes) as prepared:
            step, feed = our_step(prepared), prepared.feed
            seconds_of(step, WARM_STEPS, setup.device)
            fed, number = feed.seconds, setup.pick(FED_STEPS, TRIAL_FED_STEPS)
            seconds = number * seconds_of(step, number, setup.device)
            figures["share of step time"][name] = round((feed.seconds - fed) / seconds, 4)
    subject = timed_subject(setup)
    steps = str(setup.pick(2 * FED_STEPS, TRIAL_FED_STEPS))
    told = run(setup.distill(subject, setup.work / "fed", "--overwrite", "--max-steps", steps))
    figures["share that distill prints"] = round(told["feed_share"], 4)
    shares = {"paper": figures["share of step time"]["paper"], "paper, printed": told["feed_share"]}
    return {**figures, "targets": {f"{name}: at most {MOST_FED}": share <= MOST_FED for name, share in shares.items()}}


def timed_subject(setup: Setup, kind: str = "class") -> Subject:
    """Return what steps are timed on."""
    return setup.subject(kind, setup.subset(TIMED_IMAGES, TIMED_TEST_IMAGES))


def _seconds_here(setup: Setup, dropout: float) -> dict[str, list[float]]:
    subject, overrides = timed_subject(setup), {"attention_dropout": dropout}
    with ExitStack() as stack:
        prepared = stack.enter_context(subject.prepared(overrides=overrides))
        compiled = stack.enter_context(subject.prepared(overrides=overrides, compile=True))
        steps = {
            OURS: our_step(prepared),
            COMPILED: our_step(compiled),
            RELEASED: released_step(prepared),
            DEFAULTS: default_step(prepared),
        }
        sides = {name: timer(step, setup.device) for name, step in steps.items()}
        seconds = in_rounds(sides, setup.pairs, setup.device)
        if not compiled.trainer.forward_backward.compiled:
            raise RuntimeError("the step was not compiled")
    return seconds


def _seconds_apart(setup: Setup, dropout: float) -> dict[str, list[float]]:
    subject, overrides = timed_subject(setup), {"attention_dropout": dropout}
    with ExitStack() as stack:
        names = (OURS, COMPILED, RELEASED, DEFAULTS)
        sides = {name: stack.enter_context(side_process(subject, name, overrides=overrides)) for name in names}
        return in_rounds(sides, setup.pairs, setup.device)
