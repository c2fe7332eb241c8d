"""Blocks of a net left out or put in another order, for as long as it takes to look. Weights are never touched."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reslab.layout import Unit, stages
from reslab.nets.parts import PadShortcut
from reslab.nets.torch import ResNet
from reslab.study.data import Data
from reslab.study.untouched import untouched

MEMORY, MOST = 1 << 30, 100  # bytes that all layers put out for a batch, and its images, at most


class Lesion(NamedTuple):
    """Blocks, by their number in the net, to remove; and the order of all of them, where it is another."""

    removed: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """The first block whose input is still what it was."""
        moved = [place for place, number in enumerate(self.order) if place != number]
        return min((*self.removed, *moved), default=0)


def units(net: ResNet) -> list[Unit]:
    """The blocks in order, as data."""
    return [unit for stage in stages(net.spec) for unit in stage]


def interchangeable(net: ResNet) -> list[list[int]]:
    """The numbers of the blocks of each stage that keep the shape of their input, so that they can change places."""
    made, number = [], 0
    for stage in stages(net.spec):
        made.append([number + i for i, unit in enumerate(stage) if keeps_shape(unit)])
        number += len(stage)
    return made


def keeps_shape(unit: Unit) -> bool:
    """Whether a block's output has the shape of its input."""
    return unit.inputs == unit.outputs and unit.stride == 1


@contextmanager
def as_found(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards the net and the random numbers are as if nothing had been."""
    with untouched(net):
        net.eval()
        yield


def remove(block: nn.Module, unit: Unit) -> RemovableHandle:
    """The block's branch yields nothing, and what its shortcut carries remains, until the handle is removed.

    A plain block has no shortcut: it is left out whole, and where it changes the shape shortcut A stands in its place.
    """
    if unit.carrier == "none":
        around = PadShortcut(unit.inputs, unit.outputs, unit.stride)
        return block.register_forward_hook(lambda module, inputs, output: around(inputs[0]))

    def without_branch(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (torch.zeros_like(inputs[0]), *inputs[1:])

    return block.get_submodule("add").register_forward_pre_hook(without_branch)


def batches(net: ResNet, data: Data, items: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The items, as many at a time as memory holds when every layer's output is kept."""
    count = max(1, min(MOST, MEMORY // net.spec.cost(data.facts.size).activations))
    return [items[start : start + count] for start in range(0, len(items), count)]


def mistakes(net: ResNet, data: Data, items: NDArray[np.int64], lesions: Sequence[Lesion]) -> NDArray[np.bool_]:
    """(lesions, items): whether the net, so lesioned, is wrong about each of those test images."""
    wrong = []
    with as_found(net), torch.no_grad():
        for batch in batches(net, data, items):
            x, y = data.test_batch(batch)
            inputs = block_inputs(net, x)
            wrong.append(np.stack([(lesioned(net, inputs, lesion).argmax(1) != y).numpy() for lesion in lesions]))
    return np.concatenate(wrong, axis=1)


def block_inputs(net: ResNet, x: Tensor) -> list[Tensor]:
    """What each block of the whole net sees of the images (N, C, H, W)."""
    inputs = [net.stem(x)]
    for unit in units(net)[:-1]:
        inputs.append(net.get_submodule(unit.name)(inputs[-1]))
    return inputs


def lesioned(net: ResNet, inputs: list[Tensor], lesion: Lesion) -> Tensor:
    """The lesioned net's logits (N, classes). `inputs` are those of the whole net's blocks: what comes before a lesion is not done again."""
    numbered = [(net.get_submodule(unit.name), unit) for unit in units(net)]
    with ExitStack() as hooks:
        for number in lesion.removed:
            hooks.enter_context(remove(*numbered[number]))
        x = inputs[lesion.first]
        for number in (lesion.order or range(len(numbered)))[lesion.first :]:
            x = numbered[number][0](x)
        return net.head(x)
