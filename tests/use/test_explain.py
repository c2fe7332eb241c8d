"""Maps against captum's, against the papers' formulas, and on cases whose answer is known."""

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor

from reslab.data.preprocess import Preprocess
from reslab.errors import CallError
from reslab.family import FAMILY
from reslab.nets.torch import ResNet, build
from reslab.spec import Spec
from reslab.use import explain
from reslab.use.artefact import TorchModel
from reslab.use.classifier import Classifier
from reslab.use.explain import (
    METHODS,
    evidence,
    grad_cam,
    grad_cam_plus_plus,
    heat_map,
    integrated_gradients,
    occlusion,
    on_canvas,
    rank_correlation,
    reinitialised,
)
from tests.conftest import scramble

NETS = {
    "basic": (Spec("basic", (1, 2), (8, 16), "conv3", "A", num_classes=5), 16),
    "plain": (Spec("basic", (2, 1), (8, 16), "conv3", "none", num_classes=5), 15),
    "grey bottleneck": (Spec("bottleneck", (1, 1, 1), (4, 8, 8), "conv7-pool", "B", in_channels=1, num_classes=3), 50),
    "pre-activation": (Spec("basic", (1, 1), (8, 16), "conv3", order="preact", squeeze=4, num_classes=5), 17),
    "SkipBlock": (Spec("skip", (1, 2), (8, 16), "conv3-pool", bias="all", flatten=16, num_classes=3), 16),
    "without norms": (Spec("basic", (1, 1), (8, 8), "conv7", "C", norm="none", num_classes=4), 33),
}
PLACES = {"stem": "stem", "layer1": "layer1.0", "layer2.0": "layer2.0"}


def made(name: str) -> tuple[ResNet, Tensor, Tensor]:
    spec, size = NETS[name]
    net = scramble(ResNet(spec)).eval()
    x = torch.randn(3, spec.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    return net, x, torch.tensor([0, 2, 1])  # type: ignore[return-value]


def classifier(net: ResNet, size: int, canvas: int) -> Classifier:
    channels = net.spec.in_channels
    preprocess = Preprocess(size, canvas, channels, np.full(channels, 0.5, np.float32), np.full(channels, 0.25, np.float32))
    return Classifier(TorchModel(net, preprocess), tuple(f"class {i}" for i in range(net.spec.num_classes)))


def far(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value; and the oracle must have something to say."""
    assert theirs.abs().max() > 1e-5
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("at", PLACES)
def test_grad_cam_is_captums(name: str, at: str) -> None:
    net, x, labels = made(name)
    module = (net.maxpool or net.relu) if at == "stem" else net.get_submodule(PLACES[at])
    if name == "plain" and at == "layer1":
        module = net.layer1[1]
    theirs = captum.attr.LayerGradCam(net, module).attribute(x, labels)[:, 0].detach()
    assert far(grad_cam(net, x, labels, at), theirs) < 1e-4


@pytest.mark.parametrize("name", NETS)
def test_integrated_gradients_are_captums_and_add_up(name: str) -> None:
    net, x, labels = made(name)
    ours = integrated_gradients(net, x, labels, steps=20)
    theirs = captum.attr.IntegratedGradients(net).attribute(x, target=labels, n_steps=20, method="gausslegendre").detach().float()
    assert far(ours, theirs) < 1e-4
    with torch.no_grad():
        rise = (net(x) - net(torch.zeros_like(x))).gather(1, labels[:, None])[:, 0]
    many = integrated_gradients(net, x, labels, steps=300)
    assert far(many.sum((1, 2, 3)), rise) < 0.02


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("window", "stride"), [(5, 2), (6, 6), (4, 3)])
def test_occlusion_is_captums(name: str, window: int, stride: int) -> None:
    net, x, labels = made(name)
    channels = x.shape[1]
    oracle = captum.attr.Occlusion(net)
    theirs = oracle.attribute(x, (channels, window, window), (channels, stride, stride), target=labels, perturbations_per_eval=16)[:, 0].detach()
    assert far(occlusion(net, x, labels, window, stride), theirs) < 1e-4


def test_the_comparison_notices_a_wrong_map() -> None:
    net, x, labels = made("basic")
    theirs = captum.attr.LayerGradCam(net, net.layer2[1]).attribute(x, labels)[:, 0].detach()
    assert far(grad_cam(net, x, labels.flip(0)), theirs) > 1e-2
    assert far(grad_cam(net, x, labels, "layer2.0"), theirs) > 1e-2


def test_grad_cam_plus_plus_is_the_papers_equations() -> None:
    """Equations 10 and 19 with Y = exp(S), pixel by pixel, its first three derivatives by automatic differentiation in float64."""
    net, x, labels = made("basic")
    net, x = net.double(), x[:1].double()
    outputs: dict[str, Tensor] = {}
    with torch.no_grad():
        net(x, outputs)
    maps = outputs["layer2.1"][0]

    def y(a: Tensor) -> Tensor:  # what follows the last block
        return net.fc(a.mean((1, 2)))[labels[0]].exp()

    expected = torch.zeros_like(maps[0])
    for k in range(len(maps)):
        for i, j in np.ndindex(*maps[k].shape):
            derivatives, a = [], maps.clone().requires_grad_()
            value = y(a)
            for _ in range(3):
                value = torch.autograd.grad(value, a, create_graph=True)[0][k, i, j]
                derivatives.append(value.detach())
            first, second, third = derivatives
            alpha = second / (2 * second + maps[k].sum() * third)  # equation 19
            expected += alpha * first.relu() * maps[k]  # equation 10, and the weighted sum
    ours = grad_cam_plus_plus(net, x, labels[:1])[0]
    assert far(ours / ours.abs().max(), expected / expected.abs().max()) < 1e-9, "equal up to the factor exp(S)"


def test_no_more_images_go_through_the_net_at_once_than_memory_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, labels = made("basic")
    whole = {method: evidence(net, x, labels, method) for method in METHODS}
    monkeypatch.setattr(explain, "MEMORY", 2 * net.spec.cost(x.shape[2]).activations)
    seen: list[int] = []
    net.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    for method in METHODS:
        assert far(evidence(net, x, labels, method), whole[method]) < 1e-4
    assert max(seen) == 2


class Corner(ResNet):
    """Its logit for class 1 is the brightness of the upper left quarter; class 0 says the opposite."""

    def forward(self, x: Tensor, outputs: dict[str, Tensor] | None = None) -> Tensor:
        seen = x.mean(1, keepdim=True)
        if outputs is not None:
            outputs["stem"] = outputs["layer1.0"] = outputs["layer2.0"] = seen
        seen = outputs["layer2.0"] if outputs is not None else seen
        half = x.shape[2] // 2
        corner = seen[:, 0, :half, :half].mean((1, 2))
        return torch.stack([-corner, corner], 1)


@pytest.mark.parametrize("method", METHODS)
def test_evidence_lies_where_it_is_known_to_lie_and_nowhere_outside_the_crop(method: str) -> None:
    net = Corner(Spec("basic", (1, 1), (4, 4), "conv3", num_classes=2)).eval()
    pixels = np.full((24, 24, 3), 128, np.uint8)
    pixels[4:8, 4:8] = 250  # within the crop, which is 4 to 20, a spot in its upper left quarter
    found = heat_map(classifier(net, 16, 24), pixels, method, label="class 1")
    assert (found.dtype, found.shape, found.min(), found.max()) == (np.float32, (24, 24), 0, 1)
    assert found[4:8, 4:8].mean() > 0.7
    assert found[12:, :].max() < 0.2
    assert found[:4].max() == found[20:].max() == found[:, :4].max() == found[:, 20:].max() == 0
    assert heat_map(classifier(net, 16, 24), pixels, method).sum() == found.sum(), "class 1 is the predicted one"


def test_negative_activations_have_no_pole_in_grad_cam_plus_plus() -> None:
    """The gradient is 1/64 in the quarter; with the negative sum, -256, the weights would be negative too."""
    net = Corner(Spec("basic", (1, 1), (4, 4), "conv3", num_classes=2)).eval()
    found = grad_cam_plus_plus(net, -torch.ones(1, 3, 16, 16), torch.tensor([1]))
    assert torch.allclose(found, torch.tensor(-0.5))


def test_a_single_pixel_does_not_darken_the_rest() -> None:
    net, _, _ = made("basic")
    maps = torch.ones(1, 16, 16)
    maps[0, 3, 5] = 1000
    assert (on_canvas(classifier(net, 16, 16), maps) == 1).all()


def test_a_map_without_evidence_is_zero_and_finite() -> None:
    net, _, _ = made("basic")
    for value in (0.0, -1.0, float("nan")):
        found = on_canvas(classifier(net, 16, 16), torch.full((1, 4, 4), value).nan_to_num(0))
        assert (found == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_net_is_left_as_it_was_found(method: str) -> None:
    net, x, labels = made("basic")
    net.train()
    net.layer1.eval()
    net.fc.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    random = torch.get_rng_state()

    def unchanged() -> None:
        assert [m.training for m in net.modules()] == modes
        assert [p.requires_grad for p in net.parameters()] == flags
        assert all(p.grad is None for p in net.parameters())
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())

    maps = evidence(net, x, labels, method)
    reinitialised(net)
    unchanged()
    assert not maps.requires_grad
    assert not x.requires_grad
    with pytest.raises(RuntimeError):
        evidence(net, x[:, :2], labels, method)
    unchanged()
    with torch.inference_mode():
        inside = evidence(net, x.clone(), labels.clone(), method)
    assert torch.equal(inside, maps), "also where gradients are off"


def test_images_explained_together_get_the_maps_they_get_alone() -> None:
    net, x, labels = made("basic")
    for method in METHODS:
        together = evidence(net, x, labels, method)
        alone = torch.cat([evidence(net, x[i : i + 1], labels[i : i + 1], method) for i in range(3)])
        assert far(alone, together) < 1e-4


def test_random_weights_change_the_map_and_do_not_overflow() -> None:
    net = scramble(build("resnet110", num_classes=4))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4)
    control = reinitialised(net)
    assert torch.equal(control.fc.weight, reinitialised(net).fc.weight), "the control is the same every time"
    others = evidence(control, x, labels)
    assert others.abs().max() < 1e3
    assert others.isfinite().all()
    maps = evidence(net, x, labels)
    assert max(map(abs, rank_correlation(maps, others))) < 0.9
    assert rank_correlation(maps, maps * 3) == pytest.approx([1] * 4), "a map that does not change is noticed"


def test_rank_correlation_is_scipys() -> None:
    from scipy.stats import spearmanr

    a, b = torch.rand(2, 5, 5), torch.randn(2, 5, 5)
    assert rank_correlation(a, b) == pytest.approx([spearmanr(p.flatten(), q.relu().flatten()).statistic for p, q in zip(a, b, strict=True)])
    assert rank_correlation(a, torch.zeros(2, 5, 5)) == [None, None], "what ranks nothing is no evidence"
    assert rank_correlation(torch.ones(2, 1, 1), torch.rand(2, 1, 1)) == [None, None]


def test_a_map_of_the_image_alone_with_signs_at_random_is_noticed() -> None:
    image = torch.rand(4, 20, 20)
    one, other = (image * torch.randn(4, 20, 20, generator=torch.Generator().manual_seed(seed)).sign() for seed in (0, 1))
    assert max(value for value in rank_correlation(one, other) if value is not None) < 0.5
    assert rank_correlation(one, other, magnitude=True) == pytest.approx([1] * 4)


@pytest.mark.parametrize("name", ["resnet110_fixup", "resnet110_skipinit", "resnet110_rezero"])
def test_the_control_of_a_net_that_starts_at_zero_is_random_all_through(name: str) -> None:
    net = build(name, num_classes=4)
    control = reinitialised(net)
    assert all(tensor.any() for key, tensor in control.named_parameters() if key.endswith("weight"))
    x, labels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(2)
    others = evidence(control, x, labels)
    assert others.isfinite().all()
    assert others.any()


@pytest.mark.parametrize("size", [28, 32, 64])
def test_a_net_that_flattens_its_map_has_a_control_at_its_own_size(size: int) -> None:
    net = build(FAMILY["skipblock8"].spec.fit(size, 3, 5))
    x, labels = torch.randn(1, 3, size, size), torch.zeros(1, dtype=torch.int64)
    assert evidence(reinitialised(net), x, labels).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"method": "gradcam"}, "did you mean 'grad-cam'"),
        ({"at": "layer9"}, "did you mean 'layer"),
        ({"at": "layer1.7"}, "blocks are layer1.0 to layer2.1"),
        ({"label": "clas 1"}, "did you mean 'class 1'"),
        ({"method": "occlusion", "at": "layer1"}, "leave --at layer1 out"),
    ],
)
def test_wrong_names_get_the_nearest(arguments: dict[str, str], part: str) -> None:
    net, _, _ = made("basic")
    with pytest.raises(CallError, match=part):
        heat_map(classifier(net, 16, 16), np.zeros((16, 16, 3), np.uint8), **arguments)
