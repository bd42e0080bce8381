"""Files that were made to hurt: each is refused at once, in one line; `test_fuzz` tries what nobody thought of."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import pytest

import store
import store.verify
from store.isolation import run_isolated
from tests.store.examples import (
    GOLDEN,
    all_tensors,
    assert_same_bits,
    class_tensors,
    document_of,
    encode,
    make_manifest,
    read_all,
    sample_tensors,
)
from tests.store.mutants import run_cli, save_header, save_raw

MEGABYTE = 2**20
HUGE = 10**4000
DAMAGED = "The file is damaged: extract it again."
SOUND = encode(document_of(class_tensors()))
ENTRY = {"dtype": "F32", "shape": [3, 4], "data_offsets": [24, 72]}
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a file or file name of Linux")


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    def stop(*_: object) -> NoReturn:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(path: Path) -> str:
    with pytest.raises(store.StoreError) as caught:
        store.verify_artifact(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1500
    return message.removeprefix(f"{path}: ").removeprefix(f"{path.name}: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_offsets": [24, 71]}, "class/m2 lies in 47 bytes, float32 [3, 4] needs 48. "),
        ({"data_offsets": [72, 24]}, "header entry 'class/m2' is not "),
        ({"data_offsets": [2**62, 2**62 + 48]}, "class/mean begins at byte 72 of the data, expected 24 (no gap"),
        ({"shape": [2**32, 2**32]}, f"class/m2 lies in 48 bytes, float32 [{2**32}, {2**32}] needs {2**66}. "),
        ({"shape": [2**62] * 400}, "header entry 'class/m2' is not "),
        ({"shape": [1] * 65}, "header entry 'class/m2' is not "),
        ({"shape": [2**62] * 1_000_000}, "header entry 'class/m2' is not "),
        ({"shape": [HUGE]}, "header entry 'class/m2' is not "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_place_or_shape_that_cannot_be_is_refused(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    whole = (GOLDEN / "format-1.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    assert header["class/m2"] == ENTRY
    header["class/m2"] |= fields
    assert refusal(save_header(tmp_path / "x.safetensors", json.dumps(header).encode(), whole[start:])).startswith(
        message
    )


NAMES = ("a\0/b", "../..", "/", "/a", "a/", "a//b", "a/b/c", "a\x1b[31m/b", "a/b\n", "\u202ea/b", "ключ/имя", "a/\x9b")


@pytest.mark.parametrize("name", [*NAMES, "", "a/B", "x" * 100_000], ids=lambda name: ascii(name)[:20])
def test_a_tensor_name_that_could_harm_is_refused(path: Path, name: str) -> None:
    document = json.loads(SOUND)
    document["tensors"][name] = document["tensors"]["class/mean"]
    assert refusal(save_raw(path, encode(document))).startswith(f"tensor name {name!r:.200}")
    document["tensors"][name] = 0
    message = refusal(save_raw(path, encode(document)))
    assert message.startswith("manifest field tensors.")
    assert message.endswith(DAMAGED)
    header = {"__metadata__": {"manifest": "", "manifest_sha256": ""}, name: ENTRY}
    message = refusal(save_header(path.with_suffix(".safetensors"), json.dumps(header).encode()))
    assert message.startswith(f"tensor name {name!r:.200}")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"[" * 100_000, "header is not valid JSON ("),
        (b"[" * 80 + b"]" * 80, "header is nested more than 64 levels deep."),
        (b'{"a":' * 900 + b"0" + b"}" * 900, "header is nested more than 64 levels deep."),
        (b'{"a":0,"a":0}', "header is not valid JSON (a key stands twice)."),
        (b"9" * 5000, "header is not valid JSON (Exceeds the limit"),
        (b"1e999", "header is not valid JSON (1e999 is not a number)."),
        (b"-Infinity", "header is not valid JSON (-Infinity is not a number)."),
        (rb'"\ud800"', "manifest cannot be encoded ('utf-8' codec can't encode character '\\ud800'"),
        (rb'{"\udfff":0}', "manifest cannot be encoded ('utf-8' codec can't encode character '\\udfff'"),
    ],
    ids=lambda value: repr(value)[:20],
)
@pytest.mark.parametrize("place", [b'"preprocessing":{', b'"teacher":{', b'"class/mean":{', b'"software":{', b"{"])
def test_json_that_is_not_strict_is_refused(path: Path, value: bytes, problem: str, place: bytes) -> None:
    message = refusal(save_raw(path, SOUND.replace(place, place + b'"x":' + value + b",", 1)))
    assert message.startswith((problem, "manifest field software.x: ") if b"software" in place else problem)


def places(value: object, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        if place[:1] != ("preprocessing",) and (place or key != "format"):
            yield (*place, key)
            yield from places(member, (*place, key))


@pytest.mark.parametrize("field", list(places(json.loads(SOUND))), ids=lambda field: ".".join(map(str, field)))
def test_a_value_of_another_json_type_is_refused(tmp_path: Path, field: tuple[str | int, ...]) -> None:
    document = record = json.loads(SOUND)
    for key in field[:-1]:
        record = record[key]
    right = record[field[-1]]
    for wrong in (True, 1.5, [], {}, [None], {"": None}, 0, -HUGE, "\x1b")[: 6 if right is None else 9]:
        if type(wrong) is not type(right):
            record[field[-1]] = wrong
            message = refusal(save_raw(tmp_path / "x.safetensors", encode(document)))
            assert message.startswith(f"manifest field {'.'.join(map(str, field))}"), wrong


@pytest.mark.parametrize(
    "major", [True, 1.0, "1\n2", "\x1b[2J", "x" * 50_000, [["1"]], HUGE, -1], ids=lambda x: repr(x)[:9]
)
def test_a_version_that_is_not_the_number_one_is_refused(path: Path, major: object) -> None:
    document = json.loads(SOUND)
    document["format"]["major"] = major
    assert refusal(save_raw(path, encode(document))).startswith("artifact format ")


@pytest.mark.parametrize("size", [-1, 0, 2**31, 2**64, HUGE], ids=lambda size: f"{size:.0e}" if size < HUGE else "huge")
@pytest.mark.parametrize("field", ["teacher.embed_dim", "sampling.views", "tensors.class/m2.shape"])
def test_a_size_that_is_not_that_of_the_tensors_is_refused(path: Path, field: str, size: int) -> None:
    tensors = class_tensors() | sample_tensors()
    document = record = document_of(tensors)
    *parents, last = field.split(".")
    for parent in parents:
        record = record[parent]
    record[last] = [3, size] if last == "shape" else size
    where = f"{field}.1" if last == "shape" else field
    assert refusal(save_raw(path, encode(document), tensors)).startswith(
        (
            f"manifest field {where}: Input should be greater than ",
            f"manifest field {where}: Input should be less than {2**63}. ",
            "class/m",
            "sample/embedding has shape [5, 2, 4], ",
        )
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([1] * 33, "future/x has 33 axes, at most 32 are read."),
        ([1] * 10_000, "future/x has 10000 axes, at most 32 are read."),
        ([1, 2**40], f"future/x has rows of {2**42} bytes, at most {16 * MEGABYTE} are read."),
    ],
)
def test_a_tensor_that_numpy_or_memory_could_not_hold_is_refused(path: Path, shape: list[int], message: str) -> None:
    document = json.loads(SOUND)
    document["tensors"]["future/x"] = {"dtype": "float32", "shape": shape, "sha256": "0" * 64}
    assert refusal(save_raw(path, encode(document))) == message


MEMBERS = b"".join(b'"%d":0,' % number for number in range(200_000))
MUCH_JSON = (
    (b'"classes":[', b"0," * 900_000, f"manifest field classes.0: Input should be a valid string. {DAMAGED}"),
    (b'"classes":[', (b'"' + b"a" * 15 * MEGABYTE + b'",') * 2, "manifest field classes: Value error, class name 'aaa"),
    (b'"classes":[', b"".join(b'"%d",' % number for number in range(10**6)), "class/count has shape [3], expected ["),
    (b'"tensors":{', MEMBERS, "manifest field tensors has 200003 members, at most 1000 are read."),
    (b'"software":{', MEMBERS, "manifest field software has 200001 members, at most 1000 are read."),
    (b'"shape":[', b'"",' * 900_000, "manifest field tensors.class/count.shape.0: Input should be a valid integer. "),
    (b'"preprocessing":{', b'"a":[' + b"[]," * 10_000_000 + b"0],", "header has 20"),
    (b'"teacher":{', b'"a":0,' * 5_000_000, "header has 10"),
)


def test_much_json_takes_little_memory(path: Path) -> None:
    paths = [path.with_stem(str(number)) for number in range(len(MUCH_JSON))]
    for saved, (place, value, _) in zip(paths, MUCH_JSON, strict=True):
        save_raw(saved, SOUND.replace(place, place + value, 1))
    code, out, err, peak_bytes = run_cli("store", "verify", *paths)
    assert (code, err) == (1, "")
    for line, saved, (_, _, message) in zip(out.splitlines(), paths, MUCH_JSON, strict=True):
        assert line.startswith(f"{saved}: FAILED: {message}")
        assert len(line) < 2000
    assert peak_bytes < 400 * MEGABYTE


def nbit(file: h5py.File) -> None:
    del file["sample/embedding"]
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((1, 2, 4))
    settings.set_filter(h5py.h5z.FILTER_NBIT, 0, ())
    space = h5py.h5s.create_simple((5, 2, 4))
    h5py.h5d.create(file["sample"].id, b"embedding", h5py.h5t.IEEE_F16LE, space, settings)


def claim(file: h5py.File) -> None:
    del file["sample/embedding"]
    file.create_dataset("sample/embedding", (2**60, 2, 4), "f2", chunks=(1, 2, 4), compression="gzip")


def link(file: h5py.File, count: int) -> None:
    for number in range(count):
        file[f"class/x{number}"] = file["class/mean"]


def nest(file: h5py.File) -> None:
    group = file["class"]
    for _ in range(3000):
        group = group.create_group("a")


def soft(name: str | bytes) -> Callable[[h5py.File], object]:
    return lambda file: file.__setitem__(name, h5py.SoftLink("/"))


MANY = ("the HDF5 library could not read it: it took too much processor time. ", "class/x", "'class/x", "manifest ")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (nbit, "sample/embedding has HDF5 filters [5], expected gzip, or shuffle and gzip."),
        (claim, f"sample/embedding has 0 chunks, {2**60} are needed."),
        (lambda file: file.__setitem__("class/cycle", file["/"]), "class/cycle is not a data set."),
        (lambda file: file.__setitem__("other", file["class"]), "'other/count' stands in the file only. "),
        (nest, "class/a is not a data set."),
        (lambda file: link(file, 2000), MANY),
        (lambda file: link(file, 5000), MANY),
        (lambda file: file.create_dataset("a\nb\x1b", data=[1]), "a\\nb\\x1b is not a group of tensors."),
        (soft("\x9b1m"), "\\x9b1m is a soft or external link, which "),
        (soft("x" * 60_000), "xxx"),
        (soft(b"\xff"), "not a readable HDF5 file ("),
        (soft(b"class/\xff"), "tensor name "),
        (lambda file: file.attrs.create("manifest", np.bytes_(b"x" * 40_000_000)), "attribute manifest has 40000000 "),
    ],
)
def test_what_hdf5_could_hold_is_refused(
    tmp_path: Path, fill: Callable[[h5py.File], object], message: str | tuple[str, ...]
) -> None:
    tensors = class_tensors() | sample_tensors()
    assert refusal(save_raw(tmp_path / "x.h5", encode(document_of(tensors)), tensors, fill)).startswith(message)


def test_what_is_not_the_artifacts_is_not_read(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file.attrs.create("other", np.zeros(40_000_000, np.uint8))
        file.attrs["text"] = "of variable length"
        file["class"].attrs["reference"] = file.ref

    store.verify_artifact(save_raw(tmp_path / "x.h5", SOUND, fill=fill))
    path = tmp_path / "behind-a-user-block.h5"
    path.write_bytes(b"\xff" * 512 + (GOLDEN / "format-1.h5").read_bytes())
    store.verify_artifact(path)


@pytest.mark.parametrize("offset", [0, 13, 100, 10**9, 2**63 - 10, 2**63, 2**64 - 2])
def test_a_tensor_at_another_place_is_found_by_its_digest_or_its_end(tmp_path: Path, offset: int) -> None:
    path = save_raw(tmp_path / "x.h5", SOUND, libver="earliest")  # without checksums
    with h5py.File(path) as file:
        place = file["class/mean"].id.get_offset().to_bytes(8, "little")
    data = path.read_bytes()
    assert data.count(place) == 1
    path.write_bytes(data.replace(place, offset.to_bytes(8, "little")))
    assert refusal(path).startswith(("class/mean has ", "class/mean ends ", "not a readable HDF5 file ("))


def save_no_file(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "long name":
        return path.with_name("x" * 300 + path.suffix)
    else:
        path.symlink_to({"loop": path.name, "dangling": "nowhere"}.get(kind, kind))
    return path


NO_FILES = ("pipe", "folder", "loop", "long name", "dangling", "/dev/zero", "/dev/full", "/proc/self/mem")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    paths = [
        save_no_file(tmp_path / f"{number}{suffix}", kind)
        for number, kind in enumerate(NO_FILES)
        for suffix in (".safetensors", ".h5")
    ]
    for path in paths:
        refusal(path)
    code, out, err, _ = run_cli("store", "verify", *paths)
    assert (code, err) == (1, "")
    assert [line.split(": ")[:2] for line in out.splitlines()] == [[str(path), "FAILED"] for path in paths]


def test_a_huge_file_with_holes_is_refused_at_once_or_read_as_before_them(path: Path) -> None:
    num_bytes = 100 * 2**30
    path.touch()
    os.truncate(path, num_bytes)
    refusal(path)
    path.write_bytes((GOLDEN / f"format-1{path.suffix}").read_bytes())
    os.truncate(path, num_bytes)
    if path.suffix == ".h5":
        assert_same_bits(read_all(path), all_tensors())
    else:
        assert refusal(path).startswith(f"the file has {num_bytes} bytes, its header describes ")


@pytest.mark.parametrize("change", ["emptied", "cut off", "grown", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_verified_is_refused(path: Path, change: str) -> None:
    store.write_artifact(path, make_manifest(), all_tensors())

    def meddle(*_: object) -> None:
        if change == "replaced":
            store.write_artifact(path, make_manifest(), class_tensors(), overwrite=True)
        elif change == "removed":
            path.unlink(missing_ok=True)
        else:
            os.truncate(path, {"cut off": 100, "grown": 10_000_000, "emptied": 0}[change])

    with pytest.raises(store.StoreError) as caught:
        store.verify_artifact(path, progress=meddle)
    assert str(caught.value).startswith(
        f"{path}: cannot be read any more (" if change == "removed" else f"{path.name}: was replaced while it was open."
    )


def test_a_file_that_is_cut_off_after_its_digests_were_checked_kills_nobody(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = store.pairs.check_sorted
    store.write_artifact(path, make_manifest(), all_tensors())

    def cut_off(*arguments: Any) -> None:
        os.truncate(path, 0)
        check(*arguments)

    monkeypatch.setattr(sys.modules["store.verify"], "check_sorted", cut_off)
    assert run_isolated(lambda: refusal(path).encode(), 10.0).startswith(b"was replaced while it was open.")


def test_a_file_that_vanishes_before_it_is_opened_is_not_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_artifact(path, make_manifest(), class_tensors())
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: is_file(self) and self.unlink() is None)
    assert "cannot be read (" in refusal(path)


@LINUX
def test_a_file_name_that_is_not_utf8_is_printed_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    path = tmp_path / os.fsdecode(b"\xff\xc2\x9b.h5")
    path.write_bytes((GOLDEN / "format-1.h5").read_bytes())
    code, out, err, _ = run_cli("store", "verify", "--json", path)
    assert (code, err) == (0, "")
    assert json.loads(out)[0]["path"] == str(path)
    assert "\x9b" not in out
