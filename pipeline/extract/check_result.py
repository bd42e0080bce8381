"""What a check found, for people and for machines: the verdict, and the likely cause where something differs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import listed
from pipeline.extract.comparison import Comparison
from pipeline.extract.share import SOFTWARE
from pipeline.progress import duration
from pipeline.runtime import PeakMemory, software_versions
from store import Manifest, TeacherInfo

_MAX_WORST, _MAX_LINES = 3, 8
_MAX_CHARACTERS = 60


@dataclass(frozen=True)
class TeacherFacts:
    """How a teacher differs from the one that the manifest names: all of it in `lines`.

    With `weights` there is nothing to compare: another teacher, or embeddings of another length. `preprocessing` names
    settings of the image processor; another version may only spell them anew, so the embeddings decide.
    """

    weights: tuple[str, ...]
    preprocessing: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """Which samples or classes were compared.

    `num_chosen` were to be, of `num_stored`. `names` say what each row of `comparison` is. `failures` are differences
    that are none of numbers: images that changed between two readings, or other counts. `notes` say what was read
    beside, and `counts` the same for machines.
    """

    what: str  # samples or classes
    num_stored: int
    num_chosen: int
    names: tuple[str, ...]
    comparison: Comparison
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    counts: dict[str, int] | None = None

    def worst(self) -> list[tuple[str, float]]:
        """Return the names and relative errors of the rows that are furthest from the file's."""
        several = self.comparison.relative_error.shape[1] > 1
        return [
            (self.names[row] + (f", view {view}" if several else ""), error)
            for row, view, error in self.comparison.worst(_MAX_WORST)
        ]


@dataclass(frozen=True)
class CheckResult:
    """What a check found. `compared` is none where the teacher is another one: then nothing was embedded."""

    path: Path
    manifest: Manifest
    facts: TeacherFacts
    compared: Compared | None
    precision: str
    device: str
    tolerance: float
    seconds: float
    memory: PeakMemory

    @property
    def matches(self) -> bool:
        """Whether the teacher gives here what the file says, as far as was looked."""
        compared = self.compared
        return compared is not None and not compared.failures and not compared.comparison.differing.any()

    def verdict(self) -> str:
        """Say in one line what came out, and where something differs the likely cause."""
        if self.compared is None:
            teacher = self.manifest.teacher
            made_by = _short(teacher.name) + (f" at {_short(teacher.revision)}" if teacher.revision else "")
            return f"{'; '.join(self.facts.weights)}. Nothing was embedded: pass the teacher that made it, {made_by}."
        what, number = self.compared.what, len(self.compared.names)
        if self.matches:
            return f"matches: {number} of {self.compared.num_stored} {what}"
        problems = list(self.compared.failures)
        if num_differing := int(self.compared.comparison.differing.sum()):
            problems.append(f"{num_differing} of {number} {what} differ from the file's")
        return f"{'; '.join(problems)}. Likely cause: {self._cause()}."

    def rows(self) -> list[tuple[str, str]]:
        """Return label and text of each line of the report."""
        rows = [("artifact", str(self.path)), *(("differs", line) for line in self.facts.lines)]
        compared = self.compared
        if compared is None:
            return [*rows, ("result", "FAILED")]
        made_in = self.manifest.teacher.precision
        other = "" if made_in == self.precision else f"; the file's are in {_short(made_in)}, so more may differ"
        errors, cosine = compared.comparison.relative_error, compared.comparison.cosine
        views = f" × {errors.shape[1]} views" if errors.shape[1] > 1 else ""
        rows += [
            (
                "compared",
                f"{len(compared.names)} of {compared.num_stored:,} {compared.what}{views}, in {self.precision} on "
                f"{self.device}{other}",
            ),
            ("relative error", f"median {np.median(errors):.2g}, worst {errors.max():.2g}"),
            ("tolerance", f"{self.tolerance:g}, and the rounding of the file's type"),
            ("cosine", f"{cosine.mean():.7f} in the mean"),
            *(("worst", f"{name}: {error:.2g}") for name, error in compared.worst()),
            *(("differs", line) for line in compared.failures),
            *(("note", line) for line in compared.notes),
            ("time", duration(self.seconds)),
        ]
        return [*rows, ("result", self.verdict() if self.matches else "FAILED")]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        document: dict[str, Any] = {
            "artifact": str(self.path),
            "manifest_sha256": self.manifest.sha256(),
            "matches": self.matches,
            "verdict": self.verdict(),
            "teacher_differences": self.facts.lines,
            "software_differences": self._versions(),
            "precision": self.precision,
            "device": self.device,
            "tolerance": self.tolerance,
            "seconds": self.seconds,
            "peak_memory_bytes": self.memory.resident_bytes,
            "peak_device_memory_bytes": self.memory.device_bytes,
        }
        if self.compared is None:
            return document
        compared, numbers = self.compared, self.compared.comparison
        return document | {
            "compared": compared.what,
            "num_stored": compared.num_stored,
            "num_chosen": compared.num_chosen,
            "num_compared": len(compared.names),
            "num_differing": int(numbers.differing.sum()),
            "num_views": numbers.relative_error.shape[1],
            "median_relative_error": float(np.median(numbers.relative_error)),
            "worst_relative_error": float(numbers.relative_error.max()),
            "mean_cosine": float(numbers.cosine.mean()),
            "worst": [{"name": name, "relative_error": error} for name, error in compared.worst()],
            "failures": compared.failures,
            "notes": compared.notes,
            **(compared.counts or {}),
        }

    def _versions(self) -> tuple[str, ...]:
        here = software_versions(SOFTWARE)
        there = self.manifest.software
        return tuple(
            f"{name} {_short(there[name])} there, {here[name]} here"
            for name in here
            if name in there and there[name] != here[name]
        )

    def _cause(self) -> str:
        causes = []
        if self.compared is not None and self.compared.what == "classes":
            causes.append("other images or labels, since these are drawn by row, and re-ordered data gives others")
        if self.facts.preprocessing:
            causes.append(f"other preprocessing ({listed(self.facts.preprocessing)})")
        if versions := self._versions():
            causes.append(f"other versions ({listed(versions)})")
        return "; or ".join(causes) or (
            "none that the manifest shows: weights, preprocessing and versions are the file's; its numbers may have "
            "been changed, or stored as int8 before"
        )


def compare_teachers(manifest: Manifest, teacher: TeacherInfo, preprocessing: dict[str, Any]) -> TeacherFacts:
    """Compare a teacher with the one that a manifest names.

    Args:
        manifest: of the artifact.
        teacher: the teacher at hand.
        preprocessing: its image processor's settings.

    Returns:
        What differs.
    """
    there, weights, architecture = manifest.teacher, [], []
    if there.weights_sha256 != teacher.weights_sha256:
        weights.append(
            f"teacher weights differ: the file says {there.weights_sha256[:12]}…, this teacher's are "
            f"{teacher.weights_sha256[:12]}…"
        )
    if there.embed_dim != teacher.embed_dim:
        weights.append(
            f"embeddings differ in length: the file says {there.embed_dim}, this teacher gives {teacher.embed_dim}"
        )
    if there.architecture != teacher.architecture:
        architecture.append(
            f"teacher architecture differs: the file says {_short(there.architecture)}, this teacher is "
            f"{teacher.architecture}"
        )
    names = [
        name
        for name in sorted({*manifest.preprocessing, *preprocessing})
        if manifest.preprocessing.get(name) != preprocessing.get(name)
    ]
    lines = [
        f"preprocessing {_short(name)} differs: the file says {_short(manifest.preprocessing.get(name))}, this teacher "
        f"has {_short(preprocessing.get(name))}"
        for name in names[:_MAX_LINES]
    ]
    if len(names) > _MAX_LINES:
        lines.append(f"preprocessing differs in {len(names) - _MAX_LINES} more settings")
    return TeacherFacts(tuple(weights), tuple(map(_short, names)), (*weights, *architecture, *lines))


def _short(value: object) -> str:
    """Show a value that may come from a stranger's file."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"
