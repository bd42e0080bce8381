"""The memory of a step: ours, and a plain supervised step of the same student, each in a process of its own.

    python benchmarks/distill_memory.py SIDE ARTIFACT DATASET DEVICE STEPS

prepares a run, takes steps, and prints the most memory that PyTorch allocated on the device as JSON; what the process
itself holds is looked at from outside. Nothing of stage one is imported, nor what only the benchmark needs.
"""

import gc
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.distill_loops import Subject, our_step, supervised_step
from benchmarks.extract_processes import watch
from benchmarks.figure_book import Figures
from pipeline.runtime import keep_freed_memory, peak_memory

SIDES = {"ours": our_step, "supervised": supervised_step}
STEPS = 20
# The most that the import alone ever held.
IDLE = "import time, torch; time.sleep(0.5); print('{}')"


def measure_memory(subject: Subject, times: int) -> Figures:
    """Watch processes that take steps; compare ours with the plain ones.

    Args:
        subject: what is learned from.
        times: how often each; medians count.

    Returns:
        Megabytes: on a GPU those that PyTorch allocated there, else anonymous ones above an idle process that has
        imported torch; and the ratio of ours to the other.
    """
    idle, _ = watch(["-c", IDLE])
    megabytes: dict[str, float] = {}
    file_pages: dict[str, float] = {}
    for side in SIDES:
        command = [__file__, side, str(subject.artifact), str(subject.dataset), subject.device, str(STEPS)]
        found = []
        for _ in range(times):
            peaks, told = watch(command)
            found.append(told["device_bytes"] / 1e6 or (peaks["anonymous"] - idle["anonymous"]) * 1.024e-3)
        megabytes[side] = round(statistics.median(found), 1)
        file_pages[side] = round(peaks["file pages"] * 1.024e-3, 1)
    ratio = megabytes["ours"] / megabytes["supervised"]
    return {
        "MB": megabytes,
        "mapped file pages apart, MB": file_pages,
        "idle with torch, MB": round(idle["anonymous"] * 1.024e-3, 1),
        "ratio": round(ratio, 4),
        "steps": STEPS,
        "processes a side": times,
    }


def main() -> None:
    """Take the steps of one side."""
    side, artifact, dataset, device, steps = sys.argv[1:]
    keep_freed_memory()  # as the command does, on both sides
    subject = Subject(Path(artifact), Path(dataset), device)
    with subject.prepared() as prepared:
        step = SIDES[side](prepared)
        del prepared
        gc.collect()  # of the other side nothing but images stays
        torch.manual_seed(0)
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(int(steps)):
            step()
        print(json.dumps({"device_bytes": peak_memory(torch.device(device)).device_bytes}))


if __name__ == "__main__":
    main()
