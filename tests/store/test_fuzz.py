"""Files that nobody thought of: each is refused with one line, or is the same in content as what was written."""

import json
import os
import signal
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

import cli
import store
from store import hdf5_backend
from tests.store.examples import (
    SEARCH,
    SUFFIXES,
    Tensors,
    all_tensors,
    assert_same_bits,
    class_tensors,
    document_of,
    encode,
    read_all,
)
from tests.store.mutants import Mutant, mend, run_cli, save_header, save_raw, sources, verify_in_time

SECONDS = 1.0
BATCH_BYTES = 200 * 2**20
SOURCES = tuple(sources())
NUM_MUTANTS = 300  # of each of the ten sources
SHARE = 20  # the fast tests take every twentieth, once in this process and once from the command line

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
NAMES = st.sampled_from(sorted(all_tensors())) | st.text(max_size=9) | st.just("__metadata__")
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "I32", "I8", "U8", "BF16"]),
        "shape": st.lists(st.integers(-1, 2**63), max_size=3) | st.lists(st.integers(0, 3), max_size=80),
        "data_offsets": st.lists(st.integers(-1, 99), min_size=2, max_size=2).map(sorted) | JSON,
    }
)
HDF5_TYPES = np_st.scalar_dtypes() | np_st.byte_string_dtypes() | np_st.array_dtypes() | np_st.nested_dtypes()


@cache
def sound_tensors() -> dict[str, Tensors]:
    """Return the tensors of the sound files by the digest of their manifest, which names all their content."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, data in sources().items():
            path = Path(folder, name)
            path.write_bytes(data)
            found[store.verify_artifact(path)] = read_all(path)
    return found


def check(path: Path) -> None:
    """Check that a file is refused in time, or holds what one of the sound files holds."""
    if verify_in_time(path, SECONDS) is None:
        with store.open_artifact(path) as artifact:
            assert artifact.manifest_sha256 in sound_tensors(), path.name
            assert_same_bits(read_all(path), sound_tensors()[artifact.manifest_sha256])


def check_mutants(source: str, numbers: range, folder: Path) -> None:
    for number in numbers:
        path = Mutant(source, 0, number).save(folder)
        check(path)
        path.unlink()


@pytest.mark.parametrize("source", SOURCES)
def test_some_mutants_are_refused_or_the_same_in_content(source: str, tmp_path: Path) -> None:
    check_mutants(source, range(0, NUM_MUTANTS, SHARE), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_mutants_are_refused_or_the_same_in_content(source: str, tmp_path: Path) -> None:
    check_mutants(source, range(NUM_MUTANTS), tmp_path)


def check_flips(source: str, step: int, folder: Path) -> None:
    data = sources()[source]
    end = 8 + int.from_bytes(data[:8], "little") if source.endswith(".safetensors") else len(data)
    path = folder / source
    for place in range(0, end, step):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        check(path)


@pytest.mark.parametrize("source", ["format-1.safetensors", "format-1-gzip.h5", "old.h5"])
def test_a_bit_that_is_wrong_here_and_there_changes_nothing_unseen(source: str, tmp_path: Path) -> None:
    check_flips(source, 401, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", [name for name in SOURCES if not name.startswith("many")])
def test_a_bit_that_is_wrong_nearly_anywhere_changes_nothing_unseen(source: str, tmp_path: Path) -> None:
    check_flips(source, 1 if source.endswith(".safetensors") else 17, tmp_path)


def check_report(numbers: range, folder: Path) -> None:
    """Check that one command reports on all mutants, without a traceback and in little memory."""
    sound = folder / "sound.h5"
    sound.write_bytes(sources()["format-1.h5"])
    paths = [Mutant(source, 0, number).save(folder) for source in SOURCES for number in numbers]
    code, out, err, peak_bytes = run_cli("store", "verify", "--json", sound)
    assert (code, err, len(json.loads(out))) == (0, "", 1)
    base_bytes = peak_bytes
    code, out, err, peak_bytes = run_cli("store", "verify", "--json", *paths)
    assert (code, err) == (1, "")
    documents = json.loads(out)
    assert [document["path"] for document in documents] == [str(path) for path in paths]
    for document in documents:
        assert document["ok"] is (document["error"] is None) is (document["manifest_sha256"] is not None)
        assert "Traceback" not in (document["error"] or "")
    assert peak_bytes - base_bytes < BATCH_BYTES


def test_one_command_reports_on_some_mutants(tmp_path: Path) -> None:
    check_report(range(1, NUM_MUTANTS, SHARE), tmp_path)


@pytest.mark.slow
def test_one_command_reports_on_all_mutants(tmp_path: Path) -> None:
    check_report(range(NUM_MUTANTS), tmp_path)


def only_store_errors(path: Path) -> None:
    with suppress(store.StoreError):
        store.verify_artifact(path)


@settings(SEARCH, max_examples=60)
@given(
    suffix=st.sampled_from(SUFFIXES),
    start=st.sampled_from([b"", b"\x89HDF\r\n\x1a\n", b"\x02\0\0\0\0\0\0\0{}"]),
    data=st.binary(max_size=3000),
)
def test_any_bytes_are_refused(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, start: bytes, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(start + data)
    with pytest.raises(store.StoreError):
        store.verify_artifact(path)


@settings(SEARCH, max_examples=200)
@given(
    header=st.dictionaries(NAMES, ENTRIES | JSON, max_size=5) | JSON,
    manifest=st.none() | st.text(max_size=9) | st.just("{}"),
    data=st.binary(max_size=99),
)
def test_any_json_as_a_header_is_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, manifest: str | None, data: bytes
) -> None:
    if isinstance(header, dict) and manifest is not None:
        header = header | {"__metadata__": {"manifest": manifest, "manifest_sha256": ""}}
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    with pytest.raises(store.StoreError):
        store.verify_artifact(save_header(path, json.dumps(header).encode(), data))


@settings(SEARCH, max_examples=80)
@given(data=st.data(), suffix=st.sampled_from(SUFFIXES))
def test_any_json_in_place_of_a_field_is_refused_or_kept(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    document = record = document_of(class_tensors())
    while True:
        key = data.draw(st.sampled_from(sorted(record)) | st.text(max_size=3))
        if not isinstance(record.get(key), dict) or not record[key] or data.draw(st.booleans()):
            break
        record = record[key]
    record[key] = data.draw(JSON)
    raw = json.dumps(document, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "replace")
    path = save_raw(tmp_path_factory.getbasetemp() / f"manifest{suffix}", raw)
    with suppress(store.StoreError), store.open_artifact(path) as artifact:
        assert json.loads(artifact.manifest.to_bytes()).items() >= json.loads(raw).items()
    only_store_errors(path)


@SEARCH
@given(data=st.data())
def test_whatever_the_hdf5_library_writes_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    def fill(file: h5py.File) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(sorted(all_tensors())) | st.sampled_from(["class", "a", "a/b", "a/b/c"]))
            shape = data.draw(np_st.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
            dtype = data.draw(HDF5_TYPES)
            chunks = True if data.draw(st.booleans()) else None
            packing = data.draw(st.sampled_from([None, "gzip", "lzf"]))
            with suppress(TypeError, ValueError, OSError):  # what HDF5 has not, it does not write
                if name in file:
                    del file[name]
                file.create_dataset(name, shape, dtype, chunks=chunks, compression=packing)

    tensors = class_tensors() if data.draw(st.booleans()) else all_tensors()
    version = data.draw(st.sampled_from(["earliest", "v110", "latest"]))
    path = tmp_path_factory.getbasetemp() / "library.h5"
    only_store_errors(save_raw(path, encode(document_of(tensors)), tensors, fill, version))


def save_crashing(path: Path) -> None:
    """Say that the root's attributes continue in a block of 0 bytes: HDF5 1.14.2 crashes, HDF5 2.0 finds it."""
    data = bytearray(sources()["format-1.h5"])
    pointer = data.find(data.find(b"OCHK").to_bytes(8, "little"))
    data[pointer + 8 : pointer + 16] = bytes(8)
    mend(data, "format-1.h5")
    path.write_bytes(data)


@pytest.mark.parametrize("library", ["that is installed", "that crashes"])
def test_an_artifact_that_crashes_the_hdf5_library_is_one_line_of_distill(
    library: str,
    tmp_path: Path,
    saved_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "x.h5"
    save_crashing(path)
    if library == "that crashes":
        monkeypatch.setattr(hdf5_backend, "parse", lambda *_: os.kill(os.getpid(), signal.SIGSEGV))
    arguments = ["--artifact", path, "--dataset", saved_data, "--out", tmp_path / "run", "--max-steps", 1]
    monkeypatch.setattr(sys, "argv", ["clip-embed-kd", "distill", *map(str, arguments)])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (1, "")
    crashed, found = "the HDF5 library could not read it: it crashed with SIGSEGV. ", "not a readable HDF5 file ("
    last = printed.err.splitlines()[-1]
    assert last.startswith(
        tuple(f"Error: x.h5: {text}" for text in (crashed, found)[: 1 if "crashes" in library else 2])
    )
    assert last.endswith("copy it again.")
    assert "Traceback" not in printed.err
    assert not (tmp_path / "run").exists()


def test_a_mutant_is_the_same_whenever_it_is_made() -> None:
    for source in SOURCES:
        assert Mutant(source, 1, 2).make() == Mutant(source, 1, 2).make()
        assert np.mean([Mutant(source, 0, number).make() != sources()[source] for number in range(50)]) > 0.8
