import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import store
from store.container import Location
from store.safetensors_backend import read_header
from tests.store.examples import GOLDEN, SEARCH, all_tensors, assert_same_bits, read_all

METADATA = {"manifest": "{}", "manifest_sha256": "digest"}
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
WHOLE = (GOLDEN / "format-1.safetensors").read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "artifact.safetensors"


def save(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def save_entries(path: Path, entries: dict[str, Any], num_data_bytes: int = 24) -> None:
    save(path, json.dumps({"__metadata__": METADATA} | entries).encode(), bytes(num_data_bytes))


def refusal(path: Path) -> str:
    with pytest.raises(store.ArtifactFormatError) as caught:
        read_header(path)
    assert type(caught.value) is store.ArtifactFormatError
    return str(caught.value)


def test_tensors_are_located_without_being_read(path: Path) -> None:
    entries = {
        "t/b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
        "t/a": ENTRY,
        "t/empty": {"dtype": "I64", "shape": [0, 2**62], "data_offsets": [25, 25]},
        "t/c": {"dtype": "F16", "shape": [1, 1], "data_offsets": [25, 27]},
    }
    save_entries(path, entries, 27)
    header = read_header(path)
    start = path.stat().st_size - 27
    assert (header.manifest, header.manifest_sha256) == (b"{}", "digest")
    assert header.locations == {
        "t/a": Location("float32", (2, 3), start),
        "t/b": Location("uint8", (), start + 24),
        "t/c": Location("float16", (1, 1), start + 25),
        "t/empty": Location("int64", (0, 2**62), start + 25),
    }


def test_the_data_begin_at_a_multiple_of_eight_and_the_widest_tensors_come_first(path: Path) -> None:
    path.write_bytes(WHOLE)
    locations = read_header(path).locations
    by_place = sorted(locations, key=lambda name: locations[name].offset)
    assert locations[by_place[0]].offset % 8 == 0
    assert by_place == [
        "class/count",
        "class/m2",
        "class/mean",
        "class/text",
        "head/bias",
        "head/weight",
        "sample/label",
        "sample/embedding",
        "sample/key",
    ]
    for name, array in all_tensors().items():
        assert locations[name].offset % array.itemsize == 0


@pytest.mark.parametrize("num_bytes", range(8))
def test_a_file_without_a_whole_length_is_refused(path: Path, num_bytes: int) -> None:
    path.write_bytes(bytes(num_bytes))
    assert refusal(path) == (
        f"artifact.safetensors: the header should have 0 bytes, the file has {num_bytes}. "
        "It is cut off or not a safetensors file: copy it again."
    )


@pytest.mark.parametrize("num_bytes", [3, 2**40, 2**64 - 1])
def test_a_header_beyond_the_end_of_the_file_is_refused(path: Path, num_bytes: int) -> None:
    path.write_bytes(num_bytes.to_bytes(8, "little") + b"{}")
    assert refusal(path) == (
        f"artifact.safetensors: the header should have {num_bytes} bytes, the file has 10. "
        "It is cut off or not a safetensors file: copy it again."
    )


def test_a_header_of_unreasonable_size_is_refused_before_it_is_read(path: Path) -> None:
    at_most = 65 * 1024 * 1024
    with path.open("wb") as file:
        file.write((at_most + 1).to_bytes(8, "little"))
        file.truncate(at_most + 100)  # a sparse file
    assert refusal(path) == (f"artifact.safetensors: the header has {at_most + 1} bytes, at most {at_most} are read.")


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b'{"a":}', "Expecting value: line 1 column 6 (char 5)"),
        (b'{"\xff":1}', "'utf-8' codec can't decode byte 0xff in position 2: invalid start byte"),
        (b'{"a":1,"b":2,"a":1}', "a key stands twice"),
        (b'{"__metadata__":{"manifest":"","manifest":""}}', "a key stands twice"),
        (b'{"a":NaN}', "NaN is not a number"),
    ],
)
def test_a_header_that_is_not_strict_json_is_refused(path: Path, header: bytes, problem: str) -> None:
    save(path, header)
    assert refusal(path) == (
        f"artifact.safetensors: header is not valid JSON ({problem}). The file is damaged or not an artifact."
    )


def test_a_deeply_nested_header_is_refused(path: Path) -> None:
    save(path, b'{"a":' * 200_000)
    message = refusal(path)
    assert message.startswith("artifact.safetensors: header is not valid JSON (")
    assert message.endswith("). The file is damaged or not an artifact.")


def test_a_header_that_is_not_an_object_is_refused(path: Path) -> None:
    save(path, b"[1]")
    assert refusal(path) == "artifact.safetensors: header is a JSON list, expected an object."


@pytest.mark.parametrize(
    "header",
    [{}, {"a": ENTRY}, {"__metadata__": None}, {"__metadata__": []}, {"__metadata__": {"manifest": 1}}],
)
def test_a_header_without_metadata_of_strings_is_refused(path: Path, header: dict[str, Any]) -> None:
    save(path, json.dumps(header).encode())
    assert refusal(path) == ("artifact.safetensors: no __metadata__ of strings in the header. Not an artifact.")


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"manifest": ""}, {"manifest_sha256": ""}])
def test_a_header_without_manifest_is_refused(path: Path, metadata: dict[str, str]) -> None:
    save(path, json.dumps({"__metadata__": metadata}).encode())
    assert refusal(path) == (
        "artifact.safetensors: the header has no manifest. A safetensors file, but not an artifact."
    )


def test_a_manifest_that_is_not_utf8_keeps_its_bytes_for_the_digest(path: Path) -> None:
    save(path, rb'{"__metadata__":{"manifest":"\ud800","manifest_sha256":""}}')
    assert read_header(path).manifest == b"\xed\xa0\x80"


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"dtype": "F32", "shape": [2, 3]},
        ENTRY | {"extra": 1},
        ENTRY | {"dtype": "BF16"},
        ENTRY | {"dtype": "F64"},
        ENTRY | {"dtype": "float32"},
        ENTRY | {"dtype": 1},
        ENTRY | {"dtype": ["F32"]},
        ENTRY | {"shape": 6},
        ENTRY | {"shape": "6"},
        ENTRY | {"shape": [-2, -3]},
        ENTRY | {"shape": [2.0, 3]},
        ENTRY | {"shape": [True, 6]},
        ENTRY | {"shape": [2**63, 3]},
        ENTRY | {"shape": [None]},
        ENTRY | {"data_offsets": None},
        ENTRY | {"data_offsets": [0]},
        ENTRY | {"data_offsets": [0, 12, 24]},
        ENTRY | {"data_offsets": [-24, 0]},
        ENTRY | {"data_offsets": [24, 0]},
        ENTRY | {"data_offsets": [0, 24.0]},
        ENTRY | {"data_offsets": [False, 24]},
        ENTRY | {"data_offsets": [0, 2**63]},
    ],
    ids=str,
)
def test_an_entry_that_is_not_a_tensor_of_the_format_is_refused(path: Path, entry: object) -> None:
    save_entries(path, {"t/a": entry})
    assert refusal(path) == (
        "artifact.safetensors: header entry 't/a' is not dtype, shape and data_offsets of a tensor of the format."
    )


@pytest.mark.parametrize(
    ("entry", "lies", "needs"),
    [
        (ENTRY | {"shape": [2, 4]}, 24, "float32 [2, 4] needs 32"),
        (ENTRY | {"shape": []}, 24, "float32 [] needs 4"),
        (ENTRY | {"dtype": "F16"}, 24, "float16 [2, 3] needs 12"),
        (ENTRY | {"data_offsets": [0, 0]}, 0, "float32 [2, 3] needs 24"),
        (ENTRY | {"shape": [2**62, 2**62, 4]}, 24, f"float32 [{2**62}, {2**62}, 4] needs {2**128}"),
    ],
)
def test_a_size_that_is_not_that_of_the_shape_is_refused(
    path: Path, entry: dict[str, Any], lies: int, needs: str
) -> None:
    save_entries(path, {"t/a": entry})
    assert refusal(path) == (
        f"artifact.safetensors: t/a lies in {lies} bytes, {needs}. The file is damaged: copy or extract it again."
    )


@pytest.mark.parametrize("begin", [28, 20, 0, 2**62], ids=["gap", "overlap", "same place", "far away"])
def test_a_gap_or_an_overlap_is_refused(path: Path, begin: int) -> None:
    save_entries(path, {"t/a": ENTRY, "t/b": ENTRY | {"data_offsets": [begin, begin + 24]}}, 52)
    assert refusal(path) == (
        f"artifact.safetensors: t/b begins at byte {begin} of the data, expected 24 (no gap, no overlap)."
    )


def test_data_that_do_not_begin_at_once_are_refused(path: Path) -> None:
    save_entries(path, {"t/a": ENTRY | {"data_offsets": [4, 28]}}, 28)
    assert refusal(path) == ("artifact.safetensors: t/a begins at byte 4 of the data, expected 0 (no gap, no overlap).")


@pytest.mark.parametrize("num_data_bytes", [0, 23, 25, 1000])
def test_missing_and_trailing_bytes_are_refused(path: Path, num_data_bytes: int) -> None:
    save_entries(path, {"t/a": ENTRY}, num_data_bytes)
    file_bytes = path.stat().st_size
    assert refusal(path) == (
        f"artifact.safetensors: the file has {file_bytes} bytes, its header describes "
        f"{file_bytes - num_data_bytes + 24}. It is cut off or was appended to: copy it again."
    )


def test_a_file_cut_off_anywhere_is_refused(path: Path) -> None:
    path.write_bytes(WHOLE)
    with path.open("rb+") as file:
        for num_bytes in range(len(WHOLE) - 1, -1, -1):
            file.truncate(num_bytes)
            assert refusal(path).endswith("copy it again.")


@settings(SEARCH, max_examples=200)
@given(position=st.integers(0, len(WHOLE) - 1), bits=st.integers(1, 255))
def test_a_changed_byte_is_refused_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, position: int, bits: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    damaged = bytearray(WHOLE)
    damaged[position] ^= bits
    path.write_bytes(damaged)
    with suppress(store.ArtifactFormatError):
        assert_same_bits(read_all(path), all_tensors())


def test_a_message_is_one_line_whatever_a_tensor_is_called(path: Path) -> None:
    save_entries(path, {"a\x1b[31m/b\nc": ENTRY | {"shape": [9]}})
    assert all(character.isprintable() for character in refusal(path))
