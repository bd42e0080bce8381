"""Benchmarks run, on little; what they measure is no matter here."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tests.conftest import make_split

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_extraction_keeps_its_promises_when_killed_and_when_shared(tiny_teacher: Path, tmp_path: Path) -> None:
    datasets.DatasetDict(train=make_split(2100, 0)).save_to_disk(str(tmp_path / "data"))  # three chunks
    command = [sys.executable, str(ROOT / "benchmarks" / "extract.py"), "--work", str(tmp_path / "work")]
    command += ["--teacher", str(tiny_teacher), "--dataset", str(tmp_path / "data"), "--label-column", "label"]
    command += ["--images", "2100", "--kills", "2"]
    for measure in ("processes", "kill"):
        done = subprocess.run([*command, "--only", measure], capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "work" / "extract.json").read_text())
    assert set(figures) == {"machine", "processes", "kill"}
    assert all(figures["processes"]["checks"].values())
    assert all(figures["kill"]["checks"].values())
    assert figures["kill"]["SIGKILL"]["processes"] == 1
    assert figures["kill"]["SIGTERM"]["processes"] == 1
