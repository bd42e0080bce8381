"""What a run is: a training, an extraction, a fine-tuning or a measurement, described in full, and the three scales.

Which runs a table is made of stands in `reproduce_study`, how one becomes a command in `reproduce_commands`.
"""

from dataclasses import dataclass, replace
from typing import Any

NUM_CLASSES = 100
ALL_IMAGES = 50_000
TUNED = "-finetuned"  # ends the name of a teacher that was fine-tuned on the scale's images
NO_DEVICE = "none"  # of a measurement that only counts
# The kind of artifact that each way to train reads: the first four are of `distill`, the others of `baselines.py`.
METHODS = {
    "embed": "class",
    "sample": "samples",
    "samples": "samples",
    "views": "views",
    "teacher-kd": "class",
    "logits": "class",
    "released": "class",
    "supervised": "class",
}
LIVE = ("teacher-kd", "logits", "released", "supervised")
SMALLEST = ("base", 32)  # student and image size
_LONGER = 4  # so many times as many epochs, at most, where labels are few


@dataclass(frozen=True)
class Training:
    """One student: everything that decides how good it becomes, but for rounding.

    `method` is a name in `METHODS`. `teacher` is None where nothing is learned from one, `alpha2` where the method has
    it fixed.
    """

    method: str
    teacher: str | None
    images: int
    epochs: int
    student: str = "base"
    image_size: int = 32
    recipe: str = "paper"
    alpha2: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Return a name that no other training has at the same scale."""
        weight = "" if self.alpha2 is None else f"-alpha2-{self.alpha2:g}"
        student = f"{self.student}-{self.image_size}px-{self.recipe}{weight}"
        return f"{self.method}-{self.teacher or 'no-teacher'}-{student}-{self.images}-images-seed-{self.seed}"


@dataclass(frozen=True)
class Extraction:
    """An artifact of a teacher, of this many images, of a kind in `benchmarks.distill_setup.KINDS`."""

    teacher: str
    kind: str
    images: int

    @property
    def name(self) -> str:
        """Return the artifact's name, without suffix."""
        return f"{self.teacher}-{self.images}-images-{self.kind}"


@dataclass(frozen=True)
class FineTuning:
    """A teacher that is trained further, on this many images."""

    teacher: str
    images: int
    epochs: int
    seed: int = 0

    @property
    def name(self) -> str:
        """Return the new teacher's name."""
        return self.teacher + TUNED


@dataclass(frozen=True)
class Measurement:
    """Sizes, and time and memory of so many steps; `method` is embed or teacher, `device` as in a `Study`."""

    method: str
    teacher: str
    steps: int
    device: str
    student: str = "base"
    image_size: int = 32

    @property
    def name(self) -> str:
        """Return a name that no other measurement has at the same scale."""
        what = f"{self.method}-{self.device}" if self.steps else "sizes"
        return f"{what}-{self.teacher}-{self.student}-{self.image_size}px"


Run = Training | Extraction | FineTuning | Measurement


@dataclass(frozen=True)
class Scale:
    """How much is trained: images of CIFAR-100, as many of each class, epochs, and how often a student is evaluated.

    `larger_epochs` are those of larger students and images, where these take too long, `steps` those of a measurement,
    `labels` the labels a class of the study of few labels, `tuning_epochs` the epochs of a teacher, `weights_student`
    the student of figure 3: the paper's is the large one.
    """

    images: int
    epochs: int
    evaluations: int
    steps: int
    labels: tuple[int, ...] = (5, 10, 50, 100, 500)
    tuning_epochs: int = 3
    larger_epochs: int | None = None
    weights_student: str = "large"

    def training(self, method: str, teacher: str | None, **changes: Any) -> Training:
        """Describe a training of this scale; without α₂ there is nothing to learn from a teacher."""
        if method not in LIVE:
            changes.setdefault("alpha2", 0.5)
        made = Training(method, teacher, **{"images": self.images, "epochs": self.epochs, **changes})
        if self.larger_epochs and (made.student, made.image_size) != SMALLEST:
            made = replace(made, epochs=self.larger_epochs)
        return replace(made, teacher=None) if made.alpha2 == 0 else made

    def weighted(self, teacher: str, alpha2: float) -> Training:
        """Describe a training of figure 3."""
        return self.training("embed", teacher, student=self.weights_student, alpha2=alpha2)

    def few(self, labels: int, teacher: str, recipe: str, alpha2: float) -> Training:
        """Describe a training on so many labels a class: of as many steps as others, but at most four times the epochs.

        The artifact is of these images too, so that no label comes in through it.
        """
        images = NUM_CLASSES * labels
        epochs = max(1, min(_LONGER * self.epochs, round(self.epochs * self.images / images)))
        return self.training("embed", teacher, recipe=recipe, alpha2=alpha2, images=images, epochs=epochs)

    def tuning(self, teacher: str) -> FineTuning:
        """Describe how a teacher is fine-tuned."""
        return FineTuning(teacher, self.images, self.tuning_epochs)

    def __str__(self) -> str:
        """Say it in words."""
        larger = f", {self.larger_epochs} of larger students and images" if self.larger_epochs else ""
        each = self.images // NUM_CLASSES
        return f"{self.images:,} training images, {each} of each class, {self.epochs} epochs{larger}"


SCALES = {
    "full": Scale(ALL_IMAGES, 200, evaluations=20, steps=50),
    # Hours of two CPU cores. With the base student figure 3 shares runs with others, and has their epochs.
    "reduced": Scale(5000, 6, evaluations=1, steps=5, tuning_epochs=2, larger_epochs=1, weights_student="base"),
    "trial": Scale(200, 1, evaluations=1, steps=1, labels=(1, 2), tuning_epochs=1),
}
