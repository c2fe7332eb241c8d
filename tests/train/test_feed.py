from pathlib import Path

import numpy as np
import pytest
import torch

from reslab.data.batches import Batch, Batches
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
