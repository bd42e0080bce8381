import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.distill.method import Method
from pipeline.distill.optimizer import WeightAverage, learning_rate, make_optimizer
from pipeline.distill.recipe import Recipe
from tests.pipeline.distill.examples import join_example, make_recipe, make_student, noise_images

MakeMethod = Callable[..., Method]


@pytest.fixture
def make_method(tmp_path: Path) -> MakeMethod:
    def make(recipe: Recipe, name: str = "test_resnet", image_size: int = 8) -> Method:
        targets = join_example(noise_images(4, 0), tmp_path, recipe)
        return Method(make_student(name, image_size), targets, "class", recipe)

    return make


# The schedule


def rates(steps_per_epoch: int, **fields: object) -> list[float]:
    recipe = make_recipe(learning_rate=2.0, **fields)
    return [learning_rate(recipe, step, steps_per_epoch) for step in range(recipe.epochs * steps_per_epoch)]


def test_a_constant_learning_rate_is_constant_from_the_first_step() -> None:
    assert rates(3, epochs=2) == [2.0] * 6


def test_the_warm_up_is_a_straight_rise_that_ends_at_the_highest_value() -> None:
    assert rates(4, epochs=3, warmup=1 / 3) == [0.5, 1.0, 1.5, 2.0] + [2.0] * 8
    assert rates(4, epochs=3, warmup=1 / 6)[:3] == [1.0, 2.0, 2.0]


def test_the_cosine_falls_from_the_highest_value_to_almost_nothing() -> None:
    found = rates(4, epochs=2, schedule="cosine")
    assert found == pytest.approx([1 + math.cos(math.pi * step / 8) for step in range(8)])
    assert found[0] == 2.0
    assert found[4] == pytest.approx(1.0)
    assert 0 < found[-1] < 0.1
    assert found == sorted(found, reverse=True)


def test_the_cosine_begins_after_the_warm_up_and_would_be_zero_after_the_last_step() -> None:
    recipe = make_recipe(learning_rate=2.0, epochs=3, warmup=1 / 3, schedule="cosine")
    found = [learning_rate(recipe, step, 4) for step in range(13)]
    assert found[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert found[8] == pytest.approx(1.0)
    assert found[12] == pytest.approx(0, abs=1e-12)


def test_a_warm_up_is_as_long_a_part_of_any_run() -> None:
    assert rates(2, epochs=2, warmup=0.5) == [1.0, 2.0, 2.0, 2.0]
    assert rates(20, epochs=2, warmup=0.5).index(2.0) == 19


def test_a_warm_up_that_is_almost_the_whole_run_ends_at_the_highest_value() -> None:
    recipe = make_recipe(learning_rate=2.0, epochs=2, warmup=0.99, schedule="cosine")
    assert [learning_rate(recipe, step, 2) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


# AdamW


def decayed(method: Method, recipe: Recipe) -> dict[str, bool]:
    """Tell of every parameter whether one step decays it, by a step without gradients."""
    optimizer = make_optimizer(method, recipe)
    before = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    for parameter in method.parameters():
        with torch.no_grad():
            parameter.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert before.keys() == {name for name, _ in method.named_parameters()}
    values = {name: sorted(set(parameter.flatten().tolist())) for name, parameter in method.named_parameters()}
    shrunk = pytest.approx(1 - recipe.learning_rate * recipe.weight_decay, rel=1e-6)
    assert all(value == [1.0] or value == [shrunk] for value in values.values())
    return {name: value != [1.0] for name, value in values.items()}


def test_the_papers_recipe_decays_everything_but_the_logit_scale(make_method: MakeMethod) -> None:
    recipe = make_recipe(learning_rate=0.1, learn_logit_scale=True, direction_weight=1)
    found = decayed(make_method(recipe), recipe)
    assert not found.pop("log_logit_scale")
    assert all(found.values())
    assert {"projection.weight", "projection.bias", "regressor.weight", "student.model.fc.bias"} <= set(found)


def test_else_only_weights_are_decayed(make_method: MakeMethod) -> None:
    recipe = make_recipe(learning_rate=0.1, decay_all=False, learn_logit_scale=True)
    method = make_method(recipe, "test_vit", 16)
    found = decayed(method, recipe)
    spared = {name for name, decays in found.items() if not decays}
    shapes = {name: parameter.ndim for name, parameter in method.named_parameters()}
    assert {"student.model.pos_embed", "student.model.cls_token", "log_logit_scale", "projection.bias"} <= spared
    assert {"student.model.patch_embed.proj.weight", "student.model.head.weight", "projection.weight"} <= {
        name for name, decays in found.items() if decays
    }
    positions = {"student.model.pos_embed", "student.model.cls_token"}
    assert spared == {name for name, ndim in shapes.items() if ndim < 2} | positions


def test_the_optimizer_is_adamw_at_the_recipes_values(make_method: MakeMethod) -> None:
    recipe = make_recipe(learning_rate=0.02, weight_decay=0.3)
    method = make_method(recipe)
    optimizer = make_optimizer(method, recipe)
    assert [(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups] == [
        (0.02, 0.3, (0.9, 0.999))
    ]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(method.parameters()))


# The moving average


def floating(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items() if tensor.is_floating_point()}


def change(method: Method, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in method.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor.add_(seed)


def test_the_average_is_the_formulas_of_weights_and_running_statistics(make_method: MakeMethod) -> None:
    method = make_method(make_recipe(learn_logit_scale=True))
    average = WeightAverage(method, decay=0.4)
    expected = floating(method.state_dict())
    assert {"log_logit_scale", "projection.weight", "student.model.bn1.running_var"} <= set(expected)
    for step in range(6):
        change(method, step + 1)
        average.update(step)
        decay = min(0.4, (1 + step) / (10 + step))  # 0.1, 0.18, 0.25, 0.31, 0.36, 0.4
        now = method.state_dict()
        expected = {name: decay * tensor + (1 - decay) * now[name] for name, tensor in expected.items()}
        found = average.method.state_dict()
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, atol=1e-5), (name, step)


def test_counts_of_batches_are_copied_not_averaged(make_method: MakeMethod) -> None:
    method = make_method(make_recipe())
    average = WeightAverage(method, decay=0.9)
    change(method, 7)
    average.update(500)
    name = "student.model.bn1.num_batches_tracked"
    assert average.method.state_dict()[name].item() == method.state_dict()[name].item() == 7


def test_the_average_is_apart_from_what_is_learned(make_method: MakeMethod) -> None:
    method = make_method(make_recipe())
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    average = WeightAverage(method, decay=0.9)
    change(average.method, 3)
    average.update(0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())


def test_an_average_of_what_does_not_change_is_that(make_method: MakeMethod) -> None:
    method = make_method(make_recipe(), "test_vit", 16)  # without any count
    average = WeightAverage(method, decay=0.9)
    kept = copy.deepcopy(average.method.state_dict())
    for step in range(3):
        average.update(step)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in average.method.state_dict().items())
