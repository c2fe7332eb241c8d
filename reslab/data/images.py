"""`Images`: labelled images from a source, with class names; knows its split."""

import hashlib
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from reslab.data.decode import Pixels, Unreadable, decode, decode_square, middle_square, resize, with_channels

SPLITS = ("train", "val", "test")
MAX_IMAGE = 256 << 20  # bytes of a file; pixels are limited by decoding
SMALL_IMAGE = 128 * 128  # pixels
SLICE = 64  # images that a thread takes at a time
THREADS = 4  # decoding and hashing leave the interpreter lock, reading waits for the disk

Indices = NDArray[np.int64]
T = TypeVar("T")


class Problem(NamedTuple):
    """A file that was left out, and why."""

    name: str
    reason: str


class Note(NamedTuple):
    """What is worth knowing of a data set, or a problem that is no file's."""

    text: str
    is_problem: bool = False


class File(Protocol):
    """A path, or what else holds the bytes of an image file."""

    def read_bytes(self) -> bytes:
        """All of it. Raises OSError."""


class Files(Protocol):
    """A list of paths, or what else has a File for each image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> File: ...


@dataclass(frozen=True)
class Images:
    """n labelled images. Item i is `names[i]`, of class `classes[labels[i]]`, with the content hash `digests[i]`.

    Pixels come either from `array` (uint8, NHWC) or from `paths`; `pixels` hides which.
    """

    name: str
    classes: tuple[str, ...]
    labels: Indices
    names: Sequence[str]
    digests: Sequence[str]  # first 32 hex digits of SHA-256, of the file or of the pixels
    sizes: NDArray[np.int32]  # (n, 2): width, height after EXIF rotation
    channels: int  # that its pixels are given with; as it is opened, 1 when no image has colour, otherwise 3
    declared: Sequence[str]  # the split that the source itself gives each item, or ""
    array: Pixels | None = None
    paths: Files | None = None
    shards: NDArray[np.int32] | None = None  # which shard each item lies in, where they are to be read in few at a time
    problems: tuple[Problem, ...] = ()
    notes: tuple[Note, ...] = ()
    source: str = ""  # what to give `reslab train` to get these images again
    upright: bool = False  # a mirror image would be another class or none, as for digits
    split: dict[str, Indices] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def image_size(self) -> int:
        """The side to train at: the median short side, at most 224, in steps of 32 above 64."""
        side = int(np.median(self.sizes.min(axis=1)))
        return min(224, side if side <= 64 else side // 32 * 32)

    def pixels(self, index: int, size: int) -> Pixels:
        """uint8 (size, size, channels) of one item. Raises Unreadable."""
        return decode(self._data(index), size, self.channels) if self.array is None else resize(with_channels(self.array[index], self.channels), size)

    def square(self, index: int, least: int) -> Pixels:
        """uint8 (S, S, channels), the middle square of one item, with at least that many pixels a side where it has them. Raises Unreadable."""
        if self.array is None:
            return decode_square(self._data(index), least, self.channels)
        return middle_square(with_channels(self.array[index], self.channels))

    def _data(self, index: int) -> bytes:
        assert self.paths is not None
        return read_image(self.paths[index])

    def fingerprint(self) -> str:
        """SHA-256 over each item's content hash, class and split: equal only for equal data."""
        where = {int(i): name for name, items in self.split.items() for i in items}
        lines = sorted(f"{d} {self.classes[y]} {where.get(i, '')}" for i, (d, y) in enumerate(zip(self.digests, self.labels, strict=True)))
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def read_image(file: File) -> bytes:
    """All of an image file. Raises Unreadable for what cannot be read, is larger than 256 MiB, or is a pipe or a device, which need not end."""
    try:
        if isinstance(file, Path):
            held = file.stat()
            if not stat.S_ISREG(held.st_mode) and not stat.S_ISDIR(held.st_mode):
                raise Unreadable("not a regular file")
            if held.st_size > MAX_IMAGE:
                raise Unreadable(f"{held.st_size:,} bytes: the limit is {MAX_IMAGE >> 20} MiB")
        return file.read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or "cannot be read") from error


def digest(data: bytes | memoryview) -> str:
    """The content hash that names an image: 128 bits of SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()[:32]


def in_threads(work: Callable[[int], T], n: int, progress: Callable[[int, int], None], threads: int = THREADS) -> list[T]:
    """[work(0), ..., work(n - 1)], in threads, a slice at a time: to hand over one small image costs more than to read it."""
    results: list[T] = []

    def part(start: int) -> list[T]:
        return [work(i) for i in range(start, min(start + SLICE, n))]

    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(part, range(0, n, SLICE)):
            results += done
            progress(len(results), n)
    return results


def read_many(images: Images, items: Indices, size: int, progress: Callable[[int], None] = lambda done: None) -> tuple[Pixels, list[tuple[int, str]]]:
    """uint8 (len(items), size, size, channels), decoded in threads, and the positions that could not be, with reasons."""
    if images.array is not None and images.array.shape[1:] == (size, size, images.channels):
        whole = len(items) == len(images) and bool((items == np.arange(len(items))).all())
        return (images.array if whole else images.array[items]), []
    out = np.zeros((len(items), size, size, images.channels), np.uint8)
    failed: list[tuple[int, str]] = []

    def fill(position: int) -> None:
        try:
            out[position] = images.pixels(int(items[position]), size)
        except Unreadable as error:
            failed.append((position, str(error)))

    # The decoder of a small image is done before another thread has the interpreter: 115 us alone, 373 us in four threads
    threads = THREADS if images.sizes.prod(axis=1).mean() > SMALL_IMAGE else 1
    in_threads(fill, len(items), lambda done, n: progress(done), threads)
    return out, sorted(failed)


def read_batches(
    images: Images, items: Indices, size: int, batch_size: int, dropped: dict[str, str] | None = None
) -> Iterator[tuple[Pixels, Indices, Indices]]:  # fmt: skip
    """(pixels, labels, items) of the readable images, in order: uint8 (n, size, size, channels) and twice int64 (n).

    `dropped` gets the names of the others, with reasons. Decoded as they are asked for, in this process and without torch; a
    training reads through `Batches` instead.
    """
    for start in range(0, len(items), batch_size):
        chunk = items[start : start + batch_size]
        pixels, failed = read_many(images, chunk, size)
        if dropped is not None:
            dropped.update({images.names[chunk[position]]: reason for position, reason in failed})
        bad = [position for position, _ in failed]
        good = np.delete(chunk, bad)
        if len(good):
            yield np.delete(pixels, bad, axis=0), images.labels[good], good
