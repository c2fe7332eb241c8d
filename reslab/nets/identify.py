"""Which networks of the family given tensors fit: names and shapes compared by arithmetic, without building a net."""

import math
from collections.abc import Mapping
from dataclasses import replace

from reslab.errors import CallError
from reslab.family import FAMILY
from reslab.layout import Shape
from reslab.spec import Spec

SHOWN = 4
COUNTER = "num_batches_tracked"


def state_shapes(spec: Spec) -> dict[str, Shape]:
    """Name and shape of every parameter and running statistic of the built net, but for the norms' counters."""
    found: dict[str, Shape] = {}
    shapes: dict[str, Shape] = {"input": (spec.in_channels,)}
    for layer in spec.layers(spec.flatten or max(32, spec.reduction)):
        shapes[layer.name] = layer.shape
        inputs, outputs = shapes[layer.inputs[0]], layer.shape[0]
        if layer.conv and layer.kind == "conv":
            found[f"{layer.name}.weight"] = (outputs, inputs[0] // layer.conv.groups, layer.conv.kernel, layer.conv.kernel)
        elif layer.kind == "linear":
            found[f"{layer.name}.weight"] = (outputs, math.prod(inputs))
        elif layer.params:
            single = layer.kind in ("shift", "scaleshift", "scale")
            each = {"shift": ("bias",), "scale": ("weight",), "batchnorm": ("weight", "bias", "running_mean", "running_var")}.get(
                layer.kind, ("weight", "bias")
            )
            found |= {f"{layer.name}.{name}": (1,) if single else (outputs,) for name in each}
        if layer.bias:
            found[f"{layer.name}.bias"] = (outputs,)
    return found


def fitting(shapes: Mapping[str, Shape]) -> list[str]:
    """The rows of `FAMILY`, in its order, whose tensors have exactly these names (ours) and shapes.

    The number of classes and of input channels is taken from the tensors. Several rows can fit: where only what has no
    weights differs, such as a stride, nothing in a file tells them apart.
    """
    found = {name: shape for name, shape in shapes.items() if not name.endswith(COUNTER)}
    blocks = sum(name.endswith(".conv1.weight") and name.startswith("layer") for name in found)
    first, head = found.get("conv1.weight", found.get("conv1.0.weight", ())), found.get("fc.weight", ())
    if len(first) != 4 or len(head) != 2:
        return []
    rows = []
    for name, row in FAMILY.items():
        if sum(row.spec.depths) != blocks:
            continue
        try:
            spec = replace(row.spec, num_classes=head[0], in_channels=first[1])
        except CallError:  # numbers that no net can have
            return []
        if state_shapes(spec) == found:
            rows.append(name)
    return rows


def sentence(rows: list[str], classes: int) -> str:
    """The rows that fit, as part of a message."""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{', '.join(rows[:SHOWN])}{more} with {classes} classes"
