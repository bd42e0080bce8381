import hashlib
import tempfile
import tracemalloc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import store
from store import merged_rows
from store.merged_rows import MergedSamples
from store.verify import verify_open
from tests.store.examples import SEARCH, Tensors, make_manifest

Pair = tuple[bytes, str]
Owner = tuple[int, int]  # which artifact, which row there
CLASSES = ("ant", "bee", "cat")
# Halves of keys: few, so that rows share one or both.
HALVES = (b"\0" * 8, b"\0" * 7 + b"\1", b"\x7f" * 8, b"\x80" + b"\0" * 7, b"\xff" * 8)


class Images(NamedTuple):
    """What an extraction sees: [N, 16] sample keys, N class names, [N, V, 4] embeddings."""

    keys: NDArray[np.uint8]
    names: list[str]
    embeddings: NDArray[np.float32]


def draw_images(num_images: int, seed: int, names: Sequence[str] = CLASSES, views: int = 1) -> Images:
    """Draw images of noise, their classes in turn."""
    random = np.random.default_rng(seed)
    keys = random.integers(0, 256, (num_images, 16), dtype=np.uint8)
    embeddings = (3 + random.normal(size=(num_images, views, 4))).astype(np.float32)
    return Images(keys, [names[row % len(names)] for row in range(num_images)], embeddings)


def together(*parts: Images) -> Images:
    """Return the images of several extractions, those of the first before the others."""
    names = [name for part in parts for name in part.names]
    return Images(
        np.concatenate([part.keys for part in parts]), names, np.concatenate([part.embeddings for part in parts])
    )


def stored_as(dtype: str, embeddings: NDArray[np.float32]) -> Tensors:
    """Round embeddings to a type of the format; none of their rows is zero."""
    if dtype != "int8":
        return {"sample/embedding": embeddings.astype(dtype)}
    scales = np.abs(embeddings).max(axis=-1) / np.float32(127)
    steps = np.rint(embeddings.astype(np.float64) / scales[..., None])
    return {"sample/embedding": steps.astype(np.int8), "sample/scale": scales}


def samples_in(images: Images, classes: Sequence[str], dtype: str) -> Tensors:
    """Build the sample tensors of an extraction in the plain way: a dictionary, sorted; the first of equals wins."""
    first: dict[tuple[bytes, int], int] = {}
    for row, (key, name) in enumerate(zip(images.keys, images.names, strict=True)):
        first.setdefault((key.tobytes(), classes.index(name)), row)
    pairs = sorted(first)
    embeddings = images.embeddings[[first[pair] for pair in pairs]]
    return {
        "sample/key": np.frombuffer(b"".join(key for key, _ in pairs), np.uint8).reshape(-1, 16),
        "sample/label": np.array([label for _, label in pairs], np.int32),
        **stored_as(dtype, embeddings),
    }


def extract(
    path: Path,
    images: Images,
    *,
    dtype: str = "float16",
    with_samples: bool = True,
    with_head: bool = False,
    changes: Mapping[str, Any] | None = None,
    more: Tensors | None = None,
) -> Path:
    """Write what one extraction of these images gives; `changes` are of manifest fields, e.g. `sampling.seed`."""
    classes = tuple(dict.fromkeys(images.names))
    statistics = store.ClassStatistics(len(classes), images.embeddings.shape[2])
    statistics.add(images.embeddings[:, 0], np.array([classes.index(name) for name in images.names]))
    samples = samples_in(images, classes, dtype)
    manifest = make_manifest(len(classes), views=images.embeddings.shape[1], classes=classes)
    digest = store.pairs_sha256(samples["sample/key"], samples["sample/label"])
    for field, value in {"sampling.images_sha256": digest, **(changes or {})}.items():
        group, _, name = field.partition(".")
        new = getattr(manifest, group).model_copy(update={name: value}) if name else value
        manifest = manifest.model_copy(update={group: new})
    tensors = statistics.tensors() | (samples if with_samples else {}) | (more or {})
    if with_head:
        head = fit_head(samples, len(classes))
        tensors |= head.tensors()
        manifest = manifest.model_copy(update={"head": head.info()})
    store.write_artifact(path, manifest, tensors)
    store.verify_artifact(path)
    return path


def fit_head(samples: Tensors, num_classes: int) -> store.RidgeHead:
    """Fit a head to stored samples, all at once."""
    embeddings = samples["sample/embedding"].astype(np.float32)
    if "sample/scale" in samples:
        embeddings = embeddings * samples["sample/scale"][..., None]
    return store.fit_ridge(lambda: [(embeddings[:, 0], samples["sample/label"])], num_classes, embeddings.shape[2])


def write_pairs(path: Path, pairs: Sequence[Pair], classes: Sequence[str], part: int) -> Path:
    """Write samples without images: each embedding says which part and row it is, in two views."""
    rows = sorted((key, classes.index(name)) for key, name in pairs)
    embeddings = np.zeros((len(rows), 2, 4), np.float32)
    embeddings[..., 0], embeddings[..., 1] = part, np.arange(len(rows))[:, None]
    embeddings[:, 1, 2] = 1
    tensors: Tensors = {
        "class/count": np.full(len(classes), len(rows)),
        "class/mean": np.zeros((len(classes), 4), np.float32),
        "class/m2": np.zeros((len(classes), 4), np.float32),
        "sample/key": np.frombuffer(b"".join(key for key, _ in rows), np.uint8).reshape(-1, 16),
        "sample/label": np.array([label for _, label in rows], np.int32),
        "sample/embedding": embeddings,
    }
    store.write_artifact(path, make_manifest(len(classes), classes=tuple(classes)), tensors)
    return path


def check_against_plain_sort(parts: Sequence[Sequence[Pair]], orders: Sequence[Sequence[str]]) -> None:
    """Merge the parts, each with its classes in an order of its own, and compare with a sort of all pairs."""
    owner: dict[tuple[bytes, int], Owner] = {}
    for part, (pairs, classes) in enumerate(zip(parts, orders, strict=True)):
        for row, (key, label) in enumerate(sorted((key, classes.index(name)) for key, name in pairs)):
            owner.setdefault((key, CLASSES.index(classes[label])), (part, row))
    expected = sorted(owner)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        artifacts = []
        for part, (pairs, classes) in enumerate(zip(parts, orders, strict=True)):
            path = write_pairs(folder / f"{part}.safetensors", pairs, classes, part)
            artifacts.append(stack.enter_context(store.open_artifact(path)))
        class_rows = [np.array([CLASSES.index(name) for name in classes]) for classes in orders]
        samples = MergedSamples(artifacts, class_rows)
        tensors = {name: np.concatenate(list(rows.blocks)) for name, rows in samples.tensors().items()}
        labelled = list(samples.labelled_embeddings())

    assert samples.num_rows == len(expected)
    assert samples.num_shared == sum(map(len, parts)) - len(expected)
    stored = b"".join(key + label.to_bytes(4, "little") for key, label in expected)
    assert samples.images_sha256 == hashlib.sha256(stored).hexdigest()
    assert [key.tobytes() for key in tensors["sample/key"]] == [key for key, _ in expected]
    assert tensors["sample/label"].tolist() == [label for _, label in expected]
    views = [[[*owner[pair], view, 0] for view in range(2)] for pair in expected]
    assert tensors["sample/embedding"].tolist() == views
    assert np.concatenate([embeddings for embeddings, _ in labelled]).tolist() == [view for view, _ in views]
    assert np.concatenate([labels for _, labels in labelled]).tolist() == [label for _, label in expected]


pairs_of_a_part = st.lists(
    st.tuples(st.builds(bytes.__add__, st.sampled_from(HALVES), st.sampled_from(HALVES)), st.sampled_from(CLASSES)),
    min_size=1,
    max_size=12,
    unique=True,
)
parts_and_orders = st.lists(st.tuples(pairs_of_a_part, st.permutations(CLASSES)), min_size=1, max_size=5)


@SEARCH
@given(drawn=parts_and_orders, step_rows=st.integers(1, 3), block_rows=st.integers(1, 3))
def test_blocks_of_any_size_give_a_plain_sort(
    drawn: list[tuple[list[Pair], list[str]]], step_rows: int, block_rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merged_rows, "_STEP_ROWS", step_rows)
        patch.setattr(merged_rows, "block_rows", lambda shape, dtype: block_rows)
        check_against_plain_sort([pairs for pairs, _ in drawn], [order for _, order in drawn])


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "big") + bytes(8)


@pytest.mark.parametrize("step_rows", [1, 2, 3, 65536])
@pytest.mark.parametrize(
    "parts",
    [
        [range(10), range(100, 110)],  # one ends before the other begins
        [[0, 1, 2, 3, 50, 51], range(10, 40), [5, 45]],  # none of the first in the range of the second
        [[number] for number in range(15)],  # many inputs
        [range(7)] * 12,  # all the same
    ],
    ids=["apart", "with a gap", "many", "equal"],
)
def test_inputs_of_different_ranges(
    parts: Sequence[Sequence[int]], step_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_rows, "_STEP_ROWS", step_rows)
    pairs = [[(key_of(number), CLASSES[number % 3]) for number in part] for part in parts]
    check_against_plain_sort(pairs, [CLASSES[part % 3 :] + CLASSES[: part % 3] for part in range(len(parts))])


@pytest.mark.parametrize("step_rows", [1, 2, 3])
def test_keys_that_share_64_bits_across_the_ends_of_blocks(step_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_rows, "_STEP_ROWS", step_rows)
    shared = [(HALVES[1] + number.to_bytes(8, "big"), name) for number in range(10) for name in CLASSES]
    before, after = (HALVES[0] + bytes(8), "ant"), (HALVES[4] + bytes(8), "ant")
    check_against_plain_sort([[before, *shared[::2], after], shared[1::2], [before, *shared[:7]]], [CLASSES] * 3)


def test_no_artifact_with_samples_gives_no_tensors() -> None:
    samples = MergedSamples([], [])
    assert samples.tensors() == {}
    assert (samples.num_rows, samples.num_shared) == (0, 0)


def test_memory_is_that_of_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_rows, "_STEP_ROWS", 256)
    monkeypatch.setattr(merged_rows, "block_rows", lambda shape, dtype: 256)
    num_rows = 20_000
    with ExitStack() as stack:
        artifacts = []
        for part in range(2):
            pairs = [(key_of(2 * number + part), "ant") for number in range(num_rows)]
            path = write_pairs(tmp_path / f"{part}.safetensors", pairs, CLASSES, part)
            artifacts.append(stack.enter_context(store.open_artifact(path)))
            verify_open(artifacts[-1])  # reads blocks of 4 MiB, once
        tracemalloc.start()
        try:
            samples = MergedSamples(artifacts, [np.arange(3)] * 2)
            for rows in samples.tensors().values():
                for _ in rows.blocks:
                    pass
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert samples.num_rows == 2 * num_rows
    assert peak_bytes < samples.num_rows * 16 / 4  # a quarter of the keys alone
