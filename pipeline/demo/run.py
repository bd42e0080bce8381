"""The demonstration: extract once, then train the same student with and without the teacher's embeddings.

It runs the functions that the commands run, and prints each command as a user would type it. Whatever the
figures are, they are shown.
"""

import shlex
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from pipeline.data import DataSettings
from pipeline.demo.digits import load_digits_splits
from pipeline.distill import DistillResult, DistillSettings, distill
from pipeline.errors import PipelineError
from pipeline.extract import ExtractResult, ExtractSettings, extract
from pipeline.progress import LOGGER, duration, log_to_stderr, size

TEACHER = Path(__file__).parent / "digits-vit"
RECIPE = Path(__file__).parent / "digits.toml"
STUDENT = "test_resnet"  # timm's smallest ResNet: 0.5 million parameters
NUM_LABELLED = 100
ALPHAS = (0.0, 0.5)
SEEDS = (0, 1, 2)
# Options that are not called like their setting.
_OPTIONS = {"config": "dataset-config", "revision": "dataset-revision", "overrides": "set"}


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured. `runs` has the results of every seed for each α₂."""

    extraction: ExtractResult
    runs: dict[float, list[DistillResult]]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return all figures as plain JSON."""
        return {
            "artifact_bytes": self.extraction.artifact_bytes,
            "extract_seconds": self.extraction.seconds,
            "top1": {str(alpha2): [run.top1 for run in runs] for alpha2, runs in self.runs.items()},
            "train_seconds": {str(alpha2): [run.train_seconds for run in runs] for alpha2, runs in self.runs.items()},
            "peak_memory_bytes": max(run.memory.resident_bytes for runs in self.runs.values() for run in runs),
            "seconds": self.seconds,
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return label and text of each line of the closing table."""
        manifest = self.extraction.manifest
        rows = [
            (
                "artifact",
                f"{size(self.extraction.artifact_bytes)}: {len(manifest.classes)} classes × "
                f"{manifest.teacher.embed_dim} values, extracted in {duration(self.extraction.seconds)}",
            )
        ]
        for alpha2, runs in self.runs.items():
            accuracies = [run.top1 for run in runs]
            rows.append(
                (
                    f"α₂ = {alpha2:g}",
                    f"top-1 {statistics.mean(accuracies):.1f} % ± {statistics.stdev(accuracies):.1f} "
                    f"({', '.join(f'{accuracy:.1f}' for accuracy in accuracies)}), "
                    f"{duration(statistics.mean(run.train_seconds for run in runs))} of training each",
                )
            )
        plain, distilled = (statistics.mean(run.top1 for run in runs) for runs in self.runs.values())
        memory = max(run.memory.resident_bytes for runs in self.runs.values() for run in runs)
        rows.append(("difference", f"{distilled - plain:+.1f} points with the teacher's class embeddings"))
        rows.append(("time", duration(self.seconds)))
        rows.append(("memory", f"{size(memory)} at the peak, libraries and both stages included"))
        return rows


def run_demo(out: Path) -> DemoResult:
    """Run both stages on handwritten digits.

    Args:
        out: folder for data set, artifact and run directories; an older demonstration in it is replaced.

    Returns:
        What was measured.

    Raises:
        PipelineError: the folder holds something else, or an extra is not installed.
    """
    log_to_stderr()
    start = time.monotonic()
    datasets.disable_progress_bars()
    splits = load_digits_splits()
    _prepare(out)
    splits.save_to_disk(str(out / "digits"))
    shown_splits = ", ".join(f"{len(split):,} to {name}" for name, split in splits.items())
    LOGGER.info("Handwritten digits, 8×8 pixels (%s), are in %s.", shown_splits, out / "digits")

    to_extract = extract_settings(out)
    LOGGER.info("\n$ %s", command_line("extract", to_extract))
    extraction = extract(to_extract)
    runs: dict[float, list[DistillResult]] = {}
    for alpha2 in ALPHAS:
        for seed in SEEDS:
            to_distill = distill_settings(out, alpha2, seed)
            LOGGER.info("\n$ %s", command_line("distill", to_distill))
            runs.setdefault(alpha2, []).append(distill(to_distill))
    LOGGER.info("")
    return DemoResult(extraction, runs, time.monotonic() - start)


def extract_settings(out: Path) -> ExtractSettings:
    """Return the settings of stage one, for a demonstration in `out`."""
    return ExtractSettings(
        teacher=str(TEACHER),
        data=DataSettings(dataset=str(out / "digits")),
        out=out / "digits.safetensors",
        overwrite=True,
    )


def distill_settings(out: Path, alpha2: float, seed: int) -> DistillSettings:
    """Return the settings of one run of stage two, for a demonstration in `out`."""
    return DistillSettings(
        artifact=out / "digits.safetensors",
        data=DataSettings(dataset=str(out / "digits"), limit=NUM_LABELLED),
        out=out / f"alpha2-{alpha2:g}-seed-{seed}",
        cache=out / "images",
        student=STUDENT,
        recipe=str(RECIPE),
        overrides={"alpha2": alpha2},
        seed=seed,
        overwrite=True,
    )


def command_line(command: str, settings: ExtractSettings | DistillSettings) -> str:
    """Write settings as the command that a user would type.

    Args:
        command: `extract` or `distill`.
        settings: of that command; what is at its default is left out.

    Returns:
        One line for a shell.
    """
    words = ["clip-embed-kd", command]
    for name, value in settings.model_dump(exclude_defaults=True).items():
        for option, setting in value.items() if name == "data" else [(name, value)]:
            flag = f"--{_OPTIONS.get(option, option.replace('_', '-'))}"
            each = [f"{key}={chosen}" for key, chosen in setting.items()] if option == "overrides" else [str(setting)]
            words += [flag] if setting is True else [word for text in each for word in (flag, text)]
    return shlex.join(words)


def _prepare(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not (out / "digits" / "dataset_dict.json").is_file():
        raise PipelineError(f"{out}: holds something else than a demonstration. Choose another --out.")
    try:
        for folder in ("digits", "images"):
            shutil.rmtree(out / folder, ignore_errors=True)
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise PipelineError(f"{out}: cannot be made ({error.strerror}).") from None
