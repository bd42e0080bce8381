"""Pictures of an artifact: which classes the teacher finds alike, and how its embeddings lie.

For eyes only: nothing is measured here. All is drawn from directions: embeddings less the grand mean of the class
embeddings, at unit length. Raw embeddings share one direction, which hides all others.
"""

import importlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import store
from pipeline.drawing import Contents, Floats, Map, Rows, draw
from pipeline.errors import PipelineError
from pipeline.output import check_output, write_output
from pipeline.progress import LOGGER

Method = Literal["tsne", "pca"]

SUFFIXES = (".png", ".svg")
MAX_CLASSES = 1000
MAX_SAMPLES = 3000  # t-SNE of them takes 10 to 25 s on one core
_MIN_TSNE = 4  # points
_STYLE: dict[str, Any] = {
    "axes.edgecolor": "0.7",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 13,
    "svg.hashsalt": "clip-embed-kd",  # else ids differ from run to run
    "text.color": "0.15",
    "text.parse_math": False,  # names are data: `$` in one is a dollar sign
}


@dataclass(frozen=True)
class PlotResult:
    """What was drawn; `notes` say what was left out or done in another way."""

    out: Path
    num_classes: int
    num_samples: int
    notes: tuple[str, ...]


def plot_artifact(
    path: Path, out: Path, *, method: Method = "tsne", overwrite: bool = False, seed: int = 0
) -> PlotResult:
    """Draw the class embeddings of an artifact, and its sample embeddings where it has some.

    The same artifact gives the same bytes, on the same kind of machine and versions.

    Args:
        path: the artifact.
        out: the picture to make, `.png` or `.svg`.
        method: how directions are laid out in the plane.
        overwrite: replace an existing picture.
        seed: 0…2³²−1, of t-SNE and of the choice where there is more than can be drawn.

    Returns:
        What was drawn.

    Raises:
        PipelineError: the picture cannot be written, the extra `plot` is not installed, or samples are not finite.
        StoreError: the artifact is missing or damaged.
    """
    if out.suffix not in SUFFIXES:
        raise PipelineError(f"{out}: a picture's name ends in {' or '.join(SUFFIXES)}, found {out.suffix!r}.")
    if out.is_dir():
        raise PipelineError(f"{out}: is a folder. Choose another --out.")
    check_output(out, 0, replaceable=overwrite)
    _require_libraries()
    import matplotlib.style
    from threadpoolctl import threadpool_limits

    # Threads add up in any order, and t-SNE carries the last bit of a sum far: one thread draws the same twice.
    with threadpool_limits(1), warnings.catch_warnings(), matplotlib.style.context(_STYLE, after_reset=True):
        # Scripts that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from|Matplotlib currently does not support")
        with store.open_artifact(path) as artifact:
            contents = _read(artifact, method, seed)
        figure, picture = draw(contents), io.BytesIO()
        figure.savefig(
            picture, format=out.suffix[1:], dpi=160, bbox_inches="tight", pad_inches=0.4, metadata={"Date": None}
        )
    write_output(out, picture.getvalue())
    num_samples = sum(len(samples.points) for samples in contents.maps[1:])
    return PlotResult(out, len(contents.names), num_samples, contents.notes)


def _require_libraries() -> None:
    try:
        for library in ("matplotlib.style", "scipy.cluster.hierarchy", "sklearn.manifold"):
            importlib.import_module(library)
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0].replace("sklearn", "scikit-learn")
        raise PipelineError(
            f"store plot needs {package}, which is not installed: pip install 'clip-embed-kd[plot]'"
        ) from None


def _read(artifact: store.Artifact, method: Method, seed: int) -> Contents:
    manifest, means, random = artifact.manifest, artifact["class/mean"], np.random.default_rng(seed)
    centre = means.mean(axis=0, dtype=np.float64)  # (D,)
    drawn = _some(np.arange(len(means)), MAX_CLASSES, random)
    classes = _directions(means[drawn], centre)
    order = _alike_together(classes)
    drawn, classes = drawn[order], classes[order]
    maps = [_lay_out("Class means", classes, np.arange(len(drawn)), method, seed)]
    shown = [_part(len(drawn), len(means), "class", "classes")]
    if "sample/embedding" in artifact:
        stored_labels = artifact["sample/label"]
        rows = _some(np.flatnonzero(np.isin(stored_labels, drawn)), MAX_SAMPLES, random)
        if len(rows):
            shown.append(_part(len(rows), len(stored_labels), "sample", "samples"))
            labels = np.argsort(drawn)[np.searchsorted(np.sort(drawn), stored_labels[rows])]
            samples = _directions(_samples(artifact, rows), centre)
            maps.append(_lay_out(shown[1], samples, labels, method, seed))
    notes = [part for part in shown if "random" in part]
    if method == "tsne" and min(len(each.points) for each in maps) < _MIN_TSNE:
        notes.append(f"PCA in place of t-SNE for fewer than {_MIN_TSNE} points")
    source = f"{_shown(manifest.teacher.name, 60)} on {_shown(manifest.data_set.name, 60)}"
    return Contents(
        title=f"{source}\n{shown[0]} × {len(centre):,} values",
        names=[_shown(manifest.classes[row]) for row in drawn],
        counts=artifact["class/count"][drawn],
        similarity=np.clip(classes @ classes.T, -1, 1),
        maps=maps,
        notes=tuple(notes),
    )


def _samples(artifact: store.Artifact, rows: Rows) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        samples = store.sample_embeddings(artifact, rows)[:, 0]
    if not np.isfinite(samples).all():  # rows are gathered unverified
        raise PipelineError(f"{artifact.path.name}: a sample is not finite. The file is damaged: extract it again.")
    return samples


def _some(rows: Rows, most: int, random: np.random.Generator) -> Rows:
    return np.sort(random.choice(rows, min(len(rows), most), replace=False))


def _part(number: int, total: int, one: str, many: str) -> str:
    if number < total:
        return f"{number:,} of {total:,} {many} (chosen at random)"
    return f"{total:,} {one if total == 1 else many}"


def _shown(name: str, longest: int = 24) -> str:
    """Make a name from an untrusted file one short printable line."""
    line = "".join(letter if letter.isprintable() else " " for letter in name[: 10 * longest])
    line = " ".join(line.split()) or "(no name)"
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _directions(embeddings: NDArray[Any], centre: Floats) -> Floats:
    """Subtract the centre from [N, D] and scale to unit length; zero where only rounding is left."""
    embeddings = embeddings.astype(np.float64)
    directions: Floats = embeddings - centre
    length = np.linalg.norm(directions, axis=1, keepdims=True)
    rounding = np.finfo(np.float32).eps * np.linalg.norm(embeddings, axis=1, keepdims=True)
    return directions / np.where(length > rounding, length, np.inf)


def _alike_together(directions: Floats) -> Rows:
    """Order [C, D] by clustering: cosine distance, average linkage, leaves turned so that neighbours are alike."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(directions) < 3:
        return np.arange(len(directions))
    distance = squareform(np.clip(1 - directions @ directions.T, 0, 2), checks=False)
    return np.asarray(leaves_list(linkage(distance, "average", optimal_ordering=True)), np.int64)


def _lay_out(what: str, directions: Floats, labels: Rows, method: Method, seed: int) -> Map:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    with_tsne = method == "tsne" and len(directions) >= _MIN_TSNE
    title = f"{what} by {'t-SNE' if with_tsne else 'PCA'}"
    LOGGER.info("Laying out: %s.", title)
    points = np.zeros((len(directions), 2))
    if np.ptp(directions, axis=0).max() > 1e-6:  # else there is one point only
        reduced = PCA(min(50, *directions.shape), random_state=seed).fit_transform(directions)
        points[:, : reduced.shape[1]] = reduced[:, :2]
        if with_tsne:
            start = 1e-4 * points / points[:, 0].std()  # as scikit-learn's own start, which wants two dimensions
            perplexity = min(30.0, (len(points) - 1) / 3)
            points = TSNE(perplexity=perplexity, init=start, random_state=seed).fit_transform(reduced)
    points = points - (points.max(axis=0) + points.min(axis=0)) / 2
    return Map(title, points / (np.abs(points).max() or 1), labels)
