"""Where the time of a step goes: the profiler's table, and beside it the matrix products of the step alone."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.distill_loops import our_step
from benchmarks.distill_rounds import WARM_STEPS, compare, in_rounds, seconds_of, step_times, timer
from benchmarks.distill_setup import Setup
from benchmarks.distill_speed import timed_subject
from benchmarks.figure_book import Figures
from pipeline.distill.attention import ClassTokenBlock
from pipeline.distill.loop import Trainer
from pipeline.runtime import keep_freed_memory

SHOWN, PROFILED_STEPS = 15, 5
Product = Callable[[], Tensor]


def measure_profile(setup: Setup) -> Figures:
    """Profile steps of recipe `paper` with class embeddings, and time their matrix products alone, in turn with them.

    The products are those of the transformer's blocks, forward and backward, in the step's precision, on numbers that
    lie ready. Nothing that a step does in them can be faster than the fastest of all passes over them: the bound.
    """
    keep_freed_memory()
    with timed_subject(setup).prepared() as prepared:
        step, trainer = our_step(prepared), prepared.trainer
        products = products_of(trainer)

        def multiply() -> None:
            for product in products:
                product()

        sides = {name: timer(each, setup.device) for name, each in {"step": step, "products": multiply}.items()}
        seconds = in_rounds(sides, setup.pairs, setup.device)
        table = profile_steps(step, setup.device)
    bound = min(seconds["products"])
    return {
        "precision": str(trainer.compute.precision),
        "products": len(products),
        **step_times(seconds),
        "bound, ms": round(1e3 * bound, 2),
        "step over bound": compare(seconds["step"], [bound] * len(seconds["step"])),
        "operators by their own time": table,
    }


def profile_steps(step: Callable[[], None], device: str) -> list[Figures]:
    """Return the operators that take most time of their own, with their shares of all operators' time."""
    kind = torch.device(device).type
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kind == "cuda" else [])]
    seconds_of(step, WARM_STEPS, device)
    with profile(activities=activities) as profiler:
        seconds_of(step, PROFILED_STEPS, device)
    own = "self_device_time_total" if kind == "cuda" else "self_cpu_time_total"
    # A GPU's kernels have rows too, and their time stands with the operators that launched them already.
    operators = [row for row in profiler.key_averages() if row.device_type.name == "CPU"]
    rows = sorted(operators, key=lambda row: getattr(row, own), reverse=True)
    total = sum(getattr(row, own) for row in rows)
    return [
        {
            "operator": row.key[:80],
            "share": round(getattr(row, own) / total, 4),
            "ms a step": round(getattr(row, own) / 1e3 / PROFILED_STEPS, 2),
            "calls a step": round(row.count / PROFILED_STEPS, 1),
        }
        for row in rows[:SHOWN]
    ]


def products_of(trainer: Trainer) -> list[Product]:
    """Return functions that do the products of one step's blocks, one each, in the order of the passes."""
    forward: list[Product] = []
    backward: list[Product] = []
    model: Any = trainer.method.student.model
    where = {"device": trainer.compute.device, "dtype": trainer.compute.precision}
    size, tokens = trainer.recipe.batch_size, model.patch_embed.num_patches + model.num_prefix_tokens
    for block in model.blocks:
        # Tokens that anything behind the block looks at.
        used = 1 if isinstance(block, ClassTokenBlock) else getattr(block, "used", None) or tokens
        width, hidden, heads = model.embed_dim, block.mlp.fc1.out_features, block.attn.num_heads
        made = [
            linear_products(size * used, width, width, where),  # queries
            linear_products(size * tokens, width, 2 * width, where),  # keys and values
            attention_products(size * heads, (used, tokens), width // heads, where),
            linear_products(size * used, width, width, where),
            linear_products(size * used, width, hidden, where),
            linear_products(size * used, hidden, width, where),
        ]
        for there, back in made:
            forward, backward = forward + there, backward + back
    return [*forward, *reversed(backward)]


def linear_products(rows: int, inputs: int, outputs: int, where: dict[str, Any]) -> tuple[list[Product], list[Product]]:
    """Return the product of a linear layer, and those of both its gradients."""
    taken, given = torch.randn(rows, inputs, **where), torch.randn(rows, outputs, **where)
    weight = torch.randn(outputs, inputs, **where) / math.sqrt(inputs)
    return [lambda: taken @ weight.T], [lambda: given @ weight, lambda: given.T @ taken]


def attention_products(
    heads: int, tokens: tuple[int, int], width: int, where: dict[str, Any]
) -> tuple[list[Product], list[Product]]:
    """Return the two products of attention over all heads of a batch, and the four of their gradients.

    `tokens` are those that ask, and those that are asked.
    """
    query, given = (torch.randn(heads, tokens[0], width, **where) for _ in range(2))
    key, value = (torch.randn(heads, tokens[1], width, **where) for _ in range(2))
    weights, of_weights = (torch.randn(heads, *tokens, **where) for _ in range(2))
    return [lambda: query @ key.transpose(1, 2), lambda: weights @ value], [
        lambda: given @ value.transpose(1, 2),
        lambda: weights.transpose(1, 2) @ given,
        lambda: of_weights @ key,
        lambda: of_weights.transpose(1, 2) @ query,
    ]
