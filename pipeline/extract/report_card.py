"""The report card: what was measured of a teacher on some data, and what to make of it, as JSON and in words.

Measures nothing (`pipeline.extract.grading` does) and draws nothing (`pipeline.extract.report_page` does).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.accuracy import Accuracy, Confusion, percent

MIN_CLASS_IMAGES = 10
_FAR_BETTER = 0.1
_NARROW = 2.0  # effective rank


@dataclass(frozen=True)
class SmallClass:
    """A class with few images: fewer than were asked for, or than ten."""

    name: str
    num_images: int


@dataclass(frozen=True)
class DoubtfulLabel:
    """An image whose own class scores less than another, by −`margin`, with a head that has not seen it."""

    row: int
    key: str
    label: str
    predicted: str
    margin: float


@dataclass(frozen=True)
class ReportCard:
    """What was measured, in shares of 1.

    `num_graded` of the images are those that were looked at; where there is no evaluation set, `num_held_out` of them
    are a fifth. `chance` is the accuracy of always guessing the class with the most held-out images. Accuracies are
    missing where nothing could be held out; cosines, means over pairs of class means, where there is no pair.
    """

    num_classes: int
    embed_dim: int
    num_images: int
    num_graded: int
    held_out_from: Literal["evaluation", "fifth"]
    num_held_out: int
    chance: float
    nearest_mean: Accuracy | None
    ridge: Accuracy | None
    ten_neighbours: Accuracy | None
    effective_rank: float
    class_mean_cosine: float | None
    class_mean_cosine_centred: float | None
    num_labels_judged: int
    num_labels_doubtful: int
    num_images_with_several_labels: int
    num_images_on_both_sides: int
    classes_without_held_out: tuple[str, ...]
    classes_without_training: tuple[str, ...]
    small_classes: tuple[SmallClass, ...]
    confused: tuple[Confusion, ...]
    doubtful: tuple[DoubtfulLabel, ...]

    def as_json(self) -> dict[str, Any]:
        """Return all of it, and the warnings, as plain JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {**plain, "warnings": self.warnings()}

    def accuracies(self) -> list[tuple[str, Accuracy]]:
        """Return name and figure of each classifier, none where nothing could be held out."""
        named = (("nearest mean", self.nearest_mean), ("ridge head", self.ridge), ("10-NN", self.ten_neighbours))
        return [(name, accuracy) for name, accuracy in named if accuracy is not None]

    def rows(self) -> list[tuple[str, str]]:
        """Return label and text of each line for a terminal; names are as they came, not escaped."""
        rows = [(name, str(accuracy)) for name, accuracy in self.accuracies()]
        rows.append(("measured on", self.basis()))
        rows.append(("effective rank", f"{self.effective_rank:.1f} of {self.embed_dim}"))
        rows += [
            ("confused", f"{pair.label} → {pair.predicted}, {pair.num_images} ({percent(pair.share)})")
            for pair in self.confused[:3]
        ]
        rows.append(("doubtful labels", self.doubt()))
        return [*rows, *(("warning", text) for text in self.warnings())]

    def basis(self) -> str:
        """Say in one phrase what the accuracies were measured on."""
        phrase = f"{_count(self.num_held_out, 'image', 'images')} of the evaluation set"
        if self.held_out_from == "fifth":
            phrase = f"{_count(self.num_held_out, 'image', 'images')}: a fifth, held out by sample key"
        if self.num_graded < self.num_images:
            phrase += f"; {self.num_graded:,} of {self.num_images:,} images graded, chosen by sample key"
        return phrase

    def doubt(self) -> str:
        """Say in one phrase how many labels the teacher does not bear out."""
        return f"{self.num_labels_doubtful:,} of {self.num_labels_judged:,} images score higher at another class"

    def warnings(self) -> list[str]:
        """Say plainly what is wrong, with the test that says so and the next step; no name of a class is in it."""
        return [*self._accuracy_warnings(), *self._label_warnings(), *self._data_warnings()]

    def _accuracy_warnings(self) -> Iterator[str]:
        if self.nearest_mean is None or self.ridge is None or self.ten_neighbours is None:
            yield "No accuracy is known: no image was left to fit a classifier on."
            return
        if self.num_classes == 1:
            yield "There is one class only: accuracies say nothing."
            return
        # Twice chance is beyond 100 % where one class has half of the images.
        bar = min(2 * self.chance, (1 + self.chance) / 2)
        best = max(accuracy.low for _, accuracy in self.accuracies())
        if best <= bar:
            yield (
                f"The teacher is hardly better than chance: its best accuracy may be as low as {percent(best)}, where "
                f"guessing one class gives {percent(self.chance)} and more than {percent(bar)} is expected. Check the "
                "labels, try another --pooling, or take another teacher."
            )
        ahead = self.ridge.share - self.nearest_mean.share
        if ahead > _FAR_BETTER and self.ridge.low > self.nearest_mean.high:
            yield (
                f"The ridge head is {100 * ahead:.0f} points better than the nearest class mean: class means alone "
                "lose much of what this teacher knows. Pass --samples."
            )

    def _label_warnings(self) -> Iterator[str]:
        if 2 * self.num_labels_doubtful > self.num_labels_judged:
            yield (
                f"Most labels look doubtful: {self.doubt()}, with a head that has not seen them. Either labels are "
                "wrong, or the teacher cannot tell these classes apart."
            )
        if self.num_images_with_several_labels:
            images = _count(self.num_images_with_several_labels, "image stands", "images stand")
            yield f"{images} under several labels, pixel by pixel the same. Only one can be learnt."

    def _data_warnings(self) -> Iterator[str]:
        if self.num_classes > 2 and self.embed_dim > 1 and self.effective_rank < _NARROW:
            rank = f"{self.effective_rank:.1f} of {self.embed_dim}"
            yield f"The embeddings hardly vary: their effective rank is {rank}. Try another --pooling or teacher."
        few = sum(small.num_images < MIN_CLASS_IMAGES for small in self.small_classes)
        for number, one, many, text in (
            (few, "class has", "classes have", f"fewer than {MIN_CLASS_IMAGES} images, too few for a reliable mean."),
            (len(self.classes_without_held_out), "class has", "classes have", "no held-out image: not measured."),
            (
                len(self.classes_without_training),
                "class has",
                "classes have",
                "held-out images only: counted as wrong.",
            ),
            (
                self.num_images_on_both_sides,
                "image is",
                "images are",
                "in the evaluation set too: left out of fitting.",
            ),
        ):
            if number:
                yield f"{_count(number, one, many)} {text}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
