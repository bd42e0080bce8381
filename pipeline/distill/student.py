"""The student: a timm model that gives an embedding and logits, and its folder on disk.

The folder opens with timm, with transformers and here, with equal logits. Nothing in it is pickled.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn

from pipeline.distill.recipe import Recipe
from pipeline.distill.student_document import MAX_IMAGE_PX, check_demands, read_config, student_document
from pipeline.distill.student_document import StudentConfig as StudentConfig
from pipeline.errors import PipelineError
from pipeline.output import write_atomically
from pipeline.runtime import batch_must_fit

_ALIGNMENT_BYTES = 64
_DTYPE_CODES = {torch.float32: "F32", torch.int64: "I64"}
# Table I: layers, width, heads; the MLP is four times as wide as the embedding.
_TABLE_I = {"base": (6, 256, 8), "large": (10, 512, 8)}
_PATCH_PX = 4
_BUILD_ERRORS = (RuntimeError, AssertionError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
_TRIED_IMAGES = 2


class Student(nn.Module):
    """A timm classifier with its embedding laid open."""

    def __init__(self, model: nn.Module, config: StudentConfig) -> None:
        """Wrap a model that `build_student` made; use that."""
        super().__init__()
        self.model = model
        self.config = config
        self._mean: Tensor
        self._std: Tensor
        self.register_buffer("_mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, from embedding to logits."""
        layer: nn.Linear = self.model.get_classifier()  # type: ignore[operator]
        return layer

    @property
    def embed_dim(self) -> int:
        """Length of an embedding (d in the paper's terms)."""
        return self.classifier.in_features

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch student_dim"], Float[Tensor, "batch classes"]]:
        """Compute embeddings and logits.

        Args:
            pixels: as `normalise` returns them.

        Returns:
            Embeddings ([CLS] after the last norm for a ViT, pooled features for others), and logits.
        """
        features = self.model.forward_features(pixels)  # type: ignore[operator]
        embedding = self.model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return embedding, self.classifier(embedding)

    def normalise(self, pixels: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
        """Turn 8-bit pixels into what the model takes, by the arithmetic of torchvision's transforms."""
        # Contiguous: convolutions of another memory order add up in another order than timm's and transformers' do.
        return (pixels.permute(0, 3, 1, 2).contiguous().float().div(255) - self._mean) / self._std


def student_config(name: str, image_size: int, class_names: tuple[str, ...], recipe: Recipe) -> StudentConfig:
    """Choose architecture and input of a student.

    Args:
        name: `base` or `large` (Table I: a CLIP-style ViT with patch 4, normed before its blocks, its patch
            embedding without bias, QuickGELU), or any timm model.
        image_size: side of the input in pixels.
        class_names: one for each output.
        recipe: attention dropout of `base` and `large`, stochastic depth of all.

    Returns:
        The configuration.

    Raises:
        PipelineError: timm has no such model, or no student is so large.
    """
    if image_size > MAX_IMAGE_PX:
        raise PipelineError(
            f"student {name!r}: image size {image_size} is above {MAX_IMAGE_PX}. Pass a smaller --image-size."
        )
    if name in _TABLE_I:
        depth, width, num_heads = _TABLE_I[name]
        args: dict[str, Any] = {
            "img_size": image_size,
            "patch_size": _PATCH_PX,
            "embed_dim": width,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": 4.0,
            "pre_norm": True,
            "act_layer": "quick_gelu",
            "attn_drop_rate": recipe.attention_dropout,
        }
        if recipe.stochastic_depth:
            args["drop_path_rate"] = recipe.stochastic_depth
        return StudentConfig("vit_tiny_patch16_224", args, image_size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, class_names)
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name}*")[:5] or difflib.get_close_matches(name, timm.list_models(), 5)
        hint = f" Similar: {', '.join(similar)}." if similar else ""
        raise PipelineError(f"student {name!r} is neither base, large nor a timm model.{hint}")
    try:
        defaults = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise PipelineError(f"student {name!r}: {error}") from None
    fixed = defaults is not None and defaults.fixed_input_size
    mean, std = (defaults.mean, defaults.std) if defaults else (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    args = {"img_size": image_size} if fixed else {}
    if recipe.stochastic_depth:
        args["drop_path_rate"] = recipe.stochastic_depth
    return StudentConfig(name, args, image_size, tuple(mean), tuple(std), class_names)


def build_student(config: StudentConfig) -> Student:
    """Make a student with random weights, and try it on one batch.

    Args:
        config: what to build.

    Returns:
        The student, on the CPU, in evaluation mode.

    Raises:
        PipelineError: it does not take images of this size, has no stochastic depth where the recipe wants it,
            cannot be split into embedding and classifier, or does not fit into memory.
    """
    size, where = config.image_size, f"student {config.architecture}"
    try:
        with batch_must_fit(_TRIED_IMAGES, where, smallest=_TRIED_IMAGES):
            model = _create(config)
            _check_patch(model, size, where)
            student = Student(model, config).eval()
            with torch.no_grad():
                pixels = torch.zeros(_TRIED_IMAGES, 3, size, size)
                if not isinstance(model.get_classifier(), nn.Linear):  # type: ignore[operator]
                    raise PipelineError(f"{where}: its classifier is not one linear layer. Choose another timm model.")
                embedding, logits = student(pixels)
                whole = model(pixels)
    except _BUILD_ERRORS as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if "'drop_path_rate'" in detail:
            raise PipelineError(f"{where}: has no stochastic depth. Pass --set stochastic_depth=0.") from None
        raise PipelineError(f"{where}: does not work on images of {size}×{size} pixels ({detail}).") from error
    if not {tensor.dtype for tensor in model.state_dict().values()} <= set(_DTYPE_CODES):
        raise PipelineError(f"{where}: has weights of other types than float32 and int64. Choose another model.")
    if len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters())):
        # Neither a file of weights nor an average of them knows what is one tensor under two names.
        raise PipelineError(f"{where}: has layers that share their weights. Choose another model.")
    if embedding.ndim != 2 or not torch.allclose(logits, whole, rtol=1e-4, atol=1e-5):
        raise PipelineError(f"{where}: its logits are not a linear function of its embedding. Choose another model.")
    return student


def save_student(student: Student, folder: Path) -> None:
    """Write a student's folder; an older student in it is replaced in one step a file.

    Args:
        student: on any device.
        folder: made if it does not exist.
    """
    folder.mkdir(exist_ok=True)
    document = student_document(student.config, student.embed_dim)
    text = json.dumps(document, indent=2, ensure_ascii=False)
    write_atomically(folder / "config.json", text.encode())
    weights = {name: tensor.detach().cpu() for name, tensor in student.model.state_dict().items()}
    write_atomically(folder / "model.safetensors", _encode_weights(weights))


def load_student(folder: Path) -> Student:
    """Read a student's folder.

    Args:
        folder: a run directory, or the `student` folder in it.

    Returns:
        The student, on the CPU, in evaluation mode.

    Raises:
        PipelineError: it is missing, damaged, or not a student.
    """
    folder = folder / "student" if (folder / "student").is_dir() else folder
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise PipelineError(f"{folder}: no student here ({name} is missing). Pass a run directory.")
    config = read_config(folder)
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise PipelineError(f"{folder}: the student is damaged ({type(error).__name__}: {error}).") from None
    check_demands(config, weights, folder)
    if wrong := [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]:
        raise PipelineError(f"{folder}: the student is damaged: {wrong[0]} has values that are not finite.")
    try:
        with torch.device("meta"):  # a model of any size takes no memory there
            outline = _create(config)
    except _BUILD_ERRORS:
        outline = None  # it can be built in memory alone, or not at all, and then building says why
    if outline is not None:
        _load(outline, {name: tensor.to("meta") for name, tensor in weights.items()}, folder)
    student = build_student(config)
    _load(student.model, weights, folder)
    return student


def _create(config: StudentConfig) -> nn.Module:
    num_classes = len(config.class_names)
    model: nn.Module = timm.create_model(
        config.architecture, pretrained=False, num_classes=num_classes, **config.model_args
    )
    return model


def _load(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise PipelineError(f"{folder}: model.safetensors does not fit config.json ({detail}).") from None


def _encode_weights(weights: Mapping[str, Tensor]) -> bytes:
    # Readers map this file into memory, and kernels add up in another order where a weight is not aligned: then
    # logits would differ in the last bit between readers that copy and readers that map. So the data begins at a
    # multiple of 64 bytes, and tensors whose size is not one stand last. The safetensors library can do neither.
    order = sorted(weights, key=lambda name: (weights[name].nbytes % _ALIGNMENT_BYTES != 0, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        tensor = weights[name]
        span = [position, position + tensor.nbytes]
        header[name] = {
            "dtype": _DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        position = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT_BYTES)
    data = b"".join(weights[name].contiguous().numpy().tobytes() for name in order)
    return len(text).to_bytes(8, "little") + text + data


def _check_patch(model: nn.Module, image_size: int, where: str) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple | list) else patch
    if isinstance(side, int) and image_size % side:
        lower, upper = image_size // side * side, (image_size // side + 1) * side
        fitting = f"{lower} or {upper}" if lower else f"{upper}"
        raise PipelineError(
            f"{where}: image size {image_size} is not divisible by its patch size {side}. Pass --image-size {fitting}."
        )
