"""`config.json` of a student's folder: a stranger's, until everything in it is checked.

Builds nothing and reads no weights' content: their names and shapes tell what `config.json` may ask for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from pipeline.distill.provenance import parse_json
from pipeline.errors import PipelineError

MAX_IMAGE_PX = 4096
_WHOLE = ((int,), "a whole number")
_NUMBER = ((int, float), "a number")
# Those that a student is made with: timm's factory also takes arguments that load other files.
_MODEL_ARGS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "img_size": _WHOLE,
    "patch_size": _WHOLE,
    "embed_dim": _WHOLE,
    "depth": _WHOLE,
    "num_heads": _WHOLE,
    "mlp_ratio": _NUMBER,
    "pre_norm": ((bool,), "true or false"),
    "act_layer": ((str,), "a name"),
    "attn_drop_rate": _NUMBER,
    "drop_path_rate": _NUMBER,
}


@dataclass(frozen=True)
class StudentConfig:
    """Everything that rebuilds a student but its weights.

    `mean` and `std` are of RGB in 0…1. Images are resized (bicubic) to `image_size` on their shorter side and
    cropped at the centre.
    """

    architecture: str
    model_args: Mapping[str, Any]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_names: tuple[str, ...]


def student_document(config: StudentConfig, embed_dim: int) -> dict[str, Any]:
    """Return what `config.json` holds, as timm and transformers read it.

    Args:
        config: the student's.
        embed_dim: length of its embedding.
    """
    return {
        "architecture": config.architecture,
        "num_classes": len(config.class_names),
        "num_features": embed_dim,
        "label_names": list(config.class_names),
        "model_args": dict(config.model_args),
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(config.mean),
            "std": list(config.std),
            "num_classes": len(config.class_names),
        },
    }


def read_config(folder: Path) -> StudentConfig:
    """Read and check `config.json`.

    Args:
        folder: the student's.

    Returns:
        A configuration of known arguments of the right types, and preprocessing that makes finite numbers.

    Raises:
        PipelineError: it is damaged, or describes no student of this program.
    """
    try:
        document = parse_json(folder / "config.json")
        preprocessing, class_names = document["pretrained_cfg"], document["label_names"]
        config = StudentConfig(
            architecture=str(document["architecture"]),
            model_args=dict(document["model_args"]),
            image_size=int(preprocessing["input_size"][1]),
            mean=tuple(map(float, preprocessing["mean"])),  # type: ignore[arg-type]
            std=tuple(map(float, preprocessing["std"])),  # type: ignore[arg-type]
            class_names=tuple(map(str, class_names)),
        )
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise PipelineError(f"{folder}: the student is damaged ({type(error).__name__}: {error}).") from None
    where = f"{folder}: config.json does not describe a student of this program"
    if not timm.is_model(config.architecture) or not set(config.model_args) <= set(_MODEL_ARGS):
        raise PipelineError(f"{where}.")
    for name, value in config.model_args.items():
        types, expected = _MODEL_ARGS[name]
        if type(value) not in types:  # a bool is an int, too
            raise PipelineError(f"student {config.architecture}: {name} is {value!r:.100}, expected {expected}.")
    if not isinstance(class_names, list) or class_names != list(config.class_names):
        raise PipelineError(f"{where}: label_names is no list of names.")
    if problem := _problem(config):
        raise PipelineError(f"{where}: {problem}.")
    return config


def check_demands(config: StudentConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Check that what decides memory and time is no larger than the weights that were sent along.

    Args:
        config: as `read_config` returns it.
        weights: all of them, by name.
        folder: for the error.

    Raises:
        PipelineError: no model of such sizes has these weights.
    """
    longest = max((side for tensor in weights.values() if tensor.numel() for side in tensor.shape), default=0)
    args = config.model_args
    for name, found, most, what in (
        ("depth", args.get("depth", 0), len(weights), "tensors there are"),
        ("embed_dim", args.get("embed_dim", 0), longest, "longest side of a tensor"),
        ("patch_size", args.get("patch_size", 0), longest, "longest side of a tensor"),
        ("number of label_names", len(config.class_names), longest, "longest side of a tensor"),
    ):
        if found > most:
            raise PipelineError(
                f"{folder}: model.safetensors does not fit config.json ({name} is {found}, {what} {most})."
            )


def _problem(config: StudentConfig) -> str | None:
    if len(set(config.class_names)) < len(config.class_names):
        return "a name stands twice in label_names"
    if not 1 <= config.image_size <= MAX_IMAGE_PX:
        return f"input_size is {config.image_size}, expected 1 to {MAX_IMAGE_PX}"
    if config.model_args.get("img_size", config.image_size) != config.image_size:
        return f"img_size is {config.model_args['img_size']}, input_size {config.image_size}"
    if len(config.mean) != 3 or not all(map(math.isfinite, config.mean)):
        return f"mean is {list(config.mean)!s:.100}, expected three numbers"
    if len(config.std) != 3 or not all(value > 0 and math.isfinite(value) for value in config.std):
        return f"std is {list(config.std)!s:.100}, expected three numbers above 0"
    return None
