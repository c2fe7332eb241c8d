"""The gradient of a filter as one matrix product is the convolution's."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from reslab.nets import few_pixels
from reslab.nets.winograd import WideConv


def gradients(x: Tensor, weight: Tensor, dy: Tensor) -> list[float]:
    """The relative error of the output and of both gradients, against fp64."""
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    right = conv2d(*doubles, padding=1)
    found = few_pixels.conv3x3(x, weight)
    pairs = [(found, right), *zip(torch.autograd.grad(found, (x, weight), dy), torch.autograd.grad(right, doubles, dy.double()), strict=True)]
    return [float((one.detach().double() - other.detach()).norm() / other.detach().norm()) for one, other in pairs]


def inputs(n: int, channels: int, outputs: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(n, channels, height, width).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = (torch.randn(outputs, channels, 3, 3) / 16).bfloat16().requires_grad_()
    return x, weight, torch.randn(n, outputs, height, width).bfloat16()


@pytest.mark.parametrize("shape", [(3, 8, 12, 4, 4), (2, 16, 8, 7, 5), (5, 8, 8, 1, 3), (1, 4, 4, 2, 2)])
def test_output_and_gradients_are_those_of_the_convolution(shape: tuple[int, int, int, int, int]) -> None:
    assert max(gradients(*inputs(*shape))) < 0.004, "half a unit in the last of eight places"


def test_a_shifted_column_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = few_pixels._columns
    monkeypatch.setattr(few_pixels, "_columns", lambda x: right(x).roll(1, 1))
    assert gradients(*inputs(3, 8, 12, 4, 4))[2] > 0.5


def test_it_is_taken_in_bf16_for_wide_filters_over_few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_pixels, "_amx", lambda: True)
    wide, narrow, pixels = torch.zeros(256, 256, 3, 3), torch.zeros(128, 256, 3, 3), torch.zeros(1, 256, 7, 7)
    assert not few_pixels.pays(pixels, wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert few_pixels.pays(pixels, wide)
        assert not few_pixels.pays(pixels, narrow) and not few_pixels.pays(torch.zeros(1, 256, 8, 8), wide)
        conv = WideConv(256, 256, 3, padding=1, bias=False).train()
        before = type(conv(pixels).grad_fn).__name__
        conv.fused = True
        assert "_Conv" in type(conv(pixels).grad_fn).__name__ != before
        assert type(conv.eval()(pixels).grad_fn).__name__ == before
