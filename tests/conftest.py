"""What several tests need: folders of small images, the real CIFAR-10 and published weights where they are at hand."""

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from reslab.cli import main
from reslab.data.images import Images
from reslab.data.named import roots
from reslab.data.source import open_images

SHARED = Path(__file__).parents[2] / "shared"
COLOURS = {"red": (200, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 200)}


def draw(path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (24, 24)) -> Path:
    """A disc of about that colour somewhere on a grey ground: easy to learn, and no two alike."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(90, 150, (size[1], size[0], 3), dtype=np.uint8))
    x, y = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
    ImageDraw.Draw(image).ellipse((int(x), int(y), int(x) + size[0] // 2, int(y) + size[1] // 2), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 24 PNGs, 24 x 24 px."""
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(24):
            draw(tmp_path / "photos" / name / f"{i}.png", colour, 100 * c + i)
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def cifar() -> Images:
    if not any((root / "cifar-10-batches-py" / "batches.meta").is_file() for root in roots()):
        pytest.skip("CIFAR-10 is not on this machine: set RESLAB_DATA to the folder that holds cifar-10-batches-py")
    return open_images("cifar10")


@pytest.fixture(scope="session")
def published() -> Path:
    if not (SHARED / "weights").is_dir():
        pytest.skip("the published CIFAR-10 weights are not beside the repository")
    return SHARED / "weights"


@cache
def _operator_schemas() -> torch.library.Library:
    """The compiled operators of torchvision do not load beside a CPU build of torch; models do not need them, only their schemas."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def peer(name: str) -> ModuleType:
    """A library whose nets ours are compared with; ImportError where it is not installed."""
    _operator_schemas()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@pytest.fixture(scope="session")
def torchvision_models() -> ModuleType:
    return peer("torchvision.models")


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    return peer("timm")


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    return peer("transformers")


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `reslab` as a person does, in an empty folder, and gives back what it printed and its exit status."""

    def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-m", "reslab", *map(str, arguments)],
            cwd=work, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    return call


@pytest.fixture
def words(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`cli` in this process, which saves the seconds in which torch is imported: for calls that are refused."""

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        monkeypatch.chdir(work)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in arguments])
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out, err)

    return call


def scramble(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights and running statistics: fresh ones (mean 0, variance 1) hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif name.endswith("running_mean") or name.endswith("bias"):
                tensor.normal_(0, 0.2, generator=generator)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, (1.0 / tensor[0].numel()) ** 0.5, generator=generator)
    return net


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value of `b`."""
    return ((a - b).abs().max() / b.abs().max()).item()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference in fp64, as a part of the norm of `b`."""
    return ((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm()).item()
