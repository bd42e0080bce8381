import copy
from typing import Any, cast

import pytest
import timm
import torch
from timm.layers.activations import QuickGELU

from pipeline.distill.attention import (
    ExplicitAttention,
    FusedGELU,
    leave_unused_tokens_out,
    use_fused_gelu,
)
from tests.pipeline.distill.examples import CPU, make_student


def fused(model: torch.nn.Module) -> list[bool]:
    return [cast(Any, layer).fused_attn for layer in model.modules() if hasattr(layer, "fused_attn")]


def test_attention_is_explicit_inside_the_block_only() -> None:
    model = make_student("test_vit", 16).model
    before = fused(model)
    assert before
    assert all(before)
    with ExplicitAttention(model, CPU):
        assert not any(fused(model))
    assert fused(model) == before


def test_it_is_given_back_after_an_error() -> None:
    model = make_student("test_vit", 16).model
    with pytest.raises(ZeroDivisionError), ExplicitAttention(model, CPU):
        raise ZeroDivisionError
    assert all(fused(model))


def test_a_layer_that_was_explicit_before_stays_so() -> None:
    model = make_student("test_vit", 16).model
    layer = next(cast(Any, layer) for layer in model.modules() if hasattr(layer, "fused_attn"))
    layer.fused_attn = False
    before = fused(model)
    with ExplicitAttention(model, CPU):
        assert not any(fused(model))
    assert fused(model) == before


def test_on_other_devices_nothing_changes() -> None:
    model = make_student("test_vit", 16).model
    with ExplicitAttention(model, torch.device("cuda")):
        assert all(fused(model))


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, True), (0.1, False)])
def test_long_sequences_are_left_to_the_kernel_that_holds_no_weights(dropout: float, expected: bool) -> None:
    model = timm.create_model("test_vit", img_size=400, num_classes=3, attn_drop_rate=dropout)  # 25 × 25 patches
    with ExplicitAttention(model, CPU):
        assert set(fused(model)) == {expected}


def test_a_model_without_attention_is_left_alone() -> None:
    with ExplicitAttention(make_student("test_resnet", 8).model, CPU):
        pass


def test_both_ways_give_the_same_answers_and_gradients() -> None:
    student = make_student("test_vit", 16)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        with ExplicitAttention(student.model, torch.device(device)):
            logits = student(pixels)[1]
            gradients = torch.autograd.grad(logits.square().sum(), list(student.parameters()), allow_unused=True)
        found.append([logits, *(gradient for gradient in gradients if gradient is not None)])
    explicit, kernel = found
    assert len(explicit) == len(kernel) > 10
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(explicit, kernel, strict=True))


# The activation


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_the_fused_activation_is_quick_gelu_and_so_is_its_gradient(dtype: torch.dtype, tolerance: float) -> None:
    values = torch.linspace(-30, 30, 501, dtype=dtype).requires_grad_()
    pull = torch.linspace(1, 2, 501, dtype=dtype)
    exact = values.detach().double().requires_grad_()
    expected = exact * torch.sigmoid(1.702 * exact)
    found = FusedGELU().train()(values)
    (gradient,) = torch.autograd.grad(found, values, pull)
    (expected_gradient,) = torch.autograd.grad(expected, exact, pull.double())
    assert found.dtype == dtype
    for one, other in ((found, expected), (gradient, expected_gradient)):
        assert torch.allclose(one.double(), other, rtol=tolerance, atol=tolerance)


def test_outside_training_the_fused_activation_is_timms_own_to_the_bit() -> None:
    values = torch.randn(1000)
    assert torch.equal(FusedGELU().eval()(values), QuickGELU()(values))


def test_all_activations_of_a_student_are_replaced_and_its_parameters_are_not() -> None:
    model = make_student("base", 32).model
    names = list(model.state_dict())
    use_fused_gelu(model)
    assert [type(part) for part in model.modules() if isinstance(part, QuickGELU | FusedGELU)] == [FusedGELU] * 6
    assert list(model.state_dict()) == names


def test_other_activations_stay() -> None:
    model = tiny_vit()
    use_fused_gelu(model)
    assert not any(isinstance(part, FusedGELU) for part in model.modules())


# The last block


def trained(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the logits and gradients of a step in training."""
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    logits = model.train()(pixels)
    return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]


def tiny_vit(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model("test_vit", img_size=16, num_classes=3, **options)
    return model


@pytest.mark.parametrize("options", [{}, {"drop_path_rate": 0.5}, {"attn_drop_rate": 0.3}, {"init_values": 0.5}])
def test_the_last_block_learns_the_same_from_its_first_token_alone(options: dict[str, Any]) -> None:
    whole = tiny_vit(**options)
    short = copy.deepcopy(whole)
    leave_unused_tokens_out(short)
    with ExplicitAttention(whole, CPU), ExplicitAttention(short, CPU):
        expected, found = trained(whole), trained(short)
    assert len(found) == len(expected)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(found, expected, strict=True))


def test_the_last_block_keeps_names_and_answers() -> None:
    whole = tiny_vit()
    short = copy.deepcopy(whole)
    leave_unused_tokens_out(short)
    copied = copy.deepcopy(short)
    for model in (short, copied):
        assert list(model.state_dict()) == list(whole.state_dict())
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(short.eval()(pixels), whole.eval()(pixels))  # a copy has weights of its own
        assert not copied.eval()(pixels).any()


def test_only_the_first_token_of_the_last_block_is_computed() -> None:
    model = cast(Any, tiny_vit())
    leave_unused_tokens_out(model)
    pixels = torch.randn(2, 3, 16, 16)
    assert model.train().forward_features(pixels).shape[1] == 1
    assert model.eval().forward_features(pixels).shape[1] > 1


@pytest.mark.parametrize(("name", "options"), [("test_vit", {"global_pool": "avg"}), ("test_resnet", {})])
def test_models_that_use_all_tokens_are_left_alone(name: str, options: dict[str, Any]) -> None:
    model = timm.create_model(name, num_classes=3, **options)
    parts = list(map(type, model.modules()))
    leave_unused_tokens_out(model)
    assert list(map(type, model.modules())) == parts
