"""A convolution of a net that trains gives what torch's gives, whichever way it is done."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from reslab.nets import conv3x3, dots, tiles
from reslab.nets.conv3x3 import Conv3x3
from reslab.nets.fused import use_fused
from reslab.nets.parts import Pointwise
from reslab.nets.winograd import WinogradConv, use_winograd
from tests.conftest import distance


def made(height: int, width: int, dtype: torch.dtype) -> tuple[Conv3x3, Tensor, Tensor]:
    """A layer that trains, images and a gradient, channels-last."""
    torch.manual_seed(0)
    layer = Conv3x3(6, 10, 3, padding=1, bias=False).train().to(memory_format=torch.channels_last)
    layer.fused = True
    x, dy = (torch.randn(5, c, height, width).to(dtype).contiguous(memory_format=torch.channels_last) for c in (6, 10))
    return layer, x.requires_grad_(), dy


def found(layer: Conv3x3, x: Tensor, dy: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = layer(x)
    return [y, *torch.autograd.grad(y, (x, layer.weight), dy)]


def exact(layer: Conv3x3, x: Tensor, dy: Tensor) -> list[Tensor]:
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, layer.weight)]
    y = conv2d(*doubles, padding=1)
    return [y, *torch.autograd.grad(y, doubles, dy.double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_maps_of_two_pixels_and_less_are_one_matrix(size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv3x3.tiles, "suits", lambda x: False)
    given = made(*size, dtype)
    ours, right = found(*given), exact(*given)
    assert type(ours[0].grad_fn).__name__ == "_AsMatrixBackward"
    assert [tensor.dtype for tensor in ours] == [dtype, dtype, torch.float32]
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in ours)
    assert all(distance(one, other) < (1e-6 if dtype == torch.float32 else 0.02) for one, other in zip(ours, right, strict=True))
    with torch.no_grad():
        given[1][2, :, 0, 0] += 1
    assert distance(found(*given)[0], right[0]) > 0.05, "a pixel out of place"


def test_channels_that_do_not_fit_are_an_error_as_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "usable", lambda: True)
    monkeypatch.setattr(dots, "usable", lambda: True)
    for kind, channels in ((Conv3x3, 64), (Conv3x3, 16), (WinogradConv, 128), (Pointwise, 64)):
        conv = kind(channels, channels, 1 if kind is Pointwise else 3, padding=int(kind is not Pointwise), bias=False).train()
        use_fused(conv, True)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=f"to have {channels} channels|shapes cannot be multiplied"):
            conv(torch.randn(8, 2 * channels, 4, 4))


def test_larger_maps_and_nets_that_do_not_train_are_left_to_torch() -> None:
    layer, x, _ = made(2, 3, torch.float32)
    assert type(layer(x).grad_fn).__name__ == "ConvolutionBackward0"
    layer, x, _ = made(2, 2, torch.float32)
    assert type(layer.eval()(x).grad_fn).__name__ == "ConvolutionBackward0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Conv3x3, WinogradConv, Pointwise])
def test_no_images_and_an_image_alone_are_left_to_torch(kind: type[nn.Conv2d], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "usable", lambda: True)
    monkeypatch.setattr(dots, "usable", lambda: True)
    side = 1 if kind is Pointwise else 3
    for channels in (16, 32, 64, 128):
        conv = kind(channels, channels, side, padding=side // 2, bias=False).train()
        use_fused(conv, True)
        use_winograd(conv, True)
        for x in (torch.randn(channels, 2, 2), torch.randn(0, channels, 2, 2), torch.randn(channels, 64, 64)):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = conv(x)
                assert torch.equal(y, conv2d(x, conv.weight, padding=side // 2))
            assert type(y.grad_fn).__name__ in ("ConvolutionBackward0", "SqueezeBackward1")
