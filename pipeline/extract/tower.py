"""An image encoder as it was loaded: alone, or taken out of a dual encoder such as CLIP.

Knows the parts of loaded models, whole or not, and hashes them; it loads nothing.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError

_PROJECTION = "visual_projection."


@dataclass(frozen=True)
class Tower:
    """An image encoder.

    `projection` leads from its pooled output into the space that it shares with a text tower, and is none where
    there is no such space. `missing` names those weights of the encoder that the checkpoint does not hold.
    """

    model: Any
    projection: torch.nn.Module | None = None
    missing: frozenset[str] = frozenset()

    @property
    def architecture(self) -> str:
        """The model's class; of a wrapper around timm also which of timm's models it holds."""
        kind = type(self.model).__name__
        return f"{kind} {self.model.config.architecture}" if hasattr(self.model, "timm_model") else kind

    def weights(self, *, projected: bool) -> dict[str, Tensor]:
        """Return the weights that the checkpoint holds, by name; those of the projection too where it is used."""
        held = {name: weight for name, weight in self.model.state_dict().items() if name not in self.missing}
        if projected and self.projection is not None:
            held |= self.projection.state_dict(prefix=_PROJECTION)
        return held


def image_tower(name: str, model: Any, missing: Collection[str]) -> Tower:
    """Take the image encoder out of a model.

    Args:
        name: of the teacher, for messages.
        model: an image encoder, or a dual encoder.
        missing: names of the model's weights that its checkpoint does not hold.

    Returns:
        The encoder. Its pooler may be missing; all else is there.

    Raises:
        PipelineError: there is none, its weights are not all there, or it takes no images of one size.
    """
    projection, prefix = None, ""
    if hasattr(model, "vision_model"):
        if hasattr(model, "visual_projection"):
            projection = model.visual_projection
        elif hasattr(model, "get_text_features"):
            projection = torch.nn.Identity()  # SigLIP: what its heads return lies in the common space
        model, prefix = model.vision_model, "vision_model."
    kind = type(model).__name__
    if kind == "SiglipVisionModel":
        projection = torch.nn.Identity() if getattr(model.config, "vision_use_head", True) else None
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise PipelineError(f"{name}: {kind} is not an image encoder.")
    if kind == "Siglip2VisionModel":
        raise PipelineError(
            f"{name}: {kind} takes images of any size as lists of patches (NaFlex), which is not supported. "
            "Take a checkpoint of one size, e.g. google/siglip2-base-patch16-224."
        )
    own = {key.removeprefix(prefix) for key in missing if key.startswith(prefix)}
    check_whole(name, "the teacher", [key for key in own if "pooler." not in key])
    if any(key.startswith(_PROJECTION) for key in missing):
        projection = None
    return Tower(model, projection, frozenset(own))


def check_whole(name: str, what: str, missing: Collection[str]) -> None:
    """Refuse a part of a model some of whose weights are not in its checkpoint.

    Args:
        name: of the teacher, for the message.
        what: which part, e.g. `the teacher`.
        missing: names of the weights that are not there.

    Raises:
        PipelineError: there are any.
    """
    if missing:
        raise PipelineError(
            f"{name}: {len(missing)} of {what}'s weights are not in its checkpoint "
            f"({', '.join(sorted(missing)[:3])}…). They would be random: take a checkpoint that fits its config.json."
        )


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Hash weights, whatever files they came in.

    Args:
        weights: by name; float32, on the CPU.

    Returns:
        SHA-256 over name, shape and little-endian values of each, sorted by name; hexadecimal.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().data)
    return digest.hexdigest()
