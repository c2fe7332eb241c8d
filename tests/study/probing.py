"""What the tests of the measuring studies share: digits, and nets small enough for a test."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import reslab
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.nets.torch import ResNet
from reslab.spec import Spec
from reslab.study.data import Data, prepare

KEPT = TemporaryDirectory()


@cache
def digits() -> Data:
    return prepare(split(open_images("digits", lambda *done: None), 0), 8, Path(KEPT.name))[0]


def tiny(**changes: object) -> Spec:
    return reslab.spec("resnet20", **{"depths": (2, 2, 2), "widths": (4, 8, 16), "in_channels": 1, "num_classes": 10, **changes})


def made(spec: Spec, seed: int = 0) -> ResNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResNet(spec)


def state(net: nn.Module) -> tuple[dict[str, Tensor], list[object], int]:
    """All that a study must leave as it found it: tensors, modes and gradients, hooks; and the global random numbers."""
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()} | {"random numbers": torch.random.get_rng_state()}
    marks = [(m.training, *(p.requires_grad for p in m.parameters()), *(p.grad is None for p in m.parameters())) for m in net.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())
    return tensors, marks, hooks


def same(before: tuple[dict[str, Tensor], list[object], int], after: tuple[dict[str, Tensor], list[object], int]) -> bool:
    return before[1:] == after[1:] and all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
