from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.benchmarks.examples import save_coloured


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    # Models so small only lose by more, above all where the cores are shared.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


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
