import sys

import numpy as np
import pytest

from pipeline.demo.digits import CLASS_NAMES, load_digits_splits
from pipeline.errors import PipelineError


def test_the_splits_are_the_ones_that_the_teacher_was_trained_and_measured_on() -> None:
    splits = load_digits_splits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 1297, "test": 500}
    assert splits["train"].features["label"].names == list(CLASS_NAMES)
    # Pinned: another permutation would let the shipped teacher see the demonstration's test images.
    assert splits["test"]["label"][:12] == [1, 7, 6, 5, 2, 2, 9, 1, 8, 5, 5, 0]
    assert int(np.asarray(splits["test"][0]["image"], np.int64).sum()) == 5117


def test_no_image_stands_in_both_splits() -> None:
    train, test = (
        {bytes(np.asarray(image).data) for image in split["image"]} for split in load_digits_splits().values()
    )
    assert not train & test


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(PipelineError) as refused:
        load_digits_splits()
    assert str(refused.value) == ("demo needs scikit-learn, which is not installed: pip install 'clip-embed-kd[demo]'")
