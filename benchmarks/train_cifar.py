"""The whole training loop on CIFAR-10, data included: `reslab.train` against the usual PyTorch script, with its workers.

    python benchmarks/train_cifar.py            half an hour; asked: >= 3.0x its 4 workers, ResNet-20 >= 2.0x its best
    python benchmarks/train_cifar.py --smoke    seconds; figures that mean nothing

The script is what the widely used CIFAR ResNet repositories run, written anew here: PIL transforms (flip, crop with 4 px of
padding, normalise) in a DataLoader with 4, 2 or no workers, fp32, SGD, loss and accuracy read at every step. Ours is started as a person
would, with the same batch, crop, flip, optimiser and image size. Processes take turns; each gives the images a second of its
later steps, when the workers' head start is used up.
"""

import json
import statistics
import sys
import time
from itertools import pairwise

import numpy as np
import torch
from measure import in_turns, keep, on_the_cpu, oracle, our_steps, ratio
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from reslab.data.source import open_images

SMOKE = "--smoke" in sys.argv
DEPTHS = (20,) if SMOKE else (20, 56, 110)
WORKERS = (4, 0) if SMOKE else (4, 2, 0)
ROUNDS, FIRST, STEPS, BATCH = (1, 1, 2, 32) if SMOKE else (5, 10, 25, 128)
OURS = {"recipe": "paper-cifar", "batch_size": BATCH, "normalize": "channel", "precision": "auto"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions; where shapes change the shortcut is subsampled and padded with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.changes = stride > 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.changes:
            extra = (y.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))
        return F.relu(y + x)


class Net(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        n, widths = (depth - 2) // 6, (16, 16, 32, 64)
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        sizes = [(widths[s], widths[s + 1]) if i == 0 else (widths[s + 1],) * 2 for s in range(3) for i in range(n)]
        self.blocks = nn.Sequential(*(Block(a, b, 2 if a != b else 1) for a, b in sizes))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(F.avg_pool2d(x, x.shape[3]).flatten(1))
        return logits


class Cifar(Dataset[tuple[Tensor, int]]):
    def __init__(self) -> None:
        images = open_images("cifar10")
        assert images.array is not None
        train = np.array(images.declared) == "train"
        self.pixels, self.labels = images.array[train], images.labels[train]
        transforms = oracle("torchvision.transforms")
        self.transform = transforms.Compose(
            [transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, 4), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[item])), int(self.labels[item])


def theirs(depth: int, workers: int) -> list[float]:
    """When each step ended."""
    net = Net(depth).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4)
    loader = DataLoader(Cifar(), BATCH, shuffle=True, num_workers=workers)
    times, losses, right = [], 0.0, 0
    for x, y in loader:
        logits = net(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.item()
        right += (logits.argmax(1) == y).sum().item()
        times.append(time.perf_counter())
        if len(times) == FIRST + STEPS:
            break
    return times


def one(who: str, depth: str) -> None:
    """A process of a round."""
    times = our_steps(FIRST + STEPS, "cifar10", net=f"resnet{depth}", **OURS).times if who == "ours" else theirs(int(depth), int(who))
    seconds = [b - a for a, b in pairwise(times[FIRST - 1 :])]
    print(json.dumps({"rate": BATCH * len(seconds) / sum(seconds)}))


def main() -> None:
    lines = [f"CIFAR-10, batch {BATCH}, images a second over {STEPS} steps after {FIRST}; medians of {ROUNDS} rounds in turns"]
    for depth in DEPTHS:
        jobs = {who: [__file__, "--one", who, str(depth), *["--smoke"] * SMOKE] for who in ("ours", *map(str, WORKERS))}
        rates = {who: [found["rate"] for found in rounds] for who, rounds in in_turns(ROUNDS, jobs).items()}
        median = {who: statistics.median(rate) for who, rate in rates.items()}
        best = max(map(str, WORKERS), key=lambda who: median[who])
        lines.append(f"ResNet-{depth}: ours {median['ours']:.0f}, " + ", ".join(f"{w} workers {median[str(w)]:.0f}" for w in WORKERS))
        for who, name in (("4", "4 workers"), (best, f"its best ({best})")):
            lines.append(f"  against {name}: {ratio(rates['ours'], rates[who])}")
    keep("train_cifar", lines)


if __name__ == "__main__":
    on_the_cpu()
    if "--one" in sys.argv:
        one(*sys.argv[2:4])
    else:
        main()
