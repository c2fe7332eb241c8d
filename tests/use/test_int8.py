"""The net in 8 bits against the net: values that rounding explains, and nothing more."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import reslab
from reslab.nets.parts import Add
from reslab.nets.torch import ResNet
from reslab.use.artefact import save
from reslab.use.inference import FusedConv, _fuse, _fused, _Tracer, in_int8
from reslab.use.int8 import Int8Conv, Levels, Ranges, connect, enter, has_int8, leave, levels, observe
from tests.conftest import relative
from tests.use.conftest import TINY, classifier_of
from tests.use.test_inference import ROWS, net_of, shallow

kernels = pytest.mark.skipif(not has_int8(torch.device("cpu")), reason="needs a CPU with VNNI")
HELD = Levels(0.02, 128)


def images(net: ResNet, n: int, seed: int = 0) -> Tensor:
    side = net.spec.flatten or 64
    return torch.randn(n, net.spec.in_channels, side, side, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=torch.channels_last)


def ranges_of(net: ResNet, x: Tensor) -> Ranges:
    """Of four images at a time."""
    return observe(_fused(net, FusedConv), FusedConv, x.split(4))


@pytest.mark.parametrize("name", ROWS)
@kernels
@torch.no_grad()
def test_eight_bits_give_nearly_the_logits_of_every_kind_of_net(name: str) -> None:
    net = net_of(shallow(name))
    x = images(net, 8)
    quick = in_int8(net, ranges_of(net, x), x)
    assert quick
    want = net(x)
    assert 1e-6 < relative(quick(x), want) < 0.1
    assert relative(quick(x[:1]), want[:1]) < 0.1


class Twice(nn.Module):
    """What is added is needed again; in none of the family it is."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again, self.a, self.add = again, nn.Conv2d(3, 16, 3, padding=1), Add()
        self.b, self.c = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.add(self.c(self.b(y)), y)
        return torch.cat([z, y if self.again else z], 1)


@pytest.mark.parametrize("again", [True, False])
@kernels
@torch.no_grad()
def test_what_is_added_is_copied_where_it_is_needed_again_and_only_there(again: bool) -> None:
    torch.manual_seed(0)
    net, x = Twice(again), torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    graphs = []
    for kind in (FusedConv, Int8Conv):
        graph = fx.GraphModule(net, _Tracer().trace(net))
        _fuse(graph, kind)
        graphs.append(graph)
    connect(graphs[1], observe(graphs[0], FusedConv, [x]))
    (adding,) = [module for module in graphs[1].modules() if isinstance(module, Int8Conv) and hasattr(module, "added")]
    assert adding.copies == again
    assert relative(graphs[1](x), net(x)) < 0.02
    if again:
        adding.copies = False
        assert relative(graphs[1](x), net(x)) > 0.1


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@kernels
@torch.no_grad()
def test_a_convolution_is_right_to_the_nearest_level(relu: bool, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, 2, 1, groups=groups)
    module = Int8Conv(conv, relu)
    module.x, module.added, module.out, module.copies = HELD, Levels(0.01, 100), Levels(0.02, 0 if relu else 120), True
    q, added = (torch.randint(0, 256, (2, c, 12 // s, 12 // s), dtype=torch.uint8).contiguous(memory_format=torch.channels_last) for c, s in ((16, 1), (32, 2)))
    weight = module.weight.float() * module.scales[:, None, None, None]
    assert relative(weight, conv.weight) < 0.01
    for other in (None, added):
        want = F.conv2d(leave(q, module.x), weight, conv.bias, 2, 1, 1, groups) + (0 if other is None else leave(other, module.added))
        want = enter(want.relu() if relu else want, module.out)
        got = module(q, other)
        assert (got.int() - want.int()).abs().max() <= 1
        assert (got == want).float().mean() > 0.99
        assert want.float().std() > 10, "levels are spread"


def test_levels_hold_zero_exactly_and_the_ends_of_the_range() -> None:
    for low, high in ((-1.0, 3.0), (0.0, 5.0), (2.0, 5.0), (-4.0, -1.0), (0.0, 0.0), (0.0, 1e-40)):
        held = levels({"a": [low, high]}, "a")
        ends = torch.tensor([0.0, min(low, 0), max(high, 0)])
        assert torch.allclose(leave(enter(ends, held), held), ends, atol=held.scale / 2 + 1e-6)
        assert leave(enter(ends, held), held)[0] == 0


@pytest.mark.parametrize("damaged", [None, [1.0], ["a", "b"], [float("nan"), 1.0], [0.0, float("inf")], [2.0, 1.0], [-1e308, 1e308], 3.0])
@kernels
def test_a_damaged_range_is_an_error_of_one_line(damaged: object, tmp_path: Path) -> None:
    classifier = classifier_of(TINY)
    ranges = ranges_of(classifier.net, images(classifier.net, 8))
    save(classifier, tmp_path)
    ranges["conv1.out"] = damaged  # type: ignore[assignment]
    facts = {"agreement": 1.0, "agreement_low": 0.99, "ranges": ranges}
    (tmp_path / "inference.json").write_text(json.dumps({"precision": "int8", "processor": "another", "n": 300, "int8": facts}))
    loaded = reslab.load(tmp_path)
    pixels = torch.zeros(loaded.preprocess.canvas, loaded.preprocess.canvas, 3, dtype=torch.uint8).numpy()
    with pytest.raises(reslab.WorkError, match=r"no range of conv1\.out"):
        loaded.predict_pixels([pixels])


def test_observed_ranges_are_means_over_batches() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.ones_(net.get_parameter("0.weight"))
    batches = [torch.tensor(values).view(1, 1, 1, 2) for values in ([-1.0, 2.0], [-3.0, 10.0])]
    assert observe(fx.symbolic_trace(net), nn.Conv2d, batches) == {"0.x": [-2.0, 6.0], "0.out": [-2.0, 6.0]}


def test_every_filter_has_a_scale_of_its_own() -> None:
    conv = nn.Conv2d(4, 3, 3)
    with torch.no_grad():
        conv.weight[0] *= 1e-3
    assert Int8Conv(conv, relu=False).weight.abs().amax((1, 2, 3)).tolist() == [127, 127, 127]
