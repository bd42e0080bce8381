"""The teacher with its classifier: it sees what extraction shows it, and what is written of it is what was trained."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from benchmarks.finetune_model import CLASSIFIER, TeacherClassifier
from pipeline.errors import PipelineError
from pipeline.extract.config import Pooling
from pipeline.extract.teacher import Preprocess, Teacher, load_teacher
from tests.conftest import CLASS_NAMES, make_images

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 16, "patch_size": 8}
STAGES = {"hidden_sizes": [4, 8], "depths": [1, 1]}


def vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=8))


def dual() -> Any:
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.CLIPConfig(
        text_config=text | {"vocab_size": 20}, vision_config=SIZES | {"intermediate_size": 8}
    )
    return transformers.CLIPModel(config)


# Each with whether transformers has a linear classifier on the very embedding that `extract` takes.
ARCHITECTURES: dict[str, tuple[Callable[[], Any], bool]] = {
    "vit": (vit, True),
    "convnext": (
        lambda: transformers.ConvNextModel(transformers.ConvNextConfig(num_stages=2, patch_size=2, **STAGES)),
        True,
    ),
    "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)), False),  # its own takes a mean too
    "clip": (dual, False),  # its own is on the mean of the patches
}


def load(folder: Path, pooling: Pooling = "auto") -> Teacher:
    return load_teacher(str(folder), None, pooling, torch.device("cpu"), torch.float32)


def save(model: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3).save_pretrained(folder)
    return folder


def planes_of(num_images: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in make_images(num_images, 0)])).permute(0, 3, 1, 2)


def with_other_weights(teacher: Teacher) -> TeacherClassifier:
    """Return a classifier none of whose weights is as it began."""
    model = TeacherClassifier(teacher, len(CLASS_NAMES))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def test_images_on_the_device_become_what_extraction_shows_the_teacher(tiny_teacher: Path) -> None:
    teacher = load(tiny_teacher)
    shown = teacher.preprocess(make_images(3, 0))
    assert torch.equal(TeacherClassifier(teacher, 3).preprocess(planes_of(3)), shown)


def test_the_classifier_begins_at_zero_and_all_else_as_it_was_loaded(tiny_teacher: Path) -> None:
    teacher = load(tiny_teacher)
    before = {name: weight.clone() for name, weight in teacher.model.state_dict().items()}
    model = TeacherClassifier(teacher, 5)
    assert torch.equal(model(model.preprocess(planes_of(2))), torch.zeros(2, 5))
    assert all(torch.equal(weight, before[name]) for name, weight in model.encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_logits_are_of_the_embedding_that_extraction_takes(tiny_teacher: Path) -> None:
    teacher = load(tiny_teacher)
    model = with_other_weights(teacher).eval()
    pixels = model.preprocess(planes_of(4))
    with torch.no_grad():
        expected = model.classifier(teacher.embed(pixels))
    assert torch.allclose(model(pixels), expected, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_gives_the_embeddings_and_the_logits_of_what_was_trained(name: str, tmp_path: Path) -> None:
    make, is_known = ARCHITECTURES[name]
    trained = load(save(make(), tmp_path / "teacher"))
    model = with_other_weights(trained)
    written = tmp_path / "written"
    written.mkdir()
    model.save(CLASS_NAMES, written)
    again = load(written)
    pixels = model.preprocess(planes_of(4))
    assert torch.equal(again.embed(pixels), trained.embed(pixels))
    assert again.info.pooling == trained.info.pooling
    config = json.loads((written / "config.json").read_text("utf-8"))
    assert config["id2label"] == {"0": "ant", "1": "bee", "2": "cat"}
    assert config["label2id"] == {"ant": 0, "bee": 1, "cat": 2}
    assert (written / CLASSIFIER).exists() == (not is_known)
    if is_known:
        whole = transformers.AutoModelForImageClassification.from_pretrained(written).eval()
        assert torch.allclose(whole(pixel_values=pixels).logits, model(pixels), atol=1e-6)
    else:
        assert torch.equal(load_file(written / CLASSIFIER)["weight"], model.classifier.weight)


def test_a_pooler_that_nothing_went_through_is_not_written(tmp_path: Path) -> None:
    model = with_other_weights(load(save(vit(), tmp_path / "teacher")))
    (tmp_path / "written").mkdir()
    model.save(CLASS_NAMES, tmp_path / "written")
    with pytest.raises(PipelineError, match=r"the checkpoint has no weights for the pooler\. Pass --pooling"):
        load(tmp_path / "written", "pooled")


def test_a_teacher_that_does_not_come_back_is_refused_before_it_learns(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TeacherClassifier(load(tiny_teacher), len(CLASS_NAMES))
    (tmp_path / "itself").mkdir()
    model.check_saves(CLASS_NAMES, tmp_path / "itself")

    another, save_model = with_other_weights(load(tiny_teacher)), TeacherClassifier.save
    monkeypatch.setattr(TeacherClassifier, "save", lambda self, names, folder: save_model(another, names, folder))
    (tmp_path / "another").mkdir()
    with pytest.raises(PipelineError) as error:
        model.check_saves(CLASS_NAMES, tmp_path / "another")
    assert str(error.value) == (
        "tiny-vit: other embeddings come back from what transformers writes of this ViTModel, so that fine-tuning it "
        "would be in vain. Choose another teacher."
    )


class PillowProcessor:
    backend = "pil"


def test_a_processor_that_takes_no_tensors_is_refused(tiny_teacher: Path) -> None:
    teacher = replace(load(tiny_teacher), preprocess=Preprocess(PillowProcessor()))
    with pytest.raises(PipelineError) as error:
        TeacherClassifier(teacher, len(CLASS_NAMES))
    assert str(error.value) == (
        "tiny-vit: its image processor, PillowProcessor, takes no tensors on the device. Choose a teacher whose "
        "processor is one of transformers' own, with torchvision as its backend."
    )
