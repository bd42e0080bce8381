import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.accuracy import Confusion, accuracy_of, most_confused, percent

NAMES = ("ant", "bee", "cat", "dog")


def test_the_interval_is_wilsons() -> None:
    # Half of a hundred: Newcombe, "Two-sided confidence intervals for the single proportion", 1998, method 3.
    half = accuracy_of(50, 100)
    assert (half.share, half.num_right, half.num_images) == (0.5, 50, 100)
    assert (half.low, half.high) == pytest.approx((0.4038, 0.5962), abs=5e-5)
    assert (accuracy_of(81, 263).low, accuracy_of(81, 263).high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@given(st.integers(1, 10**7), st.data())
def test_a_share_lies_in_its_interval_and_that_in_0_to_1(num_images: int, data: st.DataObject) -> None:
    found = accuracy_of(data.draw(st.integers(0, num_images)), num_images)
    assert 0 <= found.low <= found.share <= found.high <= 1


def test_an_accuracy_is_written_for_people() -> None:
    assert str(accuracy_of(1340, 2000)) == "67.0 % (64.9–69.0)"
    assert percent(1) == "100.0 %"


def test_confused_pairs_are_counted_and_the_frequent_come_first() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
    predicted = np.array([1, 1, 0, 2, 0, 1, 0, 0, 3, 3])
    assert most_confused(labels, predicted, NAMES, 10) == (
        Confusion("cat", "ant", 2, 1.0),
        Confusion("ant", "bee", 2, 0.5),
        Confusion("bee", "ant", 1, 0.5),
        Confusion("ant", "cat", 1, 0.25),
    )
    assert len(most_confused(labels, predicted, NAMES, 1)) == 1
    assert most_confused(labels, labels, NAMES, 10) == ()


def test_confusions_of_very_many_classes_take_memory_of_the_images_only() -> None:
    names = [str(number) for number in range(3_000_000)]
    found = most_confused(np.array([2_999_999, 5]), np.array([2_999_998, 5]), names, 20)
    assert found == (Confusion("2999999", "2999998", 1, 1.0),)
