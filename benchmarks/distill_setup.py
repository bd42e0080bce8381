"""What the benchmark of stage two is run on: data sets, artifacts and commands, each made once in WORK."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np

from benchmarks import made_inputs
from benchmarks.distill_loops import LABEL_COLUMN, Subject
from benchmarks.extract_processes import run
from benchmarks.extract_setup import KNOWN_DATA, KNOWN_TEACHER, ROOT
from benchmarks.figure_book import FigureBook
from benchmarks.made_inputs import NUM_CLASSES
from pipeline.data import DataSettings, load_labelled
from pipeline.runtime import resolve_device

KINDS = {
    "class": ["--per-class", "100"],
    "samples": ["--samples"],
    "views": ["--samples", "--views", "4"],
}
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Setup:
    """How much is measured, and where: the options."""

    work: Path
    device: str
    pairs: int
    kills: int
    trial: bool
    scale: str
    arms: tuple[str, ...]
    seeds: int
    first_seed: int
    held_out: bool
    teacher: Path
    book: FigureBook

    @property
    def device_type(self) -> str:
        """The device, without its number."""
        return resolve_device(self.device).type

    @property
    def made_teacher(self) -> Path:
        """A tiny teacher of random weights, for all that does not ask what embeddings mean."""
        return made_inputs.tiny_teacher(self.work)

    def pick(self, usual: _Value, trial: _Value) -> _Value:
        """Choose by whether this is a trial."""
        return trial if self.trial else usual

    def subset(self, num_train: int, num_test: int) -> Path:
        """Return the folder of some of CIFAR-100: the first rows of each class in turn."""
        return subset(self.work, num_train, num_test)

    def artifact(self, kind: str, dataset: Path, teacher: Path = KNOWN_TEACHER) -> Path:
        """Return the artifact of a data set's training images.

        Args:
            kind: a name in `KINDS`.
            dataset: a folder.
            teacher: a folder.
        """
        path = self.work / f"{teacher.name}-{dataset.name}-{kind}.safetensors"
        if not path.exists():
            options = ["--teacher", str(teacher), "--out", str(path), *KINDS[kind]]
            run(self.command("extract", *self.of_data(dataset), *options))
        return path

    def subject(self, kind: str, dataset: Path) -> Subject:
        """Return a data set and its artifact, of the teacher of random weights."""
        return Subject(self.artifact(kind, dataset, self.made_teacher), dataset, self.device)

    def command(self, name: str, *options: str) -> list[str]:
        """Return a command that prints JSON, without the interpreter."""
        return [str(ROOT / "cli.py"), name, "--device", self.device, "--json", *options]

    def distill(self, subject: Subject, out: Path, *options: str) -> list[str]:
        """Return a `distill` command that prints JSON, without the interpreter."""
        given = [*self.of_data(subject.dataset), "--artifact", str(subject.artifact), "--out", str(out)]
        return self.command("distill", *given, *options)

    def of_data(self, dataset: Path) -> list[str]:
        """Return the options that name a data set."""
        return ["--dataset", str(dataset), "--label-column", LABEL_COLUMN]


def subset(work: Path, num_train: int, num_test: int) -> Path:
    """Return the folder of some of CIFAR-100: the first rows of each class in turn, made once in a folder."""
    folder = work / f"cifar100-{num_train}-{num_test}"
    return _made(folder, lambda: {"train": first_rows("train", num_train), "test": first_rows("test", num_test)})


def held_out(work: Path, num_train: int, num_validation: int) -> Path:
    """Return the folder of some training images of CIFAR-100, with others of them to judge by in place of test images.

    Args:
        work: where it is made, once.
        num_train: the first rows of each class in turn.
        num_validation: the last rows of each class in turn, none of them among the first.
    """

    def splits() -> dict[str, Any]:
        rows = _rows("train")
        labels, each = np.array(rows[LABEL_COLUMN]), num_validation // NUM_CLASSES
        last = [np.flatnonzero(labels == label)[-each:] for label in range(NUM_CLASSES)]
        return {"train": first_rows("train", num_train), "validation": rows.select(np.sort(np.concatenate(last)))}

    return _made(work / f"cifar100-{num_train}-held-out-{num_validation}", splits)


def first_rows(split: str, number: int) -> Any:
    """Return so many rows of a split of CIFAR-100, all classes in turn: images, and fine labels."""
    settings = DataSettings(dataset=str(KNOWN_DATA), split=split, label_column=LABEL_COLUMN, limit=number)
    return _rows(split).select(load_labelled(settings).numbers)


def _rows(split: str) -> Any:
    return datasets.load_dataset(str(KNOWN_DATA), split=split).select_columns(["img", LABEL_COLUMN])


def _made(folder: Path, splits: Callable[[], dict[str, Any]]) -> Path:
    if not folder.exists():
        datasets.disable_progress_bars()
        with made_inputs.whole_folder(folder) as unfinished:
            datasets.DatasetDict(splits()).save_to_disk(str(unfinished))
    return folder
