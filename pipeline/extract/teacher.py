"""The teacher: any `transformers` image encoder, and its own preprocessing.

The only file that imports `transformers`. Remote code is never run and pickled weights are never read.
"""

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
from pipeline.extract.pooling import pool, resolve_pooling
from pipeline.extract.tower import Tower, image_tower, weights_sha256
from pipeline.progress import LOGGER
from pipeline.runtime import batch_must_fit, full_float32
from store import TeacherInfo


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
        # On a CPU the library would resize one image after the other, to the same pixels.
        grouped = {"disable_grouping": False} if getattr(self.processor, "backend", "") == "torchvision" else {}
        pixels: Tensor = self.processor(list(images), return_tensors="pt", **grouped)["pixel_values"]
        return pixels

    @property
    def shortest_edge(self) -> int | None:
        """What the shorter side of an image is resized to, in pixels; none where both sides are given."""
        settings = self.processor.to_dict()
        if "data_config" in settings:  # of timm's
            return int(settings["data_config"]["input_size"][-1])
        size = settings.get("size")
        return size.get("shortest_edge") if isinstance(size, dict) else None

    def describe(self) -> dict[str, Any]:
        """Return the processor's settings as plain JSON, for the manifest."""
        settings = {key: value for key, value in self.processor.to_dict().items() if value is not None}
        # timm's processor is transforms of timm's own, and names no backend.
        settings["backend"] = getattr(self.processor, "backend", "timm" if "data_config" in settings else "unknown")
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return plain


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher. Only where it is pooled so, `projection` leads from its pooled output to the embedding."""

    model: Any
    preprocess: Preprocess
    info: TeacherInfo
    projection: torch.nn.Module | None = None

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        """Run the teacher.

        Args:
            pixels: as `preprocess` returns them.

        Returns:
            One raw (not normalised) embedding an image: float32, on the teacher's device, where a GPU may still be
            computing it.
        """
        with torch.inference_mode(), full_float32():
            return pool(Tower(self.model, self.projection), self._run(pixels), self.info.pooling).float()

    def has_pooled_output(self, pixels: Float[Tensor, "batch 3 height width"]) -> bool:
        """Tell whether the model pools its output itself; not all do that could.

        Args:
            pixels: as `preprocess` returns them.

        Returns:
            Whether there is an output of that name.
        """
        with torch.inference_mode():
            return getattr(self._run(pixels), "pooler_output", None) is not None

    def _run(self, pixels: Tensor) -> Any:
        is_cuda = self.model.device.type == "cuda"  # where `Embedder` keeps what is still being copied
        return self.model(pixel_values=pixels.to(self.model.device, self.model.dtype, non_blocking=is_cuda))


def load_teacher(
    name: str, revision: str | None, pooling: Pooling, device: torch.device, precision: torch.dtype
) -> Teacher:
    """Load a teacher by hub name or from a folder.

    Args:
        name: e.g. `google/vit-large-patch16-224-in21k`, or a folder with config, weights and preprocessor.
        revision: hub branch, tag or commit.
        pooling: how one embedding is taken; `auto` is what the encoder's authors mean.
        device: where it runs.
        precision: arithmetic of its forward pass.

    Returns:
        The teacher, in evaluation mode.

    Raises:
        PipelineError: it is missing, not an image encoder, not whole, or cannot be pooled as asked.
    """
    folder = Path(name)
    if not folder.is_dir() and re.match(r"^[./~]", name):
        raise PipelineError(f"{name}: no such teacher folder. Check --teacher.")
    tower = image_tower(name, *load_pretrained(name, revision))
    commit = None if folder.is_dir() else _commit(name, revision)
    revision = commit or revision
    processor = _load_processor(name, revision)
    pooling = resolve_pooling(tower, name, pooling)
    projection = tower.projection if pooling == "projected" else None
    info = TeacherInfo(
        name=folder.resolve().name if folder.is_dir() else name,
        revision=commit,
        weights_sha256=weights_sha256(tower.weights(projected=projection is not None)),
        architecture=tower.architecture,
        pooling=pooling,
        embed_dim=1,
        precision=str(precision).removeprefix("torch."),
        licence=_licence(name, revision),
    )
    with batch_must_fit(1, "the teacher"):
        model = tower.model.eval().requires_grad_(False).to(device, precision)
        if projection is not None:
            projection = projection.eval().requires_grad_(False).to(device, precision)
    return _tried(Teacher(model, Preprocess(processor), info, projection), name)


def load_pretrained(name: str, revision: str | None) -> tuple[Any, set[str]]:
    """Load a whole model, in float32 on the CPU.

    Args:
        name: hub name, or a folder.
        revision: hub branch, tag or commit.

    Returns:
        The model, and the names of those weights that the checkpoint does not hold, which are random.

    Raises:
        PipelineError: it is missing, not of `transformers`, or its weights have other shapes than its config says.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        # `trust_remote_code` unset, transformers asks on the terminal whether to run the repository's code.
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        kind = (config.architectures or [""])[0]
        # AutoModel would leave the projection of such a tower out.
        loader = getattr(transformers, kind) if kind.endswith("VisionModelWithProjection") else transformers.AutoModel
        model, loading = loader.from_pretrained(
            name,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:
        raise PipelineError(
            f"{name}: the teacher cannot be loaded ({first_line(error)}). "
            "It must be a transformers model with safetensors weights, by hub name or as a folder."
        ) from error
    return model, set(loading["missing_keys"])  # keys of another shape were an error


def load_tokenizer(name: str, revision: str | None) -> Any:
    """Load the tokenizer of a teacher's text tower.

    Args:
        name: hub name, or a folder.
        revision: hub branch, tag or commit.

    Returns:
        A tokenizer of `transformers`.

    Raises:
        PipelineError: it is missing, or needs a library that is not installed.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise PipelineError(
            f"{name}: the tokenizer for --class-text cannot be loaded ({first_line(error)}). "
            "It must lie beside the teacher's weights."
        ) from error


def _load_processor(name: str, revision: str | None) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise PipelineError(
            f"{name}: the teacher's image processor cannot be loaded ({first_line(error)}). "
            "Its folder needs preprocessor_config.json."
        ) from error


def _tried(teacher: Teacher, name: str) -> Teacher:
    """Embed one grey image: it tells the length of an embedding, and that the teacher runs here at all."""
    info = teacher.info
    try:
        with batch_must_fit(1, "the teacher"):
            grey = teacher.preprocess([Image.new("RGB", (32, 32), "grey")])
            if info.pooling == "pooled" and not teacher.has_pooled_output(grey):
                LOGGER.info("%s has no pooled output: the mean of its tokens is the embedding.", info.architecture)
                info = info.model_copy(update={"pooling": "mean"})
            teacher = replace(teacher, info=info)
            embedding, again = teacher.embed(grey), teacher.embed(grey)
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        raise PipelineError(
            f"{name}: the teacher cannot embed an image ({first_line(error)}). "
            "Do its config.json and preprocessor_config.json belong together?"
        ) from error
    if not torch.allclose(embedding, again, rtol=1e-2, atol=1e-3, equal_nan=True):
        raise PipelineError(f"{name}: the teacher gives another embedding each time (random masking?). Choose another.")
    return replace(teacher, info=info.model_copy(update={"embed_dim": embedding.shape[1]}))


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
