"""How one embedding is taken from what an image encoder returns: as its authors mean it, or as was asked for.

Plain arithmetic on a model's own output; nothing is loaded here, and no library of models imported.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.extract.config import Pooling
from pipeline.extract.tower import Tower
from pipeline.progress import LOGGER

# What each pooling takes, for messages.
TAKEN = {
    "cls": "[CLS] after the last norm",
    "distilled": "the mean of [CLS] and the distillation token",
    "pooled": "its own pooled output",
    "mean": "the mean of its tokens",
    "projected": "its own pooled output in the space that it shares with text",
}
_CLASS_TOKENS = ("cls_token", "class_embedding")


@dataclass(frozen=True)
class _SpecialTokens:
    """Tokens that stand before those of the patches: a mean leaves all `count` of them out."""

    has_class: bool
    has_distillation: bool
    count: int


def resolve_pooling(tower: Tower, name: str, pooling: Pooling) -> Pooling:
    """Choose how an encoder is pooled.

    Args:
        tower: the encoder.
        name: of the teacher, for messages.
        pooling: what was asked for; `auto` is what the encoder's authors mean.

    Returns:
        Anything but `auto`.

    Raises:
        PipelineError: the encoder has no such output, or its weights are not in the checkpoint.
    """
    if pooling == "auto":
        pooling = _authors_pooling(tower)
    tokens, kind = _special_tokens(tower.model), tower.architecture
    fitting = {
        "cls": tokens.has_class,
        "distilled": tokens.has_distillation,
        "pooled": not tower.missing,
        "mean": True,
        "projected": tower.projection is not None and not tower.missing,
    }
    if fitting[pooling]:
        return pooling
    lacks = {
        "cls": f"{kind} has no [CLS] token",
        "distilled": f"{kind} has no distillation token",
        "pooled": "the checkpoint has no weights for the pooler",
        "projected": f"{kind} has no projection into a space that it shares with a text tower, which --class-text "
        "and --pooling projected need",
    }
    *most, last = [choice for choice, fits in fitting.items() if fits]
    choices = f"{', '.join(most)} or {last}" if most else last
    raise PipelineError(f"{name}: {lacks[pooling]}. Pass --pooling {choices}.")


def pool(tower: Tower, output: Any, pooling: str) -> Tensor:
    """Take the embeddings from an encoder's output.

    Args:
        tower: the encoder.
        output: what its forward pass returned; `last_hidden_state` is [B, tokens, D], [B, D, height, width], or
            [B, height, width, D] where timm says so.
        pooling: as `resolve_pooling` returned it.

    Returns:
        [B, D], in the precision of the output.
    """
    hidden: Tensor = output.last_hidden_state
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    if pooling == "projected" and tower.projection is not None:
        projected: Tensor = tower.projection(pooled)
        return projected
    if pooling == "cls":
        # CLIP's towers apply their last norm to [CLS] alone, behind `last_hidden_state`; CvT keeps [CLS] apart.
        norm = getattr(tower.model, "post_layernorm", torch.nn.Identity())
        cls: Tensor = norm(getattr(output, "cls_token_value", hidden)[:, 0])
        return cls
    if pooling == "distilled":
        return hidden[:, :2].mean(dim=1)
    if pooling == "pooled" and pooled is not None:
        return pooled.flatten(1)  # of convolutional models [B, D, 1, 1]
    if hidden.ndim == 4:
        timm_model = getattr(tower.model, "timm_model", None)
        return hidden.mean(dim=(1, 2) if getattr(timm_model, "output_fmt", "NCHW") == "NHWC" else (2, 3))
    return hidden[:, _special_tokens(tower.model).count :].mean(dim=1)


def _authors_pooling(tower: Tower) -> Pooling:
    model, kind = tower.model, tower.architecture
    tokens = _special_tokens(model)
    if hasattr(model, "timm_model"):
        LOGGER.info("%s is a model of timm: its own pooled output is the embedding.", kind)
        return "pooled"
    # With two heads, one for each token, the authors average them. Whoever trained one head on [CLS] alone did not.
    if tokens.has_distillation and model.config.architectures != ["DeiTForImageClassification"]:
        LOGGER.info("%s was distilled through a token of its own: its mean with [CLS] is the embedding.", kind)
        return "distilled"
    if not tokens.has_class:
        LOGGER.info("%s has no [CLS] token: its own pooled output is the embedding.", kind)
        return "pooled"
    if getattr(model.config, "use_mean_pooling", False):  # BEiT and its kin
        LOGGER.info("%s was made to be pooled over patches, and is.", kind)
        return "pooled"
    return "cls"


def _special_tokens(model: Any) -> _SpecialTokens:
    timm_model = getattr(model, "timm_model", None)
    if timm_model is not None:
        has_class = getattr(timm_model, "cls_token", None) is not None
        count = getattr(timm_model, "num_prefix_tokens", int(has_class))
        return _SpecialTokens(has_class, getattr(timm_model, "dist_token", None) is not None, count)
    # A token inside a pooling head (AIMv2) asks the others, and is not among them.
    names = ((name, weight) for name, weight in model.named_parameters() if not name.startswith("head."))
    tokens = {name.rpartition(".")[2]: weight for name, weight in names}
    has_class = any(name in tokens for name in _CLASS_TOKENS)
    has_distillation = "distillation_token" in tokens
    count = has_class + has_distillation
    if "register_tokens" in tokens:
        count += tokens["register_tokens"].shape[1]
    if type(model).__name__ == "DINOv3ConvNextModel":
        count += 1  # its pooled output stands before the positions, as [CLS] does in the ViTs of that family
    return _SpecialTokens(has_class, has_distillation, count)
