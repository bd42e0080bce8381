"""Find an artifact's images in a data set: samples by content, and the rows that an extraction drew for a class.

Images are read until enough of them are found, not all of them. Nothing is embedded here.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.data import BadImageError, Labelled, load_labelled, raise_bad
from pipeline.errors import PipelineError, listed
from pipeline.extract.sampling import sample_rows
from pipeline.pixels import sample_key
from pipeline.progress import ProgressBar
from store import Artifact, SamplingInfo

Rows = NDArray[np.int64]

# Reading stops after so many rows in a row that are no samples, or twenty times as many as lie between two samples
# where the data is the artifact's own, which happens by chance once in e²⁰ times.
MIN_FRUITLESS_ROWS = 1_000
_FRUITLESS_GAPS = 20
_BLOCK_ROWS = 256
_NUM_EXAMPLES = 3


@dataclass
class Found:
    """Samples of an artifact that stand in a data set, and what else was read on the way.

    `rows` are those of the data set and `samples` those of `sample/*`, `keys` the sample keys, one entry a sample.
    `absent` names some images that the artifact lacks, `relabelled` some that it has under another label only.
    """

    rows: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_read: int = 0
    num_absent: int = 0
    num_relabelled: int = 0
    num_bad: int = 0
    absent: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)


def join_classes(artifact: Artifact, data: Labelled) -> Rows:
    """Join the data's classes to the artifact's, by name.

    Args:
        artifact: the artifact.
        data: the data set.

    Returns:
        [C of the data] the artifact's class row of each, −1 where it has none.

    Raises:
        PipelineError: they share no class.
    """
    names = artifact.manifest.classes
    row_of = {name: row for row, name in enumerate(names)}
    joined = np.array([row_of.get(name, -1) for name in data.class_names], np.int64)
    if (joined[data.labels] < 0).all():
        raise PipelineError(
            f"{artifact.path.name}: has none of the data's {len(data.class_names)} classes "
            f"({listed(data.class_names)}). It has {len(names)}, among them {listed(names)}. Is it the artifact of "
            "this data set? Check --dataset and --label-column."
        )
    return joined


def draw_again(data: Labelled, classes: Rows, sampling: SamplingInfo) -> Rows:
    """Draw the rows that an extraction of this data drew for some classes.

    Args:
        data: the data set, limited as it was then.
        classes: class indices of the data, ascending, each with an image.
        sampling: how many of each class, and the seed.

    Returns:
        Rows of the data, ascending: each class has a random stream of its own, so the others are not needed.
    """
    positions = np.flatnonzero(np.isin(data.labels, classes))
    names = [data.class_names[index] for index in classes.tolist()]
    labels = np.searchsorted(classes, data.labels[positions])
    rows, _ = sample_rows(labels, names, sampling.per_class, sampling.seed)
    rows = positions[rows]
    if sampling.rows is not None:
        rows = rows[(data.numbers[rows] >= sampling.rows[0]) & (data.numbers[rows] < sampling.rows[1])]
    return rows


def find_samples(artifact: Artifact, data: Labelled, class_rows: Rows, wanted: int) -> Found:
    """Find some of an artifact's samples in a data set, at random.

    Args:
        artifact: with samples.
        data: all rows of a split.
        class_rows: what `join_classes` returned.
        wanted: how many; fewer are found where the data has fewer.

    Returns:
        At least one sample, and at most `wanted`.

    Raises:
        PipelineError: none is found; some of the images that were read are named.
    """
    order = _reading_order(artifact, data, class_rows)
    num_samples = len(artifact["sample/label"])
    patience = max(MIN_FRUITLESS_ROWS, _FRUITLESS_GAPS * -(-len(order) // num_samples))
    finder = _Finder(artifact, data, class_rows)
    found, fruitless = finder.found, 0
    with ProgressBar("finding samples", wanted) as bar:
        while len(found.rows) < wanted and found.num_read < len(order) and fruitless < patience:
            before = len(found.rows)
            size = min(_BLOCK_ROWS, max(16, wanted - before))
            finder.read(order[found.num_read : found.num_read + size], wanted)
            fruitless = fruitless + size if len(found.rows) == before else 0
            bar.advance(len(found.rows) - before)
    if not found.rows:
        raise PipelineError(_nothing_found(artifact, data, found))
    return found


def _reading_order(artifact: Artifact, data: Labelled, class_rows: Rows) -> Rows:
    """Return the rows of the artifact's classes at random, those first that its extraction would draw from this data.

    In any order the same samples would be found; in this one nothing else is read where the data is the artifact's own.
    """
    sampling = artifact.manifest.sampling
    random = np.random.default_rng(sampling.seed)
    settings = data.settings.model_copy(update={"limit": sampling.limit})
    limited = data if sampling.limit is None else load_labelled(settings)
    joined = class_rows[limited.labels] >= 0
    likely = np.zeros(len(data), bool)
    if joined.any():
        likely[limited.numbers[draw_again(limited, np.unique(limited.labels[joined]), sampling)]] = True
    others = (class_rows[data.labels] >= 0) & ~likely
    return np.concatenate([random.permutation(np.flatnonzero(rows)) for rows in (likely, others)])


class _Finder:
    """Reads rows and looks their images up."""

    def __init__(self, artifact: Artifact, data: Labelled, class_rows: Rows) -> None:
        self.found = Found()
        self._artifact, self._data, self._class_rows = artifact, data, class_rows
        self._taken: set[int] = set()
        self._stored_keys = artifact["sample/key"]
        self._high = _high_halves(self._stored_keys)

    def read(self, rows: Rows, wanted: int) -> None:
        images = self._data.read(rows.tolist())
        raise_bad([image for image in images if isinstance(image, BadImageError)], skip_bad=True)
        decoded = [index for index, image in enumerate(images) if not isinstance(image, BadImageError)]
        keys = [sample_key(image) for image in images if not isinstance(image, BadImageError)]
        found = self.found
        found.num_read += len(rows)
        found.num_bad += len(rows) - len(decoded)
        if not decoded:
            return
        array = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        rows = rows[decoded]
        samples = self._artifact.find(array, self._class_rows[self._data.labels[rows]])
        for row, sample, key in zip(rows.tolist(), samples.tolist(), keys, strict=True):
            if sample < 0:
                self._note_absent(row, key)
            elif sample not in self._taken and len(found.rows) < wanted:
                self._taken.add(sample)
                found.rows.append(row)
                found.samples.append(sample)
                found.keys.append(key)

    def _note_absent(self, row: int, key: bytes) -> None:
        found = self.found
        found.num_absent += 1
        label = self._data.class_names[self._data.labels[row]]
        place = int(np.searchsorted(self._high, np.uint64(int.from_bytes(key[:8], "big"))))
        if place < len(self._high) and self._stored_keys[place].tobytes() == key:
            there = self._artifact.manifest.classes[int(self._artifact["sample/label"][place])]
            found.num_relabelled += 1
            example, examples = f"row {row}: {label} in the data, {there} in the file", found.relabelled
        else:
            example, examples = f"row {row}: {label}, key {key.hex()[:12]}…", found.absent
        if len(examples) < _NUM_EXAMPLES:
            examples.append(example)


def _high_halves(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the first eight bytes of sorted keys, as numbers that sort as they do."""
    return np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def _nothing_found(artifact: Artifact, data: Labelled, found: Found) -> str:
    made_of = artifact.manifest.data_set
    text = (
        f"{artifact.path.name}: none of its samples is among {found.num_read} images of {data.settings.dataset}, split "
        f"{data.settings.split}"
    )
    if found.num_relabelled:
        text += f"; {found.num_relabelled} are in it under another label ({'; '.join(found.relabelled)})"
    elif found.absent:
        text += f" ({'; '.join(found.absent)})"
    if found.num_bad:
        text += f"; {found.num_bad} cannot be decoded"
    return f"{text}. It was made of {made_of.name}, split {made_of.split}: pass that data, with the same labels."
