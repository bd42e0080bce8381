"""What moves the weights: AdamW, the schedule of its learning rate, and the moving average of what it makes."""

import copy
import math
from typing import Any

import torch
from torch import nn

from pipeline.distill.method import Method
from pipeline.distill.recipe import Recipe


def make_optimizer(method: Method, recipe: Recipe) -> torch.optim.AdamW:
    """Make AdamW over everything that is learned.

    Args:
        method: on its device.
        recipe: learning rate and weight decay.

    Returns:
        The optimizer, which updates all weights in one kernel.
    """
    spared = set(getattr(method.student.model, "no_weight_decay", set)())
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in method.named_parameters():
        weight = parameter.ndim > 1 and name.removeprefix("student.model.") not in spared
        decays = name != "log_logit_scale" and (recipe.decay_all or weight)
        (decayed if decays else rest).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}]
    groups += [{"params": rest, "weight_decay": 0.0}] if rest else []
    return torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step.

    Args:
        recipe: its highest value, warm-up and schedule.
        step: from 0, since the start of the run.
        steps_per_epoch: of this data.

    Returns:
        A straight rise over the warm-up, then constant, or half a cosine that would be 0 one step after the last one
        (arXiv 1608.03983, without restarts).
    """
    num_steps = recipe.epochs * steps_per_epoch
    return recipe.learning_rate * rate_share(step, num_steps, recipe.warmup, decays=recipe.schedule == "cosine")


def rate_share(step: int, num_steps: int, warmup: float, *, decays: bool = True) -> float:
    """Return the share of the highest learning rate that a step has, as `learning_rate` describes it.

    Args:
        step: from 0, since the start of the run.
        num_steps: of the whole run.
        warmup: share of them in which the rate rises.
        decays: along half a cosine, after that.
    """
    warmup_steps = round(warmup * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if not decays:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(num_steps - warmup_steps, 1)))


class WeightAverage:
    """A moving average of all that is learned; its student is the one that is kept (arXiv 1803.05407, 2104.03602)."""

    def __init__(self, method: Method, decay: float) -> None:
        """Begin with the weights as they are.

        Args:
            method: on its device.
            decay: what stays at each step; less in the first steps, which are far from the last.
        """
        self.method = copy.deepcopy(method)
        self._decay = decay
        # These stay the same tensors, and looking them up again at every step takes time on the CPU.
        self._averaged, self._learned = _tensors(self.method), _tensors(method)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights as they are now into the average.

        Args:
            step: from 0, since the start of the run.
        """
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged[0], self._learned[0], share)
        for mine, other in zip(self._averaged[1], self._learned[1], strict=True):
            mine.copy_(other)


def _tensors(module: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    state = module.state_dict().values()
    floating = [tensor for tensor in state if tensor.is_floating_point()]
    return floating, [tensor for tensor in state if not tensor.is_floating_point()]
