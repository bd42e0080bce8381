"""The teacher: any `transformers` image encoder, its own preprocessing, and how one embedding is taken from it.

The only file that imports `transformers`. Remote code is never run and pickled weights are never read.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import metadata_load
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from pipeline.errors import PipelineError, first_line
from pipeline.extract.config import Pooling
from pipeline.progress import LOGGER
from pipeline.runtime import batch_must_fit
from store import TeacherInfo

_CLASS_TOKENS = ("cls_token", "class_embedding")


@dataclass(frozen=True)
class Preprocess:
    """The teacher's own image processor as a function; worker processes get it without the teacher."""

    processor: Any

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch 3 height width"]:
        """Resize and normalise images.

        Args:
            images: mode RGB, of any sizes.

        Returns:
            float32, on the CPU.
        """
        pixels: Tensor = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return pixels

    def describe(self) -> dict[str, Any]:
        """Return the processor's settings as plain JSON, for the manifest."""
        settings = {key: value for key, value in self.processor.to_dict().items() if value is not None}
        settings["backend"] = getattr(self.processor, "backend", "unknown")
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return plain


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher."""

    model: Any
    preprocess: Preprocess
    info: TeacherInfo

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        """Run the teacher.

        Args:
            pixels: as `preprocess` returns them.

        Returns:
            One raw (not normalised) embedding an image: float32, on the teacher's device, where a GPU may still be
            computing it.
        """
        # Float32 is to mean float32: cuDNN's convolutions would round their input to TF32.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pixels = pixels.to(self.model.device, self.model.dtype, non_blocking=True)
            return _pool(self.model, self.model(pixel_values=pixels), self.info.pooling).float()


def load_teacher(
    name: str, revision: str | None, pooling: Pooling, device: torch.device, precision: torch.dtype
) -> Teacher:
    """Load a teacher by hub name or from a folder.

    Args:
        name: e.g. `google/vit-large-patch16-224-in21k`, or a folder with config, weights and preprocessor.
        revision: hub branch, tag or commit.
        pooling: `auto` takes [CLS] after the last norm, or the model's own pooled output where there is no [CLS].
        device: where it runs.
        precision: arithmetic of its forward pass.

    Returns:
        The teacher, in evaluation mode.

    Raises:
        PipelineError: it is missing, not an image encoder, not whole, or cannot be pooled as asked.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(name)
    if not folder.is_dir() and re.match(r"^[./~]", name):
        raise PipelineError(f"{name}: no such teacher folder. Check --teacher.")
    model, missing = _load_encoder(name, revision)
    commit = None if folder.is_dir() else _commit(name, revision)
    revision = commit or revision
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise PipelineError(
            f"{name}: the teacher's image processor cannot be loaded ({first_line(error)}). "
            "Its folder needs preprocessor_config.json."
        ) from error
    weights_sha256 = _weights_sha256(model, missing)
    with batch_must_fit(1, "the teacher"):
        model = model.eval().requires_grad_(False).to(device, precision)
    pooling = _resolve_pooling(model, name, pooling, missing)
    info = TeacherInfo(
        name=folder.resolve().name if folder.is_dir() else name,
        revision=commit,
        weights_sha256=weights_sha256,
        architecture=type(model).__name__,
        pooling=pooling,
        embed_dim=1,
        precision=str(precision).removeprefix("torch."),
        licence=_licence(name, revision),
    )
    teacher = Teacher(model, Preprocess(processor), info)
    # One grey image tells the length of an embedding, and that the teacher runs here at all.
    try:
        with batch_must_fit(1, "the teacher"):
            grey = teacher.preprocess([Image.new("RGB", (32, 32), "grey")])
            embedding, again = teacher.embed(grey), teacher.embed(grey)
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        raise PipelineError(
            f"{name}: the teacher cannot embed an image ({first_line(error)}). "
            "Do its config.json and preprocessor_config.json belong together?"
        ) from error
    if not torch.allclose(embedding, again, rtol=1e-2, atol=1e-3, equal_nan=True):
        raise PipelineError(f"{name}: the teacher gives another embedding each time (random masking?). Choose another.")
    return replace(teacher, info=info.model_copy(update={"embed_dim": embedding.shape[1]}))


def _load_encoder(name: str, revision: str | None) -> tuple[Any, set[str]]:
    try:
        model, loading = transformers.AutoModel.from_pretrained(
            name,
            revision=revision,
            use_safetensors=True,
            # Without this, transformers asks on the terminal whether to run the repository's code.
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:
        raise PipelineError(
            f"{name}: the teacher cannot be loaded ({first_line(error)}). "
            "It must be a transformers model with safetensors weights, by hub name or as a folder."
        ) from error
    prefix = ""
    if hasattr(model, "vision_model"):  # a dual encoder such as CLIP: the image tower is the teacher
        model, prefix = model.vision_model, "vision_model."
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise PipelineError(f"{name}: {type(model).__name__} is not an image encoder.")
    missing = {key.removeprefix(prefix) for key in loading["missing_keys"] if key.startswith(prefix)}
    absent = sorted(key for key in missing if not _is_pooler(key)) + sorted(map(str, loading["mismatched_keys"]))
    if absent:
        raise PipelineError(
            f"{name}: {len(absent)} of the teacher's weights are not in its checkpoint ({', '.join(absent[:3])}…). "
            "They would be random: take a checkpoint that fits its config.json."
        )
    return model, missing


def _resolve_pooling(model: Any, name: str, pooling: Pooling, missing: set[str]) -> Pooling:
    if pooling == "auto":
        pooling = "cls"
        if not _has_class_token(model):
            pooling = "pooled"
            LOGGER.info("%s has no [CLS] token: its own pooled output is the embedding.", type(model).__name__)
        elif getattr(model.config, "use_mean_pooling", False):  # BEiT and its kin
            pooling = "pooled"
            LOGGER.info("%s was made to be pooled over patches, and is.", type(model).__name__)
    if pooling == "cls" and not _has_class_token(model):
        raise PipelineError(f"{name}: {type(model).__name__} has no [CLS] token. Pass --pooling pooled or mean.")
    if pooling == "pooled" and missing:
        raise PipelineError(f"{name}: the checkpoint has no weights for the pooler. Pass --pooling cls or mean.")
    return pooling


def _pool(model: Any, output: Any, pooling: str) -> Tensor:
    hidden: Tensor = output.last_hidden_state  # (B, tokens, D), or (B, D, height, width)
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    if pooling == "cls":
        # CLIP's towers apply their last norm to [CLS] alone, behind `last_hidden_state`.
        norm = getattr(model, "post_layernorm", torch.nn.Identity())
        cls: Tensor = norm(hidden[:, 0])
        return cls
    if pooling == "pooled" and pooled is not None:
        return pooled.flatten(1)
    if hidden.ndim == 4:
        return hidden.mean(dim=(2, 3))
    others = int(_has_class_token(model)) + int(getattr(model.config, "num_register_tokens", 0))
    return hidden[:, others:].mean(dim=1)


def _has_class_token(model: Any) -> bool:
    return any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in model.named_parameters())


def _is_pooler(key: str) -> bool:
    return "pooler." in key


def _weights_sha256(model: torch.nn.Module, missing: set[str]) -> str:
    """Hash name, shape and little-endian float32 values of the encoder's weights, whatever files they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name not in missing:
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def _licence(name: str, revision: str | None) -> str | None:
    try:
        card = transformers.utils.cached_file(name, "README.md", revision=revision)
        licence = (metadata_load(card) or {}).get("license") if card else None
    except Exception:  # whatever a model card looks like, it does not stop the teacher
        return None
    return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence) if licence else None


def _commit(name: str, revision: str | None) -> str | None:
    """Return the hub commit that a name and a revision stand for: its files lie in the cache by now."""
    config = transformers.utils.cached_file(name, "config.json", revision=revision)
    commit: str | None = transformers.utils.hub.extract_commit_hash(config, None)
    return commit
