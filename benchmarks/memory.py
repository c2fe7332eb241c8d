"""Activation checkpointing by a budget: what a process holds, and what a step costs more.

    python benchmarks/memory.py            about 20 minutes; asked: ResNet-1202 <= 3 GiB resident, <= 1.3x the step time
    python benchmarks/memory.py --smoke    about a minute; figures that mean nothing

Resident memory is the peak of a whole `reslab train --memory`, from reading the images to the report. Times are of steps in
processes that take turns, each with its own training: one with all activations, one that computes again as many blocks, in
proportion, as ResNet-1202 did. Batch 128, 32 px.
"""

import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path

from measure import our_steps
from PIL import Image

import reslab
from reslab.data.source import open_images

SMOKE = "--smoke" in sys.argv
DEEP, BUDGET = ("resnet20", "800M") if SMOKE else ("resnet1202", "3G")
DEPTHS = (3,) if SMOKE else (18, 36)  # blocks a stage of what fits without: ResNet-110 and -218
BATCH, IMAGES, ROUNDS, STEPS = 128, 1500, 1 if SMOKE else 5, 4 if SMOKE else 6
SETTING = {"batch_size": BATCH, "recipe": "paper-cifar", "precision": "fp32", "low_resolution": 0.0}


def some_of_cifar(root: Path) -> Path:
    """So many images of CIFAR-10 as files, so that a whole run of a deep net takes minutes."""
    images = open_images("cifar10")
    assert images.array is not None
    for i in range(IMAGES):
        folder = root / images.classes[images.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.array[i]).save(folder / f"{i}.png")
    return root


def one(data: str, n: str, limit: str) -> None:
    """A process of a round: the median step of a ResNet of n blocks a stage."""
    spec = reslab.spec("resnet20", depths=(int(n),) * 3)
    took = our_steps(STEPS + 1, data, net=spec, memory=None if limit == "none" else int(limit), **SETTING).times
    print(json.dumps({"seconds": statistics.median(b - a for a, b in pairwise(took))}))


def budget_for(n: int, share: float) -> int:
    """The largest memory with which at least `share` of the blocks are computed again."""
    raise NotImplementedError
