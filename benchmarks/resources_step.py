"""One training step in a process of its own: its seconds, and what PyTorch allocated on the device.

    python benchmarks/resources_step.py '{"method": "embed", "student": "base", "image_size": 32, …}'

What the process itself holds is looked at from outside. Pixels, class embeddings and teachers are random numbers; no
more is loaded than the method needs.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.distill.config import Target
from pipeline.distill.loop import Compute, Trainer
from pipeline.distill.method import Batch
from pipeline.distill.recipe import load_recipe
from pipeline.distill.student import Student, build_student, student_config
from pipeline.distill.targets import Targets
from pipeline.errors import PipelineError
from pipeline.runtime import Precision, keep_freed_memory, peak_memory, resolve_device, resolve_precision
from store import Artifact

NUM_CLASSES = 100  # of CIFAR-100
WARM_STEPS = 3

Step = Callable[[], None]


@dataclass(frozen=True)
class StepCase:
    """What a step is of.

    `embed` is the paper's Embed-KD (class embeddings), `teacher` its Teacher-KD (a live teacher), `supervised` learns
    from labels alone. `embed_dim` is the teacher's.
    """

    method: Literal["embed", "teacher", "supervised"]
    student: str
    image_size: int
    teacher: str
    embed_dim: int
    steps: int
    device: str = "auto"
    precision: Precision = "auto"


def make_student(name: str, image_size: int) -> Student:
    """Build a student of the paper, for as many classes as it has."""
    return build_student(student_config(name, image_size, tuple(map(str, range(NUM_CLASSES))), load_recipe("paper")))


def make_targets(embed_dim: int) -> Targets:
    """Make class embeddings of random numbers."""
    none = np.empty(0, np.int64)
    return Targets(
        artifact=Artifact.__new__(Artifact),  # not opened: sample embeddings alone are read from it
        class_embeddings=torch.randn(NUM_CLASSES, embed_dim),
        centre=torch.zeros(embed_dim),
        class_text=None,
        head=None,
        sample_rows=none,
        image_ids=none,
        num_views=1,
    )


def make_step(case: StepCase) -> Step:
    """Prepare what a case asks for.

    Args:
        case: the case.

    Returns:
        A function that takes one step of recipe `paper` on one batch of random pixels.

    Raises:
        PipelineError: the device is absent, or memory ran out.
    """
    torch.manual_seed(0)
    device = resolve_device(case.device)
    precision = resolve_precision(case.precision, device)
    recipe = load_recipe("paper", {"alpha2": 0.0} if case.method == "supervised" else {})
    student, targets = make_student(case.student, case.image_size), make_targets(case.embed_dim)
    target: Target = "sample" if case.method == "teacher" else "class"
    trainer = Trainer(student, targets, target, recipe, Compute(device, precision, seed=0))
    shape = (recipe.batch_size, case.image_size, case.image_size, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8).to(device)
    labels = torch.arange(recipe.batch_size, device=device) % NUM_CLASSES
    batch = Batch(pixels, F.one_hot(labels, NUM_CLASSES).float(), None)
    if case.method != "teacher":
        return lambda: trainer.step(batch, 1)
    from benchmarks.live_teacher import LiveTeacher
    from benchmarks.vit_teachers import random_teacher

    live = LiveTeacher(random_teacher(case.teacher, device, precision), targets, recipe)
    return lambda: trainer.step(batch._replace(samples=live.samples(pixels)), 1)


def time_steps(step: Step, steps: int, device: torch.device) -> list[float]:
    """Take steps, after some to warm up.

    Args:
        step: takes one.
        steps: how many are timed.
        device: where it computes; a GPU is not waited for between them.

    Returns:
        The seconds of each.
    """
    for _ in range(WARM_STEPS):
        step()
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(steps):
            step()
            moments.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(moments)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def main() -> None:
    """Take the steps of one case, and print what they took as JSON."""
    case = StepCase(**json.loads(sys.argv[1]))
    keep_freed_memory()  # as the command does
    device = resolve_device(case.device)
    if device.index is not None:  # of "cuda" PyTorch takes the first by itself, and `set_device` would want a number
        torch.cuda.set_device(device)
    try:
        seconds = time_steps(make_step(case), case.steps, device)
    except PipelineError as error:
        sys.exit(f"Error: {error}")
    print(json.dumps({"seconds": seconds, "device_bytes": peak_memory(device).device_bytes}))


if __name__ == "__main__":
    main()
