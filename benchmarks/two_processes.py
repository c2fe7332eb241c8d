"""Two processes against one: the same global batch in fp32, loss by loss.

    python benchmarks/two_processes.py            minutes; asked: losses within 1e-5 over 50 steps
    python benchmarks/two_processes.py --smoke    3 steps on digits

Both train on CIFAR-10 with the batch in two pieces, and batch norm within a piece: torchrun gives each process one (gloo), one
process takes them one after the other. A thread each, as the order of a sum depends on how many threads share it.
"""

import json
import os
import statistics
import subprocess
import sys
from itertools import pairwise

from measure import keep, on_the_cpu, our_steps

from reslab.errors import WorkError

SMOKE = "--smoke" in sys.argv
DATA, STEPS = ("digits", 3) if SMOKE else ("cifar10", 50)
NETS = ("resnet20",) if SMOKE else ("resnet20", "resnet56")
OPTIONS = {"batch_size": 128, "micro_batch": 64, "precision": "fp32", "seed": 0}


def worker(net: str) -> None:
    try:
        steps = our_steps(STEPS, DATA, net=net, **OPTIONS)
    except WorkError:
        if os.environ.get("RANK") != "1":
            raise
    else:  # the process that shows has seen enough, and left the other
        print(json.dumps({"losses": steps.losses, "seconds": statistics.median(b - a for a, b in pairwise(steps.times))}), flush=True)


def run(*launcher: str, net: str) -> dict[str, object]:
    command = [sys.executable, *launcher, __file__, "--worker", net, *["--smoke"] * SMOKE]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: dict[str, object] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def main() -> None:
    lines = [f"{DATA}, recipe quick in fp32, {STEPS} steps of 128 in pieces of 64, a thread a process, gloo"]
    for net in NETS:
        two = run("-m", "torch.distributed.run", "--nproc-per-node", "2", net=net)
        one = run(net=net)
        apart = max(abs(a - b) for a, b in zip(two["losses"], one["losses"], strict=True))  # type: ignore[call-overload]
        lines.append(
            f"{net}: largest difference of a loss {apart:.1e}; the losses fall from {one['losses'][0]:.4f} to {one['losses'][-1]:.4f}; "  # type: ignore[index]
            f"step {two['seconds']:.3f} s in two processes, {one['seconds']:.3f} s in one"
        )
    keep("two_processes", lines)


if __name__ == "__main__":
    on_the_cpu()
    if "--worker" in sys.argv:
        worker(sys.argv[sys.argv.index("--worker") + 1])
    else:
        main()
