"""A step by parts, and compiled: by a stand-in, for a compiler takes a minute (`test_training` has a slow test)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.distill.feed import Feed
from pipeline.distill.method import LOSSES, Batch, Method, Samples
from pipeline.distill.step import ForwardBackward
from tests.pipeline.distill.examples import CPU, join_example, make_recipe, make_student, noise_images

FLOAT = torch.float32
Made = tuple[Method, list[Batch]]


def make(folder: Path, name: str = "test_vit", image_size: int = 16, dropout: float = 0.0, **fields: Any) -> Made:
    """Make a method in training mode, and batches of 8 and 3 images."""
    recipe = make_recipe(batch_size=8, logit_scale=5.0, **fields)
    images = noise_images(11, 0, image_size=image_size)
    targets = join_example(images, folder, recipe)
    student = make_student(name, image_size)
    if dropout:
        student.model.head_drop = nn.Dropout(dropout)
    torch.manual_seed(1)
    method = Method(student, targets, "both", recipe).train()
    return method, list(Feed(images, targets, recipe, CPU, 0).epoch(1))


def gradients(method: Method) -> dict[str, Tensor]:
    found = {
        name: parameter.grad.clone() for name, parameter in method.named_parameters() if parameter.grad is not None
    }
    method.zero_grad(set_to_none=True)
    return found


def parts_of(size: int, micro_batch: int | None, made: Made) -> list[tuple[int, int]]:
    """Return which parts of a batch of this size are computed one by one."""
    method, (batch, _) = made
    whole = Batch(batch.pixels[:1].expand(size, -1, -1, -1), torch.ones(size, 3) / 3, None)
    seen: list[tuple[int, int]] = []

    class Spy(ForwardBackward):
        def _run(self, method: Callable[..., Tensor], batch: Batch) -> Tensor:
            seen.extend(self._parts(len(batch.pixels)))
            return torch.zeros(len(LOSSES))

    Spy(method, FLOAT, micro_batch)(whole)
    return seen


# Parts


def test_a_batch_is_cut_into_parts_of_which_none_is_one_image(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert parts_of(8, None, made) == [(0, 8)]
    assert parts_of(8, 8, made) == parts_of(8, 100, made) == [(0, 8)]
    assert parts_of(8, 3, made) == [(0, 3), (3, 6), (6, 8)]
    assert parts_of(7, 3, made) == [(0, 3), (3, 7)]
    assert parts_of(3, 2, made) == [(0, 3)]
    assert parts_of(2, 2, made) == [(0, 2)]


@pytest.mark.parametrize("micro_batch", [2, 3, 7])
def test_parts_add_up_to_the_batchs_losses_and_gradients(micro_batch: int, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "cosine_weight": 0.5,
        "soft_label_weight": 0.5,
        "direction_weight": 0.3,
        "text_weight": 0.2,
    }
    method, (batch, short) = make(tmp_path, **fields)
    for each in (batch, short):
        whole = ForwardBackward(method, FLOAT, None)(each)
        expected = gradients(method)
        found = ForwardBackward(method, FLOAT, micro_batch)(each)
        assert found.tolist() == pytest.approx(whole.tolist(), rel=1e-5, abs=1e-6)
        for name, gradient in gradients(method).items():
            assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-6), name


def test_gradients_are_added_to_what_is_there(tmp_path: Path) -> None:
    method, (batch, _) = make(tmp_path)
    step = ForwardBackward(method, FLOAT, None)
    step(batch)
    once = gradients(method)
    step(batch)
    step(batch)
    for name, gradient in gradients(method).items():
        assert torch.allclose(gradient, 2 * once[name], rtol=1e-5, atol=1e-7), name


def test_losses_are_float32_and_detached_in_either_precision(tmp_path: Path) -> None:
    method, (batch, _) = make(tmp_path)
    found = {precision: ForwardBackward(method, precision, None)(batch) for precision in (FLOAT, torch.bfloat16)}
    assert all(losses.dtype == FLOAT and not losses.requires_grad for losses in found.values())
    assert not torch.equal(found[FLOAT], found[torch.bfloat16])
    assert found[FLOAT].tolist() == pytest.approx(found[torch.bfloat16].tolist(), rel=0.05)


# Compiled


class Compiler:
    """Stands for `torch.compile`: calls the method itself, draws random numbers, and notes the batches' sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.options: dict[str, Any] = {}

    def __call__(self, method: Method, **options: Any) -> Callable[..., Tensor]:
        self.options = options

        def compiled(part: Batch, candidates: Samples | None, size: int) -> Tensor:
            self.sizes.append(size)
            losses: Tensor = method(part, candidates, size)
            return losses

        return compiled


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(torch, "compile", found)
    return found


def test_only_whole_batches_are_compiled_for(compiler: Compiler, tmp_path: Path) -> None:
    method, (batch, short) = make(tmp_path)
    step = ForwardBackward(method, FLOAT, None, compiled_size=8)
    for each in (short, batch, short, batch):
        step(each)
    assert compiler.sizes == [8, 8, 8]  # the first of them is a trial
    assert compiler.options["dynamic"] is False


def test_a_compiled_step_is_the_step_itself(compiler: Compiler, tmp_path: Path) -> None:
    """Its trial leaves no trace: neither in gradients nor in running statistics nor in what dropout draws."""
    found = []
    for compiled_size in (None, 8):
        method, batches = make(tmp_path, "test_resnet", 8, dropout=0.5)
        step = ForwardBackward(method, FLOAT, None, compiled_size=compiled_size)
        losses = []
        for number, batch in enumerate(batches):
            torch.manual_seed(number)
            losses.append(step(batch).tolist())
        found.append((losses, gradients(method), method.state_dict()))
    (plain, grads, state), (compiled, other_grads, other_state) = found
    assert compiled == plain
    assert all(torch.equal(tensor, grads[name]) for name, tensor in other_grads.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in other_state.items())
    assert compiler.sizes == [8, 8]


def test_graphs_are_spoken_of_where_there_are_some(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds and 200 MB to name them, of a process that may never compile."""
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: pytest.fail("there is no graph"))
    method, (batch, short) = make(tmp_path)
    ForwardBackward(method, FLOAT, None)(batch)
    step = ForwardBackward(method, FLOAT, None, compiled_size=8)
    step(batch)
    marked: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(None))
    step._has_graphs = True
    step(short)
    assert marked == []
    step(batch)
    assert marked == [None]


def fail_at_once(method: Method, **options: Any) -> Callable[..., Tensor]:
    raise RuntimeError("torch.compile is not supported here\nand more")


def fail_at_the_first_batch(method: Method, **options: Any) -> Callable[..., Tensor]:
    def compiled(part: Batch, candidates: Samples | None, size: int) -> Tensor:
        method(part, candidates, size)[0].backward()
        raise RuntimeError("torch.compile is not supported here\nand more")

    return compiled


def test_the_time_that_compiling_takes_is_told_apart(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([10.0, 40.0])
    monkeypatch.setattr("pipeline.distill.step.time.monotonic", lambda: next(now))
    method, (batch, _) = make(tmp_path)
    step = ForwardBackward(method, FLOAT, None, compiled_size=8)
    assert step.compile_seconds == 0
    step(batch)
    step(batch)
    assert step.compile_seconds == 30


@pytest.mark.parametrize("fail", [fail_at_once, fail_at_the_first_batch])
def test_where_compilation_fails_the_reason_is_said_and_the_step_is_not_compiled(
    fail: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_embed_kd")
    found = []
    for compiled_size in (None, 8):
        monkeypatch.setattr(torch, "compile", fail)
        method, batches = make(tmp_path, "test_resnet", 8, dropout=0.5)
        step = ForwardBackward(method, FLOAT, 4, compiled_size=compiled_size)
        torch.manual_seed(5)
        losses = [step(batch).tolist() for batch in batches]
        found.append((losses, gradients(method), method.state_dict()))
    (plain, grads, state), (other, other_grads, other_state) = found
    assert other == plain
    assert all(torch.equal(tensor, grads[name]) for name, tensor in other_grads.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in other_state.items())
    said = "The step is not compiled (torch.compile is not supported here): going on without."
    assert caplog.messages.count(said) == 1
