"""The speed of steps: this program's beside those written by hand, in turn in one process, and its wait for data."""

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.distill_loops import Step, Subject, default_step, our_step, released_step, supervised_step
from benchmarks.distill_memory import measure_memory
from benchmarks.distill_setup import Setup
from benchmarks.extract_processes import run
from benchmarks.figure_book import Figures
from pipeline.runtime import keep_freed_memory

# 40 batches of 64 without a short one: a short one would be compared with a whole one.
TIMED_IMAGES, TIMED_TEST_IMAGES = 2560, 200
TURN_STEPS = {"cpu": 1, "mps": 1, "cuda": 20}  # a GPU is waited for at the end of a turn
WARM_STEPS, FED_STEPS, TRIAL_FED_STEPS = 3, 40, 4
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
        sides = {"ours": our_step(prepared), "supervised": supervised_step(prepared)}
        seconds = in_rounds(sides, setup.pick(4 * setup.pairs, setup.pairs), setup.device)
        figures = {"precision": str(prepared.trainer.compute.precision), **step_times(seconds)}
    found = compare(seconds["ours"], seconds["supervised"])
    memory = measure_memory(timed_subject(setup), setup.pick(MEMORY_TIMES, 1))
    ratios = {"time": found["ratio"], "memory": memory["ratio"]}
    targets = {f"{name}: at most {MOST_OVER}": ratio <= MOST_OVER for name, ratio in ratios.items()}
    return {**figures, "time over supervised": found, "memory": memory, "targets": targets}


def measure_released(setup: Setup) -> Figures:
    """Take our steps, compiled and not, those of the paper's released loop, and those of timm with defaults, in turn.

    With attention dropout and without: with it, PyTorch's fused attention takes a slow path on a CPU.
    """
    keep_freed_memory()  # the others gain, too
    figures: Figures = {"targets": {}}
    for case, dropout in DROPOUTS.items():
        seconds, compiled = _released_seconds(setup, dropout)
        figures[case] = {"was compiled": compiled, **step_times(seconds)}
        ratios = []
        for ours in ("ours", "ours, compiled"):
            for other in ("released loop", "timm with defaults"):
                figures[case][f"rate of {ours} over {other}"] = compare(seconds[other], seconds[ours])
            ratios.append(figures[case][f"rate of {ours} over released loop"]["ratio"])
        figures["targets"][f"{case}: over the released loop, at least {LEAST_RATE}"] = max(ratios) >= LEAST_RATE
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


def seconds_of(step: Step, steps: int, device: str) -> float:
    """Take steps, wait for the device, and return the seconds of one."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def in_rounds(sides: Mapping[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Warm all sides up and let them take turns; each round begins with the next side.

    Returns:
        Seconds a step of each side, round by round.
    """
    names, steps = list(sides), TURN_STEPS[torch.device(device).type]
    for name in names:
        seconds_of(sides[name], WARM_STEPS * steps, device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(sides[name], steps, device))
    return seconds


def compare(seconds: list[float], of_reference: list[float]) -> Figures:
    """Divide, round by round: the median ratio, its quartiles, the least and the most."""
    ratios = [one / other for one, other in zip(seconds, of_reference, strict=True)]
    lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "ratio": round(statistics.median(ratios), 4),
        "quartiles": [round(lower, 3), round(upper, 3)],
        "least and most": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": len(ratios),
    }


def step_times(seconds: Mapping[str, list[float]]) -> Figures:
    """Return the median of each side, in milliseconds a step."""
    return {"ms a step": {name: round(1e3 * statistics.median(each), 2) for name, each in seconds.items()}}


def _released_seconds(setup: Setup, dropout: float) -> tuple[dict[str, list[float]], bool]:
    """Time all sides; tell, too, whether ours could be compiled."""
    subject, overrides = timed_subject(setup), {"attention_dropout": dropout}
    with ExitStack() as stack:
        prepared = stack.enter_context(subject.prepared(overrides=overrides))
        compiled = stack.enter_context(subject.prepared(overrides=overrides, compile=True))
        sides = {
            "ours": our_step(prepared),
            "ours, compiled": our_step(compiled),
            "released loop": released_step(prepared),
            "timm with defaults": default_step(prepared),
        }
        seconds = in_rounds(sides, setup.pairs, setup.device)
        return seconds, compiled.trainer.forward_backward.compiled
