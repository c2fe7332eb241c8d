"""Torch against Keras, every row of FAMILY in full: exact counts, and values with the same random weights and statistics.

python benchmarks/keras_parity.py      about a quarter of an hour; asked: counts exact, worst relative difference at most 1e-4
python benchmarks/keras_parity.py --smoke      three rows

Differences are max |torch - Keras| / max |torch| of one tensor, the worst over all blocks and the logits, over an even and
an odd image size whose last map has 2 or 3 pixels a side, batches of 4. Random weights and batch statistics make a deep net
magnify whatever differs between two calculations, rounding above all: the last two columns say how far Keras is from torch in
training in fp32, and how far torch in fp32 is from torch in fp64. In fp64 nothing is left but a difference in what is computed,
so that is where training is judged. Then Keras Applications themselves at 224 px.
"""

import sys
import time
from pathlib import Path

import torch
from measure import keep
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import reslab
from reslab.family import FAMILY
from reslab.nets.keras import keras
from reslab.nets.keras_weights import to_keras
from reslab.spec import Spec
from tests.conftest import scramble
from tests.nets.parity import TOLERANCE, blocks, counts, differences, expected_counts, images, pair, relative, sizes

APPLICATIONS = {
    "keras_resnet50": "ResNet50",
    "keras_resnet101": "ResNet101",
    "keras_resnet152": "ResNet152",
    "keras_resnet50v2": "ResNet50V2",
    "keras_resnet101v2": "ResNet101V2",
    "keras_resnet152v2": "ResNet152V2",
}
SMOKE = ("resnet20", "wrn16-8", "keras_resnet50")


def row(name: str) -> tuple[str, bool]:
    """A line on one row, and whether it is as asked."""
    spec = FAMILY[name].spec
    start = time.monotonic()
    net, model = pair(spec)
    exact, (trainable, rest) = counts(model) == expected_counts(spec), counts(model)
    probe = blocks(spec, model)
    evaluated, trained = _worst(spec, net, probe, False), _worst(spec, net, probe, True)
    del model, probe
    fine, model = pair(spec, "float64")
    trained_fine = _worst(spec, fine, blocks(spec, model), True)
    rounding = max(_rounding(net, fine, images(spec, size)) for size in sizes(spec))
    columns = f"{evaluated:10.1e} {trained_fine:10.1e} {trained:11.1e} {rounding:9.1e}"
    line = f"{name:28} {trainable:>12,} {rest:>9,} {'exact' if exact else 'WRONG':5} {columns} {time.monotonic() - start:6.1f} s"
    return line, exact and max(evaluated, trained_fine) <= TOLERANCE


def _worst(spec: Spec, net: nn.Module, probe: keras.Model, train: bool) -> float:
    return max(max(differences(spec, net, probe, size, train)) for size in sizes(spec))


def _rounding(net: nn.Module, fine: nn.Module, x: torch.Tensor) -> float:
    """How far a block's output in fp32 is from the same in fp64, in training."""
    held: list[dict[str, torch.Tensor]] = [{}, {}]
    with torch.no_grad():
        net.train()(x, held[0])
        fine.train()(x.double(), held[1])
    return max(relative(held[1][name].numpy(), held[0][name].movedim(1, -1).numpy()) for name in held[0])


def application(name: str) -> tuple[str, bool]:
    theirs = getattr(keras.applications, APPLICATIONS[name])(weights=None, classifier_activation=None)
    net = scramble(reslab.build(name)).eval()
    to_keras(net, theirs)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(x.permute(0, 2, 3, 1).numpy(), training=False)
        worst = float((net(x) - want).abs().max() / want.abs().max())
    exact = theirs.count_params() == sum(expected_counts(FAMILY[name].spec))
    return f"{APPLICATIONS[name]:28} {theirs.count_params():>12,} {'exact' if exact else 'WRONG':>15} {worst:9.1e}", exact and worst <= TOLERANCE


def main() -> int:
    names = SMOKE if "--smoke" in sys.argv else list(FAMILY)
    lines, fine = [f"{'row':28} {'trainable':>12} {'not':>9} count  eval fp32 train fp64  train fp32  rounding"], []
    for name in names:
        line, good = row(name)
        print(line, "" if good else "<-- not as asked", flush=True)
        lines.append(line + ("" if good else "  <-- not as asked"))
        fine.append(good)
    lines += ["", f"{'Keras Applications':28} {'parameters':>12} {'count':>15}      eval"]
    for name in names:
        if name in APPLICATIONS:
            line, good = application(name)
            lines.append(line)
            fine.append(good)
    keep("keras_parity", [*lines, f"{sum(fine)} of {len(fine)} lines as asked: counts exact, at most {TOLERANCE:g}"])
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
