"""The run directory: student, checkpoints, metrics and the record of everything that made them.

    RUN/student/          config.json and model.safetensors of the last finished epoch, README.md of a finished run
    RUN/checkpoints/      the last two, from which a stopped run goes on
    RUN/metrics.jsonl     one JSON object an epoch
    RUN/tensorboard/      the same as scalars
    RUN/run.json          settings, versions, artifact digest, results
    RUN/report.html       all of it to look at, of a run that came to its end
    RUN/lock              while a process trains here

It appears with the first checkpoint or student, so that there is no run directory with nothing to go on from.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from pipeline.distill.checkpoint import Checkpoints
from pipeline.distill.loop import Compute, Trainer
from pipeline.distill.student import save_student
from pipeline.errors import PipelineError, describe_differences, first_line
from pipeline.folder_lock import LOCK_NAME, FolderLock
from pipeline.output import check_output, write_atomically
from pipeline.progress import LOGGER
from pipeline.runtime import software_versions

_SOFTWARE = ("torch", "torchvision", "timm", "datasets", "numpy", "pillow", "safetensors")
_SCALAR_GROUPS = {"top1": "evaluation", "top5": "evaluation", "epoch": None, "step": None}
# What a resumed run must share with the run before it: these parts of the record …
_SHARED = ("settings", "recipe", "artifact", "data", "compute")
# … without what only leads to something that another entry tells in full, or by its digest.
_NAMES = (
    *(("settings", name) for name in ("recipe", "overrides", "data", "eval_split")),
    *(("data", name) for name in ("name", "revision", "licence", "evaluated_on")),
    *(("artifact", "file"), ("data", "join", "artifact")),
)


class RunDirectory:
    """Writes one run directory."""

    def __init__(self, path: Path, *, overwrite: bool, resume: bool) -> None:
        """Check the place; nothing is written yet.

        Args:
            path: the directory to make.
            overwrite: replace an older run directory there.
            resume: go on with an older run there, if there is one.

        Raises:
            PipelineError: something else is there.
        """
        self.path = path = path.resolve() if path.is_symlink() else path
        self._record: dict[str, Any] = {}
        self._scalars: Any = None  # TensorBoard's writer
        self.resumes = resume and path.exists()
        if path.exists() and (overwrite or resume) and not (path / "run.json").is_file():
            what = "resumed" if resume else "overwritten"
            raise PipelineError(f"{path}: is not a run directory, so it is not {what}. Choose another --out.")
        if path.exists() and not (overwrite or resume):
            raise PipelineError(f"{path}: exists. Pass --resume to go on with it, --overwrite, or another --out.")
        check_output(path, 0, replaceable=overwrite or resume)
        hidden = path.absolute().with_name(f".{path.absolute().name}.partial")
        self._work = path if self.resumes else hidden  # where things are written
        self._checkpoints = Checkpoints(self._work / "checkpoints")

    @contextmanager
    def open(self, record: Mapping[str, Any], trainer: Trainer) -> Iterator[None]:
        """Keep the record while training goes on inside the block; where the run has an older part, go back to it.

        Args:
            record: everything that made the run, in the parts `_SHARED` names.
            trainer: at the start of the run; set to the last checkpoint.

        Raises:
            PipelineError: the older part has other settings, or its checkpoints are damaged; another process trains
                there.
        """
        self._record = {"status": "running", **record, "machine": _machine(trainer.compute)}
        self._record["software"] = software_versions(_SOFTWARE)
        try:
            with self._alone():
                try:
                    self._begin(trainer)
                    yield
                except BaseException as error:
                    self._abandon("interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed")
                    raise
                finally:
                    if self._scalars is not None:
                        self._scalars.close()
        except OSError as error:
            raise PipelineError(f"{self.path}: cannot be written ({error.strerror or error}).") from None

    def log_epoch(self, line: Mapping[str, float]) -> None:
        """Append one epoch to the metrics; its student has been saved before.

        Args:
            line: what to note, `epoch` and `step` (since the start of the run) among it.
        """
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if group := _SCALAR_GROUPS.get(name, "training"):
                self._scalars.add_scalar(f"{group}/{name}", value, line["step"])
        self._scalars.flush()

    def save_student(self, trainer: Trainer) -> None:
        """Keep the student as it is now."""
        save_student(trainer.kept, self._work / "student")
        self._publish()

    def save_checkpoint(self, trainer: Trainer) -> None:
        """Keep where the run stands now."""
        self._checkpoints.save(trainer)
        self._publish()

    def note(self, parts: Mapping[str, Any]) -> None:
        """Add parts to the record."""
        self._record |= parts
        self._write_record()

    def finish(self) -> None:
        """Record that the run came to its end."""
        self.note({"status": "finished"})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out of the run directory, and of what is to become it."""
        taken = f"{self.path}: another process trains there. Wait for it, or choose another --out."
        with ExitStack() as stack:
            for folder in dict.fromkeys((self.path, self._work)):
                if folder == self._work:
                    folder.mkdir(exist_ok=True)
                elif not folder.exists():
                    continue
                lock = FolderLock(folder, taken)
                lock.take()
                stack.callback(lock.release)
                stack.callback((self.path / LOCK_NAME).unlink, missing_ok=True)
            yield

    def _begin(self, trainer: Trainer) -> None:
        if self.resumes:
            self._resume(trainer)
        else:
            for left in self._work.iterdir():  # by a run that was killed
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != LOCK_NAME:
                    left.unlink()
        self._write_record()

    def _resume(self, trainer: Trainer) -> None:
        try:
            before = json.loads((self.path / "run.json").read_text("utf-8"))
            shared = _shared(before)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise PipelineError(
                f"{self.path}: run.json is damaged ({first_line(error)}), so it is not known what to go on with. "
                "Begin anew with --overwrite."
            ) from None
        now = json.loads(json.dumps(self._record))
        if differing := describe_differences(shared, _shared(now)):
            raise PipelineError(
                f"{self.path}: is a run of other settings: {'; '.join(differing)}. Pass the same, or another --out."
            )
        if before.get("software") != now["software"] or before.get("machine") != now["machine"]:
            LOGGER.info("The run was begun with other software or on another machine: its last bits may differ.")
        self._checkpoints.restore(trainer)
        self._cut_metrics(trainer.progress.epoch)
        # The epoch that ends here, or went on from here, may be noted at this very step: it is noted again.
        self._open_scalars(purge_step=trainer.progress.num_steps)
        LOGGER.info("Going on after step %s, in epoch %d.", f"{trainer.progress.num_steps:,}", trainer.progress.epoch)

    def _cut_metrics(self, epoch: int) -> None:
        """Leave out what a stopped part of the run noted after its last checkpoint, and half a line."""
        path, kept = self.path / "metrics.jsonl", []
        for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
            with suppress(ValueError, LookupError, TypeError, RecursionError):
                if json.loads(line)["epoch"] < epoch:
                    kept.append(line + "\n")
        write_atomically(path, "".join(kept).encode())

    def _publish(self) -> None:
        if self._work == self.path:
            return
        if self.path.exists():
            shutil.rmtree(self.path)
        self._work.rename(self.path)
        self._work = self.path
        self._checkpoints.folder = self.path / "checkpoints"
        self._open_scalars()  # it keeps its path, so not before the rename

    def _open_scalars(self, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._scalars = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge_step)

    def _abandon(self, status: str) -> None:
        if self._work != self.path:
            shutil.rmtree(self._work, ignore_errors=True)
            return
        if self.resumes and self._scalars is None:
            return  # it was not gone on with: its record stays as it was
        self._record["status"] = status
        with suppress(OSError):  # the disk may be full: what stands there stands all the same
            self._write_record()
        LOGGER.info("%s: what was learnt up to the last checkpoint is kept. Go on with --resume.", self.path)

    def _write_record(self) -> None:
        text = json.dumps(self._record, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self._work / "run.json", text.encode())


def _shared(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a resumed run must have in common with the run before it."""
    parts = {part: dict(record[part]) for part in _SHARED}
    for *path, name in _NAMES:
        holder: Any = parts
        for key in path:
            holder = holder.get(key)
        if isinstance(holder, dict):
            holder.pop(name, None)
    return parts


def _machine(compute: Compute) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else None
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpu_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": gpu,
    }
