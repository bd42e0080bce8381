"""How a vision transformer is computed while it is trained: the same function, sooner."""

from typing import Any

import torch
from jaxtyping import Float
from timm.layers.activations import QuickGELU, quick_gelu
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

QUICK_GELU_SLOPE = 1.702  # x · σ(1.702 x)
_MOST_TOKENS = 600  # whose attention is laid out: at 1,025 that is as fast as PyTorch's kernel, and takes gigabytes


class ExplicitAttention:
    """A context in which attention is computed on a CPU as two matrix products and a softmax.

    PyTorch's fused kernel has a backward pass that is slow where sequences are short: with 65 tokens a block takes
    twice as long by it, with 577 half as long again. On other devices nothing changes.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Find the layers.

        Args:
            model: of timm, whose attention layers can do both.
            device: where it is.
        """
        layers = [layer for layer in model.modules() if hasattr(layer, "fused_attn") and device.type == "cpu"]
        num_tokens = model.patch_embed.num_patches if isinstance(model, VisionTransformer) else 0
        self._layers = [layer for layer in layers if may_be_laid_out(num_tokens, layer)]
        self._changed: list[nn.Module] = []

    def __enter__(self) -> None:
        """Change the layers that are not explicit."""
        self._changed = [layer for layer in self._layers if layer.fused_attn]
        for layer in self._changed:
            layer.fused_attn = False  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        """Change them back."""
        for layer in self._changed:
            layer.fused_attn = True  # type: ignore[assignment]


def may_be_laid_out(num_tokens: int, attention: Any) -> bool:
    """Whether attention over so many tokens may be laid out in memory, a number for each pair of them.

    Args:
        num_tokens: in one sequence.
        attention: a layer of timm. With dropout of its weights PyTorch has no other way on a CPU.
    """
    dropout = getattr(attention, "attn_drop", None)
    return num_tokens <= _MOST_TOKENS or bool(getattr(dropout, "p", 0))


def use_fused_gelu(model: nn.Module) -> None:
    """Compute QuickGELU in half the passes over memory in training, eight with autograd of its formula.

    Args:
        model: of timm; changed in place. Outside training it computes as before.
    """
    for layer in list(model.modules()):
        for name, part in layer.named_children():
            if type(part) is QuickGELU:
                setattr(layer, name, FusedGELU())


def leave_unused_tokens_out(model: nn.Module) -> None:
    """Let the last block of a vision transformer compute its [CLS] token alone, where nothing else of it is used.

    Of `base` that is a ninth of all arithmetic.

    Args:
        model: of timm; changed in place. Outside training, and where another pooling is used, it computes as before.
    """
    if type(model) is VisionTransformer and model.global_pool == "token":
        blocks: Any = model.blocks
        if type(blocks[-1]) is Block:
            blocks[-1] = ClassTokenBlock(blocks[-1])


class ClassTokenBlock(nn.Module):
    """A last block of which the first token alone is computed, in training. Its parameters keep their names."""

    def __init__(self, block: Block) -> None:
        """Take over a block's parts."""
        super().__init__()
        self._whole = (block,)  # in a tuple, so that its parts are not registered twice
        for name, part in block.named_children():
            self.add_module(name, part)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch used width"]:
        """Compute the block: of the first token in training, else of all."""
        block = self._whole[0]
        if not self.training:
            tokens = block(tokens)
        else:
            tokens = tokens[:, :1] + block.drop_path1(block.ls1(block.attn(block.norm1(tokens))[:, :1]))
            tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        return tokens


class FusedGELU(nn.Module):
    """QuickGELU by PyTorch's SiLU in training; both agree within rounding."""

    def forward(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return x · σ(1.702 x)."""
        if not self.training or torch.compiler.is_compiling():  # a compiler fuses the formula itself
            activated: Tensor = quick_gelu(values)
        else:
            activated = _ScaledSiLU.apply(values)
        return activated


class _ScaledSiLU(torch.autograd.Function):
    """SiLU(a x) / a, whose derivative is that of SiLU at a x: a cancels out."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        scaled = values * QUICK_GELU_SLOPE
        ctx.save_for_backward(scaled)
        return functional.silu(scaled).mul_(1 / QUICK_GELU_SLOPE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        found: Tensor = torch.ops.aten.silu_backward(gradient, scaled)
        return found
