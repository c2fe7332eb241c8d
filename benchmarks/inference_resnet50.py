"""ResNet-50 at 224, predicting: the net as `Classifier.predict` runs it against torchvision in eager fp32. In turns, medians.

    python benchmarks/inference_resnet50.py            about five minutes, on a quiet machine
    python benchmarks/inference_resnet50.py --smoke    seconds; figures that mean nothing

Asked: >= 2.5x at batch 1, >= 4.5x at batch 16, top-1 agreement >= 99.5 %. Weights are random, and the same in both. Ours
starts from uint8 images; torchvision is given normalised floats. The precision is the one that `weigh` chooses here, as
at the end of a training; the other one is shown too. Images are smooth noise.
"""

import sys

import numpy as np
import torch
from measure import keep, torchvision_net

import reslab
from reslab.data.preprocess import Preprocess
from reslab.host import keep_freed_memory
from reslab.use.artefact import TorchModel
from reslab.use.inference import lowered
from reslab.use.race import race

SMOKE = "--smoke" in sys.argv
NET, SIZE, IMAGES = ("resnet18", 64, 32) if SMOKE else ("resnet50", 224, 256)
MEAN, STD = (np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def smooth(n: int) -> np.ndarray:
    """uint8 (n, SIZE, SIZE, 3), every image another."""
    noise = torch.rand(n, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(noise, SIZE, mode="bilinear") * 255
    return images.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()


@torch.no_grad()
def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    theirs = torchvision_net(NET)
    pixels = smooth(IMAGES)
    parts = [pixels[i : i + 16] for i in range(0, IMAGES, 16)]
    preprocess = Preprocess(SIZE, SIZE, 3, MEAN, STD)
    x = [preprocess(torch.from_numpy(part), torch.device("cpu")).contiguous() for part in parts]
    theirs.fc.bias -= torch.cat([theirs(part) for part in x]).mean(0)  # a net of random weights gives every image one class
    want = torch.cat([theirs(part).argmax(1) for part in x])
    net = reslab.build(NET).eval()
    net.load_state_dict(theirs.state_dict())
    model = TorchModel(net, preprocess).weighed(parts)
    got = np.concatenate([model.quick(part).argmax(1) for part in parts])
    chosen, record = model._quick.precision, model.inference
    agree = f"top-1 agrees with torchvision on {np.mean(got == want.numpy()):.2%} of {IMAGES} images, {len(want.unique())} classes"
    lines = [f"{NET} at {SIZE} px, random weights: {chosen} was chosen; {agree}; weighed: {record or 'no bf16 in this hardware'}"]
    single, half = lowered(net, torch.float32), lowered(net, torch.bfloat16)
    for batch in (1, 16):
        images, floats = pixels[:batch], x[0][:batch]
        runs = {
            "torchvision eager fp32": lambda floats=floats: theirs(floats),
            f"predict ({chosen})": lambda images=images: model.quick(images),
            "unfolded, channels last": lambda images=images: model.logits(images),
            "folded fp32": lambda floats=floats: single(floats),
            "folded bf16": lambda floats=floats: half(floats),
        }
        took = race(runs, seconds=1 if SMOKE else 60, rounds=3 if SMOKE else 15)
        base = took["torchvision eager fp32"]
        lines += [f"batch {batch:2}: {name:24} {batch / t:6.1f} img/s  {base / t:.2f}x" for name, t in took.items()]
    keep("inference_resnet50", lines)


main()
