"""Convolutions by Winograd's algorithm give what direct ones give, forward and backward."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import reslab
from reslab.nets import dots, winograd
from reslab.nets.winograd import Winograd, WinogradConv, has_winograd, pays, use_winograd


def of(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = Winograd.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 4, 9, 6), (3, 2, 4, 15), (2, 5, 1, 2)])
@pytest.mark.parametrize("outputs", [3, 6])
def test_outputs_and_gradients_are_those_of_the_direct_convolution(shape: tuple[int, ...], outputs: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    weight = torch.randn(outputs, shape[1], 3, 3, dtype=torch.float64).requires_grad_()
    direct, ours = conv2d(x, weight, padding=1), of(x, weight)
    torch.testing.assert_close(ours, direct, rtol=1e-12, atol=1e-11)
    dy = torch.randn_like(direct)
    for one, other in zip(torch.autograd.grad(ours, (x, weight), dy), torch.autograd.grad(direct, (x, weight), dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


def test_images_may_lie_in_memory_as_they_like() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(3, 4, 3, 3, dtype=torch.float64), torch.randn(2, 8, 4, 12, dtype=torch.float64).permute(0, 2, 3, 1)
    torch.testing.assert_close(of(x, weight), conv2d(x, weight, padding=1), rtol=1e-12, atol=1e-11)


def test_one_wrong_number_of_a_transform_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = winograd._transforms(torch.float64)
    wrong = right.output.clone()
    wrong[3, 4] += 1
    monkeypatch.setattr(winograd, "_transforms", lambda dtype: right._replace(output=wrong))
    x, weight = torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.randn(3, 3, 3, 3, dtype=torch.float64)
    assert (of(x, weight) - conv2d(x, weight, padding=1)).abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 0.03)])
def test_rounding_stays_small_forward_and_backward(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(2)
    x = torch.randn(20, 128, 16, 16).to(dtype).requires_grad_()  # in bf16 in more than one stretch
    weight = (torch.randn(128, 128, 3, 3) / 34).requires_grad_()
    dy = torch.randn(20, 128, 16, 16).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    ours, direct = of(x, weight), conv2d(*exact, padding=1)
    assert ours.dtype == dtype
    found = [ours, *torch.autograd.grad(ours, (x, weight), dy)]
    for one, other in zip(found, [direct, *torch.autograd.grad(direct, exact, dy.double())], strict=True):
        assert ((one - other).norm() / other.norm()).item() < bound


@pytest.mark.parametrize("by_dots", [False, pytest.param(True, marks=pytest.mark.skipif(not dots.usable(), reason="no dot products of bf16 here"))])
def test_under_autocast_it_computes_in_bf16_and_the_gradient_of_a_weight_is_as_exact_as_the_weight(monkeypatch: pytest.MonkeyPatch, by_dots: bool) -> None:
    monkeypatch.setattr(dots, "usable", lambda: by_dots)
    torch.manual_seed(4)
    conv = WinogradConv(128, 128, 3, padding=1)
    x = torch.randn(16, 128, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        direct = conv(x)
        conv.winograd = True
        ours = conv(x)
    assert ours.dtype == direct.dtype == torch.bfloat16
    assert not torch.equal(ours, direct)
    assert ((ours - direct).norm() / direct.norm()).item() < 0.03
    ours.sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.dtype == torch.float32


def test_it_is_used_where_asked_for_and_worth_it() -> None:
    net = reslab.build("resnet18", num_classes=5)
    wide = {name for name, module in net.named_modules() if isinstance(module, WinogradConv) and module.able(torch.float32)}
    assert wide == {f"layer{n}.{b}.conv{c}" for n in (2, 3, 4) for b in (0, 1) for c in (1, 2)} - {f"layer{n}.0.conv1" for n in (2, 3, 4)}
    assert not any(module.winograd for module in net.modules() if isinstance(module, WinogradConv))
    assert [n for n, module in reslab.build("resnet8").named_modules() if isinstance(module, WinogradConv) and module.able(torch.float32)] == [
        "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2",
    ], "64 channels to 256 are wide enough"  # fmt: skip
    x = torch.randn(16, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    direct = net.eval()(x)
    use_winograd(net, True)
    fast = net(x)
    assert not torch.equal(fast, direct)
    torch.testing.assert_close(fast, direct, rtol=1e-4, atol=1e-5)
    assert copy.deepcopy(net).layer4[1].conv2.winograd, "a copy is timed as the net will train"
    use_winograd(net, False)
    assert torch.equal(net(x), direct)


def test_narrow_nets_have_some_where_the_processor_has_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    net = reslab.build("resnet20")
    for usable in (False, True):
        monkeypatch.setattr(dots, "usable", lambda usable=usable: usable)
        assert not has_winograd(net, torch.float32)
        assert has_winograd(net, torch.bfloat16) == usable
        assert has_winograd(reslab.build("resnet8"), torch.bfloat16)
    assert {name for name, module in net.named_modules() if isinstance(module, WinogradConv)} == {
        f"layer{n}.{b}.conv{c}" for n in (2, 3) for b in (0, 1, 2) for c in (1, 2)
    } - {"layer2.0.conv1", "layer3.0.conv1"}, "of 32 and 64 channels"


def test_few_small_and_other_images_are_left_to_the_direct_convolution() -> None:
    assert pays(torch.randn(16, 128, 8, 8))
    assert not pays(torch.randn(15, 128, 8, 8)), "60 tiles"
    assert not pays(torch.randn(64, 128, 5, 5)), "most of a tile reaches over the edge"
    assert pays(torch.randn(16, 128, 8, 8).bfloat16())
    assert not pays(torch.randn(16, 128, 8, 8).half())
    with torch.autocast("cpu", torch.float16):
        assert not pays(torch.randn(16, 128, 8, 8)), "sums of so many products may be more than fp16 holds"


def test_channels_that_do_not_fit_are_an_error_as_in_torch() -> None:
    conv = WinogradConv(128, 128, 3, padding=1, bias=False).train()
    use_winograd(conv, True)
    for channels in (64, 256):
        for bf16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16), pytest.raises(RuntimeError, match="to have 128 channels"):
                conv(torch.randn(16, channels, 8, 8))


def test_a_gradient_is_the_same_within_autocast() -> None:
    torch.manual_seed(5)
    x = torch.randn(16, 128, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(128, 128, 3, 3) / 34).requires_grad_()
    y, dy = of(x, weight), torch.randn(16, 128, 8, 8).bfloat16()
    outside = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        within = torch.autograd.grad(y, (x, weight), dy)
    assert all(torch.equal(one, other) for one, other in zip(outside, within, strict=True))


def test_what_is_not_kept_for_the_backward_pass_is_made_again_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    monkeypatch.setattr(winograd, "TALL", 8)
    monkeypatch.setattr(winograd, "CACHED", 0)
    x, weight = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((7, 3, 8, 8), (5, 3, 3, 3)))
    kept, again = (Winograd.apply(x, weight, keep) for keep in (True, False))  # type: ignore[no-untyped-call]
    assert [len(part.saved_tensors) for part in (kept.grad_fn, again.grad_fn)] == [1 + 4, 2], "four stretches of two images, or the images"
    torch.testing.assert_close(kept, conv2d(x, weight, padding=1))
    dy = torch.randn_like(kept)
    for one, other in zip(torch.autograd.grad(kept, (x, weight), dy), torch.autograd.grad(again, (x, weight), dy), strict=True):
        assert torch.equal(one, other)
