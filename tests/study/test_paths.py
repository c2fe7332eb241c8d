"""Gradients along single paths, where what they must be is known."""

import itertools

import pytest
import torch
from torch import nn

import reslab
from reslab.nets.torch import ResNet
from reslab.study.paths import along_paths, carrying, fall, gradient_along, paths_of, random_paths, shares

SCALE = 0.4


def scaling(blocks: int) -> ResNet:
    """Every branch multiplies its positive input by SCALE, so that the net is linear around any image."""
    net = reslab.build("resnet20", depths=(blocks,), widths=(4,), norm="none", bias="unnormed", order="relu-before-add", in_channels=1)
    for block in net.stages[0]:
        nn.init.dirac_(block.conv1.weight)
        nn.init.dirac_(block.conv2.weight).data.mul_(SCALE)
    nn.init.constant_(net.conv1.weight, 0.1)
    return net


@torch.no_grad()
def some(count: int, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.rand(count, channels, 8, 8), torch.arange(count) % 10


@pytest.mark.parametrize("order", ["original", "preact"])
def test_gradients_along_all_paths_add_up_to_the_gradient(order: str) -> None:
    torch.manual_seed(0)
    net = reslab.build("resnet20", depths=(2, 1), widths=(4, 8), order=order, in_channels=1).eval()
    image, label = some(1)
    all_paths = torch.tensor(list(itertools.product((False, True), repeat=3)))
    along = gradient_along(net, image.expand(8, -1, -1, -1), label.expand(8), all_paths)
    x = image.clone().requires_grad_()
    nn.functional.cross_entropy(net(x), label).backward()
    assert torch.allclose(along.sum(0), x.grad[0], atol=1e-7)
    assert along[0].abs().sum() > 0
    assert not torch.allclose(along[0], along[-1])


def test_every_image_has_its_own_path() -> None:
    net = reslab.build("resnet20", in_channels=1).eval()
    x, y = some(6)
    taken = torch.rand(6, 9) < 0.5
    together = along_paths(net, x, y, taken)
    alone = [along_paths(net, x[i : i + 1], y[i : i + 1], taken[i : i + 1]).item() for i in range(6)]
    assert together.tolist() == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("blocks", [1, 5])
def test_branches_that_scale_fall_by_their_scale_and_share_binomially(blocks: int) -> None:
    """With one block the branch has a / (1 + a) of the gradient, and the shortcut the rest."""
    net = scaling(blocks)
    x, y = some(3)
    norms = [along_paths(net, x, y, random_paths(k, 3, blocks, torch.Generator().manual_seed(k))).mean().item() for k in range(blocks + 1)]
    found = fall(norms)
    assert found.factor == pytest.approx(SCALE, rel=1e-4)
    assert found.r2 == pytest.approx(1)
    p = SCALE / (1 + SCALE)
    expected = [paths_of(blocks)[k] * 2**blocks * p**k * (1 - p) ** (blocks - k) for k in range(blocks + 1)]
    assert shares(norms) == pytest.approx(expected, rel=1e-4)


def test_paths_are_counted_as_the_paper_counts_them() -> None:
    """Veit et al. 2016: of 54 blocks, the paths through 5 to 17."""
    assert sum(paths_of(54)[5:18]) == pytest.approx(0.004537, abs=1e-6)
    assert sum(paths_of(1200)) == pytest.approx(1)


def test_random_paths_have_the_length_and_differ() -> None:
    made = random_paths(3, 50, 9, torch.Generator().manual_seed(0))
    assert (made.sum(1) == 3).all()
    assert len({tuple(path) for path in made.tolist()}) > 20
    assert (made.float().mean(0) > 0).all()


def test_the_fewest_lengths_that_carry_the_gradient() -> None:
    assert carrying([0.01, 0.5, 0.46, 0.02, 0.01]) == (1, 2)
    assert carrying([1.0, 0.0]) == (0, 0)
    assert carrying([0.02, 0.02, 0.48, 0.48]) == (2, 3)


def test_a_gradient_of_zero_everywhere_has_no_fall_and_no_share() -> None:
    assert all(value != value for value in (*fall([0.0, 0.0]), *shares([0.0, 0.0])))
    assert carrying(shares([0.0, 0.0])) == (0, 1)
    assert fall([1.0, 0.0, 0.01]).factor == pytest.approx(0.1), "a length without gradient is passed over"
