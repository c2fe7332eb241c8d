"""ResNet-50 at 224, predicting: the net as `Classifier.predict` runs it against torchvision in eager fp32. In turns, medians.

    python benchmarks/inference_resnet50.py            about a quarter of an hour, on a quiet machine
    python benchmarks/inference_resnet50.py --smoke    seconds; figures that mean nothing

Asked: >= 2.5x at batch 1, >= 4.5x at batch 16, top-1 agreement >= 99.5 %. Trains a net first, on digits enlarged to 224 px, the
most of it at 112 px, for whether a precision keeps the classes shows only where there are some; the weights are the same in both.
The agreement is counted on its test images. Ours starts from uint8 images; torchvision is given normalised floats, in a process of
its own, as it comes, and once more in ours, whose allocator keeps freed memory. The precision is the one that the training
chose; the others are shown too.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import keep, oracle, train_here
from torch import nn

import reslab
from reslab.data.images import read_batches
from reslab.host import keep_freed_memory
from reslab.interval import share
from reslab.run import Run
from reslab.use.artefact import TorchModel
from reslab.use.inference import Forward, in_int8, lowered
from reslab.use.own import own_images
from reslab.use.race import race

SMOKE = "--smoke" in sys.argv
NET, SIZE, STEPS = ("resnet18", "64", ("--steps", "4")) if SMOKE else ("resnet50", "224", ("--epochs", "5", "--batch-size", "16"))
THEIRS, KEPT = "torchvision eager fp32", "the same, memory kept"
SMALL_FIRST = "--low-resolution", "0.7", "--low-size", "0.5"
OPTIONS = "--net", NET, "--image-size", SIZE, "--crop", "none", "--val", "0.2", *STEPS, *SMALL_FIRST  # int8 wants some 200 val images


def torchvision_net(channels: int, classes: int) -> nn.Module:
    net: nn.Module = getattr(oracle("torchvision.models"), NET)(num_classes=classes).eval()
    net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return net


class Alone:
    """torchvision's net in a process of its own; a call is a forward pass of so many images."""

    def __init__(self, net: nn.Module, x: torch.Tensor) -> None:
        self.folder = tempfile.TemporaryDirectory()
        file = Path(self.folder.name) / "held.pt"
        torch.save({"state": net.state_dict(), "x": x}, file)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--alone", str(file), *sys.argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Alone":
        return self

    def __exit__(self, *facts: object) -> None:
        self.process.communicate()
        self.folder.cleanup()

    def __call__(self, batch: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(batch, file=self.process.stdin, flush=True)
        if not self.process.stdout.readline():
            raise RuntimeError("the other process has ended")


@torch.no_grad()
def alone(file: str) -> None:
    """What runs there."""
    held: dict[str, Any] = torch.load(file, weights_only=True)
    net = torchvision_net(held["state"]["conv1.weight"].shape[1], len(held["state"]["fc.bias"]))
    net.load_state_dict(held["state"])
    for line in sys.stdin:
        net(held["x"][: int(line)])
        print(flush=True)


@torch.no_grad()
def main() -> None:
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(train_here("digits", Path(folder) / "run", *OPTIONS))
        model, top1 = reslab.load(run.path).model, run.last("test")["top1"]
        assert isinstance(model, TorchModel)
        images = own_images(run)
        parts = [pixels for pixels, _, _ in read_batches(images, images.split["test"], model.preprocess.canvas, 16)]
    theirs = torchvision_net(images.channels, len(images.classes))
    theirs.load_state_dict(model.net.state_dict())
    x = [model.preprocess(torch.from_numpy(part), torch.device("cpu")).contiguous() for part in parts]
    agree = sum(int((model.quick(part).argmax(1) == theirs(floats).argmax(1).numpy()).sum()) for part, floats in zip(parts, x, strict=True))
    n = sum(map(len, parts))
    counted, chosen, record = share("agreement", agree, n), model._quick.precision, model.inference
    lines = [
        f"{NET} at {SIZE} px, trained on digits to {top1:.2%} of n = {n}; {chosen} was chosen; top-1 agrees with torchvision "
        f"on {counted['agreement']:.2%} [{counted['agreement_low']:.2%}, {counted['agreement_high']:.2%}] of these",
        *(
            f"  {name} on {record['n']} val images: agreement {record[name]['agreement']:.2%}, {record[name]['exchanged']:.2%} with "
            f"other images' rounding, gain {record[name]['gain']}"
            for name in ("bf16", "int8")
            if name in record
        ),
    ]
    others: dict[str, Forward | None] = {"fp32": lowered(model.net, torch.float32), "bf16": lowered(model.net, torch.bfloat16)}
    if "int8" in record:
        others["int8"] = in_int8(model.net, record["int8"]["ranges"], x[0])
    with Alone(theirs, x[0]) as other:
        for batch in (1, 16):
            pixels, floats = parts[0][:batch], x[0][:batch]
            runs = {
                THEIRS: lambda batch=batch: other(batch),
                KEPT: lambda floats=floats: theirs(floats),
                f"predict ({chosen})": lambda pixels=pixels: model.quick(pixels),
                "unfolded, channels last": lambda pixels=pixels: model.logits(pixels),
                **{f"folded {name}": lambda forward=forward, floats=floats: forward(floats) for name, forward in others.items() if forward},
            }
            took = race(runs, seconds=1 if SMOKE else 60, rounds=3 if SMOKE else 15)
            base = took[THEIRS]
            lines += [f"batch {batch:2}: {name:24} {batch / t:6.1f} img/s  {base / t:.2f}x" for name, t in took.items()]
    keep("inference_resnet50", lines)


if __name__ == "__main__":
    if "--alone" in sys.argv:
        alone(sys.argv[sys.argv.index("--alone") + 1])
    else:
        main()
