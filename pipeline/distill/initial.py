"""Weights that a student begins with, where it does not begin from scratch."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.distill.student import Student
from pipeline.errors import PipelineError, first_line, listed

_NO_CLASSES = -1  # no model has so many: timm then leaves the classifier out


def initialise(student: Student, init: str) -> str | None:
    """Give a student weights that were learned before; its classifier stays new, unless it is of the same classes.

    Args:
        student: as `build_student` made it; changed in place.
        init: `scratch`: leave it so; `pretrained`: timm's weights of this architecture, from the hub; else a folder
            with model.safetensors: a student, or a timm model. Embeddings of positions are resized.

    Returns:
        The SHA-256 of all weights as they are then, names included; of a student from scratch none: its seed says it.

    Raises:
        PipelineError: there are no such weights, they cannot be had, or they are of another model.
    """
    if init == "scratch":
        return None
    config = student.config
    where = f"student {config.architecture}"
    overlay: dict[str, object] = {}
    if init == "pretrained":
        if timm.get_pretrained_cfg(config.architecture) is None or "depth" in config.model_args:
            raise PipelineError(f"{where}: there are no pretrained weights of it. Pass --init scratch, or a folder.")
    else:
        weights, same_classes = _read_folder(Path(init), config.class_names)
        if missing := sorted(student.model.state_dict().keys() - weights.keys() - _classifier_names(student)):
            raise PipelineError(
                f"{init}: lacks {len(missing)} of the weights of {where} ({listed(missing)}). "
                "Is it a model of the same architecture? Pass the --student that it is."
            )
        overlay = {"state_dict": weights, "num_classes": len(config.class_names) if same_classes else _NO_CLASSES}
    try:
        model = timm.create_model(
            config.architecture,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            num_classes=len(config.class_names),
            **config.model_args,
        )
    except Exception as error:  # of the hub, the network, or shapes that do not fit
        raise PipelineError(
            f"{where}: the weights of --init {init} cannot be taken ({first_line(error)[:200]})."
        ) from error
    state = model.state_dict()
    if not overlay or overlay["num_classes"] == _NO_CLASSES:
        for name in _classifier_names(student):
            state[name] = student.model.state_dict()[name]
    student.model.load_state_dict(state)
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + b"\0" + state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_folder(folder: Path, class_names: tuple[str, ...]) -> tuple[Mapping[str, Tensor], bool]:
    folder = folder / "student" if (folder / "student").is_dir() else folder
    if not (folder / "model.safetensors").is_file():
        raise PipelineError(
            f"--init {folder}: no model.safetensors there. Pass scratch, pretrained, a run directory or a folder of a "
            "timm model."
        )
    try:
        weights = load_file(folder / "model.safetensors")
        config = folder / "config.json"
        names = json.loads(config.read_text("utf-8")).get("label_names") if config.is_file() else None
    except (OSError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        raise PipelineError(f"--init {folder}: is damaged ({first_line(error)}).") from None
    return weights, names == list(class_names)


def _classifier_names(student: Student) -> set[str]:
    classifier = student.classifier
    prefix = next(name for name, module in student.model.named_modules() if module is classifier)
    return {f"{prefix}.weight", f"{prefix}.bias"}
