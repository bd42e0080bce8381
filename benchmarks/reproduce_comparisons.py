"""What may be compared, and when a difference is one: seed by seed, and of one machine. No claim is known here."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.reproduce_results import Result, Results
from benchmarks.reproduce_runs import NO_DEVICE, Measurement, Scale

# Student's t, two-sided 95 %, by degrees of freedom; the last one serves for more of them too.
_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_FEW_SEEDS = 3  # fewer have no spread that could be relied on
# Points. Seeds of one arm lie up to two points apart (docs/results.md): less tells nothing of fewer seeds.
_LARGE = 3.0
_NOISE = 2.0


def direction(differences: Iterable[float]) -> int | None:
    """Tell on which side of 0 differences lie, of one seed each.

    Returns:
        1 above and −1 below it, 0 where that is not told apart, none without differences. Of three seeds and more the
        95 % interval of the mean decides (Student's t); fewer must agree, and their mean be three points or more.
    """
    found = list(differences)
    if not found:
        return None
    mean = statistics.mean(found)
    if len(found) >= _FEW_SEEDS:
        clear = abs(mean) > _margin(found)
    else:
        clear = abs(mean) >= _LARGE and all(each * mean > 0 for each in found)
    return (1 if mean > 0 else -1) if clear else 0


def is_same(differences: Iterable[float]) -> bool | None:
    """Tell whether differences, of one seed each, are noise.

    Returns:
        Yes where the 95 % interval of the mean of three seeds and more has 0 in it and ends within two points of it, no
        where 0 is told apart from them, else none.
    """
    found = list(differences)
    if direction(found):
        return False
    is_near = len(found) >= _FEW_SEEDS and abs(statistics.mean(found)) + _margin(found) <= _NOISE
    return True if is_near else None


def differences(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    """Subtract accuracies seed by seed, where both are known."""
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def is_alike(results: Sequence[Result]) -> bool:
    """Tell whether speeds and memory may be compared: all of one machine, conditions, PyTorch and commit."""
    made_with = [(each.machine, each.conditions, each.versions.get("torch"), each.commit) for each in results]
    return all(each == made_with[0] for each in made_with)


def most_alike(results: Mapping[int, Result]) -> dict[int, Result]:
    """Return those results by seed of which speeds and memory may be compared: as many as can be, the first of equals.

    Args:
        results: by seed.
    """
    groups = [{seed: each for seed, each in results.items() if is_alike([one, each])} for one in results.values()]
    return max(groups, key=len, default={})


def devices(results: Results) -> list[str]:
    """Return the devices that anything was measured on, as settings name them, processors last."""
    found = {str(each.settings["device"]) for each in results.all() if each.settings["run"] == "measurement"}
    return sorted(found - {NO_DEVICE}, key=lambda name: (name == "cpu", name))


def measurements(results: Results, scale: Scale, *sides: Measurement) -> tuple[str, list[Result]] | None:
    """Find measurements on one device: the first in `devices` on which all are known and alike; with its name."""
    for device in devices(results):
        if found := measured_on(device, results, scale, *sides):
            return device_of(found[0]), found
    return None


def measured_on(device: str, results: Results, scale: Scale, *sides: Measurement) -> list[Result]:
    """Return measurements on a device, in the order of `sides`: all of them, of one machine, or none."""
    each = [Measurement(m.method, m.teacher, scale.steps, device, m.student, m.image_size) for m in sides]
    found = [result for result in map(results.of, each) if result is not None]
    return found if len(found) == len(sides) and is_alike(found) else []


def device_of(result: Result) -> str:
    """Return the name of the device that a result is of."""
    return str(result.machine.get("device"))


def _margin(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of the mean of three values and more."""
    t = _T[min(len(values) - 1, max(_T))]
    return t * statistics.stdev(values) / math.sqrt(len(values))
