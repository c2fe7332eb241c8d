"""How far a net sees, by arithmetic. Standard library only."""

from reslab.layout import Layer
from reslab.spec import Conv


def receptive_field(net: list[Layer]) -> dict[str, int]:
    """Input pixels, along one side, that a pixel of each layer's output can depend on (Araujo et al. 2019, eq. 2).

    Squeeze-and-excitation and the head see everything; they are left out, as is usual.
    """
    field, step = {"input": 1}, {"input": 1}
    for layer in net:
        known = [name for name in layer.inputs if name in field]
        if known and len(layer.shape) == 3 and layer.kind != "globalpool":
            window = layer.conv or layer.pool or Conv(0, 1, 1)
            field[layer.name] = max(field[name] + (window.kernel - 1) * step[name] for name in known)
            step[layer.name] = max(step[name] for name in known) * window.stride
    del field["input"]
    return field
