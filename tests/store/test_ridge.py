from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from store import ridge
from store.ridge import PENALTY_RATIOS, TIE, Batches, RidgeHead, fit_ridge
from tests.store.examples import SEARCH

pytestmark = pytest.mark.filterwarnings("error")

Array = NDArray[Any]


def batched(embeddings: Array, class_index: Array, cuts: tuple[int, ...] = ()) -> Batches:
    """Stream the rows in batches that begin at 0 and at each cut."""

    def batches() -> Iterator[tuple[Array, Array]]:
        for start, stop in zip([0, *cuts], [*cuts, len(embeddings)], strict=True):
            yield embeddings[start:stop], class_index[start:stop]

    return batches


def fit(embeddings: Array, class_index: Array, num_classes: int, cuts: tuple[int, ...] = ()) -> RidgeHead:
    return fit_ridge(batched(embeddings, class_index, cuts), num_classes, embeddings.shape[1])


def examples(num_rows: int, embed_dim: int, num_classes: int, seed: int = 0) -> tuple[Array, Array]:
    """Draw noisy classes around their own centres, every direction with a scale of its own."""
    rng = np.random.default_rng(seed)
    class_index = rng.permutation(np.arange(num_rows) % num_classes)
    centres = rng.normal(size=(num_classes, embed_dim))
    noise = rng.normal(size=(num_rows, embed_dim))
    return (centres[class_index] + noise) * np.geomspace(1, 0.1, embed_dim) + 2, class_index


def direct_solution(embeddings: Array, class_index: Array, num_classes: int, penalty: float) -> tuple[Array, Array]:
    """Solve the least squares problem itself, with a row √λ·weight for each feature and none for the intercept."""
    num_rows, embed_dim = embeddings.shape
    rows = np.hstack([np.ones((num_rows, 1)), embeddings.astype(np.float64)])
    penalties = np.hstack([np.zeros((embed_dim, 1)), np.sqrt(penalty) * np.eye(embed_dim)])
    targets = np.vstack([np.eye(num_classes)[class_index], np.zeros((embed_dim, num_classes))])
    solution = np.linalg.lstsq(np.vstack([rows, penalties]), targets, rcond=None)[0]
    return solution[1:].T, solution[0]


def scatter_of(embeddings: Array) -> float:
    """Return the mean eigenvalue of the scatter."""
    return float(embeddings.astype(np.float64).var(axis=0).mean() * len(embeddings))


def refitted(embeddings: Array, class_index: Array, num_classes: int, penalty: float) -> tuple[float, float]:
    """Return error and accuracy of refits that leave each row out."""
    scores = np.empty((len(embeddings), num_classes))
    for row in range(len(embeddings)):
        others = np.arange(len(embeddings)) != row
        weight, bias = direct_solution(embeddings[others], class_index[others], num_classes, penalty)
        scores[row] = weight @ embeddings[row] + bias
    error = np.square(scores - np.eye(num_classes)[class_index]).mean()
    return float(error), float((scores.argmax(axis=1) == class_index).mean())


@pytest.mark.parametrize(("num_rows", "embed_dim"), [(200, 6), (12, 30), (13, 13)])
def test_the_head_is_the_direct_solution_of_the_penalised_problem(num_rows: int, embed_dim: int) -> None:
    embeddings, class_index = examples(num_rows, embed_dim, 4)
    head = fit(embeddings, class_index, 4, (5, 9))
    weight, bias = direct_solution(embeddings, class_index, 4, head.penalty)
    np.testing.assert_allclose(head.weight, weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head.bias, bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_rows", "embed_dim", "num_classes"), [(40, 5, 3), (12, 20, 2), (9, 3, 8), (2, 2, 2)])
def test_penalty_error_and_accuracy_are_those_of_refits_without_each_row(
    num_rows: int, embed_dim: int, num_classes: int
) -> None:
    embeddings, class_index = examples(num_rows, embed_dim, num_classes)
    penalties = [ratio * scatter_of(embeddings) for ratio in PENALTY_RATIOS]
    refits = [refitted(embeddings, class_index, num_classes, penalty) for penalty in penalties]
    errors = np.array([error for error, _ in refits])
    best = int(np.flatnonzero(errors <= errors.min() * (1 + TIE))[0])  # with two rows all are equal

    head = fit(embeddings, class_index, num_classes, (1,))

    assert head.penalty == pytest.approx(penalties[best], rel=1e-12)
    assert (head.loo_error, head.loo_accuracy) == pytest.approx(refits[best], rel=1e-6)


@pytest.mark.parametrize("index", range(len(PENALTY_RATIOS)))
def test_every_penalty_has_the_error_of_its_refits(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    embeddings, class_index = examples(10, 14, 3)  # fewer rows than features: leverage comes near 1
    monkeypatch.setattr(ridge, "PENALTY_RATIOS", PENALTY_RATIOS[index : index + 1])
    head = fit(embeddings, class_index, 3)
    error, accuracy = refitted(embeddings, class_index, 3, PENALTY_RATIOS[index] * scatter_of(embeddings))
    assert head.loo_error == pytest.approx(error, rel=1e-5)
    assert head.loo_accuracy == pytest.approx(accuracy)


def test_noise_gets_a_large_penalty_and_a_clear_signal_a_small_one() -> None:
    rng = np.random.default_rng(0)
    noise, class_index = rng.normal(size=(60, 8)), np.arange(60) % 2
    signal = np.eye(8)[class_index] + 1e-3 * noise
    assert fit(noise, class_index, 2).penalty > scatter_of(noise)
    clear = fit(signal, class_index, 2)
    assert clear.penalty < 1e-2 * scatter_of(signal)
    assert clear.loo_accuracy == 1
    assert clear.loo_error < 1e-4


@SEARCH
@given(data=st.data(), num_rows=st.integers(2, 30), embed_dim=st.integers(1, 40))
def test_batches_and_order_of_the_rows_change_nothing(data: st.DataObject, num_rows: int, embed_dim: int) -> None:
    embeddings, class_index = examples(num_rows, embed_dim, 3, data.draw(st.integers(0, 1000)))
    cuts = tuple(sorted(data.draw(st.lists(st.integers(0, num_rows), max_size=6))))
    order = np.array(data.draw(st.permutations(range(num_rows))))
    one = fit(embeddings, class_index, 3)
    for other in (fit(embeddings, class_index, 3, cuts), fit(embeddings[order], class_index[order], 3)):
        assert other.penalty == pytest.approx(one.penalty, rel=1e-9)
        assert other.loo_error == pytest.approx(one.loo_error, rel=1e-5)
        assert other.loo_accuracy == one.loo_accuracy
        np.testing.assert_allclose(other.weight, one.weight, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other.bias, one.bias, rtol=1e-5, atol=1e-6)


@SEARCH
@given(data=st.data(), num_rows=st.integers(1, 12), embed_dim=st.integers(1, 4), dtype=st.sampled_from("efd"))
def test_any_rows_give_finite_heads_that_solve_the_penalised_problem(
    data: st.DataObject, num_rows: int, embed_dim: int, dtype: str
) -> None:
    # Few distinct numbers: equal rows, constant features and dependent features are the rule here.
    numbers = st.sampled_from([-2.0, 0.0, 0.5, 1.0, 1000.0])
    embeddings = data.draw(hnp.arrays(dtype, (num_rows, embed_dim), elements=numbers))
    class_index = data.draw(hnp.arrays(np.int32, num_rows, elements=st.integers(0, 3)))
    head = fit(embeddings, class_index, 4)
    assert np.isfinite([head.penalty, head.loo_error, *head.weight.flat, *head.bias]).all()
    assert 0 <= head.loo_accuracy <= 1
    weight, bias = direct_solution(embeddings, class_index, 4, head.penalty)
    scores = embeddings.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias
    np.testing.assert_allclose(scores, embeddings.astype(np.float64) @ weight.T + bias, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_a_large_offset_costs_no_precision(batch_size: int) -> None:
    embeddings, class_index = examples(300, 6, 3)
    embeddings = np.round(embeddings * 2**20) / 2**20  # so that the offset can be added without rounding
    near = fit(embeddings, class_index, 3)
    far = fit(embeddings + 1e4, class_index, 3, tuple(range(batch_size, 300, batch_size)))
    np.testing.assert_allclose(far.weight, near.weight, rtol=1e-6, atol=1e-7)
    assert far.loo_error == pytest.approx(near.loo_error, rel=1e-10)
    assert far.loo_accuracy == near.loo_accuracy
    # The bias is a float32 of size 1e4: that, and not the rounding of the weights, is what may be lost.
    scores = (embeddings + 1e4) @ far.weight.T.astype(np.float64) + far.bias
    expected = embeddings @ near.weight.T.astype(np.float64) + near.bias
    np.testing.assert_allclose(scores, expected, rtol=0, atol=np.spacing(np.abs(far.bias).max()) + 1e-6)


def test_half_precision_is_accumulated_in_double() -> None:
    embeddings, class_index = examples(3000, 3, 2)
    half = (embeddings * 1000).astype(np.float16)  # the sums and squares of these overflow float16
    one, other = fit(half, class_index, 2), fit(half.astype(np.float64), class_index, 2)
    np.testing.assert_array_equal(one.weight, other.weight)
    assert one.loo_error == other.loo_error


def test_a_batch_is_converted_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, class_index = examples(50, 4, 3)
    whole = fit(embeddings, class_index, 3)
    monkeypatch.setattr(ridge, "BLOCK_ROWS", 8)
    blocks = fit(embeddings, class_index, 3)
    np.testing.assert_allclose(blocks.weight, whole.weight, rtol=1e-6)
    assert blocks.loo_error == pytest.approx(whole.loo_error, rel=1e-12)


def test_the_input_is_left_as_it_was() -> None:
    embeddings, class_index = examples(10, 3, 2)
    before = embeddings.copy(), class_index.copy()
    fit(embeddings, class_index, 2)
    np.testing.assert_array_equal(embeddings, before[0])
    np.testing.assert_array_equal(class_index, before[1])


def test_tensors_have_the_names_dtypes_and_shapes_of_the_format() -> None:
    embeddings, class_index = examples(10, 3, 2)
    tensors = fit(embeddings.astype(np.float32), class_index.astype(np.uint8), 2).tensors()
    assert {name: (array.dtype.name, array.shape) for name, array in tensors.items()} == {
        "head/weight": ("float32", (2, 3)),
        "head/bias": ("float32", (2,)),
    }
    assert tensors["head/weight"].flags.c_contiguous


def test_equal_rows_give_the_class_shares() -> None:
    head = fit(np.full((4, 3), 0.1, np.float32), np.array([0, 1, 1, 1]), 3, (1, 2))
    assert head.weight.tolist() == [[0] * 3] * 3
    assert head.bias.tolist() == [0.25, 0.75, 0]
    # Without row 0 the shares are 0, 1, 0; without another they are 1/3, 2/3, 0.
    assert head.loo_error == pytest.approx((2 + 3 * 2 / 9) / 12)
    assert head.loo_accuracy == 0.75


@pytest.mark.parametrize("spread", [1e-300, 1e-150, 1e-30, 1e-18])
def test_a_spread_of_almost_nothing_does_not_overflow(spread: float) -> None:
    head = fit(np.array([[0.0], [spread], [0.0], [spread]]), np.array([0, 1, 0, 1]), 2)
    assert np.isfinite(head.weight).all()
    np.testing.assert_allclose(head.bias + head.weight.astype(np.float64)[:, 0] * spread / 2, 0.5, rtol=1e-6)


def test_a_constant_feature_has_no_weight() -> None:
    embeddings, class_index = examples(30, 3, 2)
    embeddings[:, 1] = 0.1
    assert fit(embeddings, class_index, 2, (7,)).weight[:, 1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("only", [0, 2])
def test_rows_of_one_class_give_that_class_everywhere(only: int) -> None:
    embeddings, _ = examples(20, 4, 2)
    head = fit(embeddings, np.full(20, only), 3, (3,))
    assert head.weight.tolist() == [[0] * 4] * 3
    assert head.bias.tolist() == [float(index == only) for index in range(3)]
    assert (head.loo_error, head.loo_accuracy) == (0, 1)
    assert head.penalty == pytest.approx(PENALTY_RATIOS[0] * scatter_of(embeddings))


def test_a_class_without_rows_scores_nothing_and_one_with_a_single_row_is_fitted() -> None:
    embeddings, class_index = examples(20, 4, 2)
    class_index[0] = 3
    head = fit(embeddings, class_index, 4)
    assert head.weight[2].tolist() == [0] * 4
    assert head.bias[2] == 0
    assert np.abs(head.weight[3]).max() > 0


def test_a_single_row_gives_its_class_and_no_evidence() -> None:
    head = fit(np.array([[3.0, 4.0]]), np.array([1]), 4)
    assert head.weight.tolist() == [[0, 0]] * 4
    assert head.bias.tolist() == [0, 1, 0, 0]
    assert (head.loo_error, head.loo_accuracy) == (0.25, 0)


@pytest.mark.parametrize("empty", [[], [(np.ones((0, 2)), np.zeros(0, np.int64))]])
def test_no_rows_are_an_error(empty: list[tuple[Array, Array]]) -> None:
    with pytest.raises(ValueError, match=r"^the batches hold no rows, expected at least one embedding"):
        fit_ridge(lambda: empty, 3, 2)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_class_index_that_is_no_class_is_an_error(wrong: int) -> None:
    with pytest.raises(IndexError, match=f"^class_index {wrong} is out of bounds, expected 0…2$"):
        fit(np.ones((2, 2)), np.array([0, wrong]), 3)


@pytest.mark.parametrize(("shape", "num_rows"), [((2, 3), 2), ((2, 2), 1), ((2,), 2)])
def test_shapes_that_disagree_are_an_error(shape: tuple[int, ...], num_rows: int) -> None:
    with pytest.raises(ValueError, match=r"^embeddings are \[.*\], expected \[\d, 2\]$"):
        fit_ridge(lambda: [(np.ones(shape), np.zeros(num_rows, np.int64))], 3, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match=r"^embeddings hold NaN or infinity"):
        fit(np.array([[1, value]], np.float16), np.array([0]), 3)


def test_batches_that_can_be_read_only_once_are_an_error() -> None:
    once = iter([examples(5, 2, 2)])
    with pytest.raises(ValueError, match=r"^the second pass streamed 0 rows, expected the 5 of the first$"):
        fit_ridge(lambda: once, 2, 2)


def test_of_very_many_rows_a_random_part_chooses_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, class_index = examples(4000, 6, 4)
    whole = fit(embeddings, class_index, 4)
    judged: list[int] = []
    leave_one_out = ridge._Problem.leave_one_out

    def count(self: ridge._Problem, values: Array, labels: Array) -> Array:
        judged.append(len(values))
        return leave_one_out(self, values, labels)

    monkeypatch.setattr(ridge._Problem, "leave_one_out", count)
    monkeypatch.setattr(ridge, "JUDGED_ROWS", 500)
    monkeypatch.setattr(ridge, "JUDGED_SCORES", 4)
    parts = [fit(embeddings, class_index, 4, cuts) for cuts in ((), (3, 1000, 1001, 2500))]
    assert 400 < sum(judged) / 2 < 600
    for part in parts:  # the fit itself is to all rows
        assert part.loo_error == pytest.approx(whole.loo_error, rel=0.1)
        assert part.loo_error != whole.loo_error
        assert part.penalty == pytest.approx(whole.penalty, rel=10)
    assert parts[0].loo_error == pytest.approx(parts[1].loo_error, rel=1e-9)
    monkeypatch.setattr(ridge, "JUDGED_ROWS", 1e-9)
    monkeypatch.setattr(ridge, "JUDGED_SCORES", 0)
    assert fit(embeddings, class_index, 4).loo_error > 0  # one row at least
