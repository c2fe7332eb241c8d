"""Activation checkpointing by a budget: what a process holds, and what a step costs more.

    python benchmarks/memory.py [--bf16]   half an hour; asked: ResNet-1202 <= 3 GiB resident, <= 1.3x the step time
    python benchmarks/memory.py --smoke    two minutes; figures that mean nothing

Resident memory is the peak of a whole `reslab train --memory`, from reading the images to the report. Times are of steps in
processes that take turns, one without a budget and one with such a budget that about the same part of the blocks is computed
twice as in ResNet-1202. Batch 128, 32 px, fp32, or the bf16 that a training takes by itself where it is fast.
"""

import json
import re
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from measure import in_turns, keep, on_the_cpu, our_steps, ratio, some_of_cifar, train

import reslab

SMOKE = "--smoke" in sys.argv
DEEP, BUDGET, EPOCHS = ("resnet20", "800M", "1") if SMOKE else ("resnet1202", "3G", "2")
BF16 = "--bf16" in sys.argv
PRECISION = "bf16" if BF16 else "fp32"
FITTING = {3: "750M"} if SMOKE else {18: "900M", 36: "1000M"} if BF16 else {18: "1100M", 36: "1300M"}  # blocks a stage: ResNet-110 and -218
ROUNDS, STEPS = (1, 2) if SMOKE else (5, 4)
OPTIONS = {"batch_size": 128, "recipe": "paper-cifar", "precision": PRECISION}


def one(data: str, blocks: str, memory: str) -> None:
    """A process of a round: its median step, and how many blocks it computes twice."""
    spec = reslab.spec("resnet20", depths=(int(blocks),) * 3)
    steps = our_steps(STEPS + 1, data, net=spec, memory=None if memory == "none" else memory, **OPTIONS)
    twice = re.search(r"the first (\d+) of", " ".join(steps.said))
    seconds = statistics.median(b - a for a, b in pairwise(steps.times))
    print(json.dumps({"seconds": seconds, "twice": int(twice[1]) if twice else 0}))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = str(some_of_cifar(Path(folder) / "cifar", 500 if SMOKE else 1000))
        deep = train(data, "--net", DEEP, "--memory", BUDGET, "--recipe", "paper-cifar", "--precision", PRECISION, "--batch-size", "128", "--epochs", EPOCHS)
        plan = deep.last("plan")
        of = sum(reslab.spec(DEEP).depths)
        lines = [
            f"{DEEP} in {PRECISION}, --memory {BUDGET}: peak resident {deep.peak_gib:.2f} GiB in a run of {deep.seconds:.0f} s, "
            f"{deep.last('epoch')['step']} steps; {sum(plan['segments'])} of {of} blocks computed twice "
            f"in {len(plan['segments'])} segments; a step took {plan['step_seconds']:.1f} s when it was timed before the training"
        ]
        for blocks, memory in FITTING.items():
            jobs = {
                name: [__file__, "--one", data, str(blocks), limit, *["--smoke"] * SMOKE, *["--bf16"] * BF16]
                for name, limit in (("without", "none"), ("with", memory))
            }
            rounds = in_turns(ROUNDS, jobs)
            without, with_ = ([one["seconds"] for one in rounds[name]] for name in jobs)
            lines.append(
                f"ResNet-{6 * blocks + 2}, --memory {memory}: {rounds['with'][0]['twice']} of {3 * blocks} blocks computed twice, "
                f"step {statistics.median(with_):.3f} s against {statistics.median(without):.3f} s without; {ratio(with_, without)}"
            )
    keep("memory-bf16" if BF16 else "memory", lines)


if __name__ == "__main__":
    on_the_cpu()
    if "--one" in sys.argv:
        one(*sys.argv[2:5])
    else:
        main()
