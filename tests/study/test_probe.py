"""Hooks see what passes, change nothing, and are gone afterwards; also after an exception."""

import math
from contextlib import nullcontext

import pytest
import torch

from reslab.study.kinds import Schedule
from reslab.study.probe import additions, blocks, flowing, outputs, responses, settle
from reslab.study.training import train
from reslab.study.untouched import untouched
from tests.study.probing import digits, made, same, state, tiny

ORDERS = [
    {}, {"norm": "none"}, {"order": "preact"}, {"order": "relu-preact"}, {"order": "bn-after-add", "shortcut": "B"}, {"order": "preact", "shortcut": "B"},
    {"carry": "shortcut-gate"}, {"norm": "none", "init": "fixup"}, {"block": "bottleneck"}, {"shortcut": "late"}, {"shortcut": "none"},
]  # fmt: skip


def name(changes: dict) -> str:
    return "-".join(map(str, changes.values())) or "original"


@pytest.mark.parametrize("changes", ORDERS, ids=name)
def test_sizes_are_those_of_retained_tensors(changes: dict) -> None:
    net = made(tiny(**changes))
    x, _ = digits().train_batch(torch.arange(16).numpy())
    with flowing(net) as flow:
        net(x).logsumexp(1).sum().backward()
        taken = flow.read()
    held: dict[str, torch.Tensor] = {}
    logits = net(x, held)
    for tensor in held.values():
        tensor.retain_grad()
    logits.logsumexp(1).sum().backward()
    with additions(net) as added:
        net(x)
    for at, pair in added.items():
        for where, tensor in zip(("branch", "shortcut"), pair, strict=True):
            assert taken[at, where, "activation"] == pytest.approx(float(tensor.square().mean().sqrt()), rel=1e-4)
    for at, tensor in held.items():
        assert taken[at, "out", "activation"] == pytest.approx(float(tensor.detach().square().mean().sqrt()), rel=1e-4)
        assert taken[at, "out", "gradient"] == pytest.approx(float(tensor.grad.norm()), rel=1e-4, abs=1e-12)


def test_branch_and_shortcut_together_bring_the_whole_gradient_back() -> None:
    """Two blocks of ones: the shortcut of an identity brings back what arrives; here the branch is off, so it brings nothing."""
    net = made(tiny(norm="none", depths=(2,), widths=(4,)))
    with torch.no_grad():
        for block in blocks(net).values():
            block.conv2.weight.zero_()
    with flowing(net) as flow:
        net(torch.rand(4, 1, 8, 8)).sum().backward()
        taken = flow.read()
    assert taken["layer1.0", "branch", "activation"] == 0
    assert taken["layer1.1", "branch", "gradient"] == 0
    assert taken["layer1.1", "shortcut", "gradient"] == pytest.approx(taken["layer1.0", "out", "gradient"], rel=1e-5)


def test_every_32nd_of_many_images_stands_for_all() -> None:
    net = made(tiny())
    x = torch.randn(8, 1, 8, 8).repeat_interleave(8, 0)  # 64 images, every second taken: of equal ones
    found = []
    for part in (x, x[::2]):
        net.zero_grad()
        with flowing(net) as flow:
            net(part).logsumexp(1).sum().backward()
            found.append(flow.read())
    for where, value in found[0].items():
        factor = math.sqrt(2) if where[2] == "gradient" else 1
        assert value == pytest.approx(factor * found[1][where], rel=1e-3, abs=1e-9)


def test_a_watched_training_is_the_training_bit_for_bit() -> None:
    losses = []
    for watched in (False, True):
        net = made(tiny(drop_path=0.1))
        if watched:
            with flowing(net) as flow:
                losses.append(train(net, digits(), Schedule(5, 32), 0, watch=lambda step, loss, flow=flow: flow.read()))
        else:
            losses.append(train(net, digits(), Schedule(5, 32), 0))
    assert losses[0] == losses[1]


def test_a_flow_that_is_off_takes_nothing() -> None:
    net = made(tiny())
    with flowing(net) as flow:
        flow.on = False
        net(torch.rand(2, 1, 8, 8)).sum().backward()
        assert flow.read() == {}


@pytest.mark.parametrize("fails", [False, True])
def test_a_net_is_left_as_it_was_found(fails: bool) -> None:
    net = made(tiny())
    next(net.parameters()).requires_grad_(False)
    net.fc.bias.grad = torch.ones(10)
    before = state(net)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), untouched(net), flowing(net), additions(net), outputs(responses(net)):
        net.eval()
        settle(net, torch.rand(8, 1, 8, 8))
        train(net, digits(), Schedule(2, 16), 0)
        net.requires_grad_(True)
        if fails:
            raise ZeroDivisionError
    assert same(before, state(net))
    assert torch.equal(net.fc.bias.grad, torch.ones(10))


def test_a_settled_net_normalises_the_images_it_was_settled_with() -> None:
    net, x = made(tiny()), torch.randn(32, 1, 8, 8)
    settle(net, x)
    assert not net.training
    with outputs(responses(net)) as held, torch.no_grad():
        net(x)
    for response in held.values():
        assert float(response.mean((0, 2, 3)).abs().max()) < 0.05
        assert response.std((0, 2, 3)).tolist() == pytest.approx([1.0] * response.shape[1], rel=0.02)


def test_every_convolution_on_the_longest_path_has_a_response() -> None:
    assert len(responses(made(tiny()))) == 13
    assert [isinstance(m, torch.nn.Conv2d) for m in list(responses(made(tiny(norm="none"))).values())[:2]] == [True, True]
