"""Checkpoints: everything from which a run goes on to the same weights, to the bit.

    RUN/checkpoints/00001564/tensors.safetensors    weights, their average, the optimizer's state, sums of losses
    RUN/checkpoints/00001564/progress.json          where the run stands, and the other file's digest

A folder is named by its number of steps and appears as a whole. The last two are kept. Random numbers are in none:
each step's follow from the seed and its number.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.distill.loop import Progress
from pipeline.errors import PipelineError, describe_problems, first_line
from pipeline.output import sync
from pipeline.progress import LOGGER

_FORMAT, _KEPT = 1, 2
_OURS = re.compile(r"\d+|\.\d+\.tmp")
_MOST = 2**63  # of numbers of steps, images and seconds
_PROGRESS = TypeAdapter(Progress)


class Rated(Protocol):
    """Settings with a learning rate, at its highest."""

    @property
    def learning_rate(self) -> float:
        """AdamW's."""


class Learner(Protocol):
    """Who learns in steps, and can go back to where it stood between two of them."""

    progress: Progress

    @property
    def recipe(self) -> Rated:
        """What it learns by."""

    def check_finite(self) -> None:
        """Raise PipelineError where a loss was not finite."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that it has learnt, by name."""

    def restore(self, tensors: Mapping[str, torch.Tensor], progress: Progress) -> None:
        """Go back to where it stood."""


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; it is made with the first checkpoint."""
        self.folder = folder
        self._newest: int | None = None

    def save(self, trainer: Learner) -> None:
        """Write where a run stands, and remove what is older than the checkpoint before.

        Args:
            trainer: between two steps.

        Raises:
            PipelineError: a loss or a weight is not finite: such a checkpoint would be of no use.
            OSError: it cannot be written; the others stand.
        """
        trainer.check_finite()
        if trainer.progress.num_steps == self._newest:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trainer.tensors().items()}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise PipelineError(
                f"the weights are not finite after step {trainer.progress.num_steps:,}. "
                f"Try a lower --lr than {trainer.recipe.learning_rate:g}, or --precision float32."
            )
        self.folder.mkdir(exist_ok=True)
        final = self.folder / f"{trainer.progress.num_steps:08d}"
        work = self.folder / f".{final.name}.tmp"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            _write_tensors(tensors, work / "tensors.safetensors")
            digest = _sha256(work / "tensors.safetensors")
            document = {"format": _FORMAT, "progress": asdict(trainer.progress), "tensors_sha256": digest}
            (work / "progress.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8")
            for path in (*work.iterdir(), work):
                sync(path)
            if final.exists():  # damaged, or of a run that was resumed at an earlier one
                shutil.rmtree(final)
            work.rename(final)
            sync(self.folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        self._newest = trainer.progress.num_steps
        self._remove_all_but(final)

    def restore(self, trainer: Learner) -> bool:
        """Go on from the newest checkpoint that is whole.

        Args:
            trainer: as it was at the start of the run.

        Returns:
            Whether there was one.

        Raises:
            PipelineError: there are checkpoints, and all are damaged.
        """
        found = self._found()
        for path in found:
            following = "the one before is taken" if path != found[-1] else "there is none before it"
            try:
                progress, tensors = _read(path)
                trainer.restore(tensors, progress)
            except (OSError, ValueError, LookupError, TypeError, SafetensorError, RecursionError) as error:
                reason = describe_problems(error) if isinstance(error, ValidationError) else first_line(error)
                LOGGER.info("Checkpoint %s is damaged (%s): %s.", path, reason[:200], following)
                continue
            self._newest = progress.num_steps
            return True
        if found:
            raise PipelineError(f"{self.folder}: all checkpoints are damaged. Begin anew with --overwrite.")
        return False

    def _found(self) -> list[Path]:
        names = sorted((path.name for path in self.folder.glob("[0-9]*")), reverse=True) if self.folder.is_dir() else []
        return [self.folder / name for name in names]

    def _remove_all_but(self, newest: Path) -> None:
        # By number: after a damaged one, those of more steps are of a run that went another way.
        kept = [path for path in self._found() if path.name <= newest.name][:_KEPT]
        for path in self.folder.iterdir():
            if path not in kept and _OURS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # the library's own, for a full disk too
        raise OSError(str(error)) from None


def _read(path: Path) -> tuple[Progress, dict[str, torch.Tensor]]:
    document: Any = json.loads((path / "progress.json").read_text("utf-8"))
    if not isinstance(document, dict):
        raise ValueError("progress.json holds no object")
    if document.get("format") != _FORMAT:
        raise ValueError(f"its format is {document.get('format')!r}, expected {_FORMAT}")
    if _sha256(path / "tensors.safetensors") != document.get("tensors_sha256"):
        raise ValueError("tensors.safetensors has another digest than progress.json says")
    progress = _PROGRESS.validate_python(document.get("progress"))
    for name, number in asdict(progress).items():
        if not 0 <= number < _MOST:  # nor is NaN
            raise ValueError(f"progress.json has {name} {number!s:.20}")
    if progress.num_steps != int(path.name) or progress.epoch < 1 or not 0 <= progress.steps_done <= progress.num_steps:
        raise ValueError(f"progress.json stands at step {progress.steps_done} of epoch {progress.epoch}")
    tensors = load_file(path / "tensors.safetensors")
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
    return progress, tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
