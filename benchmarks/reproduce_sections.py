"""The parts of the page: what each compares, which target fills it, and what makes its tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks import reproduce_paper as paper
from benchmarks import reproduce_resources as resources
from benchmarks import reproduce_tables as tables
from benchmarks.distill_setup import KINDS
from benchmarks.reproduce_live import live
from benchmarks.reproduce_results import Results
from benchmarks.reproduce_runs import NUM_CLASSES, SCALES, Scale
from benchmarks.reproduce_study import SIZES

SHOWN = ("full", "reduced")


@dataclass(frozen=True)
class Section:
    """A part of the page: heading, what is compared, the target that fills it, its tables, and its figure if any.

    What `counts` is the same at every scale.
    """

    heading: str
    text: str
    target: str
    tables: Sequence[Callable[[Results, Scale], tables.Lines]]
    figure: str | None = None
    counts: bool = False


_MEMORY = (
    "Memory is what the process holds at its peak above an idle one that has imported PyTorch, on a GPU what PyTorch "
    f"allocated there; times are medians of {SCALES['full'].steps} steps at scale full, {SCALES['reduced'].steps} at "
    "reduced, and seconds are of an epoch of 50,000 images, computed from them. Neither hangs on what weights are "
    "worth: teachers have random ones. Both sides compute in the precision that their results name, on these machines "
    "bfloat16, in which the teacher's weights are held too; the student's are float32."
)
_PER_CLASS = int(KINDS["class"][1])
_FEWER = "".join(f" ({each} at {name})" for name in SHOWN if (each := SCALES[name].images // NUM_CLASSES) < _PER_CLASS)
_STUDENTS = ", ".join(f"{SCALES[name].weights_student} student at scale {name}" for name in SHOWN).capitalize()
SECTIONS = (
    Section("Table I: sizes", "Counted from the models themselves.", "table1", [resources.sizes], counts=True),
    Section(
        "Table II: memory of weights",
        "Bytes of the teacher's weights in float32, over those of student, projection and class means: the paper's "
        "17× and 59×. Base student, 32 px. A teacher that is held in bfloat16 has half as many.",
        "table1",
        [resources.weights],
        counts=True,
    ),
    Section(
        "Table II: the base student at 32 px",
        f"Recipe `paper`, α₂ = 0.5, class embeddings of up to N = {_PER_CLASS} training images of each class"
        f"{_FEWER}. Teacher-KD runs the teacher on every batch. {_MEMORY}",
        "table2",
        [tables.base_student, partial(resources.resources, compared=[(name, "base", 32) for name in paper.TEACHERS])],
    ),
    Section(
        "Table III: larger students and images",
        "Recipe `paper`, α₂ = 0.5.",
        "table3",
        [tables.larger],
    ),
    Section(
        "Figure 2: memory and time",
        _MEMORY,
        "fig2",
        [partial(resources.resources, compared=[("Large-32", *size) for size in SIZES])],
        "fig2",
    ),
    Section(
        "Figure 3: accuracy over α₂",
        f"{_STUDENTS}, 32 px, recipe `paper`; the paper's is the large student. At α₂ = 1 no loss teaches the "
        "classifier: an image's class is that of the nearest projected class embedding.",
        "fig3",
        [tables.over_alpha2],
        "fig3",
    ),
    Section(
        "Few labels, few epochs",
        "α₂ = 0 against class embeddings, base student. The artifact is of the student's own images, so that no other "
        "label comes in through it. Fewer labels have more epochs: as many steps, but at most four times the epochs. "
        "Few epochs are those on the way of whole runs of recipe `paper` with all labels: its learning rate is "
        "constant, so that the beginning of a run is a shorter run. A scale that evaluates once has none.",
        "labels",
        [tables.few_labels, tables.few_epochs],
        "labels",
    ),
    Section(
        "What each kind of artifact passes on",
        "Base student, 32 px. The ridge head is the artifact's own, fitted in closed form to the teacher's embeddings "
        "of the training images: how good the teacher is on this data. Fine-tuned means on the same training images.",
        "kinds",
        [tables.kinds],
    ),
    Section(
        "A live teacher, and the artifact instead",
        "Base student, 32 px, recipe `paper`. Speed is of training steps, the ratio is over Teacher-KD with the live "
        "teacher, seed by seed. Memory is the process's at its peak, on a GPU what PyTorch allocated there. Speed and "
        "memory are of runs on one machine, under the same conditions, with the same PyTorch and commit: of the most "
        "that there are, on the device named. The released loop computes in float32. The same accuracy within noise: "
        "the 95 % interval of the difference, of three seeds and more, has 0 in it and ends within two points of it.",
        "live",
        [live],
    ),
)
