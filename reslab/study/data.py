"""What the cells of a study look at: decoded images in plain arrays, which all processes map from one folder."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reslab.data.images import Images, read_many
from reslab.data.preprocess import Preprocess
from reslab.errors import WorkError, shown
from reslab.run import workplace, write_whole
from reslab.study.kinds import code, content_key

SAMPLED = 5000  # images that the mean colour is taken from, at most


@dataclass(frozen=True)
class Facts:
    """What is known of the images without opening them. `fingerprint` also stands for the preprocessing."""

    name: str
    fingerprint: str
    classes: int
    upright: bool  # a mirror image would be another class
    preprocess: dict[str, Any]
    left_out: int = 0  # images that cannot be read

    @property
    def size(self) -> int:
        """Pixels a side, as a net sees them."""
        return int(self.preprocess["image_size"])

    @property
    def channels(self) -> int:
        return int(self.preprocess["channels"])


@dataclass(frozen=True)
class Data:
    """uint8 images (N, canvas, canvas, channels) and int64 labels (N) for training and for the test."""

    facts: Facts
    train: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test: NDArray[np.uint8]
    test_labels: NDArray[np.int64]

    def normalised(self, pixels: NDArray[np.uint8], device: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008
        """What a net is fed: float32 (N, channels, size, size)."""
        preprocess = Preprocess.from_dict(self.facts.preprocess)
        return preprocess(torch.from_numpy(pixels.copy()), device).contiguous(memory_format=torch.channels_last)

    def train_batch(self, items: NDArray[np.int64], device: torch.device = torch.device("cpu")) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Training images, normalised, and their labels."""
        return self.normalised(self.train[items], device), torch.from_numpy(self.train_labels[items]).to(device)

    def test_batch(self, items: NDArray[np.int64], device: torch.device = torch.device("cpu")) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Test images, normalised, and their labels."""
        return self.normalised(self.test[items], device), torch.from_numpy(self.test_labels[items]).to(device)


def spread(of: int, count: int) -> NDArray[np.int64]:
    """Evenly spaced positions: of images that are sorted by class, all classes are represented."""
    return np.linspace(0, of - 1, count).astype(np.int64)


def prepare(images: Images, size: int, store: Path, preprocess: Preprocess | None = None) -> tuple[Data, Path]:
    """The split images, decoded below `store` unless they are there already, and the folder they are in.

    Train is what `reslab train` would train on; val stays unseen, so that a net made here can be calibrated like a run's.
    With `preprocess`, that of a run, its decoding and its mean are kept.
    """
    made_of = [images.fingerprint(), size, preprocess and preprocess.to_dict(), code("data/images.py")]
    folder = store / "data" / content_key(made_of)
    if (folder / "facts.json").is_file():
        return load(folder), folder
    arrays: dict[str, NDArray[Any]] = {}
    left_out: list[str] = []
    for name in ("train", "test"):
        items = images.split[name]
        pixels, failed = read_many(images, items, preprocess.canvas if preprocess else size)
        good = np.setdiff1d(np.arange(len(items)), [position for position, _ in failed])
        arrays[name], arrays[f"{name}_labels"] = pixels[good], images.labels[items[good]]
        left_out += [images.digests[items[position]] for position, _ in failed]
    if not len(arrays["train"]) or not len(arrays["test"]):
        raise WorkError(f"a study needs images that can be read; {shown(images.name)} has none: `reslab check` lists them")
    if left_out:  # which may be there next time, and then are other data
        folder = store / "data" / content_key([*made_of, sorted(left_out)])
    preprocess = preprocess or _preprocess(arrays["train"])
    facts = Facts(images.name, folder.name, len(images.classes), images.upright, preprocess.to_dict(), len(left_out))
    with workplace(folder / "facts.json") as made:
        for name, array in arrays.items():
            with (made / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())  # facts.json must not reach the disk before it
            (made / f"{name}.npy").replace(folder / f"{name}.npy")  # never written in place: another study may have mapped an equal one
    write_whole(folder / "facts.json", json.dumps(asdict(facts)).encode())  # last: where it is, all is
    return load(folder), folder


def _preprocess(pixels: NDArray[np.uint8]) -> Preprocess:
    unit = pixels[:: max(1, len(pixels) // SAMPLED)].astype(np.float64) / 255
    mean, std = unit.mean((0, 1, 2)), np.maximum(unit.std((0, 1, 2)), 1e-3)
    size, channels = pixels.shape[1], pixels.shape[3]
    return Preprocess(size, size, channels, mean.astype(np.float32), std.astype(np.float32))


def load(folder: Path) -> Data:
    """What `prepare` left in a folder. The arrays are mapped, so that many processes hold them once."""
    try:
        facts = Facts(**json.loads((folder / "facts.json").read_text("utf-8")))
        names = ("train", "train_labels", "test", "test_labels")
        return Data(facts, *(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names))
    except (TypeError, OSError, ValueError, EOFError) as error:
        raise WorkError(f"the prepared images in {shown(folder)} are damaged: delete that folder") from error
