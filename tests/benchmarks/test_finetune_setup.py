"""What is trained on and evaluated on, at what size and in what arithmetic."""

from pathlib import Path

import datasets
import pytest
import torch
import transformers

from benchmarks.finetune_setup import set_up
from pipeline import runtime
from tests.benchmarks.examples import coloured_images, coloured_split, settings_of
from tests.conftest import CLASS_NAMES


def test_held_out_images_are_chosen_by_content_and_not_trained_on(tiny_teacher: Path, tmp_path: Path) -> None:
    splits = {"train": coloured_split(60, 0), "other": coloured_split(12, 1)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
    shuffled = {"train": splits["train"].shuffle(seed=1), "test": coloured_split(12, 1)}
    datasets.DatasetDict(shuffled).save_to_disk(str(tmp_path / "shuffled"))
    # The first has no split to evaluate on; the second has, and is told not to.
    setups = [
        set_up(settings_of(tiny_teacher, tmp_path / name, tmp_path / "fine", holdout=holdout))
        for name, holdout in (("data", False), ("shuffled", True))
    ]
    apart, same = ({bytes(key) for key in setup.evaluated.keys} for setup in setups)
    assert apart == same
    for setup in setups:
        trained = {bytes(key) for key in setup.train.keys}
        assert len(trained) + len(apart) == 60
        assert not trained & apart
        assert setup.evaluated_on == "held-out tenth of the training split"


def test_images_are_kept_at_their_own_size_but_no_larger_than_the_teachers(tiny_teacher: Path, tmp_path: Path) -> None:
    for size in (8, 40):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})
        columns = {"image": coloured_images(30, 0, size), "label": [row % 3 for row in range(30)]}
        rows = datasets.Dataset.from_dict(columns, features=features)
        datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / f"{size}"))
    sizes = [
        set_up(settings_of(tiny_teacher, tmp_path / folder, tmp_path / "fine", image_size=asked)).image_size
        for folder, asked in (("8", None), ("40", None), ("40", 24))
    ]
    assert sizes == [8, 16, 24]


def test_classes_of_the_evaluation_split_are_those_of_training_by_name(tiny_teacher: Path, tmp_path: Path) -> None:
    renamed = datasets.ClassLabel(names=["cat", "bee", "ant"])
    test = coloured_split(12, 1)
    labels = [2 - label for label in test["label"]]
    test = test.remove_columns("label").add_column("label", labels).cast_column("label", renamed)
    datasets.DatasetDict(train=coloured_split(30, 0), test=test).save_to_disk(str(tmp_path / "data"))
    setup = set_up(settings_of(tiny_teacher, tmp_path / "data", tmp_path / "fine"))
    assert setup.evaluated.labels.tolist() == [row % 3 for row in range(12)]


@pytest.mark.parametrize(
    ("teacher", "asked", "expected"),
    [
        ("vit", "auto", torch.bfloat16),
        ("convnext", "auto", torch.float32),  # convolutions that overlap
        ("convnext", "bfloat16", torch.bfloat16),
        ("vit", "float32", torch.float32),
    ],
)
def test_auto_is_bfloat16_only_where_a_cpu_computes_it_soundly(
    teacher: str,
    asked: str,
    expected: torch.dtype,
    tiny_teacher: Path,
    coloured: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "_has_bfloat16", lambda device: True)
    folder = tiny_teacher if teacher == "vit" else save_convnext(tmp_path / "convnext")
    setup = set_up(settings_of(folder, coloured, tmp_path / "fine", precision=asked))
    assert setup.compute.precision == expected
    assert all(weight.dtype == torch.float32 for weight in setup.teacher.model.parameters())


def save_convnext(folder: Path) -> Path:
    config = transformers.ConvNextConfig(num_stages=2, patch_size=2, hidden_sizes=[4, 8], depths=[1, 1])
    transformers.ConvNextModel(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
