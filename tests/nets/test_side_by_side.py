"""The gradient of a filter over maps that lie side by side is the convolution's."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from reslab.nets import side_by_side
from reslab.nets.side_by_side import Conv3x3
from reslab.nets.winograd import WideConv


def errors(n: int, channels: int, outputs: int, height: int, width: int, stride: int = 1) -> list[float]:
    """Of the output and both gradients, relative to fp64."""
    torch.manual_seed(1)
    x = torch.randn(n, channels, height, width).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = (torch.randn(outputs, channels, 3, 3) / 16).bfloat16().requires_grad_()
    dy = torch.randn(n, outputs, height // stride, width // stride).bfloat16()
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    right = conv2d(*doubles, stride=stride, padding=1)
    found: Tensor = side_by_side._Conv.apply(x, weight, stride)  # type: ignore[no-untyped-call]
    pairs = [(found, right), *zip(torch.autograd.grad(found, (x, weight), dy), torch.autograd.grad(right, doubles, dy.double()), strict=True)]
    return [float((one.detach().double() - other.detach()).norm() / other.detach().norm()) for one, other in pairs]


SHAPES = [
    (12, 8, 12, 4, 4),
    (12, 8, 12, 6, 8),
    (7, 16, 8, 7, 5),
    (5, 8, 8, 1, 3),
    (1, 4, 4, 2, 2),
    (100, 8, 8, 2, 2),
    (12, 8, 12, 4, 6, 2),
    (1, 4, 4, 2, 2, 2),
    (10, 16, 8, 14, 14, 2),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_convolution(shape: tuple[int, ...]) -> None:
    assert max(errors(*shape)) < 0.004, "half a unit in the last of eight places"


def test_without_the_column_of_zeros_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = side_by_side._side_by_side

    def repeated(x: Tensor, count: int, apart: int) -> Tensor:
        laid = right(x, count, apart).clone(memory_format=torch.channels_last)
        laid[:, :, :, x.shape[3] :: x.shape[3] + apart] = 1
        return laid

    monkeypatch.setattr(side_by_side, "_side_by_side", repeated)
    assert min(errors(12, 8, 12, 4, 4)) > 0.1, "a tiny map's output and both gradients"
    assert min(errors(12, 8, 12, 6, 8)[2], errors(12, 8, 12, 4, 6, 2)[2]) > 0.1


@pytest.mark.parametrize("kind", [Conv3x3, WideConv])
def test_it_is_for_narrow_maps_in_bf16_where_there_is_amx(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Conv2d]) -> None:
    conv, narrow, wide = kind(16, 16, 3, padding=1, bias=False).train(), torch.zeros(2, 16, 8, 8), torch.zeros(2, 16, 9, 9)

    def is_ours(x: Tensor) -> bool:
        return "_Conv" in type(conv(x).grad_fn).__name__

    monkeypatch.setattr(side_by_side, "has_amx", lambda: True)
    conv.fused = True  # type: ignore[assignment]
    assert not is_ours(narrow)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_ours(narrow) and not is_ours(wide)
        monkeypatch.setattr(side_by_side, "has_amx", lambda: False)
        assert not is_ours(narrow)


def test_with_stride_2_maps_of_outputs_count_and_odd_ones_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "has_amx", lambda: True)
    conv = Conv3x3(16, 16, 3, 2, padding=1, bias=False).train()
    conv.fused = True
    with torch.autocast("cpu", torch.bfloat16):
        ours = {size: "_Conv" in type(conv(torch.zeros(2, 16, *size)).grad_fn).__name__ for size in [(16, 16), (18, 18), (15, 15), (15, 14), (14, 15)]}
    assert [size for size, found in ours.items() if found] == [(16, 16)]
