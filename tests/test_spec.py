import math
from dataclasses import asdict, replace

import pytest
import torch

import reslab
from reslab.spec import FAMILY, Spec

# REFERENCE: He et al. 2015 and torchvision, as exact integers
PARAMS = {
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808,
    "resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "resnet56": 853_018, "resnet110": 1_727_962, "resnet1202": 19_421_274,
    "wide_resnet50_2": 68_883_240, "resnext50_32x4d": 25_028_904, "resnext29_16x64d": 68_155_210,
    "plain20": 269_722, "plain32": 464_154, "plain44": 658_586, "plain56": 853_018, "plain110": 1_727_962,
}  # fmt: skip
SHORTCUT_B = {
    "resnet20": 272_474,
    "resnet32": 466_906,
    "resnet44": 661_338,
    "resnet56": 855_770,
    "resnet110": 1_730_714,
    "resnet1202": 19_424_026,
}
GIGA_MACS = {
    "resnet18": 1.814,
    "resnet34": 3.664,
    "resnet50": 4.089,
    "resnet101": 7.801,
    "resnet152": 11.514,
    "wide_resnet50_2": 11.398,
    "resnext50_32x4d": 4.230,
}
PAPER_GIGA_MACS = {"resnet50": 3.8, "resnet101": 7.6, "resnet152": 11.3}  # v1: the stride on the first 1x1


def measured(spec: Spec, size: int) -> tuple[int, int, int]:
    """Parameters, multiply-accumulates and fp32 output bytes of the built net's leaf modules, for one image."""
    with torch.device("meta"):
        net = reslab.build(spec).eval()
    macs, outputs = [], []

    def look(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        outputs.append(4 * output.numel())
        if isinstance(module, torch.nn.Conv2d):
            macs.append(module.weight.numel() * output.shape[2] * output.shape[3])
        elif isinstance(module, torch.nn.Linear):
            macs.append(module.weight.numel())

    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    net(torch.empty(1, spec.in_channels, size, size, device="meta"))
    return sum(p.numel() for p in net.parameters()), sum(macs), sum(outputs)


@pytest.mark.parametrize("name", FAMILY)
def test_arithmetic_equals_built_net_exactly(name: str) -> None:
    row = FAMILY[name]
    assert tuple(row.spec.cost(row.image_size)) == measured(row.spec, row.image_size)


@pytest.mark.parametrize("name", PARAMS)
def test_params_are_the_published_ones(name: str) -> None:
    assert reslab.spec(name).cost().params == PARAMS[name]


@pytest.mark.parametrize("name", SHORTCUT_B)
def test_params_with_shortcut_b_are_the_published_ones(name: str) -> None:
    assert reslab.spec(name, shortcut="B").cost().params == SHORTCUT_B[name]


def test_macs_are_the_published_ones() -> None:
    assert {name: round(reslab.spec(name).cost(image_size=224).macs / 1e9, 3) for name in GIGA_MACS} == GIGA_MACS
    for name, giga in PAPER_GIGA_MACS.items():
        assert abs(reslab.spec(name, stride="v1").cost(224).macs / 1e9 - giga) < 0.1


@pytest.mark.parametrize(
    "changes",
    [{"norm": "none"}, {"shortcut": "C"}, {"shortcut": "none"}, {"stride": "v1"}, {"stem": "conv3"}, {"stem": "conv7"}, {"shortcut": "A"}],
    ids=str,
)
@pytest.mark.parametrize(("name", "size"), [("resnet18", 65), ("resnet50", 97)])
def test_variants_count_exactly_on_odd_sizes(name: str, size: int, changes: dict[str, str]) -> None:
    spec = reslab.spec(name, **changes)
    assert tuple(spec.cost(size)) == measured(spec, size)


def test_layers_are_the_leaf_modules_in_running_order() -> None:
    spec = reslab.spec("resnet50")
    net, ran = reslab.build(spec), []
    for name, module in net.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, i, o, name=name: ran.append((name, tuple(o.shape[1:]))))
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, 64, 64))
    assert [(layer.name, layer.shape) for layer in spec.layers(64)] == ran


@pytest.mark.parametrize(
    ("net", "size", "stem"),
    [("resnet20", 8, "conv3"), ("resnet20", 28, "conv3"), ("resnet20", 32, "conv3"), ("resnet18", 8, "conv3"), ("resnet18", 32, "conv3"),
     ("resnet18", 64, "conv7"), ("resnet18", 224, "conv7-pool"), ("resnet50", 448, "conv7-pool"), ("resnet20", 224, "conv7-pool")],
)  # fmt: skip
def test_stem_fits_the_images(net: str, size: int, stem: str) -> None:
    fitted = reslab.spec(net).fit(size, in_channels=1, num_classes=10)
    assert (fitted.stem, fitted.in_channels, fitted.num_classes) == (stem, 1, 10)
    with torch.no_grad():
        assert reslab.build(fitted).eval()(torch.zeros(2, 1, size, size)).shape == (2, 10)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(reslab.CallError, match="needs at least 8 px a side; received 4 px"):
        reslab.spec("resnet18").fit(4, 3, 10)


def test_spec_survives_json() -> None:
    import json

    spec = reslab.spec("resnet50", zero_init=True)
    assert Spec.from_dict(json.loads(json.dumps(asdict(spec)))) == spec


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reslab.spec("resnet19"), "unknown net 'resnet19': did you mean 'resnet1"),
        (lambda: reslab.spec("resnet18", widht=(1,)), "unknown Spec field 'widht': did you mean 'widths'"),
        (lambda: reslab.spec("resnet18", block="bottelneck"), "unknown block 'bottelneck': did you mean 'bottleneck'"),
        (lambda: reslab.spec("resnet18", depths=(2, 2)), "one entry a stage"),
        (lambda: reslab.spec("resnet18", depths=(2, 2, 2, 10**9)), "whole numbers from 1"),
        (lambda: reslab.spec("plain18", zero_init=True), "zero_init needs a shortcut"),
        (lambda: reslab.spec("resnet18", groups=2), "belong to bottleneck blocks"),
        (lambda: reslab.spec("resnet50", groups=7), "groups must divide the channels"),
    ],
)
def test_wrong_specs_name_the_rule(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call()  # type: ignore[operator]


def test_replace_makes_a_variant() -> None:
    variant = replace(reslab.spec("resnet20"), widths=(32, 64, 128))
    assert variant.cost().params == sum(p.numel() for p in reslab.build(variant).parameters())
    assert math.isclose(variant.cost().macs / reslab.spec("resnet20").cost().macs, 4, rel_tol=0.02)
