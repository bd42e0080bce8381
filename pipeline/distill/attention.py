"""Which attention a student computes with while it is trained. The results differ in the last bits only."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def use_explicit_attention(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute attention on a CPU as two matrix products and a softmax, instead of by PyTorch's fused kernel.

    The fused kernel's backward pass is slow where sequences are short: with 65 tokens it takes a third of the step.
    On other devices nothing changes.

    Args:
        model: of timm, whose attention layers can do both.
        device: where it is.
    """
    layers = [layer for layer in model.modules() if getattr(layer, "fused_attn", False)] if device.type == "cpu" else []
    try:
        for layer in layers:
            layer.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for layer in layers:
            layer.fused_attn = True  # type: ignore[assignment]
