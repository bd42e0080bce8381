from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.data import DataSettings
from pipeline.distill.config import DistillSettings
from pipeline.extract import ExtractSettings, extract
from tests.pipeline.distill.examples import settings_for

Start = Callable[..., DistillSettings]


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    # Models so small only lose by more, above all where the cores are shared.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def extracted(tiny_teacher: Path, saved_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher's artifact of the saved training images, with samples, all in float32."""
    given = {"teacher": str(tiny_teacher), "data": DataSettings(dataset=str(saved_data)), "samples": True}
    out = tmp_path_factory.mktemp("extracted") / "a.safetensors"
    plain = {"dtype": "float32", "precision": "float32", "device": "cpu"}
    return extract(ExtractSettings.model_validate({**given, **plain, "out": out})).path


@pytest.fixture
def start(extracted: Path, saved_data: Path, tmp_path: Path) -> Start:
    """Settings of a quick run on the saved data, with the tiny teacher's artifact."""
    return lambda **fields: settings_for(extracted, saved_data, fields.pop("out", tmp_path / "run"), **fields)
