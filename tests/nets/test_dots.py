"""Convolutions by dot products give what torch's give, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from reslab.nets import dots
from reslab.nets.dots import Dots, usable
from tests.conftest import distance

by_dots = pytest.mark.skipif(not usable(), reason="no dot products of bf16 (AVX-512) here, or no C compiler")
SHAPES = [
    (3, 32, 64, 8, 8),
    (2, 64, 32, 9, 6),  # tiles that reach over the edge, an odd number of them
    (70, 96, 32, 4, 4),
    (25, 32, 160, 16, 16),  # more tiles than go through at a time, for the filters' gradient as well
    (1, 32, 32, 1, 2),
    (5, 24, 43, 7, 8),  # panels that are not full
    (3, 43, 24, 5, 5),
    (9, 16, 16, 8, 16),  # directly, all blocks full; images of two groups
    (2, 16, 16, 9, 13),
    (17, 16, 16, 1, 1),
]


def made(n: int, inputs: int, outputs: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images and a gradient in bf16, channels-last, and filters in fp32."""
    torch.manual_seed(1)
    x, dy = (torch.randn(n, c, height, width).bfloat16().contiguous(memory_format=torch.channels_last) for c in (inputs, outputs))
    return x.requires_grad_(), (torch.randn(outputs, inputs, 3, 3) / 16).requires_grad_(), dy


def found(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    y: Tensor = Dots.apply(x, weight)  # type: ignore[no-untyped-call]
    return [y, *torch.autograd.grad(y, (x, weight), dy)]


def exact(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """In fp64."""
    doubles = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    y = conv2d(*doubles, padding=1)
    return [y, *torch.autograd.grad(y, doubles, dy.double())]


@by_dots
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_the_direct_convolution(shape: tuple[int, ...]) -> None:
    given = made(*shape)
    ours = found(*given)
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in ours)
    for one, other in zip(ours, exact(*given), strict=True):
        assert one.shape == other.shape
        assert distance(one, other) < 0.02
    for one, other in zip(ours, found(*given), strict=True):
        assert torch.equal(one, other)


@by_dots
@pytest.mark.parametrize("channels", [32, 16])
def test_a_pixel_out_of_place_is_noticed(channels: int) -> None:
    x, weight, dy = made(3, channels, channels, 8, 8)
    right = exact(x, weight, dy)
    with torch.no_grad():
        x[1, :, 3, 4], dy[1, :, 3, 4] = x[1, :, 3, 5], dy[1, :, 3, 5]
    assert all(distance(one, other) > 0.05 for one, other in zip(found(x, weight, dy), right, strict=True))


@by_dots
@pytest.mark.parametrize("shape", [(9, 32, 64, 12, 12), (27, 16, 16, 12, 12)])
def test_neither_threads_nor_how_the_memory_lies_change_a_bit(shape: tuple[int, ...]) -> None:
    x, weight, dy = made(*shape)
    ours, threads = found(x, weight, dy), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = found(x.detach().contiguous().requires_grad_(), weight, dy.contiguous())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(ours, alone, strict=True))


@by_dots
def test_only_what_is_asked_for_is_computed() -> None:
    x, weight, dy = made(3, 32, 32, 8, 8)
    y = Dots.apply(x.detach(), weight)  # type: ignore[no-untyped-call]
    y.backward(dy)
    assert weight.grad is not None
    assert x.grad is None


def test_a_processor_without_them_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(source: object) -> None:
        raise OSError("no C compiler")

    monkeypatch.setattr(dots, "compiled", missing)
    dots._winograd.cache_clear()
    usable.cache_clear()
    try:
        assert not usable()
    finally:
        dots._winograd.cache_clear()
        usable.cache_clear()


def test_panels_are_well_filled() -> None:
    assert dots.fills(32, 96)
    assert dots.fills(24, 48)
    assert not dots.fills(16, 32)
    assert not dots.fills(64, 40)
