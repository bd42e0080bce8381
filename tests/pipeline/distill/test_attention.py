from typing import Any, cast

import pytest
import torch

from pipeline.distill.attention import use_explicit_attention
from tests.pipeline.distill.examples import CPU, make_student


def fused(model: torch.nn.Module) -> list[bool]:
    return [cast(Any, layer).fused_attn for layer in model.modules() if hasattr(layer, "fused_attn")]


def test_attention_is_explicit_inside_the_block_only() -> None:
    model = make_student("test_vit", 16).model
    before = fused(model)
    assert before
    assert all(before)
    with use_explicit_attention(model, CPU):
        assert not any(fused(model))
    assert fused(model) == before


def test_it_is_given_back_after_an_error() -> None:
    model = make_student("test_vit", 16).model
    with pytest.raises(ZeroDivisionError), use_explicit_attention(model, CPU):
        raise ZeroDivisionError
    assert all(fused(model))


def test_a_layer_that_was_explicit_before_stays_so() -> None:
    model = make_student("test_vit", 16).model
    layer = next(cast(Any, layer) for layer in model.modules() if hasattr(layer, "fused_attn"))
    layer.fused_attn = False
    before = fused(model)
    with use_explicit_attention(model, CPU):
        assert not any(fused(model))
    assert fused(model) == before


def test_on_other_devices_nothing_changes() -> None:
    model = make_student("test_vit", 16).model
    with use_explicit_attention(model, torch.device("cuda")):
        assert all(fused(model))


def test_a_model_without_attention_is_left_alone() -> None:
    with use_explicit_attention(make_student("test_resnet", 8).model, CPU):
        pass


def test_both_ways_give_the_same_answers_and_gradients() -> None:
    student = make_student("test_vit", 16)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        with use_explicit_attention(student.model, torch.device(device)):
            logits = student(pixels)[1]
            gradients = torch.autograd.grad(logits.square().sum(), list(student.parameters()), allow_unused=True)
        found.append([logits, *(gradient for gradient in gradients if gradient is not None)])
    explicit, kernel = found
    assert len(explicit) == len(kernel) > 10
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(explicit, kernel, strict=True))
