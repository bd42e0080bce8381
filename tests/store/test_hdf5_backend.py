import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import store
from store import hdf5_parse
from store.container import Location
from store.hdf5_backend import read_header
from tests.store.examples import (
    GOLDEN,
    all_tensors,
    assert_same_bits,
    class_tensors,
    header_refusal,
    make_manifest,
    read_all,
)

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)
WHOLE = (GOLDEN / "format-1.h5").read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "artifact.h5"


def save(path: Path, fill: Callable[[h5py.File], object], **options: Any) -> None:
    with h5py.File(path, "w", **options) as file:
        file.attrs["manifest"] = np.bytes_(b"{}")
        file.attrs["manifest_sha256"] = np.bytes_(b"digest")
        fill(file)


def refusal(path: Path, fill: Callable[[h5py.File], object] | None = None, **options: Any) -> str:
    if fill is not None:
        save(path, fill, **options)
    return header_refusal(path)


def assert_unreadable(message: str, reason: str = "") -> None:
    """Compare all but the HDF5 library's own words, which change with its version."""
    assert message.startswith(f"artifact.h5: not a readable HDF5 file ({reason}")
    assert message.endswith("). It is cut off or damaged: copy it again.")
    assert "\n" not in message


@pytest.mark.parametrize("options", [{}, {"userblock_size": 512}, {"libver": "latest"}, {"track_order": True}])
def test_tensors_are_located_without_being_read(path: Path, options: dict[str, Any]) -> None:
    save(path, lambda file: file.create_dataset("a/b", data=ROWS), **options)
    header = read_header(path)
    assert (header.manifest, header.manifest_sha256) == (b"{}", "digest")
    assert set(header.locations) == {"a/b"}
    place = header.locations["a/b"]
    assert place == Location("float32", (2, 3), place.offset)
    np.testing.assert_array_equal(np.fromfile(path, np.float32, 6, offset=place.offset), ROWS.ravel())


def test_large_tensors_are_aligned_in_the_file(path: Path) -> None:
    store.write_artifact(path, make_manifest(embed_dim=100), class_tensors(embed_dim=100))
    assert all(place.offset % 64 == 0 for place in read_header(path).locations.values() if len(place.shape) == 2)


def test_the_file_has_the_object_formats_of_hdf5_1_8(path: Path) -> None:
    store.write_artifact(path, make_manifest(), class_tensors())
    signature, superblock_version = path.read_bytes()[:8], path.read_bytes()[8]
    assert signature == b"\x89HDF\r\n\x1a\n"
    assert superblock_version == 2


def test_the_file_has_no_clock_in_it(path: Path) -> None:
    other = path.with_name("other.h5")
    store.write_artifact(path, make_manifest(), all_tensors(), gzip=True)
    time.sleep(1.1)  # HDF5 counts seconds
    store.write_artifact(other, make_manifest(), all_tensors(), gzip=True)
    assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("link", [h5py.SoftLink("/c/d"), h5py.ExternalLink("other.h5", "/c/d")])
@pytest.mark.parametrize("name", ["a", "a/b"])
def test_a_soft_or_external_link_is_refused(path: Path, name: str, link: object) -> None:
    with h5py.File(path.with_name("other.h5"), "w") as other:
        other["c/d"] = ROWS

    def fill(file: h5py.File) -> None:
        file["c/d"] = ROWS
        file[name] = link

    assert refusal(path, fill) == f"artifact.h5: {name} is a soft or external link, which is refused."


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((2, 3), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "c/d", (2, 3))
    file.create_virtual_dataset("a/b", layout)


def _compact(file: h5py.File) -> None:
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((2, 3))
    h5py.h5d.create(file.create_group("a").id, b"b", h5py.h5t.IEEE_F32LE, space, settings)


@pytest.mark.parametrize(
    "fill",
    [
        lambda file: file.create_dataset("a/b", data=ROWS, chunks=(1, 3)),
        lambda file: file.create_dataset("a/b", data=ROWS, compression="gzip"),
        lambda file: file.create_dataset("a/b", data=ROWS, shuffle=True),
        lambda file: file.create_dataset("a/b", data=ROWS, fletcher32=True),
        lambda file: file.create_dataset("a/b", data=ROWS, maxshape=(None, 3)),
        lambda file: file.create_dataset("a/b", (2, 3), "f4", external=[("other.raw", 0, 24)]),
        _virtual,
        _compact,
    ],
    ids=["chunks", "gzip", "shuffle", "checksum", "growing", "external", "virtual", "compact"],
)
def test_another_storage_is_refused(path: Path, fill: Callable[[h5py.File], object]) -> None:
    assert refusal(path, fill) == (
        "artifact.h5: a/b is neither contiguous in this file nor, as sample embeddings may be, in gzip chunks."
    )


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (h5py.ref_dtype, "object"),
        (h5py.regionref_dtype, "object"),
        (h5py.vlen_dtype("f4"), "object"),
        (h5py.string_dtype(), "object"),
        (np.dtype("S4"), "|S4"),
        (np.dtype("V4"), "|V4"),
        (np.dtype([("x", "<f4")]), "[('x', '<f4')]"),
        (np.dtype(("<f4", (2,))), "('<f4', (2,))"),
        (np.dtype("?"), "bool"),
        (np.dtype("<f8"), "float64"),
        (np.dtype("<c8"), "complex64"),
        (np.dtype("<u4"), "uint32"),
        (np.dtype(">f4"), ">f4"),
    ],
    ids=str,
)
def test_another_type_is_refused(path: Path, dtype: Any, name: str) -> None:
    message = refusal(path, lambda file: file.create_dataset("a/b", (2, 3), dtype))
    assert message == f"artifact.h5: a/b has type {name}, which no tensor has."


def test_a_data_set_at_the_root_is_refused(path: Path) -> None:
    message = refusal(path, lambda file: file.create_dataset("a", data=ROWS))
    assert message == "artifact.h5: a is not a group of tensors."


def test_a_type_at_the_root_is_refused(path: Path) -> None:
    message = refusal(path, lambda file: file.__setitem__("a", np.dtype("f4")))
    assert message == "artifact.h5: a is not a group of tensors."


def test_a_group_in_a_group_is_refused(path: Path) -> None:
    message = refusal(path, lambda file: file.create_dataset("a/b/c", data=ROWS))
    assert message == "artifact.h5: a/b is not a data set."


def test_a_group_that_holds_the_root_is_refused(path: Path) -> None:
    message = refusal(path, lambda file: file.create_group("a").__setitem__("b", file["/"]))
    assert message == "artifact.h5: a/b is not a data set."


def test_a_data_set_without_space_is_refused(path: Path) -> None:
    assert_unreadable(refusal(path, lambda file: file.create_dataset("a/b", data=h5py.Empty("f4"))))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
def test_a_data_set_that_was_never_written_is_refused(path: Path, shape: tuple[int, ...]) -> None:
    message = refusal(path, lambda file: file.create_dataset("a/b", shape, "f4"))
    assert message == (
        f"artifact.h5: a/b ends beyond the end of the file ({path.stat().st_size} bytes). It is cut off: copy it again."
    )


@pytest.mark.parametrize("name", ["manifest", "manifest_sha256"])
def test_a_missing_attribute_is_refused(path: Path, name: str) -> None:
    message = refusal(path, lambda file: file.attrs.__delitem__(name))
    assert message == f"artifact.h5: no root attribute {name}. An HDF5 file, but not an artifact."


@pytest.mark.parametrize(
    "value",
    [
        "text of variable length",
        np.array([b"a", b"b"]),
        np.array([b"a"]),
        3,
        h5py.Empty("S3"),
        np.void(b"abc"),
    ],
    ids=["variable length", "two", "one in an array", "number", "nothing", "opaque"],
)
@pytest.mark.parametrize("name", ["manifest", "manifest_sha256"])
def test_an_attribute_that_is_not_one_string_is_refused(path: Path, name: str, value: object) -> None:
    message = refusal(path, lambda file: file.attrs.__setitem__(name, value))
    assert message == f"artifact.h5: attribute {name} is not one string of fixed length."


def test_an_attribute_of_unreasonable_size_is_refused_before_it_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5_parse, "MAX_MANIFEST_BYTES", 100)
    message = refusal(path, lambda file: file.attrs.__setitem__("manifest", np.bytes_(b"x" * 101)))
    assert message == "artifact.h5: attribute manifest has 101 bytes, at most 100 are read."


def test_a_digest_that_is_not_ascii_is_no_digest(path: Path) -> None:
    save(path, lambda file: file.attrs.__setitem__("manifest_sha256", np.bytes_(b"\xff0")))
    assert read_header(path).manifest_sha256 == "\N{REPLACEMENT CHARACTER}0"


@pytest.mark.parametrize("data", [b"", b"x", b"\x89HDF\r\n\x1a\n", bytes(10_000), b"\x89HDF\r\n\x1a\n" * 1000])
def test_a_file_that_is_not_hdf5_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert_unreadable(refusal(path))


def test_an_error_without_words_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(h5py, "File", fail)
    path.touch()
    assert_unreadable(refusal(path), "RuntimeError)")


def test_a_file_cut_off_anywhere_is_refused(path: Path) -> None:
    path.write_bytes(WHOLE)
    for num_bytes in range(len(WHOLE) - 1, -1, -127):
        os.truncate(path, num_bytes)
        assert_unreadable(refusal(path))


def test_a_changed_byte_of_the_data_is_refused(path: Path) -> None:
    path.write_bytes(WHOLE)
    for name, place in read_header(path).locations.items():
        damaged = bytearray(WHOLE)
        damaged[place.offset] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(store.ArtifactDigestError, match=f"^artifact.h5: {name} has SHA-256 "):
            read_all(path)


def test_trailing_bytes_change_nothing(path: Path) -> None:
    path.write_bytes(WHOLE + bytes(100))
    assert_same_bits(read_all(path), all_tensors())


def test_an_attribute_marked_as_utf8_is_read(path: Path) -> None:
    save(path, lambda file: file.attrs.create("manifest", "{}", dtype=h5py.string_dtype("utf-8", 2)))
    assert read_header(path).manifest == b"{}"


def test_a_message_is_one_line_whatever_a_tensor_is_called(path: Path) -> None:
    message = refusal(path, lambda file: file.create_dataset("a\x1b[31m/b\nc", data=ROWS, chunks=(1, 3)))
    assert all(character.isprintable() for character in message)
