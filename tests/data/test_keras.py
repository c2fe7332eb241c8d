from pathlib import Path

import numpy as np
import pytest

import reslab
from reslab.data.keras import KerasImages
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.nets.keras import build, keras
from reslab.spec import Spec

SPEC = Spec("basic", (1, 1), (16, 32), "conv3", num_classes=3)  # torch 2.13 dies of a strided 1x1 convolution with fewer inputs than 16


def test_each_epoch_gives_every_image_once_with_its_label_in_an_order_that_the_seed_fixes() -> None:
    images = split(open_images("digits"), 0)
    train = KerasImages(images, "train", 100, seed=3)
    first = [train[i] for i in range(len(train))]
    assert sum(len(y) for _, y in first) == len(images.split["train"])
    x, y = first[0]
    assert (x.shape, x.dtype, y.dtype) == ((100, 8, 8, 1), np.float32, np.int64)
    item = train.order[7]
    assert np.array_equal(x[7], images.pixels(item, 8).astype(np.float32) / np.float32(255))
    assert y[7] == images.labels[item]
    train.on_epoch_end()
    assert not np.array_equal(train[0][1], y)
    assert np.array_equal(KerasImages(images, "train", 100, seed=3)[0][0], x)
    assert np.array_equal(KerasImages(images, "val").order, images.split["val"])


def test_fit_takes_images_from_files_and_leaves_out_what_cannot_be_read(folder: Path) -> None:
    images = split(open_images(folder), 0)
    train = KerasImages(images, "train", 16, size=24, prepare=lambda x: x / np.float32(127.5) - 1, seed=0)
    images.paths[train.items[0]].write_bytes(b"damaged")
    model = build(SPEC)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    assert np.isfinite(model.fit(train, epochs=1, verbose=0).history["loss"]).all()
    assert sum(len(train[i][1]) for i in range(len(train))) == len(train.items) - 1
    assert model.predict(KerasImages(images, "test", size=24), verbose=0).shape == (len(images.split["test"]), 3)


def test_wrong_calls_and_unreadable_batches_are_one_line(folder: Path) -> None:
    images = open_images(folder)
    with pytest.raises(reslab.CallError, match="received 'train', 128; parts: none"):
        KerasImages(images, "train")
    images = split(images, 0)
    with pytest.raises(reslab.CallError, match="received 'trian', 128; parts: train, val, test"):
        KerasImages(images, "trian")
    for path in images.paths:
        path.write_bytes(b"damaged")
    with pytest.raises(reslab.WorkError, match="a whole batch is not, first"):
        KerasImages(images, "test", size=24)[0]
