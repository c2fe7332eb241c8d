"""Torch against Keras on values: the same random weights and statistics, every block's output, eval and train mode.

python -m tests.nets.parity NAME...       the worst relative difference of each row, two blocks a stage and a quarter as wide
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

import reslab
from reslab.family import FAMILY
from reslab.nets.keras import build, keras
from reslab.nets.keras_weights import keras_name, to_keras
from reslab.nets.parts import DropPath
from reslab.spec import Spec
from tests.conftest import scramble

TOLERANCE = 1e-4
BATCH = 4


def shallow(spec: Spec) -> Spec:
    """The same structure at a fraction of the cost: at most two blocks a stage, a quarter as wide."""
    return replace(
        spec, depths=tuple(min(2, depth) for depth in spec.depths), widths=tuple(width // 4 for width in spec.widths), stem_width=spec.stem_width // 4
    )


def distinct() -> dict[Spec, list[str]]:
    """Every row of FAMILY under its shallow form; rows that differ by depth alone share one."""
    found: dict[Spec, list[str]] = {}
    for name, row in FAMILY.items():
        found.setdefault(shallow(row.spec), []).append(name)
    return found


def sizes(spec: Spec) -> list[int]:
    """An even one and an odd one, whose last map has 2 or 3 pixels a side; for flattening nets theirs."""
    return [spec.flatten] if spec.flatten else [2 * spec.reduction, 2 * spec.reduction + 1]


def pair(spec: Spec, dtype: str = "float32") -> tuple[nn.Module, keras.Model]:
    """Both nets of a spec with the same scrambled weights; what drops at random drops nothing."""
    net = scramble(reslab.build(spec)).to(getattr(torch, dtype))
    with _precision(dtype):
        model = build(spec)
    to_keras(net, model)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, DropPath):
            module.chance = 0.0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return net, model


def blocks(spec: Spec, model: keras.Model) -> keras.Model:
    """A model that gives every block's output, and the logits."""
    ends = {".".join(layer.name.split(".")[:2]): layer.name for layer in spec.layers(sizes(spec)[0]) if layer.name.startswith("layer")}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(200_000)
    try:
        with _precision(model.compute_dtype):
            return keras.Model(model.input, [*(model.get_layer(keras_name(end)).output for end in ends.values()), model.output])
    finally:
        sys.setrecursionlimit(limit)


@contextmanager
def _precision(dtype: str) -> Iterator[None]:
    """Of what Keras makes, and of what it is fed: it rounds arrays to its floatx, and batch norms to fp32 whatever that is."""
    from keras.src.backend.common.dtypes import BIT64_TO_BIT32_DTYPE as rounded  # noqa: N811

    usual = rounded["float64"]
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    rounded["float64"] = dtype
    try:
        yield
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
        rounded["float64"] = usual


def differences(spec: Spec, net: nn.Module, probe: keras.Model, size: int, train: bool) -> list[float]:
    """max |torch - Keras| / max |torch| of every block and the logits. Train mode compares outputs, not the moved statistics."""
    held = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = images(spec, size).to(net.fc.weight.dtype)
    outputs: dict[str, torch.Tensor] = {}
    with torch.no_grad(), _precision(probe.compute_dtype):
        logits = net.train(train)(x, outputs)
        theirs = probe(x.permute(0, 2, 3, 1).numpy(), training=train)
    net.load_state_dict(held)
    to_keras(net, probe)
    ours = [tensor for name, tensor in outputs.items() if name != "stem"] + [logits]
    assert len(ours) == len(theirs) == sum(spec.depths) + 1
    return [relative(a.numpy(), keras.ops.convert_to_numpy(b)) for a, b in zip(ours, theirs, strict=True)]


def images(spec: Spec, size: int) -> torch.Tensor:
    """Random ones, (N, C, H, W)."""
    return torch.randn(BATCH, spec.in_channels, size, size, generator=torch.Generator().manual_seed(size))


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |a - b| / max |a|; Keras's maps are turned to torch's axes."""
    theirs = np.moveaxis(theirs, -1, 1) if theirs.ndim == 4 else theirs
    assert ours.shape == theirs.shape
    difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    return difference if math.isfinite(difference) else math.inf


def worst(spec: Spec) -> float:
    """Over sizes, modes and blocks."""
    net, model = pair(spec)
    probe = blocks(spec, model)
    return max(max(differences(spec, net, probe, size, train)) for size in sizes(spec) for train in (False, True))


def counts(model: keras.Model) -> tuple[int, int]:
    """Numbers trainable, and not."""
    return tuple(sum(math.prod(w.shape) for w in held) for held in (model.trainable_weights, model.non_trainable_weights))  # type: ignore[return-value]


def expected_counts(spec: Spec) -> tuple[int, int]:
    """The same by arithmetic: of a batch norm, Keras counts the moving mean and variance too."""
    layers = list(spec.layers(sizes(spec)[0]))
    return sum(layer.params for layer in layers), sum(2 * layer.shape[0] for layer in layers if layer.kind == "batchnorm")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, worst(shallow(FAMILY[name].spec)))
