"""How accurate students become: arms that differ in what they learn from the teacher, several seeds each, a table."""

import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.distill_loops import Subject
from benchmarks.distill_setup import Setup, held_out
from benchmarks.extract_processes import run
from benchmarks.extract_setup import KNOWN_DATA, KNOWN_TEACHER
from benchmarks.figure_book import Figures

TEST_IMAGES, TRIAL_TEST_IMAGES = 10_000, 100
HELD_OUT_IMAGES, TRAINING_IMAGES = 5000, 50_000
USUAL_ARMS = ("supervised", "class", "samples", "views")
_KEPT = ("top1", "top5", "num_steps", "train_seconds", "images_per_second", "feed_share")
_LEARNED = ("--set", "logit_scale=10", "--set", "learn_logit_scale=true")
_CENTRED = (*_LEARNED, "--set", "centre=true")
_STRONG, _SHORT, _BOTH = ("--recipe", "strong"), ("--recipe", "short"), ("--target", "both")
_ALONE = ("--target", "sample", "--alpha2", "0")  # a loss of samples beside cross-entropy alone
_ANNEALED = tuple(
    word
    for each in ("learning_rate=5e-4", "schedule=cosine", "warmup=0.05", "attention_dropout=0")
    for word in ("--set", each)
)


@dataclass(frozen=True)
class Arm:
    """One way to train: the kind of artifact, the options of `distill`, and the arm that it is compared with."""

    kind: str
    options: tuple[str, ...] = ()
    against: str = "supervised"


@dataclass(frozen=True)
class Scale:
    """How much is trained: images of CIFAR-100, as many of each class, and epochs."""

    images: int
    epochs: int


ARMS = {
    "supervised": Arm("class", ("--alpha2", "0")),
    "class": Arm("class"),
    "class-learned": Arm("class", _LEARNED),
    "class-centred": Arm("class", _CENTRED),
    "direction": Arm("class", ("--alpha2", "0", "--set", "direction_weight=1")),
    "sample": Arm("samples", ("--target", "sample", *_CENTRED)),
    "samples": Arm("samples", (*_BOTH, *_CENTRED)),
    "cosine": Arm("samples", (*_ALONE, "--set", "cosine_weight=1", "--set", "centre=true")),
    "soft-labels": Arm("samples", (*_ALONE, "--set", "soft_label_weight=1")),
    "views": Arm("views", (*_BOTH, *_CENTRED, "--set", "replay_views=true")),
    # Recipe `paper` at the learning rates of `strong`, without what `strong` does to images: how much to weigh samples.
    "annealed-supervised": Arm("class", (*_ANNEALED, "--alpha2", "0"), "annealed-supervised"),
    "annealed-samples": Arm("samples", (*_ANNEALED, *_BOTH, *_CENTRED), "annealed-supervised"),
}
ARMS |= {
    f"annealed-{name}-{weight}": Arm("samples", (*_ANNEALED, *options, "--set", f"cosine_weight={weight}"), against)
    for name, options, against in (
        ("cosine", (*_ALONE, "--set", "centre=true"), "annealed-supervised"),
        ("samples-cosine", (*_BOTH, *_CENTRED), "annealed-samples"),
    )
    for weight in (1, 8, 32)
}
ARMS |= {
    "strong-supervised": Arm("class", (*_STRONG, "--alpha2", "0"), "strong-supervised"),
    "strong-class": Arm("class", _STRONG, "strong-supervised"),
    "strong-samples": Arm("samples", (*_STRONG, *_BOTH, "--set", "replay_views=false"), "strong-supervised"),
    "strong-views": Arm("views", (*_STRONG, *_BOTH), "strong-supervised"),
}
ARMS |= {
    "short-supervised": Arm("class", (*_SHORT, "--alpha2", "0"), "short-supervised"),
    "short-class": Arm("class", _SHORT, "short-supervised"),
    "short-samples": Arm("samples", (*_SHORT, *_BOTH), "short-supervised"),
}
# What parts of a recipe add: without one of them, beside the whole.
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "strong-class": {
        "mixing": ("augmentation.mixup_alpha=0", "augmentation.cutmix_alpha=0"),
        "operations": ("augmentation.operations=0",),
        "erasing": ("augmentation.random_erasing=0",),
        "smoothing": ("label_smoothing=0",),
        "depth": ("stochastic_depth=0",),
        "average": ("average_decay=0",),
        "centring": ("centre=false",),
    },
    "short-samples": {
        "large-batches": ("batch_size=64",),
        "crops": ("augmentation.random_crop_px=0",),
        "soft-labels": ("soft_label_weight=0",),
    },
}
ARMS |= {
    f"{whole.split('-')[0]}-without-{part}": Arm(
        ARMS[whole].kind, (*ARMS[whole].options, *(word for each in changes for word in ("--set", each))), whole
    )
    for whole, parts in _PARTS.items()
    for part, changes in parts.items()
}
SCALES = {
    "quick": Scale(5000, 15),
    "medium": Scale(10_000, 50),
    "short": Scale(50_000, 16),
    "full": Scale(50_000, 200),
    "trial": Scale(200, 1),
}


def measure_accuracy(setup: Setup) -> Figures:
    """Train arms by seeds, one run each, and print a table of all that were ever trained at this scale.

    A run that was stopped goes on; one that is finished is left out. Each result is noted as it comes. Accuracies are
    of the last epoch, on the test split or on training images that are held out.
    """
    scale = "trial" if setup.trial else setup.scale
    place = f"{scale}-held-out" if setup.held_out else scale
    if setup.teacher != KNOWN_TEACHER:
        place += f"-{setup.teacher.name}"
    known = setup.book.known("accuracy")
    every: Figures = known.get("runs", {})
    runs: Figures = every.setdefault(place, {})
    wanted = [(arm, seed) for seed in range(setup.first_seed, setup.first_seed + setup.seeds) for arm in setup.arms]
    for arm, seed in wanted:
        name, options = f"{arm}-{seed}", _options(arm, seed, SCALES[scale])
        told = " ".join(options)
        if runs.get(name, {}).get("options") == told and "top1" in runs[name]:
            continue
        out = setup.work / "accuracy" / place / name
        trained = _train(setup, _data(setup, scale), arm, out, options)
        runs[name] = {"arm": arm, "seed": seed, "options": told, **trained}
        setup.book.note("accuracy", {"runs": every})
        click.echo(f"{place}, {name}: {runs[name]}", err=True)
    lines = table(runs)
    click.echo("\n".join(lines))
    unfinished = [f"{arm}-{seed}" for arm, seed in wanted if "top1" not in runs[f"{arm}-{seed}"]]
    tables = known.get("tables", {}) | {place: lines}
    return {"runs": every, "tables": tables, "checks": {"every run came to its end": not unfinished}}


def table(runs: Mapping[str, Figures]) -> list[str]:
    """Return the lines of a Markdown table, one an arm.

    Args:
        runs: each with `arm`, `seed` and, where it came to its end, `top1` and `top5` in percent.
    """
    lines = [
        "| arm | seeds | top-1 % | top-5 % | over supervised, seed by seed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, arm in ARMS.items():
        mine = _by_seed(runs, name)
        if not mine:
            continue
        base = _by_seed(runs, arm.against)
        differences = [run["top1"] - base[seed]["top1"] for seed, run in mine.items() if seed in base]
        told = spread(differences, sign="+") if differences and name != arm.against else ""
        cells = [spread([run[key] for run in mine.values()]) for key in ("top1", "top5")]
        lines.append(f"| {' | '.join([name, str(len(mine)), *cells, told])} |")
    return lines


def spread(values: list[float], sign: str = "") -> str:
    """Write mean and, of several, sample standard deviation."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _by_seed(runs: Mapping[str, Figures], arm: str) -> dict[int, Figures]:
    return {run["seed"]: run for run in runs.values() if run["arm"] == arm and "top1" in run}


def _options(arm: str, seed: int, scale: Scale) -> list[str]:
    epochs = str(scale.epochs)
    return [*ARMS[arm].options, "--seed", str(seed), "--epochs", epochs, "--evaluate-every", epochs]


def _train(setup: Setup, data: Path, arm: str, out: Path, options: list[str]) -> Figures:
    teacher = setup.made_teacher if setup.trial else setup.teacher
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        subject = Subject(setup.artifact(ARMS[arm].kind, data, teacher), data, setup.device)
        told = run(setup.distill(subject, out, *options, "--resume"))
    except subprocess.CalledProcessError as error:  # it said why; the others go on
        return {"exit status": error.returncode}
    return {key: told[key] for key in _KEPT}


def _data(setup: Setup, scale: str) -> Path:
    images = SCALES[scale].images
    if setup.held_out:
        num_validation = setup.pick(HELD_OUT_IMAGES, TRIAL_TEST_IMAGES)
        return held_out(setup.work, min(images, TRAINING_IMAGES - num_validation), num_validation)
    return KNOWN_DATA if images == TRAINING_IMAGES else setup.subset(images, setup.pick(TEST_IMAGES, TRIAL_TEST_IMAGES))
