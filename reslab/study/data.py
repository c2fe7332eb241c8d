"""What the cells of a study train on: images at one size in plain arrays, which all processes map from one file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reslab.data.images import read_many
from reslab.data.source import Progress, open_images
from reslab.data.split import split
from reslab.errors import WorkError, shown
from reslab.run import write_whole

SPLIT_SEED = 0


@dataclass(frozen=True)
class Facts:
    """What is known of the images without opening them. Mean and deviation are of pixel values in [0, 1]."""

    name: str
    fingerprint: str
    size: int
    channels: int
    classes: int
    upright: bool  # a mirror image would be another class
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Data:
    """uint8 images (N, size, size, channels) and int64 labels (N) for training and for the test."""

    facts: Facts
    train: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test: NDArray[np.uint8]
    test_labels: NDArray[np.int64]

    def batch(self, items: NDArray[np.int64], device: torch.device) -> Tensor:
        """Training images as float32 (N, C, H, W), normalised."""
        return self.normalised(self.train[items], device)

    def normalised(self, pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
        x = torch.from_numpy(pixels.copy()).to(device).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (self.facts.mean, self.facts.std))
        return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def prepare(source: str, size: int | None, folder: Path, progress: Progress) -> Data:
    """The images of a source, decoded at `size` pixels (by default their own) into `folder` unless they are there already.

    The training part of our split together with its val part; studies choose nothing by val.
    """
    images = split(open_images(source, progress), SPLIT_SEED)
    size = size or images.image_size
    fingerprint, held = images.fingerprint(), _held(folder)
    if (held.get("fingerprint"), held.get("size")) == (fingerprint, size):
        return load(folder)
    parts = {"train": np.sort(np.concatenate([images.split["train"], images.split["val"]])), "test": images.split["test"]}
    arrays: dict[str, NDArray[Any]] = {}
    for name, items in parts.items():
        pixels, failed = read_many(images, items, size)
        good = np.setdiff1d(np.arange(len(items)), [position for position, _ in failed])
        arrays[name], arrays[f"{name}_labels"] = pixels[good], images.labels[items[good]]
    if not len(arrays["train"]) or not len(arrays["test"]):
        raise WorkError(f"a study needs images that can be read; {shown(source)} has none: `reslab check` lists them")
    unit = arrays["train"][:: max(1, len(arrays["train"]) // 5000)].astype(np.float64) / 255
    mean, std = unit.mean((0, 1, 2)), np.maximum(unit.std((0, 1, 2)), 1e-3)
    facts = Facts(images.name, fingerprint, size, images.channels, len(images.classes), images.upright, tuple(mean.tolist()), tuple(std.tolist()))
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    write_whole(folder / "facts.json", json.dumps(asdict(facts)).encode())  # last: where it is, all is
    return load(folder)


def load(folder: Path) -> Data:
    """What `prepare` left in a folder. The arrays are mapped, so that many processes hold them once."""
    held = _held(folder)
    try:
        facts = Facts(**{**held, "mean": tuple(held["mean"]), "std": tuple(held["std"])})
        names = ("train", "train_labels", "test", "test_labels")
        return Data(facts, *(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names))
    except (KeyError, TypeError, OSError, ValueError) as error:
        raise WorkError(f"the prepared images in {shown(folder)} are damaged: delete that folder") from error


def _held(folder: Path) -> dict[str, Any]:
    try:
        held = json.loads((folder / "facts.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}
