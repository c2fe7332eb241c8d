"""What a training step costs more when `reslab study gradients` measures it: asked is under 10 %.

    python benchmarks/study_gradients_cost.py            about 4 minutes, on a quiet machine
    python benchmarks/study_gradients_cost.py --smoke    seconds; figures that mean nothing

Steps of one net on the same batch of 128, forward, backward and SGD, as the study trains: one without hooks, one measured,
one with hooks that are off, and again, interleaved. The ratio is that of the medians. The study measures 40 steps of a
training; on all others the hooks are off.
"""

import statistics
import sys
import time

import torch
from measure import keep
from torch.nn.functional import cross_entropy

import reslab
from reslab.host import keep_freed_memory
from reslab.nets.torch import ResNet
from reslab.study.probe import flowing

SMOKE = "--smoke" in sys.argv
ROUNDS = 2 if SMOKE else 25
NETS = ("resnet20", "plain56", "resnet56")
SIZES = (8,) if SMOKE else (8, 16, 32)


class Step:
    """A training step of a net, with its time."""

    def __init__(self, net: ResNet, size: int) -> None:
        self.net, self.optimizer = net, torch.optim.SGD(net.parameters(), 0.01, 0.9)
        self.x = torch.randn(128, 3, size, size).contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(0, 10, (128,))

    def __call__(self) -> float:
        start = time.perf_counter()
        loss = cross_entropy(self.net(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()
        return time.perf_counter() - start


def cost(name: str, size: int) -> str:
    bare, hooked = (Step(reslab.build(name).to(memory_format=torch.channels_last), size) for _ in range(2))
    with flowing(hooked.net) as flow:

        def measured(on: bool) -> float:
            flow.on = on
            taken, start = hooked(), time.perf_counter()
            flow.read()
            return taken + time.perf_counter() - start

        kinds = {"bare": bare, "measured": lambda: measured(True), "off": lambda: measured(False)}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(ROUNDS + 1):
            for kind, run in kinds.items():
                seconds = run()
                if number:  # the first is not counted
                    times[kind].append(seconds)
    step, on, off = (statistics.median(times[kind]) for kind in kinds)
    return f"{name:9} {size:2} px  step {1000 * step:7.1f} ms  measured {on / step - 1:+6.1%}  hooks off {off / step - 1:+6.1%}"


if __name__ == "__main__":
    torch.manual_seed(0)
    keep_freed_memory()
    head = f"a training step of batch 128, fp32, median of {ROUNDS} interleaved rounds: what measuring adds"
    keep("study_gradients_cost", [head, *(cost(name, size) for name in NETS for size in SIZES)])
