import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import store
from tests.store.examples import SEARCH, Tensors, class_tensors, make_manifest


def _key(prefix: int, suffix: int) -> bytes:
    return prefix.to_bytes(8, "big") + suffix.to_bytes(8, "big")


def _open_with_samples(path: Path, pairs: list[tuple[bytes, int]]) -> store.Artifact:
    pairs = sorted(pairs)
    samples: Tensors = {
        "sample/key": np.frombuffer(b"".join(key for key, _ in pairs), np.uint8).reshape(-1, 16),
        "sample/label": np.array([label for _, label in pairs], np.int32),
        "sample/embedding": np.zeros((len(pairs), 2, 4), np.float16),
    }
    store.write_artifact(path, make_manifest(), class_tensors() | samples)
    return store.open_artifact(path)


def _find(artifact: store.Artifact, pairs: list[tuple[bytes, int]]) -> list[int]:
    keys = np.frombuffer(b"".join(key for key, _ in pairs), np.uint8).reshape(-1, 16)
    found = artifact.find(keys, np.array([label for _, label in pairs], np.int64))
    assert found.dtype == np.int64
    assert found.shape == (len(pairs),)
    return [int(row) for row in found]


LAST = 2**64 - 1


def test_pairs_are_found_in_any_order(path: Path) -> None:
    pairs = [(_key(index * LAST // 9, index), index % 3) for index in range(10)]
    with _open_with_samples(path, pairs) as artifact:
        assert _find(artifact, pairs) == list(range(10))
        assert _find(artifact, pairs[::-1]) == list(range(9, -1, -1))
        assert _find(artifact, [pairs[7], pairs[7], pairs[0]]) == [7, 7, 0]


def test_equal_keys_are_told_apart_by_label(path: Path) -> None:
    pairs = [(_key(5, 5), 0), (_key(5, 5), 2), (_key(6, 0), 0)]
    with _open_with_samples(path, pairs) as artifact:
        assert _find(artifact, [(_key(5, 5), 2), (_key(5, 5), 0), (_key(5, 5), 1)]) == [1, 0, -1]


def test_keys_with_equal_first_halves_are_told_apart(path: Path) -> None:
    pairs = [(_key(5, suffix), 1) for suffix in (0, 7, LAST)]
    with _open_with_samples(path, pairs) as artifact:
        assert _find(artifact, [*pairs, (_key(5, 8), 1)]) == [0, 1, 2, -1]


def test_absent_keys_and_labels_are_minus_one(path: Path) -> None:
    with _open_with_samples(path, [(_key(5, 5), 1), (_key(9, 9), 1)]) as artifact:
        for key in (_key(0, 0), _key(5, 4), _key(5, 6), _key(7, 0), _key(9, LAST), _key(LAST, LAST)):
            assert _find(artifact, [(key, 1)]) == [-1]
        assert _find(artifact, [(_key(5, 5), 0), (_key(9, 9), 2), (_key(9, 9), -1)]) == [-1, -1, -1]


def test_no_query_finds_nothing(path: Path) -> None:
    with _open_with_samples(path, [(_key(5, 5), 1)]) as artifact:
        assert _find(artifact, []) == []


def test_finding_needs_samples(path: Path) -> None:
    store.write_artifact(path, make_manifest(), class_tensors())
    with store.open_artifact(path) as artifact, pytest.raises(KeyError, match="has no tensor 'sample/key'"):
        _find(artifact, [(_key(5, 5), 1)])


PAIRS = st.tuples(
    st.builds(_key, st.sampled_from([0, 1, 2**63, LAST]), st.sampled_from([0, 1, LAST])), st.integers(0, 2)
)


@settings(SEARCH, max_examples=15)
@given(stored=st.lists(PAIRS, min_size=1, unique=True), queries=st.lists(PAIRS))
def test_finding_agrees_with_a_dictionary(stored: list[tuple[bytes, int]], queries: list[tuple[bytes, int]]) -> None:
    rows = {pair: row for row, pair in enumerate(sorted(stored))}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        artifact = stack.enter_context(_open_with_samples(folder / "artifact.safetensors", stored))
        assert _find(artifact, queries) == [rows.get(pair, -1) for pair in queries]
