"""Measure the store against what the machine can do: ratios in one run, alternating, medians.

    python benchmarks/store.py --work runs/store [--large]

Gather against numpy.memmap, write against a raw file write with fsync, verify against a bare SHA-256 of the file,
`find` against numpy's binary search, `store inspect` in seconds and memory, and 50 writers killed at random moments.
With --large also the memory that a 10 GB artifact takes. It needs 8 GB of disk (20 GB with --large), and no data.
"""

import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import store  # noqa: E402 (the checkout need not be installed)

EMBED_DIM, NUM_CLASSES = 768, 100
BLOCK_ROWS = 4096
GATHERED_ROWS = 4096
RUNS, WRITES, GATHERS, KILLS = 5, 9, 40, 50
# A process starts out with the memory of the one that forked it: start it from one that has hardly any.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
silence = [(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=silence)
usage = os.wait4(process, 0)[2]
print(time.perf_counter() - start, usage.ru_maxrss)
"""
BLOCK = np.random.default_rng(0).standard_normal((BLOCK_ROWS, 1, EMBED_DIM)).astype(np.float16)


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="folder for artifacts; on the disk to test"
)
@click.option("--rows", default=1_000_000, show_default=True, help="sample embeddings of 768 float16 values")
@click.option("--large", is_flag=True, help="also write, open, gather and verify 10 GB, and measure memory")
@click.option("--only", multiple=True, help="measure these only: write, verify, gather, find, inspect, kill")
def main(work: Path, rows: int, large: bool, only: tuple[str, ...]) -> None:
    """Print every figure and write them to WORK/store.json."""
    work.mkdir(parents=True, exist_ok=True)
    paths = {"safetensors": work / "bench.safetensors", "h5": work / "bench.h5", "gzip h5": work / "bench-gzip.h5"}
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "write": lambda: measure_write(work, paths, rows),
        "verify": lambda: measure_verify(paths),
        "gather": lambda: measure_gather(paths, rows),
        "find": lambda: measure_find(rows),
        "inspect": lambda: measure_inspect(paths),
        "kill": lambda: measure_kills(work),
    }
    figures: dict[str, Any] = {"rows": rows}
    for name, measure in measures.items():
        if not only or name in only:
            figures[name] = measure()
            click.echo(f"{name}: {json.dumps(figures[name], indent=2)}")
    if large:
        figures["large"] = {kind: measure_large(work, kind) for kind in ("safetensors", "h5")}
        click.echo(f"large: {json.dumps(figures['large'], indent=2)}")
    (work / "store.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")


def measure_write(work: Path, paths: dict[str, Path], rows: int) -> dict[str, Any]:
    """Write the artifact in both containers and the same bytes as a raw file, in turn."""
    num_bytes = rows * EMBED_DIM * 2
    seconds: dict[str, list[float]] = {name: [] for name in ("raw", "safetensors", "h5")}
    for turn in range(WRITES):
        names = list(seconds)
        for name in names[turn % 3 :] + names[: turn % 3]:  # whoever comes first finds memory in another state
            path = work / f"scratch.{name}"
            settle()
            start = time.perf_counter()
            if name == "raw":
                write_raw(path, rows)
            else:
                write(path, rows)
            seconds[name].append(time.perf_counter() - start)
            path.unlink()  # at once: on a disk that frees blocks, all must find the same ones
    for name in ("safetensors", "h5"):
        write(paths[name], rows)
    start = time.perf_counter()
    write(paths["gzip h5"], rows, gzip=True)
    gzip_seconds = time.perf_counter() - start
    return {
        "raw MB/s": round(num_bytes / statistics.median(seconds["raw"]) / 1e6),
        **{f"{name} ratio": ratio(seconds["raw"], seconds[name]) for name in ("safetensors", "h5")},
        "gzip h5 MB/s": round(num_bytes / gzip_seconds / 1e6),
        "gzip h5 bytes": round(paths["gzip h5"].stat().st_size / paths["h5"].stat().st_size, 3),
    }


def measure_verify(paths: dict[str, Path]) -> dict[str, Any]:
    """Verify each artifact, and hash its file, in turn."""
    figures: dict[str, Any] = {}
    for name in ("safetensors", "h5"):
        bare, verified = [], []
        for _ in range(RUNS):
            bare.append(seconds_of(bare_sha256, paths[name]))
            verified.append(seconds_of(store.verify_artifact, paths[name]))
        figures[f"{name} ratio"] = ratio(bare, verified)
        figures[f"{name} sha256 MB/s"] = round(paths[name].stat().st_size / statistics.median(bare) / 1e6)
    gzip_seconds = seconds_of(store.verify_artifact, paths["gzip h5"])
    figures["gzip h5 MB/s"] = round(paths["h5"].stat().st_size / gzip_seconds / 1e6)
    return figures


def measure_gather(paths: dict[str, Path], rows: int) -> dict[str, Any]:
    """Gather random rows from each artifact and from numpy's map of the same tensor, in turn."""
    generator = np.random.default_rng(1)
    figures: dict[str, Any] = {}
    for name in ("safetensors", "h5"):
        with store.open_artifact(paths[name]) as artifact:
            whole: Any = artifact["sample/embedding"]
            plain = np.memmap(paths[name], np.float16, "r", whole.offset, whole.shape)
            mapped, gathered = [], []
            for _ in range(GATHERS):
                chosen = generator.integers(0, rows, GATHERED_ROWS)
                mapped.append(seconds_of(plain.__getitem__, chosen))
                chosen = generator.integers(0, rows, GATHERED_ROWS)
                gathered.append(seconds_of(artifact.gather, "sample/embedding", chosen))
        figures[f"{name} ratio"] = ratio(mapped, gathered)
        figures[f"{name} memmap ms"] = round(1e3 * statistics.median(mapped), 2)
    with store.open_artifact(paths["gzip h5"]) as artifact:
        times = []
        for _ in range(3):
            chosen = generator.integers(0, rows, GATHERED_ROWS)
            times.append(seconds_of(artifact.gather, "sample/embedding", chosen))
    figures["gzip h5 ms"] = round(1e3 * statistics.median(times))
    figures["gzip h5 rows/s"] = round(GATHERED_ROWS / statistics.median(times))
    return figures


def measure_find(rows: int) -> dict[str, Any]:
    """Look every pair up in random order; and the same with numpy's binary search over 16-byte strings."""
    keys, labels = sorted_pairs(rows)
    order = np.random.default_rng(2).permutation(rows)
    queries, wanted = keys[order], labels[order]
    index = store.pairs.PairIndex(keys, labels, "bench")
    plain, found = [], []
    for _ in range(RUNS):
        plain.append(seconds_of(np.searchsorted, keys.view("S16")[:, 0], queries.view("S16")[:, 0]))
        found.append(seconds_of(index.find, queries, wanted))
    if not (index.find(queries, wanted) == order).all():
        raise SystemExit("find returned wrong rows")
    return {"seconds": round(statistics.median(found), 3), "numpy S16 seconds": round(statistics.median(plain), 3)}


def measure_inspect(paths: dict[str, Path]) -> dict[str, Any]:
    """Run `store inspect` as a process of its own."""
    figures = {}
    for name, path in paths.items():
        seconds, resident = [], []
        for _ in range(11):
            command = [sys.executable, str(ROOT / "cli.py"), "store", "inspect", str(path)]
            launched = [sys.executable, "-S", "-c", LAUNCHER, *command]
            told = subprocess.run(launched, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            seconds.append(float(told[0]))
            resident.append(int(told[1]) / 1e3)
        figures[name] = {"seconds": round(statistics.median(seconds), 3), "resident MB": round(max(resident), 1)}
    return figures


def measure_kills(work: Path) -> dict[str, Any]:
    """Kill a process that writes two artifacts in turn to one path; each time it must be one of the two."""
    figures = {}
    rng = random.Random(0)
    for suffix in (".safetensors", ".h5"):
        folder = work / f"kill{suffix}"
        folder.mkdir(exist_ok=True)
        path = folder / f"artifact{suffix}"
        digests = {write(path, rows).sha256() for rows in (20_000, 30_000)}
        seen = []
        for _ in range(KILLS):
            process = subprocess.Popen([sys.executable, __file__, "--write-forever", str(path)], stdout=subprocess.PIPE)
            assert process.stdout is not None  # noqa: S101 (for the type checker)
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            process.wait()
            seen.append(store.verify_artifact(path))
        unknown = set(seen) - digests
        write(path, 20_000)
        left = sorted(entry.name for entry in folder.iterdir())
        figures[suffix] = {
            "killed": len(seen),
            "neither old nor new": len(unknown),
            "each of the two": sorted(seen.count(digest) for digest in digests),
            "files after the next write": left,
        }
        path.unlink()
        folder.rmdir()
    return figures


def write_forever(path: Path) -> None:
    """Write two artifacts in turn until killed."""
    print("ready", flush=True)
    while True:
        for rows in (20_000, 30_000):
            write(path, rows)


def measure_large(work: Path, kind: str) -> dict[str, Any]:
    """Write, open, gather and verify 10 GB in a process of its own."""
    command = [sys.executable, __file__, "--large-job", str(work / f"large.{kind}")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def large_job(path: Path) -> None:
    """Print, for each step, its seconds and the most anonymous memory that the process held."""
    rows = 10_000_000_000 // (EMBED_DIM * 2) + 1
    figures: dict[str, Any] = {"bytes": 0, "before MB": anonymous_mb()}
    with Watch() as watch:
        tensors = make_tensors(rows)
        watch.step("write", lambda: store.write_artifact(path, manifest(rows), tensors, overwrite=True))
        figures["bytes"] = path.stat().st_size
        artifact = watch.step("open", lambda: store.open_artifact(path))
        chosen = np.random.default_rng(3).integers(0, rows, GATHERED_ROWS)
        watch.step("gather", lambda: artifact.gather("sample/embedding", chosen))
        watch.step("verify", lambda: store.verify_artifact(path))
    path.unlink()
    print(json.dumps(figures | watch.figures))


class Watch:
    """Samples the process's anonymous memory in a thread."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.figures: dict[str, Any] = {}
        self._peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "Watch":
        """Start sampling."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Run one step and note its seconds and peak."""
        self._peak = anonymous_mb()
        start = time.perf_counter()
        result = work()
        self.figures[name] = {
            "seconds": round(time.perf_counter() - start, 3),
            "anonymous MB": round(max(self._peak, anonymous_mb())),
        }
        return result

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self._peak = max(self._peak, anonymous_mb())


def anonymous_mb() -> float:
    """Return the process's anonymous resident memory (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


def write(path: Path, rows: int, *, gzip: bool = False) -> store.Manifest:
    """Write an artifact of so many samples."""
    return store.write_artifact(path, manifest(rows), make_tensors(rows), overwrite=True, gzip=gzip)


def make_tensors(rows: int) -> dict[str, NDArray[Any] | store.RowBlocks]:
    """Return tensors that cost next to nothing to make: what is timed is the store."""
    means = np.zeros((NUM_CLASSES, EMBED_DIM), np.float32)
    return {
        "class/count": np.full(NUM_CLASSES, rows, np.int64),
        "class/mean": means,
        "class/m2": means,
        "sample/key": store.RowBlocks((rows, 16), "uint8", (rising_keys(*span) for span in spans(rows))),
        "sample/label": store.RowBlocks(
            (rows,), "int32", (np.zeros(stop - start, np.int32) for start, stop in spans(rows))
        ),
        "sample/embedding": store.RowBlocks(
            (rows, 1, EMBED_DIM), "float16", (BLOCK[: stop - start] for start, stop in spans(rows))
        ),
    }


def manifest(rows: int) -> store.Manifest:
    """Return the manifest of a teacher that never was."""
    return store.Manifest(
        teacher=store.TeacherInfo(
            name="bench",
            weights_sha256="0" * 64,
            architecture="none",
            pooling="cls",
            embed_dim=EMBED_DIM,
            precision="float32",
        ),
        data_set=store.DataSetInfo(
            name="bench", split="train", image_column="image", label_column="label", rows=rows, classes_named=True
        ),
        preprocessing={},
        sampling=store.SamplingInfo(per_class=None, seed=0, batch_size=1, images_sha256=None),
        classes=tuple(f"class {index}" for index in range(NUM_CLASSES)),
    )


def spans(rows: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks."""
    for start in range(0, rows, BLOCK_ROWS):
        yield start, min(rows, start + BLOCK_ROWS)


def rising_keys(start: int, stop: int) -> NDArray[np.uint8]:
    """Return sorted keys, 16 bytes each."""
    keys = np.zeros((stop - start, 16), np.uint8)
    keys[:, :8] = np.arange(start, stop, dtype=">u8").view(np.uint8).reshape(-1, 8)
    return keys


def sorted_pairs(rows: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return sorted random keys, which are as hashes are, and labels."""
    generator = np.random.default_rng(4)
    keys = generator.integers(0, 256, (rows, 16), np.uint8)
    labels = generator.integers(0, NUM_CLASSES, rows, np.int32)
    order, fresh = store.sort_pairs(keys, labels)
    return keys[order[fresh]], labels[order[fresh]]


def write_raw(path: Path, rows: int) -> None:
    """Write the same bytes as an artifact has, and sync them."""
    with path.open("wb") as file:
        for start, stop in spans(rows):
            file.write(rising_keys(start, stop).data)
            file.write(bytes(4 * (stop - start)))
            file.write(BLOCK[: stop - start].data)
        file.flush()
        os.fsync(file.fileno())


def bare_sha256(path: Path) -> str:
    """Hash a file."""
    digest, buffer = hashlib.sha256(), bytearray(4 * 1024 * 1024)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def settle() -> None:
    """Let the disk finish what others wrote."""
    os.sync()


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Time a call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def ratio(reference: list[float], ours: list[float]) -> float:
    """Return our rate over the reference's, the median over pairs."""
    return round(statistics.median(one / two for one, two in zip(reference, ours, strict=True)), 3)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("--write-forever", "--large-job"):
        {"--write-forever": write_forever, "--large-job": large_job}[sys.argv[1]](Path(sys.argv[2]))
    else:
        main()
