"""Which blocks of a student are computed in training as `branches` has them, and what is faster for the others."""

from typing import Any

import torch
from jaxtyping import Float
from timm.layers import Attention, DropPath, Mlp
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pipeline.distill.attention import (
    QUICK_GELU_SLOPE,
    FusedGELU,
    leave_unused_tokens_out,
    may_be_laid_out,
    use_fused_gelu,
)
from pipeline.distill.branches import (
    NOTHING_DROPPED,
    AttentionParts,
    Dropped,
    Linear,
    MlpParts,
    Norm,
    attention_branch,
    draw_kept,
    mlp_branch,
    precision_of,
)


def use_faster_parts(model: nn.Module, device: torch.device) -> None:
    """Replace parts of a student by others that train the same, sooner.

    Args:
        model: of timm; changed in place. Outside training it computes as before.
        device: where it is.
    """
    use_fused_gelu(model)
    use_fused_blocks(model, device)
    leave_unused_tokens_out(model)


def use_fused_blocks(model: nn.Module, device: torch.device) -> None:
    """Let those blocks of a vision transformer that `FusedBlock` can take be computed by it, on a CPU.

    Args:
        model: of timm; changed in place. Outside training it computes as before.
        device: where it is. A GPU has kernels of its own for all this.
    """
    if device.type != "cpu" or type(model) is not VisionTransformer:
        return
    blocks: Any = model.blocks
    for index, block in enumerate(blocks):
        if _is_plain(block):
            # Of the last block only the [CLS] token is used, where that is what is pooled.
            is_last = index == len(blocks) - 1 and model.global_pool == "token"
            blocks[index] = FusedBlock(block, used=1 if is_last else None)


def _is_plain(block: Any) -> bool:
    """Whether a block has just the parts that `branches` computes."""
    if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return False
    attention, mlp = block.attn, block.mlp
    absent = (block.ls1, block.ls2, attention.q_norm, attention.k_norm, attention.norm, mlp.norm)
    layers = (attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
    norms = (block.norm1, block.norm2)
    return (
        all(type(part) is nn.Identity for part in absent)
        and getattr(attention, "gate", None) is None
        and attention.proj_drop.p == mlp.drop1.p == mlp.drop2.p == 0
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)
        and all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)
        and attention.attn_dim == attention.qkv.in_features
        and (type(mlp.act) in (QuickGELU, FusedGELU) or (type(mlp.act) is nn.GELU and mlp.act.approximate == "none"))
    )


class FusedBlock(nn.Module):
    """A pre-norm block, computed by `branches` in training. Its parameters keep their names."""

    def __init__(self, block: Block, used: int | None = None) -> None:
        """Take over a block's parts.

        Args:
            block: one that `use_fused_blocks` would take.
            used: compute so many of the first tokens in training, since nothing else of it is used; none: all.
        """
        super().__init__()
        self._whole = (block,)  # in a tuple, so that its parts are not registered twice
        self.used = used
        for name, part in block.named_children():
            self.add_module(name, part)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch used width"]:
        """Compute the block: in training of the used tokens, else of all."""
        block: Any = self._whole[0]
        if not (self.training and may_be_laid_out(tokens.shape[1], block.attn)):
            whole: Tensor = block(tokens)
            return whole
        attention, mlp = block.attn, block.mlp
        used = self.used or tokens.shape[1]
        parts = AttentionParts(_norm(block.norm1), _linear(attention.qkv), _linear(attention.proj), attention.num_heads)
        dropped, path = self._dropped(tokens, used), _drawn_path(block.drop_path1, tokens)
        tokens = attention_branch(tokens, parts, used, dropped, path)
        slope = None if isinstance(mlp.act, nn.GELU) else QUICK_GELU_SLOPE
        path = _drawn_path(block.drop_path2, tokens)
        return mlp_branch(tokens, MlpParts(_norm(block.norm2), _linear(mlp.fc1), _linear(mlp.fc2), slope), path)

    def _dropped(self, tokens: Tensor, used: int) -> Dropped:
        attention: Any = self._whole[0].attn
        if not attention.attn_drop.p:
            return NOTHING_DROPPED
        shape = (len(tokens) * attention.num_heads, used, tokens.shape[1])
        return Dropped(*draw_kept(tokens.new_empty(shape, dtype=precision_of(tokens)), attention.attn_drop.p))


def _drawn_path(path: nn.Module, tokens: Tensor) -> Tensor | None:
    """Draw which images keep a branch, as timm does (arXiv 1603.09382): 0, or what makes up for them."""
    if not isinstance(path, DropPath) or not path.drop_prob:
        return None
    kept = tokens.new_empty((len(tokens), 1, 1)).bernoulli_(1 - path.drop_prob)
    return kept.div_(1 - path.drop_prob) if path.scale_by_keep and path.drop_prob < 1 else kept


def _linear(layer: Any) -> Linear:
    return Linear(layer.weight, layer.bias)


def _norm(layer: Any) -> Norm:
    return Norm(layer.weight, layer.bias, layer.eps)
