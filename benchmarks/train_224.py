"""A training step at 224 px: ours against torchvision's net in eager fp32. In turns, medians.

    python benchmarks/train_224.py            about 10 minutes; asked: ResNet-18 >= 3.5x, ResNet-50 >= 6x
    python benchmarks/train_224.py --smoke    ResNet-18 at 64 px; figures that mean nothing

Ours is the loop of `reslab.train` on a folder of noise, so that a step includes fetching, normalising and flipping its batch;
theirs is forward, backward and SGD on one batch of random numbers. Each turn is a process of its own.
"""

import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from measure import in_turns, keep, on_the_cpu, oracle, our_steps, ratio
from PIL import Image

SMOKE = "--smoke" in sys.argv
NETS, SIZE, BATCH = (("resnet18",), 64, 8) if SMOKE else (("resnet18", "resnet50"), 224, 32)
ROUNDS, FIRST, STEPS = (1, 1, 2) if SMOKE else (5, 4, 4)  # either's memory grows during the first three steps
OURS = {"recipe": "paper-imagenet", "batch_size": BATCH, "image_size": SIZE, "crop": "none", "lighting": 0.0, "normalize": "channel", "steps": 1000}


def noise(root: Path) -> Path:
    """Two classes of noise, enough for an epoch that is longer than what is timed."""
    rng = np.random.default_rng(0)
    for i in range((FIRST + STEPS + 2) * BATCH * 2):
        path = root / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    return root


def theirs(name: str) -> list[float]:
    """When each step ended."""
    net = getattr(oracle("torchvision.models"), name)(weights=None).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4)
    x, y, times = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(0, 1000, (BATCH,)), []
    for _ in range(FIRST + STEPS):
        loss = torch.nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter())
    return times


def one(who: str, name: str, data: str) -> None:
    """A process of a round: its median step."""
    times = our_steps(FIRST + STEPS, data, net=name, **OURS).times if who == "ours" else theirs(name)
    print(json.dumps({"seconds": statistics.median(b - a for a, b in pairwise(times[FIRST - 1 :]))}))


def main() -> None:
    lines = [f"a training step at {SIZE} px, batch {BATCH}; medians of {ROUNDS} rounds of {STEPS} steps, in turns"]
    with tempfile.TemporaryDirectory() as folder:
        data = str(noise(Path(folder) / "noise"))
        for name in NETS:
            jobs = {who: [__file__, "--one", who, name, data, *["--smoke"] * SMOKE] for who in ("ours", "theirs")}
            took = {who: [found["seconds"] for found in rounds] for who, rounds in in_turns(ROUNDS, jobs).items()}
            rates = [f"{who} {BATCH / statistics.median(seconds):.1f} img/s" for who, seconds in took.items()]
            lines.append(f"{name}: {', '.join(rates)}; {ratio(took['theirs'], took['ours'])}")
    keep("train_224", lines)


if __name__ == "__main__":
    on_the_cpu()
    if "--one" in sys.argv:
        one(*sys.argv[2:5])
    else:
        main()
