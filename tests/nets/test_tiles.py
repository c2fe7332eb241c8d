"""The gradients of convolutions whose filters' is by tiles are the convolution's."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from reslab.nets import tiles
from reslab.nets.conv3x3 import Conv3x3
from reslab.nets.parts import Pointwise
from reslab.nets.tiles import convolution, filter_gradient, usable
from reslab.nets.winograd import WinogradConv
from tests.conftest import distance

by_tiles = pytest.mark.skipif(not usable(), reason="no matrix tiles (AMX) here, or no C compiler")


def made(n: int, inputs: int, outputs: int, height: int, width: int, side: int, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Images and a gradient in bf16, channels-last, and filters in fp32."""
    torch.manual_seed(1)
    x = torch.randn(n, inputs, height, width).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, side, side) / 16
    down, across = ((size + 2 * (side // 2) - side) // stride + 1 for size in (height, width))
    return x, torch.randn(n, outputs, down, across).bfloat16().contiguous(memory_format=torch.channels_last), weight


def exact(x: Tensor, dy: Tensor, weight: Tensor, stride: int) -> list[Tensor]:
    """The output and both gradients, in fp64."""
    doubles = [x.double().requires_grad_(), weight.bfloat16().double().requires_grad_()]
    y = conv2d(*doubles, stride=stride, padding=weight.shape[2] // 2)
    return [y, *torch.autograd.grad(y, doubles, dy.double())]


SHAPES = [
    (3, 24, 40, 9, 9, 3),  # neither channels nor pixels fill tiles
    (5, 32, 64, 8, 8, 3),
    (4, 70, 96, 5, 9, 3),
    (5, 70, 96, 7, 7, 3, 2),
    (4, 64, 17, 12, 11, 3, 2),
    (1, 33, 31, 13, 13, 7, 2),
    (40, 64, 544, 5, 5, 1),
    (1, 8, 8, 1, 1, 1),
    (300, 32, 32, 3, 3, 3),  # several blocks of pixels, and several threads
]


@by_tiles
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_filters_is_the_sum_of_products(shape: tuple[int, ...]) -> None:
    x, dy, weight = made(*shape)
    stride = shape[6] if len(shape) > 6 else 1
    found = filter_gradient(x, dy, weight.shape[2], stride)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert distance(found, exact(x, dy, weight, stride)[2]) < 1e-6, "sums are in fp32"
    assert torch.equal(found, filter_gradient(x, dy, weight.shape[2], stride))


@by_tiles
def test_a_pixel_out_of_place_is_noticed() -> None:
    x, dy, weight = made(6, 32, 32, 8, 8, 3)
    right = exact(x, dy, weight, 1)[2]
    x[3, :, 7, 7] += 1
    assert distance(filter_gradient(x, dy, 3), right) > 0.001


CONVOLUTIONS = [
    (6, 32, 40, 8, 8, 3),
    (6, 40, 56, 4, 3, 3),  # by tiles from here, channels that do not fill them
    (10, 32, 16, 1, 1, 3),
    (300, 64, 33, 2, 3, 3),  # several blocks of pixels, and several threads
    (9, 160, 136, 8, 7, 3),  # several chunks of channels
    (6, 48, 40, 9, 7, 3, 2),  # not by tiles
    (6, 32, 40, 8, 6, 1),
]


@by_tiles
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_output_and_gradients_are_those_of_the_convolution(shape: tuple[int, ...]) -> None:
    x, dy, weight = made(*shape)
    stride = shape[6] if len(shape) > 6 else 1
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    y = convolution(*inputs, stride)
    gradients = torch.autograd.grad(y, inputs, dy)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last) and gradients[1].dtype == torch.float32
    for found, right in zip((y, *gradients), exact(x.detach(), dy, weight.detach(), stride), strict=True):
        assert distance(found, right) < 0.004, "half a unit in the last of eight places"


@by_tiles
def test_a_tap_out_of_place_is_noticed() -> None:
    x, dy, weight = made(6, 32, 32, 4, 4, 3)
    right = exact(x, dy, weight, 1)
    weight[:, :, 0] = weight[:, :, 0].flip(2)
    y = convolution(x.requires_grad_(), weight)
    assert distance(y, right[0]) > 0.1 and distance(torch.autograd.grad(y, x, dy)[0], right[1]) > 0.1


def is_ours(conv: nn.Conv2d, x: Tensor) -> bool:
    return "_Convolution" in type(conv(x).grad_fn).__name__


@pytest.mark.parametrize("kind", [Conv3x3, WinogradConv, Pointwise])
def test_it_is_for_training_in_bf16_with_channels_for_two_tiles(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Conv2d]) -> None:
    side = 1 if kind is Pointwise else 3
    conv, few = (kind(channels, 64, side, padding=side // 2, bias=False).train() for channels in (64, 16))
    x = torch.zeros(2, 64, 8, 8)
    monkeypatch.setattr(tiles, "usable", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_ours(conv, x), "unless it is asked for"
    conv.fused = few.fused = True  # type: ignore[assignment]
    assert not is_ours(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_ours(conv, x) and not is_ours(few, x[:, :16])
        monkeypatch.setattr(tiles, "usable", lambda: False)
        assert not is_ours(conv, x)


def test_without_a_compiler_there_are_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    monkeypatch.setattr(tiles, "_library", tiles._library.__wrapped__)
    assert not usable.__wrapped__()
