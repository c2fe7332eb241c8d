"""ResNet-50 at 224: our int8, as ONNX and as OpenVINO, from uint8 images on, against torchvision's net in eager fp32. In turns, medians.

python benchmarks/int8_resnet50.py        about five minutes; asked: >= 6x at batch 1, >= 9x at batch 16

Weights are random: time does not depend on them. Ours are torchvision's, so that both compute the same function.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import keep, torchvision_net

import reslab
from reslab.data.preprocess import Preprocess
from reslab.use import quantize
from reslab.use.artefact import TorchModel
from reslab.use.classifier import Classifier
from reslab.use.formats import FORMATS, Runner, metadata, to_onnx
from reslab.use.race import race

SMOKE = "--smoke" in sys.argv
NET, SIZE = ("resnet18", 32) if SMOKE else ("resnet50", 224)
CALIBRATION = 4 if SMOKE else 64
RACE = {"seconds": 1, "rounds": 3} if SMOKE else {"seconds": 100}


def classifier_like(theirs: torch.nn.Module) -> Classifier:
    net = reslab.build(NET).eval()
    net.load_state_dict(theirs.state_dict())
    mean, std = (np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return Classifier(TorchModel(net, Preprocess(SIZE, SIZE, 3, mean, std)), tuple(map(str, range(1000))))


if __name__ == "__main__":
    torch.manual_seed(0)
    theirs = torchvision_net(NET)
    ours = classifier_like(theirs)
    rng = np.random.default_rng(0)
    opened, sizes = dict[str, Runner](), dict[str, int]()
    with tempfile.TemporaryDirectory() as folder:
        for to in ("onnx", "openvino"):
            form = FORMATS[to]
            assert form.store is not None
            fp32 = to_onnx(ours, form.any_size)
            int8 = quantize.quantise(ours, fp32, rng.integers(0, 256, (CALIBRATION, SIZE, SIZE, 3), dtype=np.uint8), "MinMax")
            for precision, graph in (("fp32", fp32), ("int8", int8)):
                file = Path(folder) / precision / f"{to}{form.suffix}"
                file.parent.mkdir(exist_ok=True)
                form.store(graph, metadata(ours, precision), file)
                opened[f"{to} {precision}"] = form.open(file)
                sizes[f"{to} {precision}"] = sum(each.stat().st_size for each in file.parent.glob(f"{to}.*"))
    lines = [
        f"{NET} at {SIZE} px, random weights; ours take uint8 images, torchvision normalised floats; size of int8 "
        + ", ".join(f"{sizes[f'{to} int8'] / sizes[f'{to} fp32']:.3f}x ({to})" for to in ("onnx", "openvino"))
    ]
    for batch in (1, 16):
        pixels = rng.integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8)
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous() / 255

        def eager(x: torch.Tensor = x) -> torch.Tensor:
            with torch.no_grad():
                logits: torch.Tensor = theirs(x)
                return logits

        runs = {name: partial(run, pixels) for name, run in opened.items()}
        took = race({"torchvision eager fp32": eager, **runs}, **RACE)
        base = took["torchvision eager fp32"]
        lines += [f"batch {batch}: {name} {batch / t:.1f} img/s, {base / t:.2f}x" for name, t in took.items()]
    keep("int8_resnet50", lines)
