"""A finished run of a tiny net, trained for real in seconds, and classifiers with random weights and statistics."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reslab
from reslab.cli import main
from reslab.data.preprocess import Preprocess
from reslab.nets.torch import ResNet
from reslab.run import Run
from reslab.spec import Spec
from reslab.use.artefact import TorchModel
from reslab.use.classifier import Classifier
from tests.conftest import COLOURS, draw, scramble

TINY = Spec("basic", (1, 1), (8, 16), "conv3")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on a folder of 90 images, test top-1 above chance; its images lie in ../photos."""
    root = tmp_path_factory.mktemp("trained")
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(30):
            draw(root / "photos" / name / f"{i}.png", colour, 100 * c + i)
    return reslab.train(root / "photos", net=TINY, out=root / "run", epochs=8, seed=1)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `reslab` in this process, which has torch loaded, and gives back what a process of its own would."""

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(arguments, ended.value.code, out, err)

    return call


def classifier_of(spec: Spec, size: int = 32, canvas: int | None = None, seed: int = 0, **changes: Any) -> Classifier:
    """A net that nobody trained, with a temperature, a mean and a deviation that differ from the neutral ones."""
    spec = replace(spec, num_classes=5, **changes)
    channels = spec.in_channels
    mean, std = np.linspace(0.4, 0.5, channels, dtype=np.float32), np.linspace(0.2, 0.3, channels, dtype=np.float32)
    net = scramble(ResNet(spec), seed).eval()
    assert isinstance(net, ResNet)
    return Classifier(TorchModel(net, Preprocess(size, canvas or size, channels, mean, std)), tuple("abcde"), temperature=1.3, sure=0.6)


def photos_of(run: Run) -> Path:
    return run.path.parent / "photos"
