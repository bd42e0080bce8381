"""The run directory: student, checkpoints, metrics and the record of everything that made them.

    RUN/student/          config.json and model.safetensors as last evaluated, README.md of a finished run
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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from pipeline.distill.checkpoint import Checkpoints
from pipeline.distill.loop import ARITHMETIC, Compute, Trainer
from pipeline.distill.place import Place
from pipeline.distill.student import save_student
from pipeline.errors import PipelineError, describe_differences, first_line
from pipeline.output import write_atomically
from pipeline.progress import LOGGER
from pipeline.runtime import software_versions

_SOFTWARE = ("torch", "torchvision", "timm", "datasets", "numpy", "pillow", "safetensors")
_SCALAR_GROUPS = {"top1": "evaluation", "top5": "evaluation", "epoch": None, "step": None}
_OF_STUDENT = ("result", "outcome")  # parts of the record that say how good the last student is
# What a resumed run must share with the run before it: these parts of the record …
_SHARED = ("settings", "recipe", "artifact", "data", "compute")
# … without what only leads to something that another entry tells in full, or by its digest, or what changes last bits
# and what is dropped at random.
_LAST_BITS = ("micro_batch", "compile")
_NAMES = (
    *(("settings", name) for name in ("recipe", "overrides", "data", "eval_split", *_LAST_BITS)),
    *(("data", name) for name in ("name", "revision", "licence", "evaluated_on")),
    *(("artifact", "file"), ("data", "join", "artifact")),
)


class RunDirectory:
    """Writes one run directory."""

    def __init__(self, path: Path, *, overwrite: bool, resume: bool) -> None:
        """Check the place as `Place` does, and raise what it raises; nothing is written yet."""
        self._place = Place(path, overwrite=overwrite, resume=resume)
        self._record: dict[str, Any] = {}
        self._before: dict[str, Any] = {}  # of the run that is gone on with
        self._scalars: Any = None  # TensorBoard's writer
        self._checkpoints = Checkpoints(self._place.work / "checkpoints")

    @contextmanager
    def claim(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Keep other processes out while a run is prepared and trained inside the block; then open it there.

        Args:
            given: what the run was told; those of its parts that `_SHARED` names are compared.

        Raises:
            PipelineError: another process trains there, or the older part of the run has other settings.
        """
        self._record = dict(given)
        with self._place.claim():
            if self._place.resumes:
                self._before = self._read_before()
                self._check_same()
            yield

    @contextmanager
    def open(self, found: Mapping[str, Any], trainer: Trainer) -> Iterator[None]:
        """Keep the record while training goes on inside the block; where the run has an older part, go back to it.

        Args:
            found: the other parts of what made the run.
            trainer: at the start of the run; set to the last checkpoint.

        Raises:
            PipelineError: the older part has other settings, or its checkpoints are damaged.
        """
        kept = {name: self._before[name] for name in ("initial",) if name in self._before}
        self._record = {"status": "running", **self._record, **kept, **found, "machine": _machine(trainer.compute)}
        self._record["software"] = software_versions(_SOFTWARE) | {"arithmetic": str(ARITHMETIC)}
        try:
            with self._writing():
                if self._place.resumes:
                    self._check_same()
                    self._resume(trainer)
                self._write_record()
            try:
                yield
            finally:
                if self._scalars is not None:
                    self._scalars.close()
        except BaseException as error:
            self._abandon("interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed")
            raise

    @property
    def path(self) -> Path:
        """The directory, links followed."""
        return self._place.path

    def log_epoch(self, line: Mapping[str, float]) -> None:
        """Append one epoch to the metrics; its student has been saved before.

        Args:
            line: what to note, `epoch` and `step` (since the start of the run) among it.
        """
        with self._writing():
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in line.items():
                if group := _SCALAR_GROUPS.get(name, "training"):
                    self._scalars.add_scalar(f"{group}/{name}", value, line["step"])
            self._scalars.flush()

    def save_student(self, trainer: Trainer) -> None:
        """Keep the student as it is now; what an earlier end of the run said of another one goes."""
        said = [self._record.pop(name, None) for name in _OF_STUDENT]
        with self._writing():
            if any(said):
                self._write_record()
                for page in (self.path / "student" / "README.md", self.path / "report.html"):
                    page.unlink(missing_ok=True)
            save_student(trainer.kept, self._place.work / "student")
            self._publish()

    def save_checkpoint(self, trainer: Trainer) -> None:
        """Keep where the run stands now."""
        with self._writing():
            self._checkpoints.save(trainer)
            self._publish()

    def note(self, parts: Mapping[str, Any]) -> None:
        """Add parts to the record."""
        self._record |= parts
        with self._writing():
            self._write_record()

    def finish(self) -> None:
        """Record that the run came to its end."""
        self.note({"status": "finished"})

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PipelineError(f"{self.path}: cannot be written ({error.strerror or error}).") from None

    def _read_before(self) -> dict[str, Any]:
        try:
            before = dict(json.loads((self.path / "run.json").read_text("utf-8")))
            _shared(before, _SHARED)
            json.dumps(before, ensure_ascii=False).encode()  # as it will be written again
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise PipelineError(
                f"{self.path}: run.json is damaged ({first_line(error)}), so it is not known what to go on with. "
                "Begin anew with --overwrite."
            ) from None
        return before

    def _check_same(self) -> None:
        """Compare what is known of the run so far with its older part."""
        now = json.loads(json.dumps(self._record))
        parts = [part for part in _SHARED if part in now]
        before = _shared(self._before, parts)
        if "compute" in now:  # of which the device is known first
            before["compute"] = {name: before["compute"].get(name) for name in now["compute"]}
        if differing := describe_differences(before, _shared(now, parts)):
            raise PipelineError(
                f"{self.path}: is a run of other settings: {'; '.join(differing)}. Pass the same, or another --out."
            )

    def _resume(self, trainer: Trainer) -> None:
        now = json.loads(json.dumps(self._record))
        if _circumstances(self._before) != _circumstances(now):
            LOGGER.info(
                "The run was begun with other software, on another machine, or with another --micro-batch or "
                "--compile: its last bits may differ, and what is dropped at random."
            )
        self._checkpoints.restore(trainer)
        for folder in (self.path, self.path / "student"):  # what was being written when the run was killed
            for left in folder.glob(".*.tmp"):
                left.unlink(missing_ok=True)
        self._record |= {name: self._before[name] for name in _OF_STUDENT if name in self._before}
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
        if self._place.publish():
            self._checkpoints.folder = self.path / "checkpoints"
            self._open_scalars()  # it keeps its path, so not before

    def _open_scalars(self, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._scalars = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge_step)

    def _abandon(self, status: str) -> None:
        if self._place.work != self.path or (self._place.resumes and self._scalars is None):
            return  # nothing is there, or it was not gone on with: its record stays as it was
        self._record["status"] = status
        with suppress(OSError):  # the disk may be full: what stands there stands all the same
            self._write_record()
        LOGGER.info("%s: what was learnt up to the last checkpoint is kept. Go on with --resume.", self.path)

    def _write_record(self) -> None:
        text = json.dumps(self._record, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self._place.work / "run.json", text.encode())


def _shared(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return what a resumed run must have in common with the run before it."""
    parts: dict[str, dict[str, Any]] = json.loads(json.dumps({part: dict(record[part]) for part in names}))
    for *path, name in _NAMES:
        holder: Any = parts
        for key in path:
            holder = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            holder.pop(name, None)
    return parts


def _circumstances(record: Mapping[str, Any]) -> list[Any]:
    """Return what may change a run's last bits, and nothing else of it."""
    settings = dict(record["settings"])
    return [record.get("software"), record.get("machine"), *(settings.get(name) for name in _LAST_BITS)]


def _machine(compute: Compute) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else None
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpu_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": gpu,
    }
