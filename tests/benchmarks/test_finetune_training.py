"""What is learnt by a step, in what order, at what rates; and how accuracies are counted."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks.finetune_images import DeviceImages
from benchmarks.finetune_model import TeacherClassifier
from benchmarks.finetune_setup import Setup, set_up
from benchmarks.finetune_training import LABEL_SMOOTHING, FineTuning
from pipeline.distill.checkpoint import Checkpoints
from pipeline.errors import PipelineError
from tests.benchmarks.examples import BATCH_SIZE, NUM_TEST, NUM_TRAIN, settings_of

Make = Callable[..., tuple[Setup, FineTuning]]


@pytest.fixture
def make(tiny_teacher: Path, coloured: Path, tmp_path: Path) -> Make:
    def make_one(**changes: Any) -> tuple[Setup, FineTuning]:
        setup = set_up(settings_of(tiny_teacher, coloured, tmp_path / "out", **changes))
        return setup, FineTuning(TeacherClassifier(setup.teacher, len(setup.data.class_names)), setup)

    return make_one


def watched(training: FineTuning, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[float]]]:
    """Run to the end; return images and learning rates of each step."""
    steps: list[tuple[list[int], list[float]]] = []
    step = training.step

    def noted(chosen: NDArray[np.int64], generator: torch.Generator) -> None:
        step(chosen, generator)
        steps.append((chosen.tolist(), sorted({group["lr"] for group in training._optimizer.param_groups})))

    monkeypatch.setattr(training, "step", noted)
    assert training.run(Checkpoints(folder), None)
    return steps


def test_each_epoch_shows_every_image_once_in_an_order_of_its_own(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, training = make()
    steps = watched(training, tmp_path / "checkpoints", monkeypatch)
    assert [len(chosen) for chosen, _ in steps] == 2 * [BATCH_SIZE, BATCH_SIZE, BATCH_SIZE, NUM_TRAIN % BATCH_SIZE]
    epochs = [[row for chosen, _ in part for row in chosen] for part in (steps[:4], steps[4:])]
    assert all(sorted(epoch) == list(range(NUM_TRAIN)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_an_image_that_would_be_alone_in_a_batch_waits(make: Make, tmp_path: Path) -> None:
    _, training = make(batch_size=13, epochs=1)
    assert training.run(Checkpoints(tmp_path / "checkpoints"), None)
    assert training.progress.num_images == 26


def test_rates_rise_and_fall_and_the_classifiers_is_ten_times_as_high(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, training = make(epochs=5)
    rates = [rate for _, rate in watched(training, tmp_path / "checkpoints", monkeypatch)]
    shares = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * step / 18)) for step in range(18))]
    assert np.allclose(rates, [[1e-3 * share, 1e-2 * share] for share in shares])


def test_only_weights_of_layers_decay(make: Make) -> None:
    _, training = make()
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in training._optimizer.param_groups for p in group["params"]}
    assert decay["encoder.embeddings.patch_embeddings.projection.weight"] == 0.05
    assert decay["classifier.weight"] == 0.05
    assert decay["encoder.embeddings.cls_token"] == decay["encoder.embeddings.position_embeddings"] == 0
    assert decay["encoder.layernorm.weight"] == decay["classifier.bias"] == 0
    assert len(decay) == len(names)


def test_a_step_goes_down_the_smoothed_cross_entropy_of_its_images(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, training = make(operations=0)
    monkeypatch.setattr("benchmarks.finetune_training.augment", lambda pixels, settings, generator: pixels)
    chosen = np.arange(BATCH_SIZE)
    pixels = torch.tensor(setup.train.pixels[:BATCH_SIZE, 0]).permute(0, 3, 1, 2)

    def loss() -> float:
        with torch.no_grad():
            logits = training.model(training.model.preprocess(pixels))
            targets = torch.from_numpy(setup.train.labels[:BATCH_SIZE])
            return float(F.cross_entropy(logits, targets, label_smoothing=LABEL_SMOOTHING))

    losses = []
    for _ in range(6):
        losses.append(loss())
        training.step(chosen, torch.Generator())
    assert losses[0] == pytest.approx(math.log(3))  # of zeros
    assert float(training.tensors()["sum"]) == pytest.approx(BATCH_SIZE * sum(losses), rel=1e-5)
    assert loss() < losses[0] - 0.1


def test_accuracies_are_shares_of_the_images(make: Make) -> None:
    setup, training = make()
    images = DeviceImages(setup.evaluated, torch.device("cpu"))
    torch.manual_seed(0)
    torch.nn.init.normal_(training.model.classifier.weight)
    logits = training.model(training.model.preprocess(images.take(np.arange(NUM_TEST))[0].permute(0, 3, 1, 2)))
    right = (logits.argmax(dim=1).numpy() == setup.evaluated.labels).mean()
    assert 0 < right < 1
    assert training.evaluate(images) == pytest.approx((100 * right, 100))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_it_after_a_checkpoint(name: str, make: Make, tmp_path: Path) -> None:
    _, training = make()
    step = training.step

    def signalled(chosen: NDArray[np.int64], generator: torch.Generator) -> None:
        step(chosen, generator)
        if training.progress.num_steps == 6:
            signal.raise_signal(signal.Signals[name])

    training.step = signalled  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt if name == "SIGINT" else SystemExit) as stopped:
        training.run(Checkpoints(tmp_path / "checkpoints"), None)
    assert name == "SIGINT" or stopped.value.args == (143,)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000004", "00000006"]
    _, again = make()
    assert Checkpoints(tmp_path / "checkpoints").restore(again)
    assert (again.progress.epoch, again.progress.steps_done) == (2, 2)
    before, after = training.tensors(), again.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_loss_that_is_not_finite_stops_it(make: Make, tmp_path: Path) -> None:
    _, training = make()
    with torch.no_grad():
        training.model.classifier.bias.fill_(math.nan)
    with pytest.raises(PipelineError) as error:
        training.run(Checkpoints(tmp_path / "checkpoints"), None)
    assert str(error.value) == (
        "the loss is not finite in epoch 1, by step 4. Try a lower --lr than 0.001, or --precision float32."
    )
    assert not (tmp_path / "checkpoints").exists()
