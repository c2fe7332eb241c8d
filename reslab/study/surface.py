"""The loss around a trained net, along random directions in which every filter is as long as the trained one.

Li et al. 2018 (1712.09913), section 4: a direction is Gaussian, each of its filters is rescaled to the norm of the net's
own, and biases and norms are left alone. A net with batch norm does the same whatever the length of its filters; without
the rescaling a net with long filters would look flat, and one with short filters sharp.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.fusion import fuse_conv_bn_eval

from reslab.nets.torch import ResNet

Batches = list[tuple[Tensor, Tensor]]  # images as a net is fed them, and labels
Direction = list[Tensor]


def for_surface(net: ResNet, size: int) -> ResNet:
    """A copy in eval mode that computes the same in about four fifths of the time; the net is left alone.

    A batch norm that alone follows a convolution is folded into it. That scales a filter and its direction alike, so the
    surface stays what it is (to rounding: within 1e-5 of the logits). A ReLU whose input nobody else reads overwrites it.
    """
    net = copy.deepcopy(net).eval()
    layers = {layer.name: layer for layer in net.spec.layers(size)}
    readers = Counter(name for layer in layers.values() for name in layer.inputs)
    for name, layer in layers.items():
        source = layers.get(layer.inputs[0])
        if source is None or readers[source.name] > 1:
            continue
        if layer.kind == "batchnorm" and source.kind == "conv":
            conv, norm = net.get_submodule(source.name), net.get_submodule(name)
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            _put(net, source.name, fuse_conv_bn_eval(conv, norm))
            _put(net, name, nn.Identity())
        elif layer.kind == "relu":
            _put(net, name, nn.ReLU(inplace=True))
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _put(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)


def filters(net: nn.Module) -> list[Tensor]:
    """The weights that a direction moves: of convolutions and linear layers, not biases and norms.

    Those on shortcuts come last: what is drawn for all others is then the same for a plain twin, which has none.
    """
    found = [(name, weight) for name, weight in net.named_parameters() if weight.ndim > 1]
    return [weight for _, weight in sorted(found, key=lambda pair: ".downsample." in pair[0])]


def lengths(weights: Sequence[Tensor]) -> Tensor:
    """float64 (n,): for each single weight the norm of its filter, in the order of all weights laid flat."""
    return torch.cat([_norms(weight.detach()).expand_as(weight).reshape(-1) for weight in weights]).double()


def _norms(weight: Tensor) -> Tensor:
    """Of each filter (index of the first axis), to be broadcast."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return norms


def direction(weights: Sequence[Tensor], generator: Generator) -> Direction:
    """A random direction, each filter (index of the first axis) as long as the one in `weights`."""
    made = []
    for weight in weights:
        d = torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=generator))
        made.append(d * (_norms(weight.detach()) / _norms(d)))
    return made


@torch.no_grad()
def along(weights: Sequence[Tensor], directions: Sequence[Direction], points: Sequence[Sequence[float]], loss: Callable[[], float]) -> list[float]:
    """What `loss` is at weights + a first direction + b second direction ..., for each point (a, b, ...).

    The weights come back bit for bit, also after an exception.
    """
    held = [weight.clone() for weight in weights]
    try:
        found = []
        for point in points:
            for index, weight in enumerate(weights):
                weight.copy_(held[index])
                for distance, d in zip(point, directions, strict=True):
                    weight.add_(d[index], alpha=distance)
            found.append(loss())
        return found
    finally:
        for weight, old in zip(weights, held, strict=True):
            weight.copy_(old)


@torch.inference_mode()
def mean_loss(net: nn.Module, batches: Batches) -> float:
    """The mean cross-entropy, in the mode the net is in."""
    total = sum(cross_entropy(net(x), y, reduction="sum").item() for x, y in batches)
    return total / sum(len(y) for _, y in batches)
