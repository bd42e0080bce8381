"""Class names as the text tower of a CLIP-like teacher sees them: one embedding a class, in the space of its images.

Prompts are ensembled in the space of embeddings, as in Radford et al. 2021 (arXiv 2103.00020, section 3.1.4). The text
tower is loaded for this alone, and is gone before the first image is embedded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import PipelineError, first_line
from pipeline.extract.config import ExtractSettings
from pipeline.extract.teacher import Teacher, load_pretrained, load_tokenizer
from pipeline.extract.tower import check_whole, weights_sha256
from pipeline.progress import LOGGER, ProgressBar
from pipeline.runtime import batch_must_fit
from store import TextInfo

_BATCH_SIZE = 64


@dataclass(frozen=True)
class ClassText:
    """Text embeddings [C, D] float32 of all classes, and how they were made."""

    embeddings: NDArray[np.float32]
    info: TextInfo


@dataclass(frozen=True)
class TextTower:
    """The text side of a dual encoder, with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    weights_sha256: str

    @property
    def is_siglip(self) -> bool:
        """Whether texts are made the way SigLIP was trained on: in lower case, and all of one length."""
        return str(self.model.config.model_type).startswith("siglip")

    @property
    def max_tokens(self) -> int:
        """How many tokens a text may have."""
        return int(min(self.model.config.text_config.max_position_embeddings, self.tokenizer.model_max_length))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn texts into token numbers.

        Args:
            texts: any.

        Returns:
            Of each text its tokens, not padded.

        Raises:
            PipelineError: a text is too long to be read whole.
        """
        if self.is_siglip:
            texts = [text.lower() for text in texts]
        tokens: list[list[int]] = self.tokenizer(list(texts))["input_ids"]
        for text, numbers in zip(texts, tokens, strict=True):
            if len(numbers) > self.max_tokens:
                raise PipelineError(
                    f"{self.name}: {text!r} has {len(numbers)} tokens, the text tower reads {self.max_tokens}. "
                    "Shorten --prompt or the class's name, or leave --class-text out."
                )
        return tokens

    def embed(self, tokens: Sequence[list[int]]) -> NDArray[np.float64]:
        """Embed a batch of texts.

        Args:
            tokens: of each text, as `tokenize` returns them.

        Returns:
            [texts, D], each of length 1.
        """
        # SigLIP takes the last token for the text's, and was trained without a mask: it has to see the padding.
        padding = {"padding": "max_length", "max_length": self.max_tokens} if self.is_siglip else {"padding": True}
        padded = self.tokenizer.pad({"input_ids": list(tokens)}, return_tensors="pt", **padding)
        names = ("input_ids",) if self.is_siglip else ("input_ids", "attention_mask")
        inputs = {name: padded[name].to(self.model.device) for name in names}
        with torch.inference_mode():
            found = self.model.get_text_features(**inputs).pooler_output.double().cpu().numpy()
        embeddings: NDArray[np.float64] = found / np.linalg.norm(found, axis=1, keepdims=True)
        return embeddings


def embed_class_names(settings: ExtractSettings, classes: Sequence[str], teacher: Teacher) -> ClassText:
    """Embed class names with the text tower that belongs to a teacher.

    Args:
        settings: the prompts, and how many texts are embedded at once, if it says so.
        classes: names in row order; an underscore stands for a space.
        teacher: its device and precision are the text tower's, too.

    Returns:
        For each class the mean over all prompts of their embeddings of length 1. It is not normalised again.

    Raises:
        PipelineError: the teacher has no text tower or tokenizer, they do not fit, or a text is too long.
    """
    tower = load_text_tower(settings.teacher, teacher.info.revision or settings.teacher_revision, teacher)
    names = [name.replace("_", " ") for name in classes]
    embeddings = _mean_over_prompts(tower, settings, names, teacher.info.embed_dim)
    _check_finite(tower, classes, embeddings)
    LOGGER.info("The names of %d classes were embedded with %d prompt(s).", len(classes), len(settings.prompts))
    return ClassText(embeddings, TextInfo(prompts=settings.prompts, weights_sha256=tower.weights_sha256))


def _mean_over_prompts(
    tower: TextTower, settings: ExtractSettings, names: Sequence[str], embed_dim: int
) -> NDArray[np.float32]:
    size, num_prompts = settings.batch_size or _BATCH_SIZE, len(settings.prompts)
    num_texts = len(names) * num_prompts
    summed = np.zeros((len(names), embed_dim))
    bar = ProgressBar("embedding class names", num_texts, "texts")
    try:
        with bar, batch_must_fit(size, "the text tower"), np.errstate(invalid="ignore"):
            for start in range(0, num_texts, size):
                numbers = np.arange(start, min(start + size, num_texts))
                classes, prompts = np.divmod(numbers, num_prompts)
                texts = [settings.prompts[j].replace("{}", names[i]) for i, j in zip(classes, prompts, strict=True)]
                embeddings = tower.embed(tower.tokenize(texts))
                if embeddings.shape[1] != embed_dim:
                    raise PipelineError(
                        f"{tower.name}: a text embedding has {embeddings.shape[1]} values, an image's {embed_dim}. "
                        "They are not of one space: leave --class-text out."
                    )
                np.add.at(summed, classes, embeddings)
                bar.advance(len(texts))
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        raise PipelineError(
            f"{tower.name}: the text tower cannot embed the class names ({first_line(error)}). "
            "Do its config.json and its tokenizer belong together?"
        ) from error
    return (summed / num_prompts).astype(np.float32)


def load_text_tower(name: str, revision: str | None, teacher: Teacher) -> TextTower:
    """Load the text tower that belongs to a teacher.

    Args:
        name: hub name, or a folder.
        revision: hub branch, tag or commit.
        teacher: its device and precision are the text tower's, too.

    Returns:
        The tower, in evaluation mode.

    Raises:
        PipelineError: there is none, it is not whole, or its tokenizer cannot be loaded.
    """
    model, missing = load_pretrained(name, revision)
    weights = {key: weight for key, weight in model.state_dict().items() if key.startswith("text_")}
    if not weights or not hasattr(model, "get_text_features"):
        raise PipelineError(
            f"{name}: {type(model).__name__} has no text tower, which --class-text needs. "
            "Leave it out, or take the whole of a model like CLIP."
        )
    check_whole(name, "the text tower", [key for key in missing if key.startswith("text_")])
    tokenizer = load_tokenizer(name, revision)
    model.vision_model = None  # it is the teacher, and need not lie in memory twice
    with batch_must_fit(1, "the text tower"):
        model = model.eval().requires_grad_(False).to(teacher.model.device, teacher.model.dtype)
    return TextTower(name, model, tokenizer, weights_sha256(weights))


def _check_finite(tower: TextTower, classes: Sequence[str], embeddings: NDArray[np.float32]) -> None:
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        raise PipelineError(
            f"{tower.name}: the text embedding of class {classes[int(finite.argmin())]!r} has values that are not "
            "finite. Try --precision float32; if that does not help, the text tower's weights are damaged."
        )
