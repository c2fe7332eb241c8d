"""How long reslab takes to begin: importing it, its quick commands, a prediction of one image, and building nets of shapes alone.

    python benchmarks/startup.py            about 2 minutes, on a quiet machine
    python benchmarks/startup.py --smoke    seconds; figures that mean nothing

Commands are timed as whole processes, from starting Python to its exit, after one that is not counted. Nets are built on
the meta device: all once in one process, and the slowest three again, each time in a fresh one; importing torch comes
before the clock starts.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import keep
from PIL import Image

import reslab
from reslab.data.preprocess import Preprocess
from reslab.family import FAMILY
from reslab.use.artefact import TorchModel, save
from reslab.use.classifier import Classifier

SMOKE = "--smoke" in sys.argv
TIMES = 1 if SMOKE else 9
BUILD = """
import sys, time, torch, reslab
reslab.build
for name in sys.argv[1:]:
    start = time.perf_counter()
    with torch.device("meta"):
        reslab.build(name)
    print(time.perf_counter() - start)
"""
COMMANDS = (
    ["-c", "pass"],
    ["-c", "import reslab"],
    ["-m", "reslab", "--help"],
    ["-m", "reslab", "models"],
    ["-m", "reslab", "show", "resnet50", "--svg", "resnet50.svg"],
    ["-m", "reslab", "show", "resnet1202"],
    ["-c", "import torch"],
    ["-m", "reslab", "predict", "model", "photo.jpg"],
)


def whole(command: list[str]) -> list[float]:
    """Wall seconds of that many runs."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        if "predict" in command:
            artefact(Path(folder))
        for _ in range(TIMES + 1):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def artefact(folder: Path) -> None:
    """A ResNet-20 that nobody trained, and a photo of 500 x 375 px."""
    net = reslab.build("resnet20", num_classes=10).eval()
    ends = np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32)
    save(Classifier(TorchModel(net, Preprocess(32, 32, 3, *ends)), tuple("abcdefghij")), folder / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)).save(folder / "photo.jpg")


def build(*names: str) -> list[float]:
    """Seconds that each net took, one after the other in a process."""
    done = subprocess.run([sys.executable, "-c", BUILD, *names], check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]


def told(seconds: list[float]) -> str:
    return f"median {1000 * statistics.median(seconds):5.0f} ms, {1000 * min(seconds):.0f} to {1000 * max(seconds):.0f}, n = {len(seconds)}"


def main() -> None:
    lines = ["whole processes"]
    for command in COMMANDS:
        typed = " ".join(["python", *command])
        lines.append(f"  {typed:48}  {told(whole(command))}")
    names = ["resnet20"] if SMOKE else list(FAMILY)
    once = dict(zip(names, build(*names), strict=True))
    slowest = sorted(names, key=lambda name: -once[name])[:3]
    lines.append(f"building on the meta device, {len(names)} nets once each: slowest {1000 * max(once.values()):.0f} ms; the slowest three again")
    lines += [f"  {name:48}  {told([build(name)[0] for _ in range(TIMES)])}" for name in slowest]
    keep("startup", lines)


main()
