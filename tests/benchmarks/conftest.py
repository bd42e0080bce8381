from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from pipeline.data import DataSettings
from pipeline.distill.config import DistillSettings
from pipeline.extract import ExtractSettings, extract
from tests.benchmarks.examples import save_coloured
from tests.pipeline.distill.examples import settings_for

Start = Callable[..., DistillSettings]


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved data set: images in the colour of their class."""
    return save_coloured(tmp_path_factory.mktemp("coloured") / "data")


@pytest.fixture(scope="session")
def dropping_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT of 16×16 pixels that drops some of what it computes while it learns."""
    folder = tmp_path_factory.mktemp("teachers") / "dropping-vit"
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=48, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3).save_pretrained(folder)
    return folder


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
