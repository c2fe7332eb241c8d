"""What a training's steps see: the order of an epoch, the boxes that are cut, the augmentation.

Order and boxes are drawn from (seed, epoch), the augmentation from (seed, step, micro-batch), the coins for mirrored images from
the seed, whatever came before.
"""

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate, one_hot

from reslab.data import augment
from reslab.data.batches import Batch, Batches
from reslab.data.boxes import Boxes, resized, scaled
from reslab.data.images import Indices
from reslab.data.preprocess import Preprocess
from reslab.data.shards import shuffled
from reslab.seeds import seeded
from reslab.train.recipe import Recipe

ORDER, AUGMENT, COIN, LAYERS, BOXES = 1, 2, 3, 4, 5  # a training's streams of random numbers; the layers of a net draw from one


class Feed:
    """The training images as a recipe shows them. Where `flip` is alternate, a coin for each decides in which epochs it is mirrored."""

    def __init__(self, train: Batches, preprocess: Preprocess, recipe: Recipe, steps_per_epoch: int, device: torch.device) -> None:
        self.train, self.preprocess, self.recipe = train, preprocess, recipe
        self.steps_per_epoch, self.device = steps_per_epoch, device
        self.coins = torch.randint(0, 2, (len(train.images),), generator=seeded(recipe.seed, COIN))

    def boxes(self, epoch: int, order: Indices) -> Boxes | None:
        """What an epoch's batches show of the images in its order; None for the whole canvas. One drawn more than once is shown differently."""
        if self.recipe.crop not in ("resized", "scale"):
            return None
        n, generator = len(self.train.items), seeded(self.recipe.seed, BOXES, epoch)
        boxes = resized(n, generator) if self.recipe.crop == "resized" else scaled(n, generator)
        return boxes if self.recipe.balance == "sampling" else boxes[order]

    def order(self, epoch: int) -> Indices:
        """The training images of an epoch, by their place among these."""
        rng = np.random.default_rng([self.recipe.seed, ORDER, epoch])
        n = len(self.train.items)
        if self.recipe.balance != "sampling":
            shards = self.train.images.shards
            assert self.recipe.batch_size is not None
            return rng.permutation(n) if shards is None else shuffled(shards[self.train.items], self.recipe.batch_size, rng)
        labels = self.train.images.labels[self.train.items]
        share = 1 / np.bincount(labels, minlength=1)[labels]
        return rng.choice(n, n, p=share / share.sum())

    def shown(self, batch: Batch, step: int, number: int, size: int) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), normalised, augmented and of `size` pixels a side, and targets (N, classes) as probabilities.

        `number` is that of the micro-batch in the step's batch.
        """
        recipe, device = self.recipe, self.device
        generator = seeded(recipe.seed, AUGMENT, step, number)
        pixels = batch.pixels
        if recipe.flip != "none":  # as bytes, which is a quarter of the work
            pixels = augment.flip(pixels, self._mirrored(batch.items, step // self.steps_per_epoch, generator), across=2)
        x = self.preprocess.unit(pixels, device)
        x = x if recipe.crop in ("resized", "scale") else self.preprocess.crop(x)
        if recipe.jitter:
            x = augment.jitter(x, recipe.jitter, generator)
        if recipe.randaugment:
            x = augment.randaugment(x, recipe.randaugment, generator)
        x = self.preprocess.normalise(x)
        if recipe.crop == "pad" and recipe.pad:
            x = augment.pad_crop(x, recipe.pad, generator, recipe.edge == "reflect")
        if recipe.lighting:
            x = augment.lighting(x, recipe.lighting, torch.as_tensor(self.preprocess.std, device=device), generator)
        if recipe.cutout:  # boxes may have been cut smaller already
            x = augment.cutout(x, max(1, round(recipe.cutout * x.shape[2] / self.preprocess.image_size)), generator)
        if x.shape[2] != size:
            x = interpolate(x, size=size, mode="bilinear", antialias=True)
        targets = one_hot(batch.labels.to(device), len(self.train.images.classes)).float()
        mixes = [m for m in ("mixup", "cutmix") if getattr(recipe, m)]
        if mixes:
            mix = mixes[int(torch.randint(0, len(mixes), (1,), generator=generator))]
            x, targets = getattr(augment, mix)(x, targets, getattr(recipe, mix), generator)
        return x.contiguous(memory_format=torch.channels_last), targets

    def _mirrored(self, items: Tensor, epoch: int, generator: Generator) -> Tensor:
        """Which images are mirrored: each with probability 1/2, or every other epoch (Jordan 2024, 2404.00498, section 3.6)."""
        if self.recipe.flip == "random" or self.recipe.balance == "sampling":  # which may show an image twice in an epoch
            return torch.rand(len(items), generator=generator) < 0.5
        return (self.coins[items] + epoch) % 2 == 1
