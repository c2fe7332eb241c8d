"""ResNet-50 at 224, predicting: the net as `Classifier.predict` runs it against torchvision in eager fp32. In turns, medians.

    python benchmarks/inference_resnet50.py            about a quarter of an hour, on a quiet machine
    python benchmarks/inference_resnet50.py --smoke    seconds; figures that mean nothing

Asked: >= 2.5x at batch 1, >= 4.5x at batch 16, top-1 agreement >= 99.5 %. Trains a net first, on digits enlarged to 224 px, the
most of it at 112 px, for whether a precision keeps the classes shows only where there are some; the weights are the same in both.
The agreement is counted on its test images. Ours starts from uint8 images; torchvision is given normalised floats. The precision
is the one that the training chose; the others are shown too.
"""

import sys
import tempfile
from pathlib import Path

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
SMALL_FIRST = "--low-resolution", "0.7", "--low-size", "0.5"
OPTIONS = "--net", NET, "--image-size", SIZE, "--crop", "none", "--val", "0.2", *STEPS, *SMALL_FIRST  # int8 wants some 200 val images


@torch.no_grad()
def main() -> None:
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(train_here("digits", Path(folder) / "run", *OPTIONS))
        model, top1 = reslab.load(run.path).model, run.last("test")["top1"]
        assert isinstance(model, TorchModel)
        images = own_images(run)
        parts = [pixels for pixels, _, _ in read_batches(images, images.split["test"], model.preprocess.canvas, 16)]
    theirs = getattr(oracle("torchvision.models"), NET)(num_classes=len(images.classes)).eval()
    theirs.conv1 = nn.Conv2d(images.channels, 64, 7, 2, 3, bias=False)
    theirs.load_state_dict(model.net.state_dict())
    x = [model.preprocess(torch.from_numpy(part), torch.device("cpu")).contiguous() for part in parts]
    agree = sum(int((model.quick(part).argmax(1) == theirs(floats).argmax(1).numpy()).sum()) for part, floats in zip(parts, x, strict=True))
    n = sum(map(len, parts))
    counted, chosen, record = share("agreement", agree, n), model._quick.precision, model.inference
    lines = [
        f"{NET} at {SIZE} px, trained on digits to {top1:.2%} of n = {n}; {chosen} was chosen; top-1 agrees with torchvision "
        f"on {counted['agreement']:.2%} [{counted['agreement_low']:.2%}, {counted['agreement_high']:.2%}] of these",
        *(
            f"  {name} on {record['n']} val images: agreement {record[name]['agreement']:.2%}, gain {record[name]['gain']}"
            for name in ("bf16", "int8")
            if name in record
        ),
    ]
    others: dict[str, Forward | None] = {"fp32": lowered(model.net, torch.float32), "bf16": lowered(model.net, torch.bfloat16)}
    if "int8" in record:
        others["int8"] = in_int8(model.net, record["int8"]["ranges"], x[0])
    for batch in (1, 16):
        pixels, floats = parts[0][:batch], x[0][:batch]
        runs = {
            "torchvision eager fp32": lambda floats=floats: theirs(floats),
            f"predict ({chosen})": lambda pixels=pixels: model.quick(pixels),
            "unfolded, channels last": lambda pixels=pixels: model.logits(pixels),
            **{f"folded {name}": lambda forward=forward, floats=floats: forward(floats) for name, forward in others.items() if forward},
        }
        took = race(runs, seconds=1 if SMOKE else 60, rounds=3 if SMOKE else 15)
        base = took["torchvision eager fp32"]
        lines += [f"batch {batch:2}: {name:24} {batch / t:6.1f} img/s  {base / t:.2f}x" for name, t in took.items()]
    keep("inference_resnet50", lines)


main()
