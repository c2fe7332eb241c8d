"""ResNet-50 at 224 px on an NVIDIA GPU, training and predicting, ours against timm's on the same card. In turns, medians.

    python gpu.py            minutes, on a machine with a GPU; refuses to run without one
    python gpu.py --smoke    ResNet-18 at 64 px, also on a CPU; figures that mean nothing

Ours trains by the loop of `reslab.train` on a folder of noise, so that a step includes fetching, normalising and flipping its
batch, and predicts by `Classifier.predict`'s model from uint8 pixels. timm's net runs in bf16 autocast, channels last, on
one batch that lies on the card, eager and compiled. Each turn is a process of its own.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from measure import in_turns, keep, oracle, our_steps, ratio
from PIL import Image

import reslab
from reslab.data.preprocess import Preprocess
from reslab.use.artefact import TorchModel

SMOKE = "--smoke" in sys.argv
NET, SIZE, BATCH, FILES = ("resnet18", 64, 4, 120) if SMOKE else ("resnet50", 224, 256, 20_000)
ROUNDS, FIRST, STEPS = (1, 1, 2) if SMOKE else (5, 20, 40)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = {"recipe": "paper-imagenet", "batch_size": BATCH, "image_size": SIZE, "crop": "none", "lighting": 0.0, "normalize": "channel", "steps": 1000}
WAYS = ("ours", "timm") if SMOKE else ("ours", "timm", "timm compiled")


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


def finished(work: Callable[[], object]) -> float:
    """When the work was done, and the card with it."""
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timms(compiled: bool) -> torch.nn.Module:
    net = oracle("timm").create_model(NET).to(DEVICE, memory_format=torch.channels_last)
    return torch.compile(net) if compiled else net


def training(who: str, data: str) -> list[float]:
    """When each step ended."""
    if who == "ours":
        return our_steps(FIRST + STEPS, data, net=NET, **OURS).times
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

    return [finished(step) for _ in range(FIRST + STEPS)]


@torch.no_grad()
def predicting(who: str, data: str) -> list[float]:
    """When each batch was answered."""
    if who == "ours":
        net = reslab.build(NET).to(DEVICE, memory_format=torch.channels_last).eval()
        half = np.full(3, 0.5, np.float32)
        pixels = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
        model = TorchModel(net, Preprocess(SIZE, SIZE, 3, half, half)).weighed([pixels[: min(16, BATCH)]])
        return [finished(lambda: model.quick(pixels)) for _ in range(FIRST + STEPS)]
    net = timms("compiled" in who).eval()
    x = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def answer() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            net(x)

    return [finished(answer) for _ in range(FIRST + STEPS)]


WORK = {"training": training, "predicting": predicting}


def one(what: str, who: str, data: str) -> None:
    """A process of a round: its median step."""
    times = WORK[what](who, data)
    print(json.dumps({"seconds": statistics.median(b - a for a, b in pairwise(times[FIRST - 1 :]))}))


def main() -> None:
    if DEVICE.type != "cuda" and not SMOKE:
        sys.exit("this needs an NVIDIA GPU; torch sees none")
    lines = [f"{NET} at {SIZE} px, batch {BATCH}, on {DEVICE}; medians of {ROUNDS} rounds of {STEPS} steps, in turns"]
    if DEVICE.type == "cuda":
        driver = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True)
        lines.append(f"{driver.stdout.strip()}, CUDA {torch.version.cuda}, timm {oracle('timm').__version__}")
    with tempfile.TemporaryDirectory() as folder:
        data = str(noise(Path(folder) / "noise"))
        for what in WORK:
            jobs = {who: [__file__, "--one", what, who, data, *["--smoke"] * SMOKE] for who in WAYS}
            took = {who: [found["seconds"] for found in rounds] for who, rounds in in_turns(ROUNDS, jobs).items()}
            lines.append(f"{what}: " + ", ".join(f"{who} {BATCH / statistics.median(seconds):.1f} img/s" for who, seconds in took.items()))
            for who in WAYS[1:]:
                lines.append(f"  ours against {who}: {ratio(took[who], took['ours'])}")
    keep("gpu", lines)


if __name__ == "__main__":
    if "--one" in sys.argv:
        one(*sys.argv[2:5])
    else:
        main()
