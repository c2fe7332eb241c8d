import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reslab.data.batches import Batches, choose_storage, drawn, mean_and_std, mean_image
from reslab.data.boxes import Crops, cut, resized
from reslab.data.images import Images
from reslab.data.preprocess import Preprocess
from reslab.data.source import open_images
from reslab.errors import WorkError


def test_memory_and_stream_give_the_same_batches(folder: Path) -> None:
    images = open_images(folder)
    items = np.arange(3, 60)
    order = np.random.default_rng(0).permutation(57)
    memory, stream = (list(Batches(images, items, 20, storage).epoch(16, order)) for storage in ("memory", "stream"))
    assert len(memory) == len(stream) == 4
    for a, b in zip(memory, stream, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert memory[0].pixels.shape == (16, 20, 20, 3)


def test_memory_and_stream_cut_the_same_boxes_of_changing_sizes(folder: Path) -> None:
    images = open_images(folder)
    boxes = resized(57, torch.Generator().manual_seed(0))
    crops = Crops(boxes, lambda number: 12 if number < 2 else 16)
    order = np.random.default_rng(0).permutation(57)
    memory, stream = (list(Batches(images, np.arange(3, 60), 24, storage).epoch(16, order, crops)) for storage in ("memory", "stream"))
    assert [tuple(b.pixels.shape) for b in memory] == [(16, 12, 12, 3), (16, 12, 12, 3), (16, 16, 16, 3), (9, 16, 16, 3)]
    for a, b in zip(memory, stream, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    first, later = int(order[0]), int(order[37])
    assert torch.equal(memory[2].pixels[5], cut(images.pixels(3 + later, 24), boxes[37], 16))
    assert torch.equal(memory[0].pixels[0], cut(images.pixels(3 + first, 24), boxes[0], 12))


def test_images_in_memory_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, decoded = open_images(folder), []
    pixels = Images.pixels
    monkeypatch.setattr(Images, "pixels", lambda self, index, size: decoded.append(index) or pixels(self, index, size))
    batches = Batches(images, np.arange(72), 24, "memory")
    for _ in range(3):
        assert sum(len(b.items) for b in batches.epoch(16)) == 72
    assert sorted(decoded) == list(range(72))


def test_files_that_break_later_are_dropped_and_named_in_both_storages(folder: Path) -> None:
    images = open_images(folder)
    (folder / "red" / "5.png").write_bytes(b"gone bad")
    for storage in ("memory", "stream"):
        batches = Batches(images, np.arange(72), 24, storage)
        assert sum(len(b.items) for b in batches.epoch(16)) == 71
        assert list(batches.dropped) == ["red/5.png"]


def test_a_streamed_batch_of_unreadable_images_is_passed_over_where_nothing_is_trained(folder: Path) -> None:
    images = open_images(folder)
    for item in range(48, 72):
        images.paths[item].write_bytes(b"gone bad")  # type: ignore[index]
    for storage in ("memory", "stream"):
        assert sum(len(b.items) for b in Batches(images, np.arange(72), 24, storage).epoch(20)) == 48
    stream = Batches(images, np.arange(72), 24, "stream")
    with pytest.raises(WorkError, match="a whole batch is not, first red/"):
        list(stream.epoch(20, trained=True))
    with pytest.raises(WorkError, match="none of these is, last red/"):
        list(Batches(images, np.arange(50, 72), 24, "stream").epoch(20))


def test_an_array_is_given_with_the_channels_that_a_net_has() -> None:
    grey = open_images("digits")
    assert grey.array is not None
    for storage in ("memory", "stream"):
        for size in (8, 12):
            wanted = next(Batches(grey, np.arange(5), size, storage).epoch(5)).pixels
            got = next(Batches(replace(grey, channels=3), np.arange(5), size, storage).epoch(5)).pixels
            assert torch.equal(got, wanted.expand(5, size, size, 3))
    colour = replace(grey, array=grey.array * np.array([1, 0, 0], np.uint8), channels=1)
    assert np.abs(colour.square(0, 8) - 0.299 * grey.array[0]).max() < 1


def test_storage_follows_the_size(folder: Path) -> None:
    images = open_images(folder)
    assert choose_storage(images, 24)[0] == "memory"
    assert choose_storage(images, 200_000)[0] == "stream"
    assert choose_storage(images, 24, processes=10**9)[0] == "stream"


def test_mean_and_deviation_are_those_of_the_pixels(folder: Path) -> None:
    images = open_images(folder)
    batches = Batches(images, np.arange(72), 24, "memory")
    pixels = np.stack([images.pixels(i, 24) for i in range(72)]).astype(float) / 255
    mean, std = mean_and_std(batches)
    assert np.allclose(mean, pixels.mean((0, 1, 2)))
    assert np.allclose(std, pixels.std((0, 1, 2)))
    assert np.allclose(mean_image(batches).permute(1, 2, 0), pixels.mean(0), atol=1e-6)


def test_preprocess_crops_the_middle_and_survives_json() -> None:
    import json

    preprocess = Preprocess(4, 8, 1, np.array([0.25], np.float32), np.array([0.5], np.float32))
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 8, 8, 1)
    got = preprocess(pixels, torch.device("cpu"))
    assert torch.allclose(got[0, 0], (pixels[0, 2:6, 2:6, 0] / 255 - 0.25) / 0.5)
    held = json.loads(json.dumps(preprocess.to_dict()))
    assert torch.equal(Preprocess.from_dict(held)(pixels, torch.device("cpu")), got)
    del held["tta"]
    assert Preprocess.from_dict(held | {"mirror": True}).tta == "mirror", "as models said it before there were shifts"
    for wrong in ("twice", ["mirror"], None):
        with pytest.raises(WorkError, match="damaged"):
            Preprocess.from_dict(held | {"tta": wrong})


def test_an_epoch_that_nobody_finishes_does_not_keep_the_process_from_ending(folder: Path) -> None:
    script = f"""
import numpy as np
from reslab.data.batches import Batches
from reslab.data.source import open_images
epoch = Batches(open_images({str(folder)!r}), np.arange(48), 20, "stream").epoch(4)
print(len(next(epoch).items))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("4\n", "")


def test_images_are_drawn_from_all_classes_of_a_folder_and_of_shards_in_their_order(folder: Path) -> None:
    images = open_images(folder)
    items = np.argsort(images.labels, kind="stable")  # class by class, as a folder lists them
    batches = Batches(images, items, 20, "memory")
    positions = drawn(batches, 24, 0)
    assert len(set(positions.tolist())) == 24
    assert len(np.unique(images.labels[items[positions]])) == len(images.classes)
    assert np.array_equal(positions, drawn(batches, 24, 0))
    assert not np.array_equal(positions, drawn(batches, 24, 1))
    assert sorted(drawn(batches, 10**6, 0)) == list(range(len(items)))
    sharded = Batches(replace(images, shards=np.zeros(len(images), np.int32)), items, 20, "memory")
    assert drawn(sharded, 24, 0).tolist() == list(range(24))


def test_a_script_without_a_guard_may_stream_whatever_python_starts_processes_by(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(f"""
import multiprocessing
multiprocessing.set_start_method("forkserver", force=True)  # as from Python 3.14
import numpy as np
from reslab.data.batches import Batches
from reslab.data.source import open_images
print(sum(len(batch.items) for batch in Batches(open_images({str(folder)!r}), np.arange(12), 20, "stream").epoch(4)))
""")
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("12\n", "")
