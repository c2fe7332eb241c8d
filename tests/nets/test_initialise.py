"""First values: what their papers derive, and that nets of depth 110 without norm train with them and not without."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import reslab
from reslab.nets import initialise
from reslab.nets.initialise import begin_as_identity, whiten

UNNORMED = {"resnet110_fixup": 1e-3, "resnet110_skipinit": 3e-3, "resnet110_rezero": 3e-3}  # Adam's learning rate


def losses(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Training losses on the digits, batch 32; a guess among ten classes has 2.303."""
    held = load_digits()
    images, labels = torch.tensor(held.images, dtype=torch.float32)[:, None], torch.tensor(held.target)
    images, generator, found = (images - images.mean()) / images.std(), torch.Generator().manual_seed(0), []
    for _ in range(steps):
        batch = torch.randint(0, len(labels), (32,), generator=generator)
        loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", UNNORMED)
def test_nets_of_depth_110_train_without_norm(name: str) -> None:
    torch.manual_seed(0)
    net = reslab.build(name, in_channels=1)
    assert sum(losses(net, torch.optim.Adam(net.parameters(), UNNORMED[name]), 90)[-10:]) / 10 < 2.0


@pytest.mark.parametrize("name", UNNORMED)
def test_it_is_the_init_that_lets_them_train(name: str) -> None:
    for init in (reslab.spec(name).init, "he"):
        torch.manual_seed(0)
        net = reslab.build(name, in_channels=1, init=init)
        last = losses(net, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9), 10)[-1]
        assert math.isfinite(last) == (init != "he"), "He's init without norm must explode under plain SGD"


@pytest.mark.parametrize("name", UNNORMED)
def test_each_branch_starts_as_nothing_and_every_block_of_equal_shapes_as_the_identity(name: str) -> None:
    net, outputs = reslab.build(name).eval(), {}
    with torch.no_grad():
        net(torch.randn(2, 3, 16, 16), outputs)
    assert torch.equal(outputs["layer1.0"], outputs["stem"])
    assert torch.equal(outputs["layer3.17"], outputs["layer3.1"])


def test_fixup_scales_the_first_convolution_of_a_branch_by_the_root_of_the_depth() -> None:
    torch.manual_seed(0)
    net = reslab.build("resnet110_fixup")
    first = torch.cat([block.conv1.weight.flatten() for block in net.layer1])
    assert first.std().item() == pytest.approx((2 / (16 * 9)) ** 0.5 * 54**-0.5, rel=0.02)
    assert not net.fc.weight.any()


def test_gates_start_where_the_spec_says() -> None:
    net = reslab.build("resnet110_shortcut_gate", depths=(1, 1, 1), gate_bias=-3.0)
    assert torch.equal(net.layer2[0].gate[0].bias, torch.full((32,), -3.0))


@pytest.mark.parametrize("changes", [{}, {"norm": "none"}, {"order": "preact"}, {"order": "bn-after-add"}], ids=str)
@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_zero_init_makes_each_identity_block_add_nothing(name: str, changes: dict[str, str]) -> None:
    net, outputs = reslab.build(name, zero_init=True, **changes).eval(), {}
    with torch.no_grad():
        net(torch.randn(2, 3, 64, 64), outputs)
    scale = net.spec.eps if changes.get("order") == "bn-after-add" else 0.0  # a norm after the addition divides by sqrt(1 + eps)
    assert torch.allclose(outputs["layer1.1"], outputs["layer1.0"], rtol=scale, atol=0)
    assert not torch.equal(outputs["layer2.0"].mean(), outputs["layer1.1"].mean())


def test_convolutions_start_as_he_et_al_derive() -> None:
    torch.manual_seed(0)
    for conv in (m for m in reslab.build("resnet18").modules() if isinstance(m, nn.Conv2d)):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize(("name", "filters"), [("resnet20", 16), ("resnet8", 24), ("resnet50d", 32), ("resnet18", 64)])
def test_a_whitened_first_convolution_gives_uncorrelated_components_and_their_negatives(name: str, filters: int) -> None:
    net = reslab.build(name)
    conv = net.first_conv
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.avg_pool2d(torch.randn(64, 3, 34, 34, generator=generator), 3, 1)
    images = (smooth - smooth.mean()) / smooth.std()
    whiten(conv, images)
    assert conv.out_channels == filters
    out = torch.nn.functional.conv2d(images, conv.weight).transpose(0, 1).flatten(1)
    half = filters // 2
    torch.testing.assert_close(out[half:], -out[:half])
    second_moments = out[:half] @ out[:half].T / out.shape[1]
    torch.testing.assert_close(second_moments, torch.eye(half), rtol=0, atol=0.02)


def test_whitening_looks_at_many_pixels_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    filters = []
    for pixels in (initialise.PIXELS, 3 * 256):
        monkeypatch.setattr(initialise, "PIXELS", pixels)
        conv = reslab.build("resnet8").first_conv
        whiten(conv, images)
        filters.append(conv.weight.abs())  # a component's sign is nobody's choice
    torch.testing.assert_close(*filters, rtol=1e-3, atol=1e-4)


def test_convolutions_that_begin_as_the_identity_hand_their_input_on() -> None:
    net = reslab.build("resnet8")
    begin_as_identity(net)
    x = torch.randn(2, 64, 8, 8)
    wider, equal = net.layer2[0].conv1, net.layer1[0].conv2
    torch.testing.assert_close(wider(x)[:, :64], x)
    assert wider(x)[:, 64:].std() > 0.1, "the other outputs keep He's values"
    torch.testing.assert_close(equal(x), x)
    assert not torch.equal(net.first_conv(torch.ones(1, 3, 8, 8))[:, :3], torch.ones(1, 3, 8, 8)), "the stem is none of them"


def test_filters_that_whitening_has_no_use_for_stay() -> None:
    conv = torch.nn.Conv2d(1, 30, 3, bias=False)
    before = conv.weight.detach().clone()
    whiten(conv, torch.randn(8, 1, 12, 12))
    assert torch.equal(conv.weight[18:], before[18:])
    assert not torch.equal(conv.weight[:18], before[:18])


def test_small_patches_lie_in_the_middle_and_noise_is_not_blown_up() -> None:
    conv = nn.Conv2d(3, 24, 7, padding=3, bias=False)
    images = 0.01 * torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    whiten(conv, images)
    placed = conv.weight.detach().abs().amax((0, 1)) > 0
    assert placed.nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]], "2x2 patches of three channels give 24 filters"
    assert nn.functional.conv2d(images, conv.weight).std() < 0.6


def test_a_convolution_that_narrows_does_not_begin_as_the_identity() -> None:
    net = reslab.build("resnet20", widths=(16, 8, 8), shortcut="B")
    weight = net.get_parameter("layer2.0.conv1.weight")
    before = weight.clone()
    begin_as_identity(net)
    assert torch.equal(weight, before)
