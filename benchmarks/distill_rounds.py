"""Comparisons in time: sides that take turns, ratios round by round, their median."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.distill_loops import Step
from benchmarks.figure_book import Figures

TURN_STEPS = {"cpu": 1, "mps": 1, "cuda": 20}  # a GPU is waited for at the end of a turn
WARM_STEPS = 3
Timer = Callable[[int], float]  # takes so many steps and returns the seconds of one


def timer(step: Step, device: str) -> Timer:
    """Return what takes steps in this process and times them."""
    return lambda steps: seconds_of(step, steps, device)


def seconds_of(step: Step, steps: int, device: str) -> float:
    """Take steps, wait for the device, and return the seconds of one."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def in_rounds(sides: Mapping[str, Timer], rounds: int, device: str) -> dict[str, list[float]]:
    """Warm all sides up and let them take turns; each round begins with the next side.

    Args:
        sides: each by its name.
        rounds: turns of each side.
        device: a turn has as many steps as make sense there.

    Returns:
        Seconds a step of each side, round by round.
    """
    names, steps = list(sides), TURN_STEPS[torch.device(device).type]
    for name in names:
        sides[name](WARM_STEPS * steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(sides[name](steps))
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
