import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.distill.branches import draw_kept
from pipeline.distill.fused_block import FusedBlock, use_faster_parts, use_fused_blocks
from tests.pipeline.distill.examples import CPU, make_student


def small_vit(**options: Any) -> nn.Module:
    """Return a ViT of two blocks in float64, none of whose parameters is a zero or a one."""
    torch.manual_seed(0)
    given = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**given, "act_layer": "quick_gelu", **options})
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return model.double().train()


def trained(model: nn.Module, precision: torch.dtype | None = None) -> list[Tensor]:
    """Return the logits and gradients of a step, the gradient of pixels among them."""
    generator = torch.Generator().manual_seed(0)
    kind = next(model.parameters()).dtype
    pixels = torch.randn(3, 3, 8, 8, generator=generator).to(kind).requires_grad_()
    torch.manual_seed(5)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        logits = model(pixels)
    return [logits.detach(), *torch.autograd.grad(logits.float().square().sum(), [pixels, *model.parameters()])]


def fused(model: nn.Module) -> nn.Module:
    """Return a copy whose blocks are all written out."""
    model = copy.deepcopy(model)
    use_fused_blocks(model, CPU)
    assert all(type(block) is FusedBlock for block in cast(Any, model).blocks)
    return model


def farthest(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest distance of one tensor from another, over its norm."""
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_norm": True},
        {"act_layer": None},  # GELU
        {"global_pool": "avg"},  # all tokens of the last block are used
        {"drop_path_rate": 0.5},
        {"num_heads": 1},
    ],
)
def test_a_block_and_its_gradients_are_those_of_timm(options: dict[str, Any]) -> None:
    model = small_vit(**options)
    assert farthest(trained(fused(model)), trained(model)) < 1e-12


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_dropped_attention_is_that_of_timm_with_the_same_weights_dropped(pool: str) -> None:
    model = small_vit(attn_drop_rate=0.3, global_pool=pool)
    written = fused(model)
    for block, other in zip(cast(Any, model).blocks, cast(Any, written).blocks, strict=True):
        block.attn.fused_attn = False
        block.attn.attn_drop = SameDropout(0.3, other.used)
    assert farthest(trained(written), trained(model)) < 1e-12
    assert farthest(trained(fused(small_vit(global_pool=pool))), trained(model)) > 1e-3  # something was dropped


class SameDropout(nn.Module):
    """Dropout that draws as a written out block does: for the used tokens alone."""

    def __init__(self, probability: float, used: int | None) -> None:
        super().__init__()
        self._probability, self._used = probability, used

    def forward(self, values: Tensor) -> Tensor:
        batch, heads, tokens, _ = values.shape
        used = self._used or tokens
        drawn, scale = draw_kept(values.new_empty((batch * heads, used, tokens)), self._probability)
        kept = torch.ones_like(values)
        kept[:, :, :used] = drawn.view(batch, heads, used, tokens)
        return values * kept * scale


def test_the_gradient_is_the_derivative() -> None:
    block = cast(Any, fused(small_vit(drop_path_rate=0.2, attn_drop_rate=0.2)).blocks)[0]
    tokens = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def compute(tokens: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        found: Tensor = block(tokens)
        return found

    assert torch.autograd.gradcheck(compute, (tokens, *block.parameters()))


def test_in_bfloat16_it_is_as_near_to_the_exact_step_as_timms_own() -> None:
    exact = small_vit(global_pool="avg", embed_dim=64)
    model = copy.deepcopy(exact).float()
    expected, own = trained(exact), trained(model, torch.bfloat16)
    found = trained(fused(model), torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for tensor in found[1:])
    for one, other, right in zip(found, own, expected, strict=True):
        distance = float((one - right).norm() / right.norm())
        assert distance < 1.5 * float((other - right).norm() / right.norm()) + 0.01


def test_tokens_stay_in_float32_between_blocks_in_bfloat16() -> None:
    block = cast(Any, fused(small_vit().float())).blocks[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(2, 5, 16)).dtype == torch.float32


def test_outside_training_answers_are_timms_to_the_bit_and_names_stay() -> None:
    model = small_vit(attn_drop_rate=0.3, drop_path_rate=0.3).float()
    written = fused(model)
    assert list(written.state_dict()) == list(model.state_dict())
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(written.eval()(pixels), model.eval()(pixels))
        copied = copy.deepcopy(written)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(written(pixels), model(pixels))  # a copy has weights of its own
        assert not copied(pixels).any()


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"drop_path_rate": 0.5}])
def test_a_compiler_is_given_the_same_function(options: dict[str, Any]) -> None:
    model = small_vit(**options)
    compiled = torch.compile(fused(model), backend="eager")
    assert farthest(trained(cast(nn.Module, compiled)), trained(model)) < 1e-12


def test_only_the_used_token_of_the_last_block_is_computed() -> None:
    written = cast(Any, fused(small_vit()))
    assert [block.used for block in written.blocks] == [None, 1]
    assert written.forward_features(torch.randn(2, 3, 8, 8).double()).shape[1] == 1
    assert written.eval().forward_features(torch.randn(2, 3, 8, 8).double()).shape[1] == 5


def test_a_long_sequence_is_left_to_timm_unless_attention_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    whole = Block.forward

    def forward(self: Block, tokens: Tensor) -> Tensor:
        computed.append(tokens.shape[1])
        found: Tensor = whole(self, tokens)
        return found

    monkeypatch.setattr(Block, "forward", forward)
    for dropout in (0.0, 0.1):
        model = fused(small_vit(attn_drop_rate=dropout))
        cast(Any, model).blocks[0](torch.randn(1, 601, 16, dtype=torch.float64))
    assert computed == [601]


def scaled(block: Any) -> None:
    block.ls1 = nn.Linear(16, 16)


def gated(block: Any) -> None:
    block.attn.gate = nn.Linear(16, 16)


def dropped(block: Any) -> None:
    block.attn.proj_drop.p = 0.1


def normed(block: Any) -> None:
    block.attn.q_norm = nn.LayerNorm(8)


def unbiased(block: Any) -> None:
    block.attn.qkv.bias = None


def rectified(block: Any) -> None:
    block.mlp.act = nn.ReLU()


def plain_norm(block: Any) -> None:
    block.norm1 = nn.RMSNorm(16)


def other_attention(block: Any) -> None:
    block.attn = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [scaled, gated, dropped, normed, unbiased, rectified, plain_norm, other_attention],
    ids=lambda f: f.__name__,
)
def test_a_block_of_another_kind_is_left_alone(change: Callable[[Any], None]) -> None:
    model = cast(Any, small_vit())
    change(model.blocks[0])
    use_fused_blocks(model, CPU)
    assert [type(block) is FusedBlock for block in model.blocks] == [False, True]


def test_models_of_another_kind_and_other_devices_are_left_alone() -> None:
    for model, device in ((make_student("test_resnet", 8).model, CPU), (small_vit(), torch.device("cuda"))):
        use_fused_blocks(model, device)
        assert not any(isinstance(part, FusedBlock) for part in model.modules())


def test_a_path_that_is_always_dropped_is_nothing_and_not_infinite() -> None:
    model = small_vit()
    for block in cast(Any, model).blocks:
        block.drop_path1 = DropPath(1.0)
    assert all(tensor.isfinite().all() for tensor in trained(fused(model)))


def test_a_student_of_the_paper_is_written_out_on_a_cpu() -> None:
    model = make_student("base", 32).model
    use_faster_parts(model, CPU)
    assert sum(isinstance(part, FusedBlock) for part in model.modules()) == 6


# Dropout


def test_dropout_drops_as_many_as_it_should_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    kept, scale = draw_kept(torch.empty(300, 1, 1001), 0.1)
    assert kept.mean().item() == pytest.approx(0.9, abs=0.003)
    assert torch.unique(kept).tolist() == [0, 1]
    assert scale == pytest.approx(1 / 0.9, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_that_of_the_seed_in_any_precision(dtype: torch.dtype) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(draw_kept(torch.empty(7, 5, 11, dtype=dtype), 0.3)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].dtype == dtype


def test_dropout_of_nearly_everything_is_dropout() -> None:
    kept, scale = draw_kept(torch.empty(10, 10, 10), 0.999999)
    assert scale <= 1 << 16
    assert kept.mean() < 0.02
