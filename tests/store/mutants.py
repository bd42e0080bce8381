"""Damaged artifacts, made from sound ones. Each is named by a recipe, from which it can be made anew."""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import h5py
import numpy as np

import cli
import store
from tests.store.examples import (
    GOLDEN,
    SUFFIXES,
    Tensors,
    all_tensors,
    class_tensors,
    document_of,
    encode,
    make_manifest,
)

NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
CHECKED_SIGNATURES = (b"\x89HDF", b"OHDR", b"OCHK", b"FRHP", b"FHDB", b"BTHD", b"BTLF", b"FAHD", b"FADB")
SIGNATURES = (*CHECKED_SIGNATURES, b"TREE", b"SNOD", b"HEAP", b"GCOL")
MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run(json.loads(sys.stdin.read()), capture_output=True, text=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([done.returncode, done.stdout, done.stderr, peak]))
"""


@dataclass(frozen=True)
class Mutant:
    """A recipe: number `number` of the mutants of the file `source` with the seed `seed`."""

    source: str
    seed: int
    number: int

    def make(self) -> bytes:
        """Return the damaged file; the same on every machine."""
        chance = random.Random(f"{self.source} {self.seed} {self.number}")
        data = bytearray(sources()[self.source])
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            chance.choice(DAMAGES)(data, chance, self.source)
        if self.source.endswith(".h5") and chance.random() < 0.5:
            mend(data, self.source)
        return bytes(data)

    def save(self, folder: Path) -> Path:
        """Write the damaged file; its name is the recipe."""
        path = folder / f"{self.seed}-{self.number}-{self.source}"
        path.write_bytes(self.make())
        return path


@cache
def sources() -> dict[str, bytes]:
    """Return all sound files: golden ones, larger ones with samples, and HDF5 files of the oldest kind."""
    found = {path.name: path.read_bytes() for path in sorted(GOLDEN.iterdir()) if path.suffix in SUFFIXES}
    chance = np.random.default_rng(0)
    keys = np.sort(chance.integers(0, 2**63, 300)).astype(">u8").view(np.uint8).reshape(-1, 8)
    many = class_tensors(10, 32) | {
        "class/count": np.full(10, 100),
        "sample/key": np.hstack([keys, keys]),
        "sample/label": chance.integers(0, 10, 300).astype(np.int32),
        "sample/embedding": chance.standard_normal((300, 1, 32)).astype(np.float16),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, tensors in (("many.safetensors", many), ("many.h5", many), ("many-gzip.h5", many)):
            path = Path(folder, name)
            store.write_artifact(path, make_manifest(10, 32, 1), tensors, gzip="gzip" in name)
            found[name] = path.read_bytes()
        for name, version in (("old.h5", "earliest"), ("new.h5", "latest")):
            raw = encode(document_of(all_tensors()))
            found[name] = save_raw(Path(folder, name), raw, all_tensors(), _compress, version).read_bytes()
    return found


@cache
def checked_blocks(source: str) -> tuple[tuple[int, int], ...]:
    """Return first and last place of what HDF5 guards by a checksum: else hardly a mutant would get past them."""
    data, blocks = sources()[source], []
    for signature in CHECKED_SIGNATURES:
        for start in (place for place in range(len(data)) if data.startswith(signature, place)):
            sizes = range(4, 600)
            if signature == b"OCHK":  # may be long, but the message that points to it says how long
                pointer = data.find(start.to_bytes(8, "little"))
                sizes = range(size := int.from_bytes(data[pointer + 8 : pointer + 16], "little") - 4, size + 1)
            for stop in (start + size for size in sizes if start + size + 4 <= len(data)):
                if lookup3(data[start:stop]) == int.from_bytes(data[stop : stop + 4], "little"):
                    blocks.append((start, stop))
                    break
    return tuple(sorted(blocks))


def mend(data: bytearray, source: str) -> None:
    """Make the checksums right again."""
    for start, stop in checked_blocks(source):
        if stop + 4 <= len(data):
            data[stop : stop + 4] = lookup3(bytes(data[start:stop])).to_bytes(4, "little")


def lookup3(data: bytes) -> int:
    """Return the checksum of HDF5's metadata: Bob Jenkins' hashlittle (2006), initial value 0."""
    a = b = c = (0xDEADBEEF + len(data)) & 0xFFFFFFFF
    for start in range(0, len(data), 12):
        part = data[start : start + 12].ljust(12, b"\0")
        a, b, c = ((x + int.from_bytes(part[i : i + 4], "little")) & 0xFFFFFFFF for x, i in ((a, 0), (b, 4), (c, 8)))
        a, b, c = _mix(a, b, c) if start + 12 < len(data) else _final(a, b, c)
    return c


def save_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    """Write a `.safetensors` file with any header."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def save_raw(
    path: Path,
    raw: bytes,
    tensors: Tensors | None = None,
    fill: Callable[[h5py.File], object] = id,
    libver: object = ("v108", "v108"),
) -> Path:
    """Write any bytes as manifest, with their digest, beside any tensors; `fill` changes an HDF5 file afterwards."""
    tensors, digest = class_tensors() if tensors is None else tensors, hashlib.sha256(raw).hexdigest()
    if path.suffix == ".h5":
        with h5py.File(path, "w", libver=libver) as file:
            file.attrs.create("manifest", np.bytes_(raw))
            file.attrs.create("manifest_sha256", np.bytes_(digest.encode()))
            for name, array in tensors.items():
                file.create_dataset(name, data=array, track_times=False)
            fill(file)
        return path
    entries: dict[str, object] = {"__metadata__": {"manifest": raw.decode(), "manifest_sha256": digest}}
    data = b""
    for name, array in tensors.items():
        code = f"{array.dtype.kind.upper()}{array.dtype.itemsize * 8}"
        place = [len(data), len(data) + array.nbytes]
        entries[name] = {"dtype": code, "shape": array.shape, "data_offsets": place}
        data += array.tobytes()
    return save_header(path, json.dumps(entries, ensure_ascii=False).encode(), data)


def run_cli(*arguments: object) -> tuple[int, str, str, int]:
    """Run a command in a process of its own; return its status, stdout, stderr, and its peak memory in bytes."""
    command = [sys.executable, str(Path(cli.__file__)), *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input=json.dumps(command), capture_output=True, text=True, check=True
    )
    code, out, err, peak = json.loads(done.stdout)
    return code, out, err, peak


def verify_in_time(path: Path, seconds: float) -> str | None:
    """Verify a file in so much processor time, and return the error, or none.

    A file that takes longer is measured once more: machines are noisy.
    """
    for _ in range(2):
        started = sum(os.times()[:4])  # user and system time, of ended children too
        error = None
        try:
            store.verify_artifact(path)
        except store.StoreError as refused:
            error = str(refused)
        taken = sum(os.times()[:4]) - started
        if taken < seconds:
            break
    assert taken < seconds, path.name
    assert error is None or error.isprintable(), path.name
    return error


def _compress(file: h5py.File) -> None:
    """Store samples in gzip chunks after all."""
    rows = file["sample/embedding"][:]
    del file["sample/embedding"]
    chunks = (1, *rows.shape[1:])
    file.create_dataset("sample/embedding", data=rows, chunks=chunks, compression="gzip", track_times=False)


@cache
def _places(source: str) -> tuple[int, ...]:
    """Return where structure begins; in a file without signatures, all that is not zero."""
    data = sources()[source]
    if source.endswith(".safetensors"):
        return tuple(range(0, int.from_bytes(data[:8], "little"), 16))
    places = [start for start, _ in checked_blocks(source)]
    for signature in SIGNATURES:
        places += [place for place in range(len(data)) if data.startswith(signature, place)]
    filled = [place for place in range(0, min(len(data), 16000), 8) if any(data[place : place + 8])]
    return tuple(places * (1 + len(filled) // max(1, len(places)))) + tuple(filled)


def _place(data: bytearray, chance: random.Random, source: str) -> int:
    """Choose a byte, mostly one of the structure rather than of the tensors."""
    if chance.random() < 0.1:
        return chance.randrange(len(data) + 1)
    return min(chance.choice(_places(source)) + chance.randrange(chance.choice((8, 64, 300))), len(data))


def _flip(data: bytearray, chance: random.Random, source: str) -> None:
    place = _place(data, chance, source)
    data[place : place + 1] = bytes(byte ^ 1 << chance.randrange(8) for byte in data[place : place + 1])


def _number(data: bytearray, chance: random.Random, source: str) -> None:
    place, size = _place(data, chance, source), chance.choice((1, 2, 4, 8))
    value = chance.choice((*NUMBERS, chance.getrandbits(64))) & (256**size - 1)
    data[place : place + size] = value.to_bytes(size, "little")


def _noise(data: bytearray, chance: random.Random, source: str) -> None:
    place, size = _place(data, chance, source), chance.randrange(1, 65)
    data[place : place + size] = chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size)))


def _move(data: bytearray, chance: random.Random, source: str) -> None:
    start, to, size = _place(data, chance, source), _place(data, chance, source), 2 ** chance.randrange(2, 11)
    block, other = data[start : start + size], data[to : to + size]
    data[to : to + size] = block
    if chance.random() < 0.5 and len(block) == len(other):
        data[start : start + size] = other


def _resize(data: bytearray, chance: random.Random, source: str) -> None:
    place, size = _place(data, chance, source), chance.choice((1, 8, 100))
    if (kind := chance.randrange(4)) == 0:
        del data[place:]
    elif kind == 1:
        data += chance.randbytes(size)
    elif kind == 2:
        del data[place : place + size]
    else:
        data[place:place] = chance.randbytes(size)


def _splice(data: bytearray, chance: random.Random, source: str) -> None:
    others = [other for name, other in sources().items() if Path(name).suffix == Path(source).suffix]
    place = _place(data, chance, source)
    data[place:] = chance.choice(others)[place:]


DAMAGES: Sequence[Callable[[bytearray, random.Random, str], None]] = (
    _flip, _flip, _number, _number, _number, _noise, _move, _resize, _splice
)  # fmt: skip


def _rotate(x: int, bits: int) -> int:
    return ((x << bits) | (x >> (32 - bits))) & 0xFFFFFFFF


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    for bits in (4, 6, 8, 16, 19, 4):
        a = ((a - c) & 0xFFFFFFFF) ^ _rotate(c, bits)
        c = (c + b) & 0xFFFFFFFF
        a, b, c = b, c, a
    return a, b, c


def _final(a: int, b: int, c: int) -> tuple[int, int, int]:
    for bits in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - _rotate(b, bits)) & 0xFFFFFFFF
        a, b, c = b, c, a
    return c, a, b
