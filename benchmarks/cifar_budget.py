"""CIFAR-10 within a time: `reslab train cifar10 --net resnet20 --budget 20m`, accuracy, time and peak memory.

python benchmarks/cifar_budget.py [SEED]        20 minutes; asked: top-1 >= 90.5 %, peak under 2.5 GiB
"""

import sys

from measure import keep, train

if __name__ == "__main__":
    seed = next((argument for argument in sys.argv[1:] if argument.isdigit()), "0")
    given = ("--steps", "3", "--image-size", "8") if "--smoke" in sys.argv else ("--budget", "20m")
    run = train("cifar10", "--net", "resnet20", "--seed", seed, *given)
    test, epochs, plan = run.last("test"), [r for r in run.records if r["kind"] == "epoch"], run.records[0]
    lines = [
        f"reslab train cifar10 --net resnet20 {' '.join(given)} --seed {seed}",
        f"test top-1 {test['top1']:.2%} [{test['top1_low']:.2%}, {test['top1_high']:.2%}], n = {test['n']}",
        f"{len(epochs)} epochs begun in {plan['precision']}, {epochs[-1]['step']} steps in {epochs[-1]['seconds']:.0f} s; whole process {run.seconds:.0f} s",
        f"step before training: {1000 * plan['step_seconds']:.0f} ms at 32 px, {1000 * plan['low_step_seconds']:.0f} ms at 24 px ({plan['reason']})",
        f"peak resident memory {run.peak_gib:.2f} GiB, batch 128",
    ]
    keep("cifar_budget", lines)
