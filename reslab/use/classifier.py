"""A Classifier: what turns image files into calibrated probabilities. It needs no user code and none of the training data.

It comes from a run folder or from an exported .onnx file. What computes the logits is its `Model`; here, and for an
exported file all the way down, everything is numpy, and torch need not be installed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from reslab.data.decode import Pixels, Unreadable, decode
from reslab.data.images import THREADS, read_image
from reslab.data.preprocess import Frame
from reslab.errors import CallError, WorkError, shown
from reslab.run import located
from reslab.spec import Spec

if TYPE_CHECKING:
    from reslab.nets.torch import ResNet

T = TypeVar("T")

BATCH = 64
BATCH_PIXELS = 1 << 20  # of image files: more only costs memory
AHEAD = 2  # batches that are decoded while one is in the net
SLICE = 16  # images that a thread decodes at a time
SMALL_FILE = 1 << 15  # bytes up to which one thread decodes faster than several, which wait for the interpreter
TOP = 5

Logits = NDArray[np.float32]
Float = TypeVar("Float", np.float32, np.float64)


class Model(Protocol):
    """A net with its preprocessing: torch weights, or an exported file."""

    @property
    def spec(self) -> Spec:
        """What the net is."""

    @property
    def preprocess(self) -> Frame:
        """What images are to be decoded to."""

    def logits(self, pixels: Pixels) -> Logits:
        """uint8 (N, canvas, canvas, C) -> (N, classes), computed in fp32 unless the file says otherwise."""

    def quick(self, pixels: Pixels) -> Logits:
        """`logits` as fast as this machine gives them: they differ by rounding; of the classes on val at least 99.5 % do not."""


class Prediction(NamedTuple):
    """The likeliest class of an image, its calibrated probability, and the likeliest five."""

    label: str
    probability: float
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Classifier:
    """A trained model with all that turns an image file into probabilities."""

    model: Model
    classes: tuple[str, ...]
    temperature: float = 1.0  # logits are divided by it: Guo et al. 2017 (1706.04599)
    sure: float = 0.5  # an answer with less calibrated probability deserves "not sure"

    @property
    def spec(self) -> Spec:
        """What the net is."""
        return self.model.spec

    @property
    def preprocess(self) -> Frame:
        """What images are decoded to; a run's, a Preprocess, also normalises."""
        return self.model.preprocess

    @property
    def has_net(self) -> bool:
        """Whether there is a torch net with gradients; an exported file has a graph instead."""
        return hasattr(self.model, "net")

    @property
    def net(self) -> "ResNet":
        """The torch net. Raises CallError for an exported file."""
        net: ResNet | None = getattr(self.model, "net", None)
        if net is None:
            raise CallError("this needs the net itself, and an exported file has only its graph: give the run folder")
        return net

    def logits(self, pixels: Pixels) -> Logits:
        """uint8 (N, canvas, canvas, C) -> float32 logits (N, classes), not calibrated."""
        return self.model.logits(pixels)

    def predict(self, images: Iterable[str | Path]) -> list[Prediction]:
        """The classes of image files, in order. Raises WorkError, naming the file, at the first that cannot be read."""
        found = []
        for path, prediction in self.predict_each(images):
            if isinstance(prediction, str):
                raise WorkError(f"every file must be a readable image; {shown(path)} is not: {prediction}")
            found.append(prediction)
        return found

    def predict_each(self, images: Iterable[str | Path]) -> Iterator[tuple[Path, Prediction | str]]:
        """(path, prediction), or (path, why there is none), for each image file; memory does not grow with their number."""
        return self.each(images, self.predict_pixels)

    def each(self, images: Iterable[str | Path], work: Callable[[list[Pixels]], Iterable[T]]) -> Iterator[tuple[Path, T | str]]:
        """(path, what `work` gives for it), or (path, why it cannot be read), in order; `work` gets up to 64 decoded images.

        The next ones are decoded meanwhile, and no more are held than those. `images` is read as far as that needs.
        """
        paths = iter(Path(image) for image in images)
        size = max(1, min(BATCH, BATCH_PIXELS // self.preprocess.canvas**2))
        first = list(islice(paths, size))
        chunks = chain([first], iter(lambda: list(islice(paths, size)), []))
        with ThreadPoolExecutor(_threads(first)) as pool:
            for chunk, decoded in _ahead(chunks, self._read, pool):
                good = [d for d in decoded if not isinstance(d, str)]
                results = iter(work(good) if good else [])
                for path, d in zip(chunk, decoded, strict=True):
                    yield path, d if isinstance(d, str) else next(results)

    def decode(self, image: bytes) -> Pixels:
        """The content of an image file -> uint8 (canvas, canvas, C). Raises Unreadable, which says why."""
        return decode(image, self.preprocess.canvas, self.preprocess.channels)

    def _read(self, path: Path) -> Pixels | str:
        try:
            return self.decode(read_image(path))
        except Unreadable as error:
            return str(error)

    def predict_pixels(self, decoded: Sequence[Pixels]) -> list[Prediction]:
        """The classes of images that `decode` gave, in order; at least one, and all go through the net at once."""
        probabilities = softmax(self.model.quick(np.stack(decoded)) / np.float32(self.temperature))
        likeliest = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
        tops = [[(self.classes[i], float(row[i])) for i in order] for row, order in zip(probabilities, likeliest, strict=True)]
        return [Prediction(*top[0], top) for top in tops]


def _threads(paths: list[Path]) -> int:
    """How many threads decode files like these."""
    sizes = []
    for path in paths:
        with suppress(OSError):
            sizes.append(path.stat().st_size)
    return THREADS if sum(sizes) > SMALL_FILE * len(sizes) else 1


def _ahead(chunks: Iterable[list[Path]], read: Callable[[Path], T], pool: ThreadPoolExecutor) -> Iterator[tuple[list[Path], list[T]]]:
    """Each chunk with what `read` gives for its paths; the next two are being read while one is in use."""
    waiting: deque[tuple[list[Path], list[Future[list[T]]]]] = deque()

    def part(paths: list[Path]) -> list[T]:
        return [read(path) for path in paths]

    def oldest() -> tuple[list[Path], list[T]]:
        chunk, parts = waiting.popleft()
        return chunk, [one for done in parts for one in done.result()]

    for chunk in chunks:
        waiting.append((chunk, [pool.submit(part, chunk[i : i + SLICE]) for i in range(0, len(chunk), SLICE)]))
        if len(waiting) > AHEAD:
            yield oldest()
    while waiting:
        yield oldest()


def softmax(logits: NDArray[Float]) -> NDArray[Float]:
    """Rows of probabilities."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    probabilities: NDArray[Float] = e / e.sum(1, keepdims=True)
    return probabilities


def load(path: str | Path) -> Classifier:
    """The Classifier of a run folder, of its `model/`, of a shipped net by name, or of a .onnx file that `reslab export` wrote; the last needs no torch.

    Raises CallError when there is none, WorkError when it is damaged.
    """
    path = located(path)
    model: Model
    if path.suffix.lower() == ".onnx":
        from reslab.use.onnx import read_onnx

        model, held = read_onnx(path)
    else:
        try:
            from reslab.use.artefact import read_folder
        except ModuleNotFoundError as error:
            raise WorkError(f"a run folder needs {error.name}, which is not installed: install it, or give a file that `reslab export` wrote") from error
        model, held = read_folder(path)
    return Classifier(model, *_checked(path, model.spec, held))


def _checked(path: Path, spec: Spec, held: dict[str, Any]) -> tuple[tuple[str, ...], float, float]:
    """Class names, temperature and the threshold of "sure" as a file holds them. Raises WorkError."""
    try:
        classes, temperature, sure = held["classes"], float(held["temperature"]), float(held.get("sure", 0.5))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WorkError(f"the model in {shown(path)} is damaged: {shown(repr(error))[:120]}") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise WorkError(f"the model in {shown(path)} is damaged: class names must be a list of texts")
    if len(classes) != spec.num_classes or not 0 < temperature < 1e3 or not 0 <= sure <= 1:
        raise WorkError(
            f"the model in {shown(path)} is damaged: {len(classes)} class names, {spec.num_classes} outputs, temperature {temperature}, sure {sure}"
        )
    return tuple(classes), temperature, sure
