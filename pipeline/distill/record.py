"""The run directory: student, metrics and the record of everything that made them.

    RUN/student/          config.json and model.safetensors of the last finished epoch
    RUN/metrics.jsonl     one JSON object an epoch
    RUN/tensorboard/      the same as scalars
    RUN/run.json          settings, versions, artifact digest, results

It appears when the first epoch is finished, so that there is no run directory without a student.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from pipeline.distill.config import DistillSettings, Recipe
from pipeline.distill.evaluate import Evaluation
from pipeline.distill.loop import Compute, EpochResult
from pipeline.distill.student import Student, save_student, write_atomically
from pipeline.errors import PipelineError
from pipeline.output import check_output
from pipeline.progress import LOGGER
from pipeline.runtime import software_versions
from store import Artifact

_SOFTWARE = ("torch", "torchvision", "timm", "datasets", "numpy", "pillow", "safetensors")


class RunDirectory:
    """Writes one run directory."""

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        """Check the place; nothing is written yet.

        Args:
            path: the directory to make.
            overwrite: replace an older run directory there.

        Raises:
            PipelineError: something else is there.
        """
        self.path = path = path.resolve() if path.is_symlink() else path
        self._record: dict[str, Any] = {}
        self._scalars: Any = None  # TensorBoard's writer
        if path.exists() and overwrite and not (path / "run.json").is_file():
            raise PipelineError(f"{path}: is not a run directory, so it is not overwritten. Choose another --out.")
        check_output(path, 0, replaceable=overwrite)
        self._work = path.absolute().with_name(f".{path.absolute().name}.partial")  # where things are written

    @contextmanager
    def open(
        self,
        settings: DistillSettings,
        recipe: Recipe,
        artifact: Artifact,
        data: dict[str, Any],
        compute: Compute,
    ) -> Iterator[None]:
        """Keep the record while training goes on inside the block.

        Args:
            settings: of the run.
            recipe: with the settings laid over it.
            artifact: the teacher's side.
            data: what to say of the images.
            compute: device, precision and seed.
        """
        manifest = artifact.manifest
        self._record = {
            "status": "running",
            "settings": settings.model_dump(mode="json"),
            "recipe": recipe.model_dump(),
            "artifact": {
                "file": artifact.path.name,
                "manifest_sha256": artifact.manifest_sha256,
                "teacher": manifest.teacher.model_dump(),
            },
            "data": data,
            "machine": _machine(compute),
            "software": software_versions(_SOFTWARE),
        }
        shutil.rmtree(self._work, ignore_errors=True)
        try:
            self._work.mkdir()
            self._write_record()
            try:
                yield
            finally:
                if self._scalars is not None:
                    self._scalars.close()
        except BaseException as error:
            self._abandon("interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed")
            if isinstance(error, OSError):
                raise PipelineError(f"{self.path}: cannot be written ({error.strerror or error}).") from None
            raise

    def log_epoch(
        self, epoch: int, num_steps: int, learning_rate: float, result: EpochResult, evaluation: Evaluation
    ) -> None:
        """Append one epoch to the metrics; its student has been saved before.

        Args:
            epoch: from 1.
            num_steps: since the start of the run.
            learning_rate: of the epoch.
            result: losses and speed.
            evaluation: of the student after the epoch.
        """
        line = {
            "epoch": epoch,
            "step": num_steps,
            "loss": result.loss,
            "loss_ce": result.ce,
            "loss_clip": result.clip,
            "loss_cosine": result.cosine,
            "learning_rate": learning_rate,
            "images_per_second": result.num_images / result.seconds,
            "seconds": result.seconds,
            "top1": evaluation.top1,
            "top5": evaluation.top5,
        }
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name not in ("epoch", "step"):
                group = "evaluation" if name.startswith("top") else "training"
                self._scalars.add_scalar(f"{group}/{name}", value, num_steps)
        self._scalars.flush()

    def save(self, student: Student) -> None:
        """Keep this student; the run directory appears with the first one."""
        save_student(student, self._work / "student")
        if self._work != self.path:
            if self.path.exists():
                shutil.rmtree(self.path)
            self._work.rename(self.path)
            self._work = self.path
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self._scalars = SummaryWriter(str(self.path / "tensorboard"))  # keeps its path, so not before the rename

    def finish(self, result: dict[str, Any]) -> None:
        """Record the results and that the run came to its end."""
        self._record |= {"status": "finished", "result": result}
        self._write_record()

    def _abandon(self, status: str) -> None:
        if self._work != self.path:
            shutil.rmtree(self._work, ignore_errors=True)
            return
        self._record["status"] = status
        with suppress(OSError):  # the disk may be full: the student stands all the same
            self._write_record()
        LOGGER.info("%s: the student of the last finished epoch is kept.", self.path)

    def _write_record(self) -> None:
        text = json.dumps(self._record, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self._work / "run.json", text.encode())


def _machine(compute: Compute) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else None
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpu_cores": os.cpu_count(),
        "gpu": gpu,
        "device": str(compute.device),
        "precision": str(compute.precision).removeprefix("torch."),
    }
