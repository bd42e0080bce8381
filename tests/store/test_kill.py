"""A writer killed at any moment leaves the old artifact or the new one."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import store
from tests.store.examples import class_tensors, file_names, make_manifest

ROOT = Path(__file__).parents[2]
WRITER = """
import itertools, sys
import store
from tests.store.examples import class_tensors, make_manifest
print("ready", flush=True)
for embed_dim in itertools.cycle((100_000, 200_000)):
    store.write_artifact(sys.argv[1], make_manifest(embed_dim=embed_dim), class_tensors(3, embed_dim), overwrite=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(path: Path) -> None:
    random_seconds = random.Random(0)
    digests = {
        store.write_artifact(path, make_manifest(embed_dim=size), class_tensors(3, size), overwrite=True).sha256()
        for size in (100_000, 200_000)
    }
    seen = []
    for _ in range(25):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(random_seconds.uniform(0, 0.1))
        process.kill()
        process.communicate()
        seen.append(store.verify_artifact(path))
    assert set(seen) == digests
    store.write_artifact(path, make_manifest(), class_tensors(), overwrite=True)
    assert file_names(path.parent) == [path.name]
