from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distill import feed as module
from pipeline.distill import held as held_module
from pipeline.distill.feed import Feed
from pipeline.distill.images import DecodedImages
from pipeline.distill.losses import soft_labels
from pipeline.distill.method import Batch, Samples
from pipeline.distill.mix import Mixed
from pipeline.distill.order import step_seed
from pipeline.distill.targets import Targets
from tests.conftest import CLASS_NAMES
from tests.pipeline.distill.examples import (
    CPU,
    EMBED_DIM,
    Extras,
    embedding_of,
    head_of,
    images_of,
    join_example,
    make_recipe,
    mean_of,
    noise_images,
    pairs_in,
)


def augmented(**fields: float) -> dict[str, Any]:
    return {f"augmentation.{name}": value for name, value in fields.items()}


EVERYTHING_ON = {
    **augmented(horizontal_flip=0.5, random_crop_px=2, operations=1, random_erasing=0.5, mixup_alpha=1, cutmix_alpha=1),
    "soft_label_weight": 1.0,
    "centre": True,
}


def make_feed(images: DecodedImages, folder: Path, seed: int = 0, without: tuple[int, ...] = (), **fields: Any) -> Feed:
    recipe = make_recipe(**fields)
    num_views = images.pixels.shape[1]
    targets = join_example(images, folder, recipe, without=without, extras=Extras(num_views=num_views))
    return Feed(images, targets, recipe, CPU, seed)


def rows_of(batch: Batch, images: DecodedImages) -> list[tuple[int, int]]:
    """Return which image, and which view of it, each of a batch's pixels are."""
    shown = torch.from_numpy(images.pixels[images.places]).flatten(2)
    same = (batch.pixels.flatten(1)[:, None, None] == shown[None]).all(dim=3)
    assert (same.sum(dim=(1, 2)) == 1).all()
    return [(int(row), int(view)) for _, row, view in same.nonzero()]


def images_in(batch: Batch, images: DecodedImages) -> list[int]:
    return [row for row, _ in rows_of(batch, images)]


def samples_of(batch: Batch) -> Samples:
    assert batch.samples is not None
    return batch.samples


def equal(left: Batch, right: Batch) -> bool:
    """Tell whether two batches are the same, to the bit."""
    tensors = []
    for batch in (left, right):
        samples = samples_of(batch)
        assert samples.probabilities is not None
        tensors.append([batch.pixels, batch.class_targets, *samples])
    return all(torch.equal(one, other) for one, other in zip(*tensors, strict=True))


def stored(images: DecodedImages, rows: list[tuple[int, int]]) -> Tensor:
    pairs = pairs_in(images)
    return torch.from_numpy(np.stack([embedding_of(pairs[row], view).astype(np.float32) for row, view in rows]))


def example_head() -> tuple[Tensor, Tensor]:
    weights, biases = zip(*(head_of(name) for name in CLASS_NAMES), strict=True)
    return torch.from_numpy(np.stack(weights)), torch.tensor(biases)


# Which images


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(4, [4, 4]), (7, [7, 2]), (3, [3, 3, 3]), (8, [8]), (9, [9]), (64, [9])]
)
def test_an_epoch_has_every_image_once_but_a_last_one_that_would_be_alone(
    batch_size: int, sizes: list[int], tmp_path: Path
) -> None:
    images = noise_images(9, 0)
    feed = make_feed(images, tmp_path, batch_size=batch_size)
    batches = list(feed.epoch(1))
    assert [len(batch.pixels) for batch in batches] == sizes
    assert (feed.num_steps, feed.num_images) == (len(sizes), 9)
    rows = [row for batch in batches for row in images_in(batch, images)]
    assert len(rows) == len(set(rows)) == sum(sizes)


def test_who_is_left_out_changes_from_epoch_to_epoch(tmp_path: Path) -> None:
    images = noise_images(9, 0)
    feed = make_feed(images, tmp_path, batch_size=4)
    seen = [{row for batch in feed.epoch(epoch) for row in images_in(batch, images)} for epoch in range(1, 6)]
    assert len({frozenset(rows) for rows in seen}) > 1


def test_the_order_follows_from_seed_and_epoch(tmp_path: Path) -> None:
    images = noise_images(9, 0)

    def order(seed: int, epoch: int) -> list[int]:
        torch.manual_seed(seed * 17 + epoch)  # what else is drawn does not matter
        feed = make_feed(images, tmp_path, seed, batch_size=3)
        return [row for batch in feed.epoch(epoch) for row in images_in(batch, images)]

    assert order(3, 1) == order(3, 1)
    orders = [order(3, 1), order(3, 2), order(4, 1), order(2**32 - 1, 1)]
    assert len({tuple(rows) for rows in orders}) == 4
    assert orders[0] != list(range(9))


def test_only_selected_images_are_drawn(tmp_path: Path) -> None:
    images = noise_images(9, 0)
    chosen = images.select(np.array([8, 3, 5, 1]))
    (batch,) = make_feed(chosen, tmp_path).epoch(1)
    rows = images_in(batch, images)
    assert sorted(rows) == [1, 3, 5, 8]
    assert batch.class_targets.argmax(dim=1).tolist() == [row % 3 for row in rows]
    assert torch.equal(samples_of(batch).embeddings, stored(images, [(row, 0) for row in rows]))


@pytest.mark.parametrize("first_step", [0, 1, 2, 3, 4, 5])
def test_an_epoch_gone_on_with_has_the_batches_that_were_left(first_step: int, tmp_path: Path) -> None:
    feed = make_feed(noise_images(14, 0, num_views=2), tmp_path, batch_size=3, replay_views=True, **EVERYTHING_ON)
    whole, rest = list(feed.epoch(2)), list(feed.epoch(2, first_step))
    assert len(whole) == 5
    assert len(rest) == 5 - first_step
    assert all(equal(one, other) for one, other in zip(whole[first_step:], rest, strict=True))


def test_a_batch_is_the_same_whatever_was_drawn_before(tmp_path: Path) -> None:
    images = noise_images(14, 0)
    first, second = (make_feed(images, tmp_path, 5, batch_size=4, **EVERYTHING_ON) for _ in range(2))
    expected = list(first.epoch(3))
    for epoch in (1, 2):
        list(second.epoch(epoch))
    next(second.epoch(3))  # begun, and left
    torch.rand(7)
    found = list(second.epoch(3))
    assert len(found) == 4
    assert all(equal(one, other) for one, other in zip(expected, found, strict=True))


def test_every_step_has_randomness_of_its_own(tmp_path: Path) -> None:
    images = images_of(np.repeat(noise_images(1, 0).pixels, 12, axis=0), [0] * 12)
    feed = make_feed(images, tmp_path, batch_size=6, **augmented(operations=2))
    batches = [batch.pixels for epoch in (1, 2) for batch in feed.epoch(epoch)]
    assert len({batch.numpy().tobytes() for batch in batches}) == 4


def test_seeds_of_steps_are_unlike_each_other() -> None:
    triples = [(seed, epoch, step) for seed in (0, 1, 2**32 - 1) for epoch in (1, 2, 200) for step in (0, 1, 2**32 - 1)]
    seeds = {step_seed(*triple, purpose) for triple in triples for purpose in (0, 1)}
    assert len(seeds) == 2 * len(triples)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(0, 1, 2) != step_seed(1, 0, 2) != step_seed(2, 1, 0)


# What is beside the pixels


def test_targets_are_those_of_the_same_images(tmp_path: Path) -> None:
    images = noise_images(9, 0)
    feed = make_feed(images, tmp_path, batch_size=9, soft_label_weight=1.0, soft_label_temperature=0.5)
    (batch,) = feed.epoch(1)
    rows, samples = images_in(batch, images), samples_of(batch)
    assert torch.equal(batch.class_targets, F.one_hot(torch.tensor(rows) % 3, 3).float())
    embeddings = stored(images, [(row, 0) for row in rows])
    assert torch.equal(samples.embeddings, embeddings)
    assert samples.joined.all()
    assert torch.equal(samples.positives, torch.eye(9))
    assert samples.probabilities is not None
    assert torch.allclose(samples.probabilities, soft_labels(embeddings, example_head(), 0.5))


def test_the_centre_is_taken_off_embeddings_but_not_of_what_the_head_sees(tmp_path: Path) -> None:
    images = noise_images(9, 0)
    (batch,) = make_feed(images, tmp_path, batch_size=9, soft_label_weight=1.0, centre=True).epoch(1)
    rows, samples = [(row, 0) for row in images_in(batch, images)], samples_of(batch)
    centre = torch.from_numpy(np.mean([mean_of(name) for name in CLASS_NAMES], axis=0))
    assert torch.allclose(samples.embeddings, stored(images, rows) - centre, atol=1e-6)
    assert samples.probabilities is not None
    assert torch.allclose(samples.probabilities, soft_labels(stored(images, rows), example_head(), 0.1))


def test_without_sample_targets_there_is_no_sample_side(tmp_path: Path) -> None:
    images, recipe = noise_images(4, 0), make_recipe()
    targets = join_example(images, tmp_path, recipe)
    empty = np.empty(0, np.int64)
    plain = Targets(targets.artifact, targets.class_embeddings, targets.centre, None, None, empty, empty, 1)
    (batch,) = Feed(images, plain, recipe, CPU, 0).epoch(1)
    assert batch.samples is None


def test_copies_of_an_image_are_positives_of_each_other(tmp_path: Path) -> None:
    pixels = noise_images(3, 0).pixels[[0, 1, 2, 0, 0]]
    images = images_of(pixels, [0, 1, 2, 0, 1])  # the last copy has another label
    (batch,) = make_feed(images, tmp_path, batch_size=5).epoch(1)
    pixels_of = [batch.pixels[row].numpy().tobytes() for row in range(5)]
    same = torch.tensor([[one == other for other in pixels_of] for one in pixels_of]).float()
    assert sorted(same.sum(dim=1).tolist()) == [1, 1, 3, 3, 3]
    assert torch.allclose(samples_of(batch).positives, same / same.sum(dim=1, keepdim=True))


def test_images_without_an_embedding_are_not_joined_and_nobodys_positives(tmp_path: Path) -> None:
    images = noise_images(9, 0)
    missing = (1, 4, 5)
    (batch,) = make_feed(images, tmp_path, without=missing, batch_size=9, centre=True).epoch(1)
    rows, samples = images_in(batch, images), samples_of(batch)
    there = torch.tensor([row not in missing for row in rows])
    assert torch.equal(samples.joined, there)
    assert (samples.embeddings[~there] == 0).all()
    assert torch.equal(samples.positives, torch.diag(there.float()))


def test_a_copy_that_is_not_joined_is_nobodys_positive(tmp_path: Path) -> None:
    images = images_of(noise_images(2, 0).pixels[[0, 0, 1]], [0, 1, 2])
    (batch,) = make_feed(images, tmp_path, without=(1,), batch_size=4).epoch(1)
    labels = batch.class_targets.argmax(dim=1).tolist()
    ant, bee = labels.index(0), labels.index(1)
    assert samples_of(batch).joined.tolist() == [label != 1 for label in labels]
    assert samples_of(batch).positives[ant, ant] == 1
    assert samples_of(batch).positives[:, bee].tolist() == [0, 0, 0]


# Views


def test_pixels_and_embeddings_are_of_the_same_view(tmp_path: Path) -> None:
    images = noise_images(8, 0, num_views=3)
    feed = make_feed(images, tmp_path, batch_size=4, replay_views=True, **augmented(horizontal_flip=1, operations=2))
    drawn = []
    for epoch in range(1, 5):
        for batch in feed.epoch(epoch):
            rows = rows_of(batch, images)  # exact: what the teacher saw is not augmented once more
            assert torch.equal(samples_of(batch).embeddings, stored(images, rows))
            assert batch.class_targets.argmax(dim=1).tolist() == [row % 3 for row, _ in rows]
            drawn += [view for _, view in rows]
    assert set(drawn) == {0, 1, 2}
    assert min(drawn.count(view) for view in range(3)) > 4


def test_without_replay_the_clean_view_is_shown_and_augmented(tmp_path: Path) -> None:
    images = noise_images(8, 0, num_views=3)
    (batch,) = make_feed(images, tmp_path, batch_size=8, **augmented(horizontal_flip=1)).epoch(1)
    mirrored = images_of(images.pixels[:, :, :, ::-1].copy(), images.labels.tolist())
    rows = rows_of(batch, mirrored)
    assert {view for _, view in rows} == {0}
    assert torch.equal(samples_of(batch).embeddings, stored(images, rows))


def test_views_are_mixed_and_erased_as_images_are(tmp_path: Path) -> None:
    images = noise_images(8, 0, num_views=2)
    on = augmented(random_erasing=1, mixup_alpha=1)
    (batch,) = make_feed(images, tmp_path, batch_size=8, replay_views=True, **on).epoch(1)
    assert (batch.class_targets.max(dim=1).values < 1).any()
    plain = make_feed(images, tmp_path, batch_size=8, replay_views=True)
    (unchanged,) = plain.epoch(1)
    assert not torch.equal(batch.pixels, unchanged.pixels)


# Mixed


def test_pixels_and_every_target_are_mixed_with_the_same_partner_by_the_same_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = noise_images(6, 0)
    partner, share = torch.tensor([3, 1, 0, 5, 2, 4]), torch.tensor([0.75, 1.0, 0.5, 0.25, 0.0, 1.0])
    seen = []

    def fixed(pixels: Tensor, settings: Any, generator: Any) -> Mixed:
        seen.append(pixels)
        return Mixed(pixels, partner, share)

    monkeypatch.setattr(module, "mix", fixed)
    (batch,) = make_feed(images, tmp_path, batch_size=6, soft_label_weight=1.0).epoch(1)
    rows = images_in(batch, images)
    labels, embeddings = F.one_hot(torch.tensor(rows) % 3, 3).float(), stored(images, [(row, 0) for row in rows])
    opinion = soft_labels(embeddings, example_head(), 0.1)

    def blend(values: Tensor) -> Tensor:
        return share[:, None] * values + (1 - share[:, None]) * values[partner]

    samples = samples_of(batch)
    assert torch.equal(batch.pixels, seen[0])
    assert torch.allclose(batch.class_targets, blend(labels))
    assert torch.allclose(samples.embeddings, blend(embeddings), atol=1e-6)
    assert samples.probabilities is not None
    assert torch.allclose(samples.probabilities, blend(opinion), atol=1e-6)
    assert torch.equal(samples.positives, torch.eye(6))
    assert samples.joined.all()


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_what_is_mixed_into_the_pixels_is_in_the_class_targets(kind: str, tmp_path: Path) -> None:
    """A third of the images is red, a third green and a third blue: what is in the pixels is seen."""
    pixels = np.zeros((12, 1, 16, 16, 3), np.uint8)
    for row in range(12):
        pixels[row, ..., row % 3] = 255
        pixels[row, 0, 0, 0, row % 3] -= row + 1  # so that no two are equal
    images = images_of(pixels, [row % 3 for row in range(12)])
    (batch,) = make_feed(images, tmp_path, batch_size=12, **augmented(**{kind: 1})).epoch(1)
    colours = batch.pixels.float().mean(dim=(1, 2)) / 255
    assert torch.allclose(batch.class_targets, colours, atol=0.01)
    assert (batch.class_targets.max(dim=1).values < 0.9).any()


def test_a_mixture_with_an_image_that_is_not_joined_takes_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = noise_images(6, 0)
    partner, share = torch.tensor([1, 2, 3, 4, 5, 0]), torch.tensor([0.75, 0.5, 1.0, 0.25, 0.5, 1.0])
    monkeypatch.setattr(module, "mix", lambda pixels, settings, generator: Mixed(pixels, partner, share))
    for missing in range(6):
        (batch,) = make_feed(images, tmp_path, without=(missing,), batch_size=6).epoch(1)
        rows, samples = images_in(batch, images), samples_of(batch)
        there = torch.tensor([row != missing for row in rows])
        assert torch.equal(samples.joined, there & (there[partner] | (share == 1)))
        # An embedding that is no candidate is nobody's positive: its logit is −10⁹.
        assert (samples.positives[:, ~samples.joined] == 0).all()
        assert torch.allclose(samples.positives[samples.joined].sum(dim=1), torch.ones(int(samples.joined.sum())))


# Where pixels come from


@pytest.mark.parametrize("held", ["pixels", "embeddings", "both"])
def test_what_is_kept_on_the_device_makes_the_same_batches(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = noise_images(9, 0, num_views=2).select(np.array([7, 2, 5, 0, 3]))
    make = partial(make_feed, images, tmp_path, without=(1,), replay_views=True, soft_label_weight=1.0)
    first, asked = make(), list[int]()

    def fits(num_bytes: int, device: torch.device) -> bool:  # as on a GPU
        asked.append(num_bytes)
        return held in ("both", ("pixels", "embeddings")[len(asked) - 1])

    monkeypatch.setattr(held_module, "fits_device", fits)
    monkeypatch.setattr(held_module, "_BLOCK_BYTES", 2 * images.pixels[0].nbytes)  # three blocks, one of them short
    second = make()
    assert asked == [5 * images.pixels[0].nbytes, 5 * 2 * EMBED_DIM * 4]
    parts = (second._pixels, second._embeddings)
    assert [part is not None and part._all is not None for part in parts] == [
        held != "embeddings",
        held != "pixels",
    ]
    assert all(equal(one, other) for one, other in zip(first.epoch(1), second.epoch(1), strict=True))


def test_what_does_not_fit_after_all_is_fetched_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    make = partial(make_feed, noise_images(5, 0), tmp_path, soft_label_weight=1.0)
    first = make()
    monkeypatch.setattr(held_module, "fits_device", lambda num_bytes, device: True)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", full)
        second = make()
    assert second._pixels._all is None
    assert all(equal(one, other) for one, other in zip(first.epoch(1), second.epoch(1), strict=True))


def test_time_spent_on_batches_is_counted(tmp_path: Path) -> None:
    feed = make_feed(noise_images(9, 0), tmp_path)
    assert feed.seconds == 0
    next(feed.epoch(1))
    assert feed.seconds > 0
