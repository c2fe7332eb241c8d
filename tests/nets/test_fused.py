"""The kernels of fused.c and pool.c give what torch's operations give, forward and backward, and step aside where they cannot."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reslab
from reslab.nets import compiler, fused, gram
from reslab.nets import pool as pool_kernels
from reslab.nets.fused import Norm, norm_add_relu, norm_relu, reason_against, twin, use_fused
from reslab.nets.parts import Add, Pointwise
from reslab.nets.pool import MaxPool
from tests.conftest import distance

pytestmark = pytest.mark.skipif(bool(reason_against()), reason=f"the kernels cannot be made here: {reason_against()}")
SHAPES = [(4, 16, 5, 7), (2, 24, 6, 6), (3, 64, 9, 3), (8, 80, 4, 4), (16, 1, 4, 8), (8, 256, 1, 1), (300, 32, 3, 3)]


def normed(channels: int) -> Norm:
    """A norm in training whose parameters are not what they start with."""
    norm = Norm(channels).train()
    norm.fused = True
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
        norm.bias.uniform_(-1, 1)
    return norm


def both(shape: tuple[int, ...], dtype: torch.dtype, joined: bool, rectified: bool) -> dict[str, float]:
    """The relative error of everything that a norm, an addition and ReLU give, against fp64."""
    torch.manual_seed(1)
    norm, relu = normed(shape[1]), nn.ReLU()
    exact = nn.BatchNorm2d(shape[1]).double().train()
    exact.load_state_dict(norm.state_dict())
    x = (3 + 2 * torch.randn(shape)).to(dtype).requires_grad_()
    shortcut = torch.randn(shape).to(dtype).requires_grad_() if joined else None
    dy = torch.randn(shape).to(dtype)
    inputs = [tensor for tensor in (x, shortcut) if tensor is not None]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    right = exact(doubles[0]) + (doubles[1] if joined else 0)
    right = right.relu() if rectified else right
    found = norm_add_relu(norm, Add(), relu, x, lambda: shortcut) if shortcut is not None else norm_relu(norm, relu, x) if rectified else norm(x)
    assert found is not None and "NormReLU" in type(found.grad_fn).__name__ and found.dtype == dtype
    ours = torch.autograd.grad(found, [*inputs, norm.weight, norm.bias], dy)
    theirs = torch.autograd.grad(right, [*doubles, exact.weight, exact.bias], dy.double())
    names = ["dx", *["d_shortcut"] * joined, "d_weight", "d_bias"]
    errors = {name: distance(one, other) for name, one, other in zip(names, ours, theirs, strict=True)}
    running = {name: distance(buffer, exact.get_buffer(name).double()) for name, buffer in norm.named_buffers()}
    return {"y": distance(found, right), **errors, **running}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("joined", "rectified"), [(False, False), (False, True), (True, True)])
def test_outputs_gradients_and_statistics_are_those_of_torch(shape: tuple[int, ...], joined: bool, rectified: bool) -> None:
    assert max(both(shape, torch.float32, joined, rectified).values()) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("joined", "rectified"), [(False, False), (False, True), (True, True)])
def test_in_bf16_nothing_is_rounded_but_what_is_written(shape: tuple[int, ...], joined: bool, rectified: bool) -> None:
    errors = both(shape, torch.bfloat16, joined, rectified)
    assert max(errors[name] for name in errors if name not in ("y", "dx")) < 2e-6
    assert max(errors["y"], errors["dx"]) < 0.004, "half a unit in the last of eight places"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 0.004)])
@pytest.mark.parametrize("uses", [(True, False), (False, True), (True, True)])
def test_the_gradients_of_both_uses_of_an_output_count(dtype: torch.dtype, bound: float, uses: tuple[bool, bool]) -> None:
    torch.manual_seed(4)
    x, added = (torch.randn(4, 32, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    norm = normed(32)
    y = norm_add_relu(norm, Add(), nn.ReLU(), x, lambda: added)
    assert y is not None and twin(y) is not y and twin(y).data_ptr() == y.data_ptr()
    assert twin(x) is x, "what no kernel made is its own"
    exact = nn.BatchNorm2d(32).double().train()
    exact.load_state_dict({name: tensor for name, tensor in norm.state_dict().items() if name in ("weight", "bias")}, strict=False)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, added)]
    right = (exact(doubles[0]) + doubles[1]).relu()
    given = [(out, torch.randn(y.shape).to(dtype)) for out, used in zip((y, twin(y)), uses, strict=True) if used]
    ours = torch.autograd.grad([out for out, _ in given], [x, added, norm.weight, norm.bias], [dy for _, dy in given])
    theirs = torch.autograd.grad(right, [*doubles, exact.weight, exact.bias], torch.stack([dy.double() for _, dy in given]).sum(0))
    assert max(distance(one, other) for one, other in zip(ours, theirs, strict=True)) < bound


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_a_group_of_images_is_normalised_as_if_alone(kernels: bool, joined: bool) -> None:
    torch.manual_seed(6)
    x, added, dy = (torch.randn(12, 24, 5, 6).contiguous(memory_format=torch.channels_last) + i for i in range(3))
    norm, relu = normed(24), nn.ReLU()
    alone, norm.fused, norm.together = copy.deepcopy(norm), kernels, 4

    def gives(norm: Norm, *images: Tensor) -> list[Tensor]:
        given = [image.requires_grad_() for image in images[: 1 + joined]]
        y = norm_add_relu(norm, Add(), relu, given[0], lambda: given[1]) if joined else None
        y = y if y is not None else relu(norm(given[0]) + (given[1] if joined else 0))
        return [y.detach(), *torch.autograd.grad(y, [*given, norm.weight, norm.bias], images[2])]

    found, parts, moved = gives(norm, x, added, dy), [], []
    for images in zip(*(tensor.detach().chunk(3) for tensor in (x, added, dy)), strict=True):
        one = copy.deepcopy(alone)
        parts.append(gives(one, *images))
        moved.append(torch.stack([one.get_buffer("running_mean"), one.get_buffer("running_var")]))
    *each, weight, bias = zip(*parts, strict=True)
    right = [*map(torch.cat, each), sum(weight), sum(bias)]
    assert max(distance(one, other.double()) for one, other in zip(found, right, strict=True)) < 2e-6
    running = torch.stack([norm.get_buffer("running_mean"), norm.get_buffer("running_var")])
    assert distance(running, torch.stack(moved).mean(0).double()) < 2e-6 and norm.num_batches_tracked == 1
    norm.together = 0
    assert distance(gives(norm, x.detach(), added.detach(), dy.detach())[0], right[0].double()) > 0.01, "all at once is something else"
    norm.eval().together = 4
    assert norm.groups(12) == 1


def test_a_wrong_line_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right, wrong = "floats(slope + c)", "floats(level + c)"
    source = fused.SOURCE.read_text("utf-8")
    assert source.count(right) == 1
    (tmp_path / "fused.c").write_text(source.replace(right, wrong), "utf-8")
    (tmp_path / "vectors.h").write_bytes(fused.SOURCE.with_name("vectors.h").read_bytes())
    monkeypatch.setattr(fused, "SOURCE", tmp_path / "fused.c")
    library = fused._library.__wrapped__(torch.float32)
    monkeypatch.setattr(fused, "_library", lambda dtype: library)
    assert both((4, 16, 5, 7), torch.float32, False, True)["dx"] > 0.01


def test_a_large_mean_costs_no_digits() -> None:
    x = (1000 + torch.randn(32, 16, 8, 8)).requires_grad_()
    norm = normed(16)
    y = norm(x)
    right = F.batch_norm(x.detach().double(), None, None, norm.weight.double(), norm.bias.double(), training=True)
    assert distance(y.detach(), right.detach()) < 6e-5, "that is how fp32 holds 1000"


def test_an_odd_corner_costs_no_digits() -> None:
    torch.manual_seed(3)
    x = torch.randn(16, 16, 24, 24)
    x[:, :, 0, 0] = 100
    norm = normed(16)
    right = F.batch_norm(x.double(), None, None, norm.weight.double(), norm.bias.double(), training=True)
    assert distance(norm(x.requires_grad_()).detach(), right.detach()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_hidden(dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.ones(4, 16, 4, 4, dtype=dtype)
        x[1, 3, 0, 0] = bad
        y = norm_relu(normed(16), nn.ReLU(), x)
        assert y[:, 3].isnan().all() and y[:, [*range(3), *range(4, 16)]].isfinite().all()
        pooled = pool(3, 1, 1)(x)
        assert torch.equal(pooled[1, 3].isfinite(), F.max_pool2d(x, 3, 1, 1)[1, 3].isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_lets_a_gradient_through_as_torch_does(dtype: torch.dtype) -> None:
    norm, x, dy = normed(16), torch.randn(4, 16, 4, 4, dtype=dtype), torch.randn(4, 16, 4, 4, dtype=dtype)
    shortcut = torch.randn(4, 16, 4, 4, dtype=dtype)
    shortcut[1, 3, 0, 0], shortcut[2, 5, 1, 1] = float("nan"), -float("nan")
    shortcut.requires_grad_()
    y = norm_add_relu(norm, Add(), nn.ReLU(), x, lambda: shortcut)
    assert y is not None
    d_shortcut, d_bias = torch.autograd.grad(y, (shortcut, norm.bias), dy)
    right = dy * ~(y.detach() <= 0)
    assert torch.equal(d_shortcut, right) and d_shortcut[1, 3, 0, 0] == dy[1, 3, 0, 0] and d_shortcut[2, 5, 1, 1] == dy[2, 5, 1, 1]
    assert distance(d_bias, right.double().sum((0, 2, 3))) < 1e-6


def pool(side: int, stride: int, padding: int, ceil_mode: bool = False) -> MaxPool:
    made = MaxPool(side, stride, padding, ceil_mode=ceil_mode).train()
    made.fused = True
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 2)])
@pytest.mark.parametrize(
    ("side", "stride", "padding", "ceil_mode"), [(2, 2, 0, True), (2, 2, 0, False), (3, 3, 0, True), (3, 2, 1, False), (3, 1, 1, False), (2, 3, 0, True)]
)
def test_pools_are_torchs(dtype: torch.dtype, size: tuple[int, int], side: int, stride: int, padding: int, ceil_mode: bool) -> None:
    torch.manual_seed(2)
    x = torch.randint(-3, 3, (3, 32, *size)).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()  # with many equals
    ours = pool(side, stride, padding, ceil_mode)(x)
    theirs = F.max_pool2d(x, side, stride, padding, ceil_mode=ceil_mode)
    assert "_MaxPool" in type(ours.grad_fn).__name__ and torch.equal(ours, theirs)
    dy = torch.randint(-9, 9, theirs.shape).to(dtype)  # whole numbers, so that sums are exact
    assert torch.equal(torch.autograd.grad(ours, x, dy)[0], torch.autograd.grad(theirs, x, dy)[0])


def gradient(net: nn.Module, x: Tensor, bf16: bool = False) -> Tensor:
    """All of it, as one vector."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = net(x)
    loss = F.cross_entropy(logits.float() if bf16 else logits, torch.arange(len(x)) % 4)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(net.parameters()))])


@pytest.mark.parametrize("net", ["resnet20", "resnet8", "preact20", "skipblock8", "resnet50", "resnet50c", "se_resnet20", "resnet110_bn_after_add"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_net_is_as_near_to_fp64_as_without(net: str, bf16: bool) -> None:
    torch.manual_seed(3)
    plain = reslab.build(net, num_classes=4).train().to(memory_format=torch.channels_last)
    quick, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    use_fused(quick, True)
    x = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    right = gradient(exact, x.double())
    assert distance(gradient(quick, x, bf16), right) < 1.5 * distance(gradient(plain, x, bf16), right) + 1e-6
    pairs = [] if bf16 else zip(quick.named_buffers(), exact.buffers(), strict=True)
    for (name, one), other in pairs:
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-3, atol=1e-3, msg=name)


def test_a_hook_between_norm_and_relu_sees_what_it_always_does() -> None:
    norm, relu, x = normed(16), nn.ReLU(), torch.randn(4, 16, 4, 4)
    norm.register_forward_hook(lambda module, inputs, y: -y)
    y = norm_relu(norm, relu, x)
    assert distance(y, (-F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)).relu().double()) < 1e-6
    assert norm_add_relu(norm, Add(), relu, x, lambda: x) is None


def test_what_the_kernels_do_not_know_is_torchs() -> None:
    norm = normed(16)
    assert not fused._suits(norm, torch.zeros(2, 16, 4, 4, dtype=torch.float64))
    assert not fused._suits(norm, torch.zeros(1, 16, 1, 1)), "torch says that one pixel is too few"
    assert not fused._suits(normed(3), torch.zeros(1, 3, 3, 3)), "nine pixels of three channels are no whole vectors"
    assert not fused._suits(norm.eval(), torch.zeros(2, 16, 4, 4))
    assert not fused._suits(Norm(16).train(), torch.zeros(2, 16, 4, 4)), "unless it is asked for"
    elsewhere = reslab.build("resnet18").to("meta").train()
    use_fused(elsewhere, True)
    assert not any(getattr(module, "fused", False) for module in elsewhere.modules()), "addresses on another device mean nothing to them"


def test_a_pointwise_convolution_is_a_product_of_matrices_in_bf16_alone() -> None:
    torch.manual_seed(4)
    for stride in (1, 2):
        made = Pointwise(32, 48, 1, stride).train()
        made.fused = True
        x = torch.randn(3, 32, 6, 6).contiguous(memory_format=torch.channels_last)
        exact = F.conv2d(x.double(), made.weight.double(), made.bias.double() if made.bias is not None else None, stride)
        with torch.autocast("cpu", torch.bfloat16):
            y = made(x)
        assert "Permute" in type(y.grad_fn).__name__ and distance(y, exact) < 0.01 and y.is_contiguous(memory_format=torch.channels_last)
        assert "Convolution" in type(made(x).grad_fn).__name__ and distance(made(x), exact) < 1e-6


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Nothing that was compiled is remembered, neither inside nor afterwards."""
    caches = fused._library, fused.reason_against, pool_kernels._library, pool_kernels.usable
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("uncompiled")
def test_without_a_compiler_training_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert reason_against() == "no C compiler: cc is not on the path"
    run = reslab.train("digits", net="resnet8", out=tmp_path / "run", steps=2, batch_size=16)
    assert run.last("plan")["fusing"] == reason_against()


@pytest.mark.usefixtures("uncompiled")
def test_a_compiler_that_fails_is_told_of_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    assert reason_against() and "\n" not in reason_against()
    net = reslab.build("resnet8")
    use_fused(net, True)
    fused_now = {type(module).__name__ for module in net.modules() if getattr(module, "fused", False)}
    assert fused_now and not fused_now & {"Norm", "MaxPool"}, "convolutions need no compiler"


def test_what_is_added_has_the_shape_of_what_it_is_added_to() -> None:
    norm, x = normed(16), torch.randn(4, 16, 6, 6)
    wide, shape = torch.randn(4, 1, 6, 6), torch.Size([4, 16, 6, 6])
    found = norm_add_relu(norm, Add(), nn.ReLU(), x, lambda: wide)
    assert found is not None and torch.equal(found, norm_add_relu(norm, Add(), nn.ReLU(), x, lambda: wide.expand(shape).contiguous()))
    with pytest.raises(RuntimeError, match="expanded"):
        norm_add_relu(norm, Add(), nn.ReLU(), x, lambda: torch.randn(4, 8, 6, 6))


def test_parameters_and_images_that_the_kernels_would_misread_are_torchs() -> None:
    x = torch.randn(4, 64, 4, 4)
    for dtype in (torch.bfloat16, torch.float64):
        norm = normed(64).to(dtype)
        assert not fused._suits(norm, x) and not fused._suits(norm, x.bfloat16())
        right = F.batch_norm(x.to(dtype), None, None, norm.weight, norm.bias, training=True)
        assert torch.equal(norm(x.to(dtype)), right)
    norm = normed(64)
    norm.running_var = norm.running_var.double()  # type: ignore[union-attr]
    assert not fused._suits(norm, x)
    for strange in (torch.ones(64, 2)[:, 0], torch.ones(1).expand(64), torch.ones(32)):
        norm = normed(64)
        norm.weight = nn.Parameter(strange)
        assert not fused._suits(norm, x), "not one number behind the other, or too few"
    assert not fused._suits(normed(64), x.to("meta")), "addresses on another device mean nothing to them"


def test_another_activation_is_not_taken_for_a_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gelu, norm = torch.randn(4, 16, 4, 4), nn.GELU(), normed(16)
    assert distance(norm_relu(norm, gelu, x), F.gelu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)).double()) < 1e-6
    assert norm_add_relu(norm, Add(), gelu, x, lambda: x) is None
    monkeypatch.setattr(gram, "_pays", lambda *_: True)
    assert gram.conv_norm_add_relu(Pointwise(16, 16, 1), norm, Add(), gelu, x, lambda: x) is None


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("together", [0, 4])
def test_no_images_give_no_images(kernels: bool, together: int) -> None:
    norm, nothing = normed(16), torch.zeros(0, 16, 4, 4)
    norm.fused, norm.together = kernels, together
    assert norm(nothing).shape == norm_relu(norm, nn.ReLU(), nothing).shape == (0, 16, 4, 4)
    assert pool(2, 2, 0)(nothing).shape == (0, 16, 2, 2)


def test_an_image_alone_is_pooled_as_torch_does() -> None:
    x = torch.randn(4, 16, 16)
    assert torch.equal(pool(2, 2, 0)(x), F.max_pool2d(x, 2, 2))


def test_windows_that_the_kernels_do_not_know_are_torchs() -> None:
    x = torch.randn(2, 16, 40, 40)
    for made in (MaxPool(17, 1), MaxPool((2, 3)), MaxPool(2, (2, 1)), MaxPool(3, 1, (1, 0)), MaxPool(2, dilation=2)):
        made.train().fused = True
        assert torch.equal(made(x), nn.MaxPool2d.forward(made, x))
    largest = pool(15, 4, 7)
    x.requires_grad_()
    dy = torch.randint(-9, 9, largest(x).shape).float()
    ours, theirs = (torch.autograd.grad(y, x, dy)[0] for y in (largest(x), F.max_pool2d(x, 15, 4, 7)))
    assert torch.equal(ours, theirs)


def test_channels_that_do_not_fit_are_an_error_as_in_torch() -> None:
    for channels in (16, 48, 128):
        with pytest.raises(RuntimeError, match="running_mean should contain 64 elements"):
            normed(channels)(torch.randn(8, 64, 4, 4))


def test_a_norm_whose_weight_is_made_of_others_is_torchs() -> None:
    norm, x = normed(16), torch.randn(4, 16, 4, 4)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    assert not fused._suits(norm, x)
    assert torch.equal(norm(x), F.batch_norm(x, None, None, norm.weight, norm.bias, training=True))


def test_no_gradient_at_all_is_none() -> None:
    norm, x = normed(16), torch.randn(4, 16, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(Nothing.apply(norm(x)), x, allow_unused=True)  # type: ignore[no-untyped-call]
    assert gradient is None


class Nothing(torch.autograd.Function):
    """Zero, and no gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> None:
        return None


def test_sums_are_fp32_whatever_a_tensor_is_by_default() -> None:
    dy = torch.randn(4, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    right = fused.gated(dy, None, None)[1]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fused.gated(dy, None, None)[1], right) and right.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
