"""Weights between torch nets and Keras models: whose name is whose, and in which order the axes lie.

A convolution's kernel is (out, in, height, width) in torch and (height, width, in, out) in Keras; a linear layer's is
transposed. Both ways are exact. `keras_files.py` reads Keras's files without Keras; torch is imported where tensors are made.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reslab.errors import CallError, shown

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIX = {  # Keras's name of a variable: torch's
    "kernel": "weight",
    "gamma": "weight",
    "weight": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
TO_KERAS = {4: (2, 3, 1, 0), 2: (1, 0)}  # axes, by their number
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
COUNTER = "num_batches_tracked"  # torch's, which Keras does not have


def keras_name(name: str) -> str:
    """Our name of a layer in Keras, whose torch backend forbids dots; no name of ours has a hyphen."""
    return name.replace(".", "-")


def torch_names(layers: Iterable[str]) -> dict[str, str]:
    """Our torch names of a whole Keras model's layers: ours, Keras Applications' and the teaching ResNet's are known."""
    layers = list(layers)
    preact = "post_bn" in layers
    return {name: _applications(name, preact) or _teaching(name) or name.replace("-", ".") for name in layers}


def _applications(name: str, preact: bool) -> str | None:
    """conv2_block1_0_conv, conv2_block1_1_bn; in V2 a norm stands before the convolution of its number."""
    plain = {"conv1_conv": "conv1", "conv1_bn": "bn1", "post_bn": "bn_last", "predictions": "fc", "probs": "fc"}
    if name in plain:
        return plain[name]
    found = re.fullmatch(r"conv([2-9])_block(\d{1,4})_(preact|[0-3])_(conv|bn)", name)
    if not found:
        return None
    stage, block, number, kind = found.groups()
    prefix = f"layer{int(stage) - 1}.{int(block) - 1}"
    if number == "0":
        return f"{prefix}.downsample.{0 if kind == 'conv' else 1}"
    count = 1 if number == "preact" else int(number) + (preact and kind == "bn")
    return f"{prefix}.{kind}{count}"


def _teaching(name: str) -> str | None:
    """res2a_branch2a, bn2a_branch1: stage 2, block a, and of its branches the first or a convolution of the second."""
    plain = {"conv1": "conv1", "bn_conv1": "bn1"}
    if name in plain:
        return plain[name]
    if re.fullmatch(r"fc\d+", name) and name != "fc1":  # fc6, fc1000: the head; our fc1 is a hidden layer
        return "fc"
    found = re.fullmatch(r"(res|bn)([2-5])([a-z])_branch(1|2[abc])", name)
    if not found:
        return None
    kind, stage, block, branch = found.groups()
    prefix = f"layer{int(stage) - 1}.{ord(block) - ord('a')}"
    if branch == "1":
        return f"{prefix}.downsample.{0 if kind == 'res' else 1}"
    return f"{prefix}.{'conv' if kind == 'res' else 'bn'}{'abc'.index(branch[1]) + 1}"


def to_keras(net: "nn.Module", model: Any) -> None:
    """Copies all weights of a torch net into the Keras model of the same spec: ours, or one of Keras Applications.

    Raises CallError, and changes nothing, when the two do not hold the same names and shapes.
    """
    state = {name: tensor.numpy(force=True) for name, tensor in net.state_dict().items() if not name.endswith(COUNTER)}
    held = {name: array.transpose(TO_KERAS.get(array.ndim, (0,))) for name, array in state.items()}
    variables = _variables(model)
    _check_match({name: array.shape for name, array in held.items()}, {name: tuple(v.shape) for name, v in variables.items()})
    for name, variable in variables.items():
        variable.assign(np.ascontiguousarray(held[name]))


def from_keras(model: Any, net: "nn.Module") -> None:
    """Copies all weights of a Keras model, ours or one of Keras Applications, into the torch net of the same spec.

    Torch's counts of batches, which no result depends on, stay. Raises CallError, and changes nothing, as `to_keras` does.
    """
    held = {name: to_tensor(np.asarray(variable)) for name, variable in _variables(model).items()}
    state = net.state_dict()
    ours = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith(COUNTER)}
    _check_match({name: tuple(tensor.shape) for name, tensor in held.items()}, ours)
    net.load_state_dict(state | held)


def to_tensor(array: NDArray[Any]) -> "Tensor":
    """A variable of Keras, float in either byte order, in torch's order of axes; 32 bits, or 64 where it has them."""
    import torch

    turned = array.transpose(TO_TORCH.get(array.ndim, tuple(range(array.ndim))))
    return torch.from_numpy(np.ascontiguousarray(turned, np.float64 if array.dtype.itemsize > 4 else np.float32))


def _variables(model: Any) -> dict[str, Any]:
    """The model's variables by torch's names of them."""
    layers = [layer for layer in model.layers if layer.weights]
    names = torch_names(layer.name for layer in layers)
    return {f"{names[layer.name]}.{SUFFIX.get(v.name, v.name)}": v for layer in layers for v in layer.weights}


def _check_match(given: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    for name in [*wanted, *given]:
        if given.get(name) != wanted.get(name):
            here, there = given.get(name, "missing"), wanted.get(name, "unexpected")
            raise CallError(f"weights go between nets of one spec; {shown(name)} is {here} in one and {there} in the other: build both from the same")
