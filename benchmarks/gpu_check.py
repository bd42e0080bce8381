"""Whether a machine can run the suite: everything that is missing, said at once and before anything is run."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.distill_loops import LABEL_COLUMN
from benchmarks.extract_setup import KNOWN_DATA
from benchmarks.reproduce_bench import commit
from benchmarks.reproduce_plan import Reproduction, teachers_at_hand
from pipeline.data import DataSettings, load_labelled
from pipeline.errors import PipelineError
from pipeline.runtime import resolve_device, resolve_precision, software_versions

NUM_IMAGES = {"train": 50_000, "test": 10_000}
NUM_CLASSES = 100
GPU_BYTES_A_JOB = 6e9  # of the largest students
UNKNOWN_COMMIT = "unknown: no repository here, and no CLIP_EMBED_KD_COMMIT"
DISK_BYTES, SHARED_BYTES = 20e9, 4e9  # of all that is left behind; of batches between processes


class Fact(NamedTuple):
    """One thing that was looked at; `problem` is empty where it is as it should be."""

    name: str
    found: str
    problem: str = ""


def check_machine(reproduction: Reproduction, num_at_once: int) -> list[str]:
    """Look at everything that the suite needs.

    Args:
        reproduction: what shall be run.
        num_at_once: trainings side by side.

    Returns:
        A line for each thing that was found.

    Raises:
        PipelineError: something is missing; all that is, in one message.
    """
    facts = list(_facts(reproduction, num_at_once))
    problems = [f"{fact.name.capitalize()}: {fact.problem}" for fact in facts if fact.problem]
    if problems:
        raise PipelineError(" ".join(["the suite cannot be run here.", *problems]))
    return [f"{fact.name:<10}  {fact.found}" for fact in facts]


def _facts(reproduction: Reproduction, num_at_once: int) -> Iterator[Fact]:
    found = commit()
    is_trial = reproduction.scale == "trial"
    yield Fact(
        "program",
        f"commit {found or UNKNOWN_COMMIT}, Python {sys.version.split()[0]}",
        "" if found or is_trial else f"its commit is {UNKNOWN_COMMIT}.",
    )
    versions = software_versions(("torch", "torchvision", "timm", "transformers", "datasets", "h5py"))
    yield Fact("packages", ", ".join(f"{name} {version}" for name, version in versions.items() if name != "python"))
    yield from _device(reproduction.device, num_at_once)
    yield Fact("processor", f"{len(os.sched_getaffinity(0))} cores")
    yield _room("disk", reproduction.results.parent, 0 if is_trial else DISK_BYTES)
    yield _room("shm", Path("/dev/shm"), 0 if is_trial else SHARED_BYTES)
    yield from (_split(name, number) for name, number in NUM_IMAGES.items())
    yield _teachers(reproduction)


def _room(name: str, folder: Path, wanted: float) -> Fact:
    free = shutil.disk_usage(folder).free
    problem = "" if free >= wanted else f"{free / 1e9:.1f} GB free at {folder}, {wanted / 1e9:.0f} are needed."
    return Fact(name, f"{free / 1e9:.1f} GB free", problem)


def _device(name: str, num_at_once: int) -> Iterator[Fact]:
    try:
        device = resolve_device(name)
    except PipelineError as error:
        yield Fact("device", "", str(error))
        return
    precision = str(resolve_precision("auto", device)).removeprefix("torch.")
    if device.type != "cuda":
        yield Fact("device", f"{device}, {precision}")
        return
    free, total = torch.cuda.mem_get_info(device)
    wanted = num_at_once * GPU_BYTES_A_JOB
    problem = "" if free >= wanted else f"{free / 1e9:.0f} GB free, {wanted / 1e9:.0f} are needed: fewer --jobs."
    told = f"{torch.cuda.get_device_name(device)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {precision}"
    yield Fact("device", told, problem)


def _split(name: str, number: int) -> Fact:
    try:
        data = load_labelled(DataSettings(dataset=str(KNOWN_DATA), split=name, label_column=LABEL_COLUMN))
    except PipelineError as error:
        return Fact("data", "", f"{error} CLIP_EMBED_KD_SHARED names the folder around data/cifar100.")
    found = f"split {name}: {len(data):,} images of {len(data.class_names)} classes"
    as_expected = (len(data), len(data.class_names)) == (number, NUM_CLASSES)
    return Fact("data", found, "" if as_expected else f"{found}; CIFAR-100 has {number:,} of {NUM_CLASSES}.")


def _teachers(reproduction: Reproduction) -> Fact:
    try:
        names = teachers_at_hand(reproduction.teachers)
    except PipelineError as error:
        return Fact("teachers", "", str(error))
    return Fact("teachers", ", ".join(names), "" if names else "none is at hand: --teachers, or CLIP_EMBED_KD_SHARED.")
