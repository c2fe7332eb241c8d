"""CIFAR-10 to a given accuracy: `reslab train cifar10 --recipe sprint` as a whole process, seed by seed, and the peer's pace.

    python benchmarks/sprint.py [RECIPE]       sprint (asked: 94.0 % on average over 5 seeds), half an hour on two cores; sprint-95, two hours;
                                               sprint-96, a night; minutes on a GPU
    python benchmarks/sprint.py --smoke        some steps; figures that mean nothing

Seconds count from starting Python to its exit: reading the data, choosing a plan, training, the test over 10,000 images and the
report. Between the seeds the peer's net, airbench94's written anew, takes steps of its own on the same machine, in fp32 and in
bf16; its published 9.9 epochs at the better of the two are what its training alone would take here. Every seed is kept as soon
as it is measured (results/RECIPE.jsonl), and a later call, on whichever machine, goes on with those that are missing, one that was
interrupted in the middle included (unfinished/): its seconds are those of training up to the state it was resumed from and those of
the process that went on. Seeds of a recipe that has changed since do not count. Its net is not compared: where that changes alone, the
kept file has to go.
"""

import json
import shutil
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from measure import RESULTS, Measured, commit, hardware, keep, records, train_in
from torch import Tensor, nn
from torch.nn import functional as F

from reslab.host import keep_freed_memory
from reslab.tensors import read_tensors
from reslab.train.hardware import synchronise
from reslab.train.recipe import RECIPES

SMOKE = "--smoke" in sys.argv
RECIPE = next((name for name in sys.argv[1:] if not name.startswith("--")), "sprint")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAME = RECIPE + "-gpu" * (DEVICE.type == "cuda")
CALL = RECIPES[RECIPE].as_call
UNFINISHED = RESULTS.parent / "unfinished"
SEEDS = 1 if SMOKE else 5
IMAGES, EPOCHS = 50_000, 9.9  # airbench94: Jordan 2024 (2404.00498), table 1
BATCH, STEPS = (16, 2) if SMOKE else (1024, 6)
SHORT = ("--steps", "4", "--batch-size", "64", "--norm-batch", "64", "--net", "resnet20", "--tta", "none") if SMOKE else ()


class Group(nn.Module):
    """conv, max-pool, batch norm, GELU, conv, batch norm, GELU; the norms have no scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(i, outputs, 3, padding=1, bias=False) for i in (inputs, outputs))
        self.norm1, self.norm2 = (nn.BatchNorm2d(outputs, 1e-12, 0.4) for _ in range(2))
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class Peer(nn.Module):
    """airbench94's net: a frozen 2x2 convolution to 24 channels, three groups, a max over what is left, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.groups = nn.Sequential(Group(24, 64), Group(64, 256), Group(256, 256))
        self.head = nn.Linear(256, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.max_pool2d(self.groups(F.gelu(self.whiten(x))), 3).flatten(1)) / 9
        return logits


def pace(bf16: bool) -> float:
    """The peer's images a second in training steps on images that are there already, the median of a few after the first.

    With freed memory kept, as ours has it.
    """
    keep_freed_memory()
    torch.manual_seed(0)
    net = Peer().to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, 0.85, nesterov=True)
    x = torch.randn(BATCH, 3, 32, 32).to(DEVICE, memory_format=torch.channels_last)
    y = torch.arange(BATCH, device=DEVICE) % 10
    times = [time.perf_counter()]
    for _ in range(STEPS):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(x), y, label_smoothing=0.2, reduction="sum")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        synchronise(x)
        times.append(time.perf_counter())
    return BATCH / statistics.median(b - a for a, b in pairwise(times[1:]))


def told(name: str, values: list[float], digits: int) -> str:
    spread = f", standard deviation {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{name}: mean {statistics.mean(values):.{digits}f}{spread}, {min(values):.{digits}f} to {max(values):.{digits}f}, n = {len(values)}"


def measured(seed: int, out: Path) -> dict[str, Any]:
    """The peer's pace, then a whole training, or what is left of one."""
    paces = [pace(bf16) for bf16 in (False, True)]
    state = out / "state" / "last.safetensors"
    before = json.loads(read_tensors(state)[1])["seconds"] if state.is_file() else 0.0
    if (out / "model" / "spec.json").is_file():  # it was lost between its end and its line in results/
        run = Measured(0.0, 0.0, records(out))
    elif before:
        run = train_in(out, "--resume", out)
    else:
        shutil.rmtree(out, ignore_errors=True)
        run = train_in(out, "cifar10", "--recipe", RECIPE, "--seed", str(seed), *SHORT, "--out", out)
    one = {"seed": seed, "top1": run.last("test")["top1"], "seconds": before + run.seconds, "resumed": before > 0}
    return one | {"fp32": paces[0], "bf16": paces[1], "commit": commit(), "hardware": hardware(), "recipe": CALL}


def main() -> None:
    kept = RESULTS / f"{NAME}.jsonl"
    before = [json.loads(line) for line in kept.read_text("utf-8").splitlines()] if kept.is_file() and not SMOKE else []
    found = [one for one in before if one["recipe"] == CALL]
    for seed in range(SEEDS):
        if seed not in [one["seed"] for one in found]:
            out = UNFINISHED / f"{NAME}{'-smoke' * SMOKE}-{crc32(CALL.encode()):08x}-{seed}"
            found.append(measured(seed, out))
            if not SMOKE:
                kept.write_text("".join(json.dumps(one) + "\n" for one in found), "utf-8")
            shutil.rmtree(out)
    peers = [EPOCHS * IMAGES / max(one["fp32"], one["bf16"]) for one in found]
    lines = [
        f"seed {one['seed']}: {100 * one['top1']:.2f} % in {one['seconds']:.0f} s{', resumed' * one.get('resumed', False)}; "
        f"the peer's net, fp32 {one['fp32']:.0f}, bf16 {one['bf16']:.0f} img/s, so {peer:.0f} s for its training alone; "
        f"commit {one['commit']}, {one['hardware'].split(',')[0]}"
        for one, peer in zip(found, peers, strict=True)
    ]
    lines.append(told("accuracy, %", [100 * one["top1"] for one in found], 2))
    for machine in sorted({one["hardware"] for one in found}):
        there = [(one["seconds"], peer) for one, peer in zip(found, peers, strict=True) if one["hardware"] == machine and not one.get("resumed")]
        name = machine.split(",")[0]
        if not there:
            continue  # seconds of a seed that was resumed are no whole process's
        lines.append(told(f"{name}: seconds", [seconds for seconds, _ in there], 0))
        lines.append(told(f"{name}: seconds as a share of the peer's training", [seconds / peer for seconds, peer in there], 2))
    keep(NAME, [f"CIFAR-10, recipe {RECIPE}: whole process, test of 10,000 images included", *lines])


if __name__ == "__main__":
    main()
