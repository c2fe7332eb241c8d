"""The nets of torchvision, timm and Transformers that ours are compared with, and the comparison."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import reslab
from reslab.nets.configs import TIMM
from reslab.nets.torch import ResNet
from reslab.nets.weights import Loaded
from tests.conftest import peer, relative, scramble

TORCHVISION = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "resnet18": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    "resnet26": {"depths": [2, 2, 2, 2]},
    "resnet34": {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]},
    "resnet50": {},
    "resnet50_v1": {"downsample_in_bottleneck": True},
    "resnet101": {"depths": [3, 4, 23, 3]},
}
CASES = (
    *(("torchvision", name) for name in TORCHVISION),
    *(("timm", name) for name in TIMM),
    *(("transformers", name) for name in TRANSFORMERS),
)


@contextmanager
def undrawn() -> Iterator[None]:
    """Nets built here get no first values, which takes most of the time of building one."""
    draws = ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "trunc_normal_")
    with mock.patch.multiple(nn.init, **{name: lambda tensor, *args, **kwargs: tensor for name in draws}):
        yield


@undrawn()
def make(library: str, row: str) -> nn.Module:
    """Their net for a row of ours, with random weights and running statistics."""
    if library == "torchvision":
        net = getattr(peer("torchvision.models"), row)(weights=None)
    elif library == "timm":
        net = peer("timm").create_model(TIMM[row])
    else:
        transformers = peer("transformers")
        net = transformers.ResNetForImageClassification(transformers.ResNetConfig(**TRANSFORMERS[row], id2label={i: str(i) for i in range(1000)}))
    return scramble(net).eval()


def loaded(theirs: nn.Module, row: str) -> tuple[ResNet, Loaded]:
    """Our net with their weights, which went through a file."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder) / "theirs.pth")
        with undrawn():
            ours = reslab.build(row).eval()
        return ours, reslab.load_weights(ours, Path(folder) / "theirs.pth")


@torch.no_grad()
def differences(theirs: nn.Module, ours: ResNet, size: int) -> dict[str, float]:
    """The relative difference of every stage's output and of the logits, for two images."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    held: list[Tensor] = []
    hooks = [stage.register_forward_hook(lambda module, inputs, out: held.append(out)) for stage in _stages(theirs)]
    want = theirs(x)
    for hook in hooks:
        hook.remove()
    outputs: dict[str, Tensor] = {}
    found = {"logits": relative(ours(x, outputs), getattr(want, "logits", want))}
    for number, (stage, depth) in enumerate(zip(held, ours.spec.depths, strict=True), start=1):
        found[f"layer{number}"] = relative(outputs[f"layer{number}.{depth - 1}"], stage)
    assert all(map(math.isfinite, found.values())), found
    return found


def _stages(net: nn.Module) -> list[nn.Module]:
    if hasattr(net, "layer1"):
        return [net.get_submodule(f"layer{i}") for i in range(1, 5)]
    return list(net.stages) if hasattr(net, "stages") else list(net.resnet.encoder.stages)
