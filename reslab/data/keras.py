"""Images as what Keras's `fit`, `evaluate` and `predict` take."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reslab.data.decode import Pixels
from reslab.data.images import Images, read_many
from reslab.errors import CallError, WorkError, shown
from reslab.keras_backend import keras

Numbers = NDArray[np.float32]


def unit(pixels: Pixels) -> Numbers:
    """uint8 -> float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255)


class KerasImages(keras.utils.PyDataset):
    """One part of split images in batches (prepared images (N, size, size, C), labels (N) int64).

    `prepare` turns uint8 (N, size, size, C) into what the net is fed. With a `seed` every epoch has its own order, which the
    seed fixes. Files are decoded as they are needed, and those that cannot be are left out; `options` such as `workers` are
    PyDataset's. Raises CallError for a part that the images do not have, WorkError when no image of a batch can be read.
    """

    def __init__(
        self, images: Images, part: str, batch_size: int = 128, size: int | None = None,
        prepare: Callable[[Pixels], Any] = unit, seed: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        if not len(images.split.get(part, ())) or batch_size < 1:
            parts = ", ".join(images.split) or "none, `reslab.data.split.split` makes them"
            raise CallError(f"a part of the split with images, and a batch_size from 1; received {shown(part)!r}, {batch_size}; parts: {parts}")
        self.images, self.items = images, images.split[part]
        self.batch_size, self.size, self.prepare = batch_size, size or images.image_size, prepare
        self.seed, self.epoch = seed, -1
        self.on_epoch_end()

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[Any, NDArray[np.int64]]:
        items = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        pixels, failed = read_many(self.images, items, self.size)
        bad = [position for position, _ in failed]
        if len(bad) == len(items):
            raise WorkError(f"images must stay readable; a whole batch is not, first {shown(self.images.names[items[0]])}: {failed[0][1]}")
        return self.prepare(np.delete(pixels, bad, axis=0)), self.images.labels[np.delete(items, bad)]

    def on_epoch_end(self) -> None:
        """Puts the images in the next epoch's order."""
        self.epoch += 1
        self.order = self.items if self.seed is None else np.random.default_rng((self.seed, self.epoch)).permutation(self.items)
