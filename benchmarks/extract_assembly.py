"""From chunks to the artifact, as the first process does it when all images are embedded: alone, to be watched.

    python benchmarks/extract_assembly.py FOLDER

FOLDER holds chunks, which `make_chunks` makes of numbers; the artifact is written beside them.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import store
from pipeline.extract.assemble import Chunks
from pipeline.extract.partial import chunk_dtype

EMBED_DIM, NUM_CLASSES, CHUNK_IMAGES = 768, 1000, 4096


def make_chunks(folder: Path, images: int) -> None:
    """Write chunks of normal embeddings, one view, with keys and labels at random."""
    random = np.random.default_rng(0)
    chunk = np.zeros(CHUNK_IMAGES, chunk_dtype(1, EMBED_DIM))
    chunk["embedding"] = random.standard_normal((CHUNK_IMAGES, 1, EMBED_DIM), np.float32)
    for start in range(0, images, CHUNK_IMAGES):
        length = min(CHUNK_IMAGES, images - start)
        chunk["row"] = np.arange(start, start + CHUNK_IMAGES)
        chunk["key"] = random.integers(0, 256, (CHUNK_IMAGES, 16), np.uint8)
        chunk["label"] = random.integers(0, NUM_CLASSES, CHUNK_IMAGES)
        np.save(folder / f"{start:012d}.npy", chunk[:length], allow_pickle=False)


def main(folder: Path) -> None:
    """Assemble and write; print the seconds of each as JSON."""
    start = time.monotonic()
    paths = sorted(folder.glob("*.npy"))
    chunks = Chunks([np.load(path, mmap_mode="r", allow_pickle=False) for path in paths], NUM_CLASSES)
    assembled = chunks.assemble("float16")
    middle = time.monotonic()
    manifest = store.Manifest(
        teacher=store.TeacherInfo(
            name="numbers",
            weights_sha256="0" * 64,
            architecture="none",
            pooling="cls",
            embed_dim=EMBED_DIM,
            precision="float32",
        ),
        data_set=store.DataSetInfo(
            name="numbers", split="train", image_column="i", label_column="l", rows=len(chunks), classes_named=True
        ),
        preprocessing={},
        sampling=store.SamplingInfo(per_class=None, seed=0, batch_size=1, images_sha256=assembled.images_sha256),
        head=assembled.head.info(),
        classes=tuple(f"class {index}" for index in range(NUM_CLASSES)),
    )
    store.write_artifact(folder / "a.safetensors", manifest, assembled.tensors, overwrite=True)
    print(json.dumps({"statistics and head": middle - start, "samples written": time.monotonic() - middle}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
