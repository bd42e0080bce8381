"""The paper's teachers by name (Table I), with random weights: they take as much time and memory as trained ones.

Nothing is loaded and nothing can be learned from them.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from pipeline.errors import PipelineError
from pipeline.extract.teacher import Preprocess, Teacher
from store import TeacherInfo

IMAGE_SIZE_PX = 224
# Layers, width, heads, MLP (arXiv 2010.11929, table 1).
_SIZES = {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)}
_NAME = re.compile(r"(google/)?vit-(?P<size>base|large)-patch(?P<patch>16|32)(-224-in21k)?")
_SPREAD = 0.02


@dataclass(frozen=True)
class ModelSize:
    """One row of Table I, and what it comes to."""

    layers: int
    width: int
    heads: int
    mlp: int
    parameters: int


def teacher_config(name: str) -> transformers.ViTConfig:
    """Return the configuration of one of the paper's teachers.

    Args:
        name: `google/vit-{base,large}-patch{16,32}-224-in21k`, with or without what stands around the size.

    Returns:
        The published one.

    Raises:
        PipelineError: it is none of them.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise PipelineError(
            f"teacher {name!r} is not one of the paper's. Expected google/vit-SIZE-patchP-224-in21k, with SIZE base or "
            "large and P 16 or 32."
        )
    layers, width, heads, mlp = _SIZES[match["size"]]
    return transformers.ViTConfig(
        image_size=IMAGE_SIZE_PX,
        patch_size=int(match["patch"]),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
    )


def teacher_size(name: str) -> ModelSize:
    """Count a teacher's weights, of which none is made.

    Args:
        name: as `teacher_config` takes it.

    Returns:
        Its size, with the pooler that its checkpoint has, and that is loaded though [CLS] does not pass it.

    Raises:
        PipelineError: it is not one of the paper's.
    """
    config = teacher_config(name)
    return ModelSize(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        mlp=config.intermediate_size,
        parameters=sum(parameter.numel() for parameter in _on_paper(config).parameters()),
    )


def random_teacher(name: str, device: torch.device, precision: torch.dtype) -> Teacher:
    """Make a teacher of random weights, in its precision from the start.

    Args:
        name: as `teacher_config` takes it.
        device: where it runs.
        precision: of its weights and its arithmetic.

    Returns:
        The teacher, with the image processor of the in21k checkpoints; its embedding is [CLS].

    Raises:
        PipelineError: it is not one of the paper's.
    """
    config = teacher_config(name)
    model = _on_paper(config).to(precision).to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=_SPREAD)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)  # else nothing of an image would come through
    half = [0.5] * 3
    size = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    info = TeacherInfo(
        name=name,
        weights_sha256="0" * 64,
        architecture=type(model).__name__,
        pooling="cls",
        embed_dim=config.hidden_size,
        precision=str(precision).removeprefix("torch."),
    )
    processor = transformers.ViTImageProcessor(size=size, image_mean=half, image_std=half)
    return Teacher(model, Preprocess(processor), info)


def _on_paper(config: transformers.ViTConfig) -> Any:
    with torch.device("meta"):
        return transformers.ViTModel(config)
