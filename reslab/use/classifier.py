"""A Classifier: a Run's finished artefact. It needs no user code and none of the data it was trained on.

On disk it is the folder `model/`: spec.json, weights.safetensors, classes.json, preprocess.json, calibration.json.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from reslab.data.decode import Pixels, Unreadable, decode
from reslab.data.images import THREADS
from reslab.data.preprocess import Preprocess
from reslab.errors import CallError, WorkError, shown
from reslab.nets.torch import ResNet
from reslab.run import write_whole
from reslab.spec import Spec
from reslab.tensors import read_tensors, write_tensors

T = TypeVar("T")

BATCH = 64
TOP = 5


class Prediction(NamedTuple):
    """The likeliest class of an image, its calibrated probability, and the likeliest five."""

    label: str
    probability: float
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Classifier:
    """A trained net with all that turns an image file into probabilities."""

    net: ResNet
    classes: tuple[str, ...]
    preprocess: Preprocess
    temperature: float = 1.0  # logits are divided by it: Guo et al. 2017 (1706.04599)
    sure: float = 0.5  # an answer with less calibrated probability deserves "not sure"

    @property
    def spec(self) -> Spec:
        """What the net is."""
        return self.net.spec

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """uint8 (N, canvas, canvas, C) -> float32 logits (N, classes) on the CPU, in fp32 and not calibrated."""
        self.net.eval()
        device = next(self.net.parameters()).device
        x = self.preprocess(pixels, device).contiguous(memory_format=torch.channels_last)
        out: Tensor = self.net(x).float().cpu()
        return out

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
        """(path, what `work` gives for it), or (path, why it cannot be read). `work` gets up to 64 decoded images at a time."""
        paths = iter(Path(image) for image in images)
        with ThreadPoolExecutor(THREADS) as pool:
            while chunk := list(islice(paths, BATCH)):
                decoded = list(pool.map(self._read, chunk))
                good = [d for d in decoded if not isinstance(d, str)]
                results = iter(work(good) if good else [])
                for path, d in zip(chunk, decoded, strict=True):
                    yield path, d if isinstance(d, str) else next(results)

    def decode(self, image: bytes) -> Pixels:
        """The content of an image file -> uint8 (canvas, canvas, C). Raises Unreadable, which says why."""
        return decode(image, self.preprocess.canvas, self.preprocess.channels)

    def _read(self, path: Path) -> Pixels | str:
        try:
            return self.decode(path.read_bytes())
        except OSError as error:
            return error.strerror or "cannot be read"
        except Unreadable as error:
            return str(error)

    def predict_pixels(self, decoded: Sequence[Pixels]) -> list[Prediction]:
        """The classes of images that `decode` gave, in order; at least one, and all go through the net at once."""
        pixels = torch.stack([torch.from_numpy(d.copy()) for d in decoded])
        probabilities = (self.logits(pixels) / self.temperature).softmax(1)
        values, labels = probabilities.topk(min(TOP, len(self.classes)), dim=1)
        tops = [[(self.classes[i], float(v)) for v, i in zip(vs, ls, strict=True)] for vs, ls in zip(values.tolist(), labels.tolist(), strict=True)]
        return [Prediction(top[0][0], top[0][1], top) for top in tops]

    def save(self, folder: Path, calibration: dict[str, Any] | None = None) -> None:
        """Writes the artefact; `calibration` are facts to keep beside the temperature."""
        write_tensors(folder / "weights.safetensors", self.net.state_dict())
        for name, value in (
            ("classes", self.classes),
            ("preprocess", self.preprocess.to_dict()),
            ("calibration", {"temperature": self.temperature, "sure": self.sure, **(calibration or {})}),
            ("spec", asdict(self.spec)),  # last: where it is, all is
        ):
            write_whole(folder / f"{name}.json", json.dumps(value, indent=1).encode())


def load(path: str | Path) -> Classifier:
    """The Classifier of a run folder, or of its `model/`. Raises CallError when there is none, WorkError when it is damaged."""
    folder = Path(path)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / "spec.json").is_file():
        unfinished = (Path(path) / "run.toml").is_file()
        fix = f"finish it with `reslab train --resume {shown(path)}`" if unfinished else "give the folder that `reslab train` wrote"
        raise CallError(f"a finished run has model/spec.json; {shown(path)} has not: {fix}")
    held = {name: _json(folder / f"{name}.json") for name in ("spec", "classes", "preprocess", "calibration")}
    try:
        net = ResNet(Spec.from_dict(held["spec"]))
        temperature, sure = float(held["calibration"]["temperature"]), float(held["calibration"].get("sure", 0.5))
        classes = tuple(str(name) for name in held["classes"])
    except (CallError, KeyError, TypeError, ValueError) as error:
        raise WorkError(f"the model in {shown(folder)} is damaged: {shown(str(error))}") from error
    if len(classes) != net.spec.num_classes or not 0 < temperature < 1e3 or not 0 <= sure <= 1:
        raise WorkError(
            f"the model in {shown(folder)} is damaged: {len(classes)} class names, {net.spec.num_classes} outputs, temperature {temperature}, sure {sure}"
        )
    weights, _ = read_tensors(folder / "weights.safetensors")
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise WorkError(f"the weights in {shown(folder)} are of another net than its spec.json") from error
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Classifier(net.eval(), classes, Preprocess.from_dict(held["preprocess"]), temperature, sure)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WorkError(f"{shown(file)} cannot be read: {shown(str(error))[:120]}") from error
