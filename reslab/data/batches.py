"""Images -> batches of raw uint8 pixels, in an order that a seed fixes.

A data set that fits lives in memory, decoded once; a larger one is decoded by worker processes as it is needed. Which
of the two was chosen changes neither the order nor what an image or a box of it shows; a stream cuts boxes from the images'
own pixels, which may be finer than what memory holds of them.
"""

import atexit
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reslab.data.boxes import Boxes, Crops, cut, least_side
from reslab.data.decode import Unreadable
from reslab.data.images import Images, Indices, read_many
from reslab.errors import WorkError, shown
from reslab.host import memory

MEMORY_SHARE = 0.25  # of the machine's memory, at most, for pixels
CPU = torch.device("cpu")

Storage = Literal["memory", "stream"]


class Batch(NamedTuple):
    """Raw images, uint8 (N, H, W, C), with their labels (N) and their positions in the Images (N), both int64."""

    pixels: Tensor
    labels: Tensor
    items: Tensor


class _Wanted(NamedTuple):
    """An item of the Images, the pixels a side that are wanted of it, and the box they are to show; None for all of its middle."""

    item: int
    size: int
    box: Boxes | None


class Batches:
    """The images of one part of a split at one size, cut into batches."""

    def __init__(self, images: Images, items: Indices, size: int, storage: Storage, workers: int = 2) -> None:
        self.images = images
        self.items = items
        self.size = size
        self.storage = storage
        self.workers = workers
        self.dropped: dict[str, str] = {}  # name -> reason, of images that could not be decoded
        self._pixels: Tensor | None = None
        self._copy: Tensor | None = None  # of the pixels, on a GPU

    @property
    def nbytes(self) -> int:
        """Of the pixels that are in memory."""
        return 0 if self._pixels is None else self._pixels.nbytes

    def load(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Decodes everything now, where it is to live in memory. Unreadable images are dropped and listed."""
        if self.storage == "stream" or self._pixels is not None:
            return
        array, failed = read_many(self.images, self.items, self.size, progress)
        bad = [position for position, _ in failed]
        self.dropped = {self.images.names[self.items[position]]: reason for position, reason in failed}
        if bad:
            array, self.items = np.delete(array, bad, axis=0), np.delete(self.items, bad)
        self._pixels = torch.from_numpy(np.require(array, requirements=["C", "W"]))

    def epoch(
        self, batch_size: int, order: Indices | None = None, crops: Crops | None = None, device: torch.device = CPU, trained: bool = False
    ) -> Iterator[Batch]:  # fmt: skip
        """Batches in the given order of positions within this part; by default each once, in their own order.

        With `crops`, what their boxes hold of each image. Whole images from memory are cut into batches on `device`, which gets
        a copy of them all; those of a stream wait in memory that a GPU reads directly. A streamed batch of unreadable images only
        is passed over, but where it is `trained` on, which is a step. Raises WorkError for that, and where all batches are such.
        """
        self.load()
        order = np.arange(len(self.items)) if order is None else order
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        if self._pixels is not None:
            pixels = self._pixels if crops else self._near(self._pixels, device)
            for number, chunk in enumerate(chunks):
                yield self._batch(self._held(pixels, number, chunk, batch_size, crops), self.items[chunk])
        else:
            yield from self._stream(chunks, batch_size, crops, device, trained)

    def _held(self, pixels: Tensor, number: int, chunk: Indices, batch_size: int, crops: Crops | None) -> Tensor:
        if crops is None:
            return pixels[torch.from_numpy(chunk).to(pixels.device)]
        boxes = crops.boxes[number * batch_size :]
        return torch.stack([cut(pixels[position].numpy(), box, crops.size(number)) for position, box in zip(chunk, boxes, strict=False)])

    def _near(self, pixels: Tensor, device: torch.device) -> Tensor:
        """The pixels on that device."""
        if device.type == pixels.device.type:
            return pixels
        if self._copy is None:
            self._copy = pixels.to(device)
        return self._copy

    def _batch(self, pixels: Tensor, items: Indices) -> Batch:
        return Batch(pixels, torch.from_numpy(self.images.labels[items]), torch.from_numpy(items))

    def _stream(self, chunks: list[Indices], batch_size: int, crops: Crops | None, device: torch.device, trained: bool) -> Iterator[Batch]:
        images, any_readable, failed = self.images, False, list[tuple[int, str]]()
        loader: DataLoader[Any] = DataLoader(
            _Files(images),
            batch_sampler=[self._wanted(number, chunk, batch_size, crops) for number, chunk in enumerate(chunks)],
            num_workers=self.workers,
            # the other ways import the caller's script once more, which need not be written for it
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
            collate_fn=_collate,
            worker_init_fn=_quiet_worker,
            pin_memory=device.type == "cuda",
        )
        for pixels, items, failed in _alive(loader):
            self.dropped.update({self.images.names[item]: reason for item, reason in failed})
            if len(items):
                any_readable = True
                yield self._batch(pixels, items)
            elif trained:
                raise WorkError(f"images must stay readable; a whole batch is not, first {shown(images.names[failed[0][0]])}: {failed[0][1]}")
        if failed and not any_readable:
            raise WorkError(f"images must stay readable; none of these is, last {shown(images.names[failed[0][0]])}: {failed[0][1]}")

    def _wanted(self, number: int, chunk: Indices, batch_size: int, crops: Crops | None) -> list[_Wanted]:
        if crops is None:
            return [_Wanted(int(item), self.size, None) for item in self.items[chunk]]
        boxes, size = crops.boxes[number * batch_size :], crops.size(number)
        return [_Wanted(int(item), size, box) for item, box in zip(self.items[chunk], boxes, strict=False)]


def choose_storage(images: Images, size: int, processes: int = 1) -> tuple[Storage, str]:
    """Memory when the decoded pixels, which each process holds, take at most a quarter of the machine's; and the sentence that says so."""
    need = len(images) * size * size * images.channels
    have = memory()
    storage: Storage = "memory" if need * processes <= MEMORY_SHARE * have else "stream"
    each = f" in each of {processes} processes" if processes > 1 else ""
    return storage, f"{need / 2**20:,.0f} MiB of pixels{each}, {have / 2**30:.0f} GiB of memory"


class _Files(Dataset[tuple[int, Any]]):
    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, wanted: _Wanted) -> tuple[int, Any]:
        item, size, box = wanted
        try:
            if box is None:
                return item, torch.from_numpy(self.images.pixels(item, size).copy())
            return item, cut(self.images.square(item, least_side(box, size)), box, size)
        except Unreadable as error:
            return item, str(error)


def _collate(samples: list[tuple[int, Any]]) -> tuple[Tensor, Indices, list[tuple[int, str]]]:
    good = [(item, value) for item, value in samples if not isinstance(value, str)]
    failed = [(item, value) for item, value in samples if isinstance(value, str)]
    pixels = torch.stack([value for _, value in good]) if good else torch.empty(0)
    return pixels, np.array([item for item, _ in good], dtype=np.int64), failed


_running: WeakSet[Any] = WeakSet()  # iterators of loaders, with their workers


def _alive(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches; that a worker was killed is an error in our words. Workers are ended with the epoch, however it ends."""
    iterator: Any = iter(loader)
    _running.add(iterator)
    try:
        yield from iterator
    except WorkError as error:  # of a worker: the last line of its traceback is the message
        raise WorkError(str(error).strip().splitlines()[-1].partition("WorkError: ")[2] or str(error)) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise WorkError("a process that decodes images was killed, perhaps for want of memory; free some and --resume") from error
    finally:
        _end(iterator)


def _end(iterator: Any) -> None:
    if hasattr(iterator, "_shutdown_workers"):  # there are none where the loader works in this process
        iterator._shutdown_workers()


@atexit.register
def _end_all() -> None:
    """Of epochs that nobody finished. Their workers ignore the signal by which Python ends its children, and it would wait for them for ever."""
    for iterator in list(_running):
        _end(iterator)


def _quiet_worker(_: int) -> None:
    """Signals reach the whole process group; only the main process answers them, and ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def sample(batches: Batches, most: int) -> Indices:
    """Positions of at most `most` images, evenly spaced; of shards, which are shuffled when they are made, the first."""
    n = min(most, len(batches.items))
    return np.arange(n) if batches.images.shards is not None else np.unique(np.linspace(0, len(batches.items) - 1, n).astype(np.int64))


def drawn(batches: Batches, most: int, seed: int) -> Indices:
    """Positions of at most `most` images in random order; of shards, which are shuffled when they are made, the first."""
    n = min(most, len(batches.items))
    return np.arange(n) if batches.images.shards is not None else np.random.default_rng(seed).permutation(len(batches.items))[:n]


def mean_and_std(batches: Batches, most: int = 5000) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of pixel values in [0, 1], over a `sample`."""
    count, total, squares = 0, torch.zeros(batches.images.channels).double(), torch.zeros(batches.images.channels).double()
    for batch in batches.epoch(256, sample(batches, most)):
        x = batch.pixels.double().flatten(0, 2) / 255
        count, total, squares = count + len(x), total + x.sum(0), squares + (x * x).sum(0)
    mean = total / count
    std = (squares / count - mean**2).clamp(min=1e-4).sqrt()
    return mean.tolist(), std.tolist()


def mean_image(batches: Batches) -> Tensor:
    """The mean of every pixel over all images, float32 (C, H, W), values in [0, 1]."""
    count, total = 0, torch.zeros(batches.size, batches.size, batches.images.channels).double()
    for batch in batches.epoch(512):
        count, total = count + len(batch.pixels), total + batch.pixels.double().sum(0)
    return (total / count / 255).permute(2, 0, 1).float()
