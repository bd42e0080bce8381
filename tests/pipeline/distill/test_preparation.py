from pathlib import Path

import pytest
import torch

from pipeline import runtime
from pipeline.distill.preparation import compute_for, prepare
from store import open_artifact
from tests.pipeline.distill.examples import settings_for, write_example


@pytest.mark.parametrize(
    ("student", "size", "asked", "has_bfloat16", "expected"),
    [
        ("test_vit", 16, "auto", True, torch.bfloat16),
        ("test_vit", 16, "auto", False, torch.float32),
        ("test_resnet", 8, "auto", True, torch.float32),  # convolutions that overlap
        ("test_resnet", 8, "bfloat16", True, torch.bfloat16),
        ("test_vit", 16, "float32", True, torch.float32),
    ],
)
def test_auto_is_bfloat16_only_where_a_cpu_computes_it_soundly(
    student: str,
    size: int,
    asked: str,
    has_bfloat16: bool,
    expected: torch.dtype,
    saved_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "_has_bfloat16", lambda device: has_bfloat16)
    path = write_example(tmp_path / "a.safetensors")
    settings = settings_for(path, saved_data, tmp_path / "run", student=student, image_size=size, precision=asked)
    with open_artifact(path) as artifact:
        prepared = prepare(settings, settings.resolved_recipe(), compute_for(settings), artifact)
    assert prepared.trainer.compute.precision == expected
