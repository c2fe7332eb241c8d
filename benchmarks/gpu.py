"""ResNet-50 at 224 px on an NVIDIA GPU, training and predicting, ours against timm's on the same card. In turns, medians.

    python gpu.py            minutes, on a machine with a GPU; refuses to run without one
    python gpu.py --smoke    ResNet-18 at 64 px, also on a CPU; figures that mean nothing

Ours trains by the loop of `reslab.train` on a folder of noise, so that a step includes fetching, normalising and flipping its
batch, and predicts by `Classifier.predict`'s model from uint8 pixels in main memory, or from normalised ones on the card. timm's
net runs in bf16 autocast, channels last, on one normalised batch that lies on the card, eager and compiled. Each is a process
that gets ready first, and then takes its turns.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import Steps, keep, oracle, prepared_in_turns, ratio, turn
from PIL import Image

import reslab
from reslab.data.preprocess import Preprocess
from reslab.use.artefact import TorchModel
from reslab.use.inference import processor

SMOKE = "--smoke" in sys.argv
NET, SIZE, BATCH, FILES = ("resnet18", 64, 4, 120) if SMOKE else ("resnet50", 224, 256, 6_000)
ROUNDS, FIRST, STEPS = (1, 1, 2) if SMOKE else (5, 10, 10)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = {"recipe": "paper-imagenet", "batch_size": BATCH, "image_size": SIZE, "crop": "none", "lighting": 0.0, "normalize": "channel"}
PEERS = ("timm",) if SMOKE else ("timm", "timm compiled")


class Turns(Steps):
    """A Show that lets a training wait for its turn after the first steps, and again after each round."""

    def __init__(self) -> None:
        super().__init__(sys.maxsize)

    def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
        super().step(epoch, epochs, step, steps, facts)
        done = len(self.times) - FIRST
        if done >= 0 and done % STEPS == 0:
            turn({"seconds": statistics.median(np.diff(self.times[-STEPS - 1 :]))} if done else None)
            self.times[-1] = time.perf_counter()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def noise(root: Path) -> Path:
    """Two classes of noise; few different files, many names, for they are decoded once."""
    rng, kinds = np.random.default_rng(0), 16
    for i in range(FILES):
        path = root / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < kinds:
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
        else:
            path.write_bytes((root / "ab"[i % kinds % 2] / f"{i % kinds}.jpg").read_bytes() + i.to_bytes(4, "little"))  # duplicates are left out
    return root


def timms(compiled: bool) -> torch.nn.Module:
    net = oracle("timm").create_model(NET).to(DEVICE, memory_format=torch.channels_last)
    return torch.compile(net) if compiled else net


def repeated(work: Callable[[], object]) -> None:
    """Rounds of steps, each with the card waited for, as our training does."""
    times: list[float] = []
    while True:
        for _ in range(STEPS if times else FIRST):
            start = time.perf_counter()
            work()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        turn({"seconds": statistics.median(times[-STEPS:])})


def training(who: str, data: str) -> None:
    if who == "ours":
        with tempfile.TemporaryDirectory() as folder:
            reslab.train(data, net=NET, out=Path(folder) / "run", show=Turns(), **OURS)  # type: ignore[arg-type]
    net = timms("compiled" in who).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4)
    x = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (BATCH,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = net(x)
        torch.nn.functional.cross_entropy(logits.float(), y).backward()
        optimizer.step()

    repeated(step)


@torch.no_grad()
def predicting(who: str, data: str) -> None:
    if "ours" in who:
        net = reslab.build(NET).to(DEVICE, memory_format=torch.channels_last).eval()
        half = np.full(3, 0.5, np.float32)
        pixels = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
        trusted = {"precision": "bf16", "agreement": 1.0, "processor": processor(DEVICE)}  # with random weights classes are nearly ties
        model = TorchModel(net, Preprocess(SIZE, SIZE, 3, half, half), trusted)
        x = model._fed(pixels)
        repeated((lambda: model._quick(x)) if "card" in who else (lambda: model.quick(pixels)))
    net = timms("compiled" in who).eval()
    x = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def answer() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            net(x)

    repeated(answer)


WORK = {"training": (training, ["ours"]), "predicting": (predicting, ["ours", "ours on the card"])}


def main() -> None:
    if DEVICE.type != "cuda" and not SMOKE:
        sys.exit("this needs an NVIDIA GPU; torch sees none")
    lines = [f"{NET} at {SIZE} px, batch {BATCH}, on {DEVICE}; medians of {ROUNDS} rounds of {STEPS} steps, in turns"]
    if DEVICE.type == "cuda":
        driver = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True)
        lines.append(f"{driver.stdout.strip()}, CUDA {torch.version.cuda}, timm {oracle('timm').__version__}")
    with tempfile.TemporaryDirectory() as folder:
        data = str(noise(Path(folder) / "noise"))
        for what, (_, ours) in WORK.items():
            jobs = {who: [__file__, "--one", what, who, data, *["--smoke"] * SMOKE] for who in (*ours, *PEERS)}
            took = {who: [found["seconds"] for found in rounds] for who, rounds in prepared_in_turns(ROUNDS, jobs).items()}
            lines.append(f"{what}: " + ", ".join(f"{who} {BATCH / statistics.median(seconds):.1f} img/s" for who, seconds in took.items()))
            lines += [f"  {own} against {who}: {ratio(took[who], took[own])}" for own in ours for who in PEERS]
    keep("gpu", lines)


if __name__ == "__main__":
    if "--one" in sys.argv:
        WORK[sys.argv[2]][0](*sys.argv[3:5])
    else:
        main()
