"""An open artifact goes to worker processes and threads, which read the same rows from the same file."""

import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

import store
from tests.store.examples import STORAGES, Tensors, class_tensors, make_manifest, samples_of

NAME = "sample/embedding"
ROWS = np.random.default_rng(0).integers(0, 3000, 500)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    embedding = np.random.default_rng(1).normal(size=(3000, 1, 64)).astype(np.float16)
    return class_tensors(3, 64) | samples_of(embedding)


@pytest.fixture
def artifacts(tensors: Tensors, tmp_path: Path) -> Iterator[list[store.Artifact]]:
    """Return the same artifact, open in each container and as gzip chunks."""
    opened = []
    for suffix, gzip in STORAGES:
        path = tmp_path / f"artifact-{gzip}{suffix}"
        store.write_artifact(path, make_manifest(3, 64, 1), tensors, gzip=gzip)
        opened.append(store.open_artifact(path))
    yield opened
    for artifact in opened:
        artifact.__exit__(None, None, None)


def read_everything(artifact: store.Artifact) -> None:
    """Make its maps and its index of pairs, which must not go along."""
    artifact.find(artifact["sample/key"][:1], artifact["sample/label"][:1])
    artifact.gather(NAME, ROWS[:1])


def test_a_pickled_artifact_holds_neither_rows_nor_hdf5_objects(artifacts: list[store.Artifact]) -> None:
    for artifact in artifacts:
        read_everything(artifact)
        pickled = pickle.dumps(artifact)
        assert len(pickled) < 10_000
        assert b"h5py" not in pickled
        assert b"memmap" not in pickled


def test_a_pickled_artifact_is_read_as_before(artifacts: list[store.Artifact], tensors: Tensors) -> None:
    for artifact in artifacts:
        read_everything(artifact)
        copy = pickle.loads(pickle.dumps(artifact))
        assert copy.manifest == artifact.manifest
        assert copy.manifest_sha256 == artifact.manifest_sha256
        assert copy.gather(NAME, ROWS).tobytes() == tensors[NAME][ROWS].tobytes()
        assert copy.find(tensors["sample/key"], tensors["sample/label"]).tolist() == list(range(3000))


@pytest.mark.parametrize("method", [method for method in get_all_start_methods() if method in {"spawn", "fork"}])
def test_worker_processes_gather_and_find_the_same_rows(
    artifacts: list[store.Artifact], tensors: Tensors, method: str
) -> None:
    keys, labels = tensors["sample/key"][ROWS], tensors["sample/label"][ROWS]
    with ProcessPoolExecutor(1, get_context(method)) as workers:
        for artifact in artifacts:
            read_everything(artifact)
            gathered = workers.submit(artifact.gather, NAME, ROWS)  # the artifact is pickled with its method
            found = workers.submit(artifact.find, keys, labels)
            assert gathered.result(60).tobytes() == tensors[NAME][ROWS].tobytes()
            np.testing.assert_array_equal(found.result(60), ROWS)


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_worker_uses_what_its_parent_had_open(artifacts: list[store.Artifact], tensors: Tensors) -> None:
    def work(answers: Connection) -> None:
        for artifact in artifacts:
            keys, labels = tensors["sample/key"][ROWS], tensors["sample/label"][ROWS]
            answers.send((artifact.gather(NAME, ROWS), artifact.find(keys, labels)))

    for artifact in artifacts:
        read_everything(artifact)
    context = get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there,))
    process.start()
    for _ in artifacts:
        assert here.poll(60)
        gathered, found = here.recv()
        assert gathered.tobytes() == tensors[NAME][ROWS].tobytes()
        np.testing.assert_array_equal(found, ROWS)
    process.join()


def test_threads_may_share_an_artifact(artifacts: list[store.Artifact], tensors: Tensors) -> None:
    for artifact in artifacts:
        with ThreadPoolExecutor(4) as threads:
            parts = np.array_split(ROWS, 20)
            gathered = threads.map(lambda rows, artifact=artifact: artifact.gather(NAME, rows), parts)
            assert np.concatenate(list(gathered)).tobytes() == tensors[NAME][ROWS].tobytes()


def test_an_artifact_is_found_after_the_working_directory_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix, gzip in STORAGES:
        monkeypatch.chdir(tmp_path)
        store.write_artifact(f"other-{gzip}{suffix}", make_manifest(3, 64, 1), class_tensors(3, 64), gzip=gzip)
        artifact = store.open_artifact(f"other-{gzip}{suffix}")
        monkeypatch.chdir("/")
        np.testing.assert_array_equal(artifact["class/mean"], class_tensors(3, 64)["class/mean"])
