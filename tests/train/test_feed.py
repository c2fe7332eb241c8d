from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reslab.data.batches import Batch, Batches
from reslab.data.images import Images
from reslab.data.preprocess import Preprocess
from reslab.data.source import open_images
from reslab.train.feed import Feed
from reslab.train.recipe import Crop, Recipe, resolve


@pytest.mark.parametrize("crop", ["none", "resized"])
def test_cutout_takes_the_same_share_of_small_images(folder: Path, crop: Crop) -> None:
    recipe = resolve(Recipe(cutout=12, crop=crop, flip="none", batch_size=64, epochs=1), 72, 32, upright=False)
    preprocess = Preprocess(32, 32, 3, np.zeros(3, np.float32), np.ones(3, np.float32))
    feed = Feed(Batches(open_images(folder), np.arange(72), 32, "memory"), preprocess, recipe, 1, torch.device("cpu"))

    def left(size: int) -> torch.Tensor:
        """The share of each white image that is left; boxes come from the images at their size."""
        side = size if crop == "resized" else 32
        white = Batch(torch.full((64, side, side, 3), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64), torch.arange(64))
        return feed.shown(white, 0, 0, size)[0].mean((1, 2, 3))

    full, small = left(32), left(16)
    assert full.min() == pytest.approx(1 - 12**2 / 32**2), "an image in which the whole square lies inside"
    assert small.min() == pytest.approx(1 - 12**2 / 32**2, abs=0.01), "the same, but for edges between two pixels"
    assert small.mean() == pytest.approx(full.mean().item(), abs=0.02)


@pytest.mark.parametrize("given", [{"jitter": 0.4}, {"lighting": 0.1}, {"cutout": 8}, {"mixup": 1.0}, {"cutmix": 1.0}, {"randaugment": 2}], ids=str)
def test_what_a_recipe_asks_for_is_done_to_what_the_net_sees(given: dict[str, float], folder: Path) -> None:
    if "randaugment" in given:
        pytest.importorskip("kornia", reason="the extra `augment` is not installed")
    batches = Batches(open_images(folder), np.arange(72), 32, "memory")
    preprocess = Preprocess(32, 32, 3, np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32))

    def shown(step: int, **fields: float) -> tuple[torch.Tensor, torch.Tensor]:
        recipe = resolve(Recipe(**{"crop": "none", "flip": "none", "cutout": 0, "batch_size": 72, "epochs": 1, **fields}), 72, 32, upright=False)  # type: ignore[arg-type]
        return Feed(batches, preprocess, recipe, 1, torch.device("cpu")).shown(next(batches.epoch(72)), step, 0, 32)

    plain, (x, targets) = shown(0), shown(0, **given)
    changed = (x != plain[0]).flatten(1).any(1)
    assert changed.float().mean() > 0.5, "of a mix, an image may meet itself"
    assert torch.equal(x, shown(0, **given)[0]), "the same step again"
    assert not torch.equal(x, shown(1, **given)[0])
    mixed = (targets.max(1).values < 1).any()
    assert mixed == bool({"mixup", "cutmix"} & given.keys())
    assert torch.allclose(targets.sum(1), torch.ones(72))


LEFT = np.repeat([1.0, 0.0], 4)  # a row that is white on the left


def feed_of(labels: list[int], seed: int = 0, **fields: object) -> tuple[Feed, Batch]:
    """A feed of images that are white on the left, and all of them as a batch."""
    pixels = np.broadcast_to((255 * LEFT).astype(np.uint8)[:, None], (len(labels), 8, 8, 1)).copy()
    names = [str(i) for i in range(len(labels))]
    images = Images("x", ("a", "b"), np.array(labels), names, names, np.full((len(labels), 2), 8, np.int32), 1, [""] * len(labels), pixels)
    recipe = resolve(Recipe(seed=seed, **{"crop": "none", "flip": "none", "batch_size": 20, "epochs": 1, **fields}), len(labels), 8, upright=False)  # type: ignore[arg-type]
    preprocess = Preprocess(8, 8, 1, np.zeros(1, np.float32), np.ones(1, np.float32))
    batches = Batches(images, np.arange(len(labels)), 8, "memory")
    return Feed(batches, preprocess, recipe, steps_per_epoch=5, device=torch.device("cpu")), next(batches.epoch(len(labels)))


def mirrored(feed: Feed, batch: Batch, step: int) -> torch.Tensor:
    """Which of the images are shown mirrored."""
    shown = feed.shown(batch, step, 0, 8)[0]
    right = torch.tensor(LEFT[::-1].copy(), dtype=torch.float32)
    assert all(torch.equal(row, right) or torch.equal(row, right.flip(0)) for row in shown[:, 0, 3])
    return shown[:, 0, 0, 0] == 0


def test_mirrors_alternate_by_epoch_from_a_coin_for_each_image() -> None:
    feed, batch = feed_of([0] * 200, flip="alternate")
    first = mirrored(feed, batch, 0)
    assert 70 < first.sum() < 130
    assert torch.equal(mirrored(feed, batch, 4), first), "the same epoch"
    assert torch.equal(mirrored(feed, batch, 5), ~first)
    assert torch.equal(mirrored(feed, batch, 10), first)
    back = Batch(batch.pixels, batch.labels, batch.items.flip(0))
    assert torch.equal(mirrored(feed, back, 0), first.flip(0)), "an image keeps its coin wherever it lies in a batch"


def test_random_mirrors_are_half_of_all_and_new_at_every_step() -> None:
    feed, batch = feed_of([0] * 200, flip="random")
    steps = torch.stack([mirrored(feed, batch, step) for step in (0, 1, 5)])
    assert all(70 < count < 130 for count in steps.sum(1))
    assert all(50 < (steps[a] == steps[b]).sum() < 150 for a, b in ((0, 1), (0, 2), (1, 2)))
    assert not mirrored(*feed_of([0] * 200), 0).any()


def test_sampling_shows_rare_classes_as_often_as_frequent_ones() -> None:
    labels = np.array([0] * 900 + [1] * 100)
    feed, _ = feed_of(labels.tolist(), balance="sampling")
    order = feed.order(0)
    assert len(order) == 1000
    assert 0.45 < labels[order].mean() < 0.55
    assert len(set(order[labels[order] == 1])) > 90, "not the same few"
    assert sorted(feed_of(labels.tolist())[0].order(0)) == list(range(1000))


def test_an_image_that_is_drawn_again_is_shown_differently() -> None:
    labels = [0] * 990 + [1] * 10
    feed, batch = feed_of(labels, balance="sampling", crop="resized", flip="alternate")
    order = feed.order(0)
    boxes = feed.boxes(0, order)
    assert boxes is not None and len(boxes) == len(order)
    again = np.flatnonzero(order == np.bincount(order).argmax())
    assert len(np.unique(boxes[again], axis=0)) == len(again) > 20
    same = batch.items[:1].repeat(64)
    assert len(set(feed._mirrored(same, 0, torch.Generator().manual_seed(0)).tolist())) == 2
    each, _ = feed_of(labels, crop="resized")
    order = each.order(0)
    boxes = each.boxes(0, order)
    by_image = each.boxes(0, np.arange(1000))
    assert boxes is not None and by_image is not None and np.array_equal(boxes, by_image[order]), "a box goes with its image, whatever the order"


@pytest.mark.parametrize(
    ("fields", "choose"),
    [
        ({}, lambda feed, batch, epoch: feed.order(epoch)),
        ({"balance": "sampling"}, lambda feed, batch, epoch: feed.order(epoch)),
        ({"crop": "resized"}, lambda feed, batch, epoch: feed.boxes(epoch, feed.order(epoch))),
        ({"crop": "scale"}, lambda feed, batch, epoch: feed.boxes(epoch, feed.order(epoch))),
        ({"flip": "alternate"}, lambda feed, batch, epoch: mirrored(feed, batch, 5 * epoch).numpy()),
        ({"flip": "random"}, lambda feed, batch, epoch: mirrored(feed, batch, 5 * epoch).numpy()),
        ({"crop": "pad", "pad": 2}, lambda feed, batch, epoch: feed.shown(batch, 5 * epoch, 0, 8)[0].numpy()),
    ],
    ids=["order", "sampling", "boxes", "scale", "coins", "flips", "shifts"],
)
def test_each_choice_follows_the_seed_and_the_epoch(fields: dict[str, object], choose: Callable[[Feed, Batch, int], np.ndarray]) -> None:
    first, again, other = (choose(*feed_of([0, 1] * 50, seed, **fields), 0) for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, choose(*feed_of([0, 1] * 50, 7, **fields), 1))
