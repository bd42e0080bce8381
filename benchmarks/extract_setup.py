"""What the benchmark of extraction is run on: teacher, data set, device and how much, from the command's options."""

import os
import platform
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import made_inputs
from pipeline.data import DataSettings, Labelled, load_labelled
from pipeline.extract import ExtractResult, ExtractSettings, extract
from pipeline.runtime import resolve_device

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("CLIP_EMBED_KD_SHARED", ROOT.parent / "shared"))
KNOWN_TEACHER, KNOWN_DATA = SHARED / "teachers" / "vit_tiny_patch16_224", SHARED / "data" / "cifar100"
MADE_IMAGES = 20_000


@dataclass(frozen=True)
class Setup:
    """What is measured, and how much of it: the options."""

    work: Path
    teacher: Path
    dataset: Path
    label_column: str
    device: str
    images: int | None
    pairs: int
    kills: int

    @cached_property
    def data(self) -> Labelled:
        """All rows of the data set."""
        return load_labelled(DataSettings(dataset=str(self.dataset), label_column=self.label_column))

    @property
    def device_type(self) -> str:
        """The device, without its number."""
        return resolve_device(self.device).type

    @property
    def is_known(self) -> bool:
        """Whether these are the teacher and the data that accuracies are known of."""
        return (self.teacher, self.dataset) == (KNOWN_TEACHER, KNOWN_DATA)

    def count(self, wanted: int) -> int:
        """Return how many images a measure gets that wants so many; no class may be without one."""
        return max(min(wanted, self.images or wanted, len(self.data)), len(self.data.class_names))

    def limited(self, images: int) -> DataSettings:
        """Name so many rows of the data set."""
        return self.data.settings.model_copy(update={"limit": images})

    def extract(self, images: int, **options: Any) -> ExtractResult:
        """Extract in this process; the artifact stays until the next call."""
        folder = fresh_folder(self.work / "scratch")
        given = {"data": self.limited(images), "per_class": "all", "device": self.device, **options}
        return extract(ExtractSettings(teacher=str(self.teacher), out=folder / "a.safetensors", **given))

    def command(self, out: Path, *options: str, teacher: Path | None = None) -> list[str]:
        """Return an `extract` command that prints JSON, without the interpreter."""
        arguments = ["extract", "--teacher", str(teacher or self.teacher), "--dataset", str(self.dataset)]
        arguments += ["--label-column", self.label_column, "--device", self.device, "--out", str(out), "--json"]
        return [str(ROOT / "cli.py"), *arguments, *options]

    def described(self) -> dict[str, Any]:
        """Return what figures are of, without paths."""
        trial = {"trial": self.images} if self.images else {}
        return {"teacher": self.teacher.name, "data set": self.dataset.name, **trial}


def choose_setup(*, made: bool, **options: Any) -> Setup:
    """Fill in teacher and data set where none is named, and make them where they are to be made."""
    options["work"].mkdir(parents=True, exist_ok=True)
    if made or options["device"].startswith("cuda"):
        options["teacher"] = options["teacher"] or made_inputs.base_teacher(options["work"])
        if options["dataset"] is None:
            num_images = min(MADE_IMAGES, options["images"] or MADE_IMAGES)
            options |= {"dataset": made_inputs.jpeg_images(options["work"], num_images), "label_column": "label"}
    options["teacher"] = options["teacher"] or KNOWN_TEACHER
    options["dataset"] = options["dataset"] or KNOWN_DATA
    return Setup(**options)


def fresh_folder(path: Path) -> Path:
    """Return an empty folder in place of whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def machine(device: str) -> dict[str, Any]:
    """Return the facts that figures depend on."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    is_cuda = resolve_device(device).type == "cuda"
    return {
        "processor": model.group(1) if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
