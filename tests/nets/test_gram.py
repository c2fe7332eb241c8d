"""A 1x1 convolution and its norm as one product give what both give one after the other, forward and backward."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import reslab
from reslab.nets import gram
from reslab.nets.fused import Norm, use_fused
from reslab.nets.gram import conv_norm, conv_norm_add_relu, entry
from reslab.nets.parts import Add, Pointwise
from reslab.nets.product import usable
from tests.conftest import distance

by_tiles = pytest.mark.skipif(not usable(), reason="no matrix tiles (AMX) here, or no C compiler")
SHAPES = [(8, 64, 256, 14, 14, 1), (8, 64, 128, 23, 24, 2), (3, 96, 512, 23, 29, 1)]  # images, channels in and out, height, width, stride


def made(inputs: int, outputs: int, stride: int = 1) -> nn.ModuleList:
    """A convolution and a norm in training whose parameters are not what they start with."""
    torch.manual_seed(1)
    pair = nn.ModuleList([Pointwise(inputs, outputs, 1, stride, bias=False), Norm(outputs)]).train()
    with torch.no_grad():
        pair[1].weight.uniform_(-2, 2)
        pair[1].bias.uniform_(-1, 1)
    use_fused(pair, True)
    return pair


def images(*shape: int) -> Tensor:
    return (torch.randn(shape) + 0.5).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()


def errors(n: int, inputs: int, outputs: int, height: int, width: int, stride: int, joined: bool) -> dict[str, float]:
    """The relative error of everything against fp64, which is told what the ReLU let through."""
    pair = made(inputs, outputs, stride)
    exact = copy.deepcopy(pair).double()
    x, added, dy = images(n, inputs, height, width), *(images(n, outputs, -(-height // stride), -(-width // stride)) for _ in range(2))
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, added)][: 1 + joined]
    right = exact[1](exact[0](doubles[0])) + (doubles[1] if joined else 0)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv_norm_add_relu(*pair, Add(), nn.ReLU(), x, lambda: added) if joined else conv_norm(*pair, x)
        assert found is not None and found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
        ours = torch.autograd.grad(found, [x, *[added] * joined, *pair.parameters()], dy)  # in autocast as well, which must not matter
    theirs = torch.autograd.grad(right, [*doubles, *exact.parameters()], dy.double() * (found > 0 if joined else 1))
    names = ["dx", *["d_added"] * joined, "d_filters", "d_weight", "d_bias"]
    running = {name: distance(buffer, exact[1].get_buffer(name).double()) for name, buffer in pair[1].named_buffers()}
    return {"y": distance(found, right.relu() if joined else right), **{k: distance(*v) for k, *v in zip(names, ours, theirs, strict=True)}, **running}


@by_tiles
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("joined", [False, True])
def test_outputs_gradients_and_statistics_are_those_of_both(shape: tuple[int, ...], joined: bool) -> None:
    found = errors(*shape, joined)  # type: ignore[arg-type]
    assert max(found.pop("y"), found.pop("dx")) < 0.004, "half a unit in the last of eight places"
    assert max(found.values()) < 4e-6, "sums are in fp32"


@by_tiles
def test_a_wrong_sum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gram.gated

    def wrong(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        g, total = right(*tensors)
        return g, total * 1.01

    monkeypatch.setattr(gram, "gated", wrong)
    found = errors(*SHAPES[0], joined=True)
    assert min(found["d_bias"], found["running_mean"], found["running_var"]) > 1e-4


@by_tiles
def test_a_large_mean_costs_few_digits() -> None:
    """The covariance is a difference; a mean of ten standard deviations takes two of its seven digits."""
    pair = made(64, 128)
    x = (10 + images(8, 64, 14, 14)).detach()
    right = nn.functional.conv2d(x.double(), pair[0].weight.double()).var((0, 2, 3))
    pair[1].momentum = 1.0
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_norm(*pair, x) is not None
    assert distance(pair[1].running_var, right) < 1e-4


def block(x: Tensor, pair: nn.ModuleList, first: Pointwise, extra: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The end of a block, then the entry of the next, whose shortcut carries on; a number."""
    y = conv_norm_add_relu(*pair, Add(), nn.ReLU(), x, lambda: 0 * x.repeat(1, 2, 1, 1))
    assert y is not None
    out = entry(first, y)
    assert out is not None
    z, carried = out
    return (z * z.detach().sign()).sum() + (carried * carried.detach().cos()).sum() + (0 if extra is None else extra(y))


@by_tiles
@pytest.mark.parametrize("extra", [None, lambda y: (y * 3).sum(), lambda y: (y.detach() - 1).mul(y).sum()])
def test_an_entry_adds_both_gradients_and_takes_them_through_the_relu(monkeypatch: pytest.MonkeyPatch, extra: Callable[[Tensor], Tensor] | None) -> None:
    """Also where a third use of the block's output adds to what the entry has told of its own gradient."""
    pair, first, x = made(64, 128), made(128, 64)[0], images(8, 64, 14, 14)
    calls: list[bool] = []
    counted = gram.gated
    monkeypatch.setattr(gram, "gated", lambda dy, other, y: calls.append(y is not None) or counted(dy, other, y))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(block(x, pair, first, extra), [x, *pair.parameters(), first.weight])
        assert sum(calls) == (extra is not None), "a gradient that has been through the ReLU is not taken through it again"
        y = conv_norm_add_relu(*pair, Add(), nn.ReLU(), x, lambda: 0 * x.repeat(1, 2, 1, 1))
    assert y is not None
    y = y.detach().double().requires_grad_()
    weight = first.weight.bfloat16().double().detach().requires_grad_()
    z = nn.functional.conv2d(y, weight)
    loss = (z * z.detach().sign()).sum() + (y * y.detach().cos()).sum() + (0 if extra is None else extra(y))
    dy, d_weight = torch.autograd.grad(loss, [y, weight])
    exact, double = copy.deepcopy(pair).double(), x.detach().double().requires_grad_()
    right = torch.autograd.grad(exact[1](exact[0](double)), [double, *exact.parameters()], dy * (y > 0))
    assert max(distance(one, other) for one, other in zip(found, (*right, d_weight), strict=True)) < 0.01


@by_tiles
def test_the_gradient_of_what_no_relu_made_is_not_cut() -> None:
    first, x = made(64, 32)[0], images(4, 64, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = entry(first, x)
        assert out is not None
        (dx,) = torch.autograd.grad(out[0].sum() + 2 * out[1].sum(), x)
    right = 2 + first.weight.bfloat16().double().sum(0)
    assert distance(dx, right.expand(4, -1, 5, 7)) < 0.004


@by_tiles
def test_a_net_of_bottlenecks_is_made_of_these() -> None:
    net = reslab.build("resnet50", depths=(2, 1), widths=(64, 128), num_classes=4).train().to(memory_format=torch.channels_last)
    use_fused(net, True)
    names = set()
    with torch.autocast("cpu", torch.bfloat16):
        todo = [net(torch.randn(8, 3, 64, 64)).grad_fn]
    while todo:
        if (node := todo.pop()) is not None:
            names.add((type(node).__name__, id(node)))
            todo += [parent for parent, _ in node.next_functions]
    made_of = [name for name, _ in names]
    assert made_of.count("_EntryBackward") == 3 and made_of.count("_ConvNormBackward") == 3, "the ends of the blocks of stage 1, and its shortcut"


@by_tiles
def test_they_step_aside() -> None:
    pair, x = made(64, 128), images(8, 64, 14, 14)
    relu, add = nn.ReLU(), Add()
    assert conv_norm(*pair, x) is None, "outside of autocast"
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_norm(*pair, x) is not None
        assert conv_norm(*pair, x[:2]) is None, "few pixels"
        assert conv_norm(*made(128, 64), images(8, 128, 20, 20)) is None, "many channels to few"
        assert conv_norm(*made(64, 80), x) is None, "channels that do not fill tiles"
        assert conv_norm(*pair, x.float()) is None and entry(pair[0], x.float()) is None, "images that are not bf16 yet, and are to stay so"
        assert conv_norm(*pair, images(8, 96, 14, 14)) is None, "not the channels of the convolution, which torch is to say"
        with pytest.raises(RuntimeError, match="expanded"):
            conv_norm_add_relu(*pair, add, relu, x, lambda: x)
        for part in (*pair, add, relu):
            with part.register_forward_hook(lambda *_: None):
                assert conv_norm_add_relu(*pair, add, relu, x, lambda: x) is None, "a hook"
        with pair[0].register_forward_hook(lambda *_: None):
            assert entry(pair[0], x) is None
        pair[1].together = 2
        assert conv_norm(*pair, x) is None, "norms over parts of the batch"
        pair[1].together = 0
        assert conv_norm(*pair.eval(), x) is None and entry(pair[0], x) is None
        assert conv_norm(nn.Conv2d(64, 128, 1, bias=False), pair[1], x) is None and entry(made(64, 128, stride=2)[0], x) is None
