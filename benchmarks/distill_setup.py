"""What the benchmark of stage two is run on: data sets, artifacts and commands, each made once in WORK."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets

from benchmarks import made_inputs
from benchmarks.distill_loops import LABEL_COLUMN, Subject
from benchmarks.extract_processes import run
from benchmarks.extract_setup import KNOWN_DATA, KNOWN_TEACHER, ROOT
from benchmarks.figure_book import FigureBook
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
    if not folder.exists():
        datasets.disable_progress_bars()
        with made_inputs.whole_folder(folder) as unfinished:
            chosen = {"train": num_train, "test": num_test}
            splits = {name: first_rows(name, number) for name, number in chosen.items()}
            datasets.DatasetDict(splits).save_to_disk(str(unfinished))
    return folder


def first_rows(split: str, number: int) -> Any:
    """Return so many rows of a split of CIFAR-100, all classes in turn: images, and fine labels."""
    settings = DataSettings(dataset=str(KNOWN_DATA), split=split, label_column=LABEL_COLUMN, limit=number)
    data = load_labelled(settings)
    rows = datasets.load_dataset(str(KNOWN_DATA), split=split)
    return rows.select_columns([data.image_column, LABEL_COLUMN]).select(data.numbers)
