"""Each ordering, shortcut and part against its formula, written out here once more from the papers."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import reslab
from reslab.nets.parts import BlurPool, DropPath
from reslab.spec import Shortcut
from tests.conftest import scramble


def block_of(**fields: object) -> nn.Module:
    """The second block of a net's first stage: equal shapes on both sides, 16 channels."""
    spec = reslab.spec("resnet20", **{"shortcut": "B", **fields})
    return scramble(reslab.build(spec)).eval().layer1[1]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(1))


ORDERS = {
    "original": lambda b, x: torch.relu(x + b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(x)))))),
    "bn-after-add": lambda b, x: torch.relu(b.bn2(x + b.conv2(torch.relu(b.bn1(b.conv1(x)))))),
    "relu-before-add": lambda b, x: x + torch.relu(b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(x)))))),
    "relu-preact": lambda b, x: x + b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(torch.relu(x)))))),
    "preact": lambda b, x: x + b.conv2(torch.relu(b.bn2(b.conv1(torch.relu(b.bn1(x)))))),
}
CARRIES = {
    "scaling": lambda b, f, x: 0.5 * f + 0.5 * x,
    "exclusive-gate": lambda b, f, x: torch.sigmoid(b.gate[0](x)) * f + (1 - torch.sigmoid(b.gate[0](x))) * x,
    "shortcut-gate": lambda b, f, x: f + (1 - torch.sigmoid(b.gate[0](x))) * x,
    "dropout": lambda b, f, x: f + x,  # in eval mode
}


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_those_of_he_2016_figure_4(order: str, x: Tensor) -> None:
    block = block_of(order=order)
    assert torch.allclose(block(x), ORDERS[order](block, x), atol=1e-6)
    others = [formula(block, x) for name, formula in ORDERS.items() if name != order]
    assert not any(torch.allclose(block(x), other, atol=1e-2) for other in others), "the formulas must differ"


@pytest.mark.parametrize("carry", CARRIES)
def test_carries_are_those_of_he_2016_table_1(carry: str, x: Tensor) -> None:
    block = block_of(carry=carry, gate_bias=-1.0)
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    assert torch.allclose(block(x), torch.relu(CARRIES[carry](block, branch, x)), atol=1e-6)


def test_dropout_on_the_shortcut_drops_half_of_it_in_training(x: Tensor) -> None:
    block = block_of(carry="dropout", zero_init=True)
    block.bn2.weight.data.zero_()
    block.bn2.bias.data.zero_()
    block.carry.train()
    kept = block(x.abs())
    assert set(torch.unique((kept / x.abs()).round(decimals=3)).tolist()) == {0.0, 2.0}


def test_first_unit_of_a_preactivation_net_is_activated_before_the_split_and_the_last_after_the_addition() -> None:
    net = scramble(reslab.build("preact20")).eval()
    outputs: dict[str, Tensor] = {}
    image = torch.randn(2, 3, 32, 32)
    logits = net(image, outputs)
    stem = torch.relu(net.bn1(net.conv1(image)))
    first = net.layer1[0]
    assert torch.allclose(outputs["layer1.0"], stem + first.conv2(torch.relu(first.bn2(first.conv1(stem)))), atol=1e-5)
    last = torch.relu(net.bn_last(outputs["layer3.2"]))
    assert torch.allclose(logits, net.fc(last.mean((2, 3))), atol=1e-5)


@pytest.mark.parametrize("order", ["preact", "relu-preact"])
def test_projection_of_a_preactivation_block_sees_the_activated_input(order: str, x: Tensor) -> None:
    block = scramble(reslab.build("preact20", order=order)).eval().layer2[0]
    activated = torch.relu(block.bn1(x)) if order == "preact" else torch.relu(x)
    seen: list[Tensor] = []
    block.downsample.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    block(x)
    assert torch.equal(seen[0], activated)


def test_squeeze_and_excitation_scales_each_channel_of_the_branch(x: Tensor) -> None:
    block = block_of(squeeze=16)
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    w1, w2 = block.se.fc1, block.se.fc2
    hidden = torch.relu(branch.mean((2, 3)) @ w1.weight[:, :, 0, 0].T + w1.bias)
    gate = torch.sigmoid(hidden @ w2.weight[:, :, 0, 0].T + w2.bias)
    assert torch.allclose(block(x), torch.relu(x + branch * gate[:, :, None, None]), atol=1e-6)


def test_blur_smooths_with_the_binomial_filter_and_takes_every_second_pixel() -> None:
    x = torch.zeros(1, 2, 8, 8)
    x[0, 1, 4, 4] = 16.0
    out = BlurPool(2)(x)
    assert out.shape == (1, 2, 4, 4)
    assert out[0, 1, 2, 2] == 4.0
    assert not out[0, 0].any()
    assert torch.equal(BlurPool(2)(torch.ones(1, 1, 5, 5)), torch.ones(1, 1, 3, 3)), "edges are reflected, not dark"


@pytest.mark.parametrize("shortcut", ["A", "late"])
def test_pooling_nets_halve_behind_the_first_convolution_before_its_norm(shortcut: Shortcut) -> None:
    block = scramble(reslab.build(reslab.spec("resnet8", shortcut=shortcut))).eval().layer2[0]
    x = torch.randn(2, 64, 9, 9, generator=torch.Generator().manual_seed(1))
    pooled = torch.nn.functional.max_pool2d(torch.nn.functional.pad(block.conv1(x), (0, 1, 0, 1), value=-torch.inf), 2)
    first = torch.relu(block.bn1(pooled))
    padded = torch.cat((torch.zeros(2, 96, 5, 5), x[:, :, ::2, ::2], torch.zeros(2, 96, 5, 5)), dim=1)
    assert torch.allclose(block(x), torch.relu(block.bn2(block.conv2(first)) + (padded if shortcut == "A" else first)), atol=1e-5)


def test_stochastic_depth_leaves_whole_branches_out_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    path = DropPath(0.25).train()
    out = path(torch.ones(4000, 1, 2, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert out.flatten(1).std(dim=1).max() == 0, "an image's branch is dropped whole"
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(path.eval()(out), out)


def test_chance_to_drop_rises_linearly_to_the_last_block() -> None:
    chances = [block.drop_path.chance for stage in reslab.build("resnet110_stochastic").stages for block in stage]
    assert chances == pytest.approx([0.5 * (i + 1) / 54 for i in range(54)])


def test_wide_blocks_drop_out_before_their_last_convolution(x: Tensor) -> None:
    block = scramble(reslab.build("wrn16-8", dropout=0.5)).layer1[1].eval()
    seen: list[Tensor] = []
    block.dropout.register_forward_hook(lambda m, inputs, output: seen.append(output))
    wide = torch.randn(2, 128, 9, 9)
    out = block(wide)
    assert torch.allclose(out, wide + block.conv2(seen[0]), atol=1e-5)
    block.dropout.train()
    assert not torch.equal(block(wide), out)


def test_group_norm_has_32_groups_or_two_channels_each() -> None:
    net = reslab.build("resnet20", norm="group")
    assert [net.bn1.num_groups, net.layer2[0].bn1.num_groups, net.layer3[0].bn1.num_groups] == [8, 16, 32]


def skip_block(block: nn.Module, x: Tensor) -> Tensor:
    """The SkipBlock as its text says."""
    main = torch.relu(block.bn1(block.conv1(x)))
    main = torch.relu(block.bn2(block.conv2(main)))
    if block.halve is not None:
        main, x = block.halve(main), block.downsample(x)
        x = torch.cat([x, x], dim=1)
    elif block.downsample is not None:
        x = block.downsample(x)
    return main + x


@pytest.mark.parametrize("stride", ["v1.5", "none"])
def test_skip_blocks_are_as_described(stride: str) -> None:
    net = scramble(reslab.build("skipblock8", depths=(2, 3, 3), stride=stride, flatten=16)).eval()
    image = torch.randn(2, 3, 16, 16)
    y = nn.functional.max_pool2d(torch.relu(net.conv1(image)), 2)
    for stage in net.stages:
        for block in stage:
            y = skip_block(block, y)
    want = net.fc(torch.relu(net.fc1(y.flatten(1))))
    assert torch.allclose(net(image), want, rtol=1e-4, atol=1e-4)
    assert y.shape[1:] == ((256, 2, 2) if stride == "v1.5" else (256, 8, 8))
    assert all(module.bias is not None for module in net.modules() if isinstance(module, nn.Conv2d))


def test_skip_blocks_without_skip_and_norm_keep_the_main_path() -> None:
    net = reslab.build("skipblock8_plain", norm="none", depths=(1, 2, 2))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    block, x = net.layer2[0], torch.randn(2, 64, 8, 8)
    main = torch.relu(block.conv2(torch.relu(block.conv1(x))))
    assert torch.allclose(block(x), block.halve(main), atol=1e-5)


def test_keras_v2_pools_zeros_where_torch_pools_nothing() -> None:
    zero, lowest = reslab.build("keras_resnet50v2").maxpool, nn.MaxPool2d(3, 2, 1)
    negative = -torch.ones(1, 1, 4, 4)
    assert zero(negative)[0, 0, 0, 0] == 0
    assert lowest(negative)[0, 0, 0, 0] == -1
    assert torch.equal(zero(-negative), lowest(-negative))


@pytest.mark.parametrize("inputs", [1, 8, 15, 16])
def test_strided_projections_of_narrow_nets_survive_several_threads(inputs: int) -> None:
    """In a process of its own: torch's own strided 1x1 convolution ends it."""
    code = f"""if True:
        import torch
        from reslab.nets.parts import conv
        from reslab.spec import Conv
        torch.set_num_threads(4)
        ours = conv({inputs}, Conv(32, 1, 2), bias=False).to(memory_format=torch.channels_last)
        x = torch.randn(7, {inputs}, 12, 12, requires_grad=True)
        for _ in range(50):
            y = ours(x.contiguous(memory_format=torch.channels_last))
            y.sum().backward()
        theirs = torch.nn.functional.conv2d(x, ours.weight, stride=2)
        assert torch.allclose(y, theirs, atol=1e-5)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_norms_have_the_eps_of_the_spec(norm: str, kind: type[nn.BatchNorm2d | nn.GroupNorm]) -> None:
    net = reslab.build("resnet20", norm=norm, eps=1e-3)
    assert {module.eps for module in net.modules() if isinstance(module, kind)} == {1e-3}


def test_a_blur_mirrors_the_edges() -> None:
    x, kernel = torch.rand(1, 2, 5, 6), torch.tensor([1.0, 2, 1])
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    right = nn.functional.conv2d(padded, (kernel[:, None] * kernel / 16).expand(2, 1, 3, 3), stride=2, groups=2)
    torch.testing.assert_close(BlurPool(2)(x), right)
