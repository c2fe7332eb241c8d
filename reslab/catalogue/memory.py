"""How much memory a net needs in torch, by arithmetic, in bytes of fp32.

A training step holds the parameters, a gradient of each, what the optimiser remembers of each (one momentum for SGD and
Muon; AdamW would need two), and what the backward pass will need of the forward one:

    a convolution, a norm, a pool, a linear layer    what it read
    ReLU, sigmoid                                    what they wrote
    a product                                        its factors
    a max-pool, a norm, a dropout                    besides: where the maxima were, its statistics, what was dropped

A tensor that several of them need is kept once, and additions need nothing. A test holds this against what autograd
saves, byte for byte. Left out are the workspace of convolutions, the gradients of the one or two activations on their
way back, buffers, and what the allocator keeps for later. Standard library only.
"""

import math
from typing import NamedTuple

from reslab.layout import Layer, Shape, norm_groups, parts
from reslab.spec import Spec

FP32, INDEX = 4, 8  # bytes of a number, and of the place of a maximum
READ = ("conv", "batchnorm", "groupnorm", "linear", "maxpool", "avgpool", "blurpool", "scale", "scaleshift", "multiply", "add-exclusive")
WRITTEN = ("relu", "sigmoid")


class Memory(NamedTuple):
    """Bytes, for a batch."""

    parameters: int
    gradients: int
    momentum: int
    kept: int  # of the forward pass, for the backward one
    inference: int  # parameters, and the most that is alive at once in a forward pass that keeps nothing

    @property
    def training(self) -> int:
        return self.parameters + self.gradients + self.momentum + self.kept


class Stretch(NamedTuple):
    """Bytes, for a batch, of the stem, a block or the head: of what it makes."""

    kept: int  # for the backward pass
    output: int  # its last layer's
    largest: int  # of its layers' outputs


def memory(spec: Spec, image_size: int, batch: int) -> Memory:
    """What a training step and a forward pass hold for a batch of that many images."""
    layers = list(spec.layers(image_size))
    parameters = FP32 * sum(layer.params for layer in layers)
    kept = sum(stretch.kept for stretch in stretches(spec, image_size, batch))
    return Memory(parameters, parameters, parameters, kept, parameters + batch * _alive(layers, _shapes(spec, image_size, layers)))


def stretches(spec: Spec, image_size: int, batch: int) -> list[Stretch]:
    """The stem with the images that it reads, every block, and the head. A tensor belongs to the stretch that makes it."""
    split = [part.layers for part in parts(spec, image_size, fold=False)]
    layers = [layer for part in split for layer in part]
    kept, shapes = _kept(layers), _shapes(spec, image_size, layers)
    found = []
    for part in split:
        numbers = sum(math.prod(layer.shape) for layer in part if layer.name in kept)
        statistics = FP32 * sum(2 * layer.shape[0] for layer in part if layer.kind == "batchnorm")  # of the whole batch
        here = batch * (FP32 * numbers + sum(_extra(layer, shapes) for layer in part)) + statistics
        largest = max(math.prod(layer.shape) for layer in part)
        found.append(Stretch(here, batch * FP32 * math.prod(part[-1].shape), batch * FP32 * largest))
    images = batch * FP32 * math.prod(shapes["input"]) * ("input" in kept)
    return [found[0]._replace(kept=found[0].kept + images), *found[1:]]


def _shapes(spec: Spec, image_size: int, layers: list[Layer]) -> dict[str, Shape]:
    return {"input": (spec.in_channels, image_size, image_size)} | {layer.name: layer.shape for layer in layers}


def _kept(layers: list[Layer]) -> set[str]:
    """Names of the layers whose output is kept; "input" is the image."""
    kept: set[str] = set()
    for layer in layers:
        if layer.kind in WRITTEN:
            kept.add(layer.name)
        elif layer.kind == "add-gated":
            kept.add(layer.inputs[1])
        elif (layer.kind in READ and not _reads_padded(layer)) or _subsamples(layer):
            kept.update(layer.inputs)
    return kept


def _subsamples(layer: Layer) -> bool:
    """Whether a shortcut takes every other pixel, as a pool of one."""
    return layer.kind == "pad" and layer.conv is not None and layer.conv.stride > 1


def _reads_padded(layer: Layer) -> bool:
    """Whether a max-pool reads a copy of its input with zeros around it, and keeps that."""
    return layer.kind == "maxpool" and layer.pool is not None and layer.pool.fill == "zero"


def _extra(layer: Layer, shapes: dict[str, Shape]) -> int:
    """Bytes an image that are kept besides inputs and outputs."""
    size, padded = math.prod(layer.shape), 0
    if layer.pool:
        channels, height, width = shapes[layer.inputs[0]]
        padded = channels * (height + 2 * layer.pool.padding) * (width + 2 * layer.pool.padding)
    match layer.kind:
        case "maxpool":
            return INDEX * size + (FP32 * padded if _reads_padded(layer) else 0)
        case "blurpool":
            return FP32 * padded
        case "groupnorm":
            return FP32 * 2 * norm_groups(layer.shape[0])
        case "dropout" | "add-gated" | "add-exclusive":  # what was dropped; 1 - gate
            return FP32 * size
        case "droppath":
            return FP32
    return 0


def _alive(layers: list[Layer], shapes: dict[str, Shape]) -> int:
    """Bytes an image: the most that is alive at once when every output goes as soon as its last reader has run."""
    last = {name: index for index, layer in enumerate(layers) for name in layer.inputs}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    alive = most = sizes["input"]
    for index, layer in enumerate(layers):
        alive += sizes[layer.name]
        most = max(most, alive)
        alive -= sum(sizes[name] for name in set(layer.inputs) if last[name] == index)
    return FP32 * most
