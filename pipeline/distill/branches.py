"""The two branches of a transformer's block with their backward passes written out, for a CPU.

tokens + path · attention(norm(tokens)), and the same with the MLP. They are what autograd would compute, in fewer
passes over memory: scales are multiplied into weights instead of activations, and heads are laid side by side once.
Norms and sums of tokens are in the tokens' own type, products in that of autocast.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_LEVELS = 1 << 16


class Norm(NamedTuple):
    """A layer norm."""

    weight: Float[Tensor, " width"]
    bias: Float[Tensor, " width"]
    eps: float


class Linear(NamedTuple):
    """A linear layer."""

    weight: Float[Tensor, "outputs inputs"]
    bias: Float[Tensor, " outputs"]

    def scaled(self, factor: float, precision: torch.dtype) -> "Linear":
        """Return the layer times a factor, in another type."""
        return Linear(*((each if factor == 1 else each * factor).to(precision) for each in self))

    def __call__(self, rows: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """Compute the layer."""
        return torch.addmm(self.bias, rows, self.weight.T)


class AttentionParts(NamedTuple):
    """What attention's branch is made of: `projection` is to queries, keys and values, one after another."""

    norm: Norm
    projection: Linear
    last: Linear
    num_heads: int


class MlpParts(NamedTuple):
    """What the MLP's branch is made of. `slope`: a of QuickGELU, x · σ(a x); none: GELU."""

    norm: Norm
    first: Linear
    second: Linear
    slope: float | None


class Dropped(NamedTuple):
    """What is dropped of attention: `kept` is 1 or 0 a weight, `scale` makes up for what is lost."""

    kept: Float[Tensor, "heads used tokens"] | None
    scale: float


NOTHING_DROPPED = Dropped(None, 1.0)


def attention_branch(
    tokens: Float[Tensor, "batch tokens width"],
    parts: AttentionParts,
    used: int,
    dropped: Dropped = NOTHING_DROPPED,
    path: Float[Tensor, "batch 1 1"] | None = None,
) -> Float[Tensor, "batch used width"]:
    """Add self-attention of normed tokens to them.

    Args:
        tokens: on a CPU.
        parts: norm and layers.
        used: so many of the first tokens are wanted.
        dropped: of softmax's weights.
        path: what the branch of each image is multiplied by.
    """
    (weight, bias), width = parts.projection, tokens.shape[2]
    query, pairs = Linear(weight[:width], bias[:width]), Linear(weight[width:], bias[width:])
    settings = (parts.num_heads, used, parts.norm.eps, dropped.scale, precision_of(tokens))
    learned = (*parts.norm[:2], *query, *pairs, *parts.last)
    with torch.autocast("cpu", enabled=False):
        computed: Tensor = _Attention.apply(settings, dropped.kept, path, tokens, *learned)
    return computed


def mlp_branch(
    tokens: Float[Tensor, "batch tokens width"], parts: MlpParts, path: Float[Tensor, "batch 1 1"] | None = None
) -> Float[Tensor, "batch tokens width"]:
    """Add an MLP of normed tokens to them.

    Args:
        tokens: on a CPU.
        parts: norm, layers and activation.
        path: what the branch of each image is multiplied by.
    """
    settings = (parts.slope, parts.norm.eps, precision_of(tokens))
    with torch.autocast("cpu", enabled=False):
        computed: Tensor = _Mlp.apply(settings, path, tokens, *parts.norm[:2], *parts.first, *parts.second)
    return computed


def draw_kept(like: Float[Tensor, "heads used tokens"], probability: float) -> tuple[Tensor, float]:
    """Draw what attention dropout drops, with 16 bits a weight: four share one random number of 64 bits.

    PyTorch's own dropout takes a fifth of a step.

    Args:
        like: nothing of it is read but shape and type.
        probability: of a weight to become 0, 0 ≤ p < 1; rounded to a multiple of 2⁻¹⁶.

    Returns:
        Ones and zeros of that type, and what to multiply by, so that the mean stays.
    """
    threshold = min(round(probability * _LEVELS), _LEVELS - 1)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64)
    words.random_(-(2**63), None)
    levels = words.view(torch.int16)[: like.numel()].view(like.shape)
    # 1 and 0 of the weights' own type: products with them take half the time of a mask.
    kept = torch.ge(levels, threshold - _LEVELS // 2, out=torch.empty_like(like))
    return kept, _LEVELS / (_LEVELS - threshold)


def precision_of(tokens: Tensor) -> torch.dtype:
    """Return the type of products with tokens: that of autocast inside of it, else their own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tokens.dtype


class _Attention(torch.autograd.Function):
    """Attention's branch. The scale of queries is multiplied into their projection, dropout's into the last one."""

    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Any, ...], kept: Tensor | None, path: Tensor | None, tokens: Tensor, *learned: Tensor
    ) -> Tensor:
        num_heads, used, eps, scale, precision = settings
        norm, query, pairs, last = learned[:2], Linear(*learned[2:4]), Linear(*learned[4:6]), Linear(*learned[6:])
        batch, _, width = tokens.shape
        query = query.scaled((width // num_heads) ** -0.5, precision)
        pairs, last = pairs.scaled(1, precision), last.scaled(1, precision)
        last = last if scale == 1 else Linear(learned[6].mul(scale).to(precision), last.bias)

        normed, *moments = torch.native_layer_norm(tokens, (width,), norm[0], norm[1], eps)
        normed = normed.to(precision)
        first = normed[:, :used].reshape(-1, width)
        (asking,) = _heads(query(first), 1, batch, num_heads)
        asked = _heads(pairs(normed.view(-1, width)), 2, batch, num_heads)
        weights = torch.bmm(asking, asked[0].transpose(1, 2)).softmax(dim=-1)
        thinned = weights if kept is None else weights * kept
        mixed = _rows(torch.bmm(thinned, asked[1])[None], batch)
        ctx.settings = settings
        ctx.save_for_backward(
            kept,
            path,
            tokens,
            *norm,
            query.weight,
            pairs.weight,
            last.weight,
            *moments,
            *(first, normed, asking, asked, weights, thinned, mixed),
        )
        return tokens[:, :used] + _times(last(mixed).view(batch, used, width), path)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        num_heads, used, _, scale, precision = ctx.settings
        kept, path, tokens, *norm, query, pairs, last, mean, rstd = ctx.saved_tensors[:10]
        first, normed, asking, asked, weights, thinned, mixed = ctx.saved_tensors[10:]
        batch, _, width = tokens.shape

        given = _times(gradient, path).to(precision).reshape(-1, width)
        of_last = _of_linear(given, mixed, tokens.dtype, scale)
        (given,) = _heads(given @ last, 1, batch, num_heads)
        of_asked = torch.empty_like(asked)
        torch.bmm(thinned.transpose(1, 2), given, out=of_asked[1])
        of_weights = torch.bmm(given, asked[1].transpose(1, 2))
        of_weights = of_weights if kept is None else of_weights.mul_(kept)
        of_weights = torch._softmax_backward_data(of_weights, weights, -1, precision)
        torch.bmm(of_weights.transpose(1, 2), asking, out=of_asked[0])
        asking_rows = _rows(torch.bmm(of_weights, asked[0])[None], batch)
        asked_rows = _rows(of_asked, batch)
        query_scale = (width // num_heads) ** -0.5
        of_query = _of_linear(asking_rows, first, tokens.dtype, query_scale)
        of_query[1].mul_(query_scale)
        of_pairs = _of_linear(asked_rows, normed.view(-1, width), tokens.dtype)
        given = (asked_rows @ pairs).view(batch, -1, width)
        given[:, :used] += (asking_rows @ query).view(batch, used, width)
        of_tokens, *of_norm = _of_norm(given, tokens, (mean, rstd), norm)
        of_tokens[:, :used] += gradient
        return None, None, None, of_tokens, *of_norm, *of_query, *of_pairs, *of_last


class _Mlp(torch.autograd.Function):
    """The MLP's branch. QuickGELU is SiLU(a x) / a: a is multiplied into the first layer, 1/a into the second."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], path: Tensor | None, tokens: Tensor, *learned: Tensor) -> Tensor:
        slope, eps, precision = settings
        norm, given, width = learned[:2], Linear(*learned[2:4]), tokens.shape[2]
        first = given.scaled(slope or 1, precision)
        second = Linear(learned[4] if slope is None else learned[4] / slope, learned[5]).scaled(1, precision)

        normed, *moments = torch.native_layer_norm(tokens, (width,), norm[0], norm[1], eps)
        normed = normed.to(precision).view(-1, width)
        hidden = first(normed)
        active = F.gelu(hidden) if slope is None else F.silu(hidden)
        ctx.settings = settings
        ctx.save_for_backward(path, tokens, *norm, first.weight, second.weight, *moments, normed, hidden, active)
        return tokens + _times(second(active).view(tokens.shape), path)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slope, _, precision = ctx.settings
        path, tokens, *norm, first, second, mean, rstd, normed, hidden, active = ctx.saved_tensors

        given = _times(gradient, path).to(precision).reshape(-1, tokens.shape[2])
        of_second = _of_linear(given, active, tokens.dtype, 1 / (slope or 1))
        given = given @ second
        if slope is None:
            given = torch.ops.aten.gelu_backward(given, hidden, approximate="none")
        else:
            given = torch.ops.aten.silu_backward(given, hidden)
        of_first = _of_linear(given, normed, tokens.dtype, slope or 1)
        of_first[1].mul_(slope or 1)
        of_tokens, *of_norm = _of_norm(given @ first, tokens, (mean, rstd), norm)
        of_tokens += gradient
        return None, None, of_tokens, *of_norm, *of_first, *of_second


def _times(branch: Tensor, path: Tensor | None) -> Tensor:
    return branch if path is None else branch * path


def _heads(rows: Float[Tensor, "rows columns"], several: int, batch: int, num_heads: int) -> Tensor:
    """Lay heads side by side: [several, batch · heads, tokens, width of a head]."""
    laid = rows.view(batch, -1, several, num_heads, rows.shape[1] // several // num_heads).permute(2, 0, 3, 1, 4)
    return laid.reshape(several, batch * num_heads, *laid.shape[3:])


def _rows(heads: Float[Tensor, "several heads tokens head_width"], batch: int) -> Float[Tensor, "rows columns"]:
    """Undo `_heads`."""
    several, heads_of_all, tokens, head_width = heads.shape
    split = heads.view(several, batch, heads_of_all // batch, tokens, head_width)
    return split.permute(1, 3, 0, 2, 4).reshape(batch * tokens, -1)


def _of_linear(given: Tensor, taken: Tensor, kind: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the gradients of a layer's weight, which was scaled by a factor, and of its bias as it was added."""
    weight, bias = (given.T @ taken).to(kind), given.sum(0).to(kind)
    return (weight if factor == 1 else weight.mul_(factor)), bias


def _of_norm(given: Tensor, taken: Tensor, moments: tuple[Tensor, Tensor], norm: Sequence[Tensor]) -> Any:
    """Return the gradients of a norm's input, weight and bias."""
    given = given.to(taken.dtype).view(taken.shape)
    every = [True, True, True]
    return torch.ops.aten.native_layer_norm_backward(given, taken, taken.shape[-1:], *moments, *norm, every)
