import math
from dataclasses import asdict, replace

import pytest
import torch

import reslab
from reslab.family import FAMILY
from reslab.spec import Spec

# REFERENCE: He et al. 2015 and torchvision, as exact integers
PARAMS = {
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808,
    "resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "resnet56": 853_018, "resnet110": 1_727_962, "resnet1202": 19_421_274,
    "wide_resnet50_2": 68_883_240, "resnext50_32x4d": 25_028_904, "resnext29_16x64d": 68_155_210, "wrn28-10": 36_479_194,
    "preact20": 272_282, "preact110": 1_730_522, "preact164": 1_703_258, "preact1001": 10_327_706, "se_resnet50": 28_088_024,
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
KERAS_COUNTS = {  # Keras counts a batch norm's moving statistics too
    "keras_resnet50": 25_636_712, "keras_resnet101": 44_707_176, "keras_resnet152": 60_419_944,
    "keras_resnet50v2": 25_613_800, "keras_resnet101v2": 44_675_560, "keras_resnet152v2": 60_380_648,
    "keras_teaching_resnet50": 23_600_006,
}  # fmt: skip
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


def measured(spec: Spec, size: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Name, output shape, parameters and multiply-accumulates of the built net's leaf modules, in the order they run."""
    with torch.device("meta"):
        net = reslab.build(spec)
    ran = []

    def look(name: str, module: torch.nn.Module, output: torch.Tensor) -> None:
        params, macs = sum(p.numel() for p in module.parameters()), 0
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            macs = module.weight.numel() * math.prod(output.shape[2:])
        ran.append((name, tuple(output.shape[1:]), params, macs))

    for name, module in net.named_modules():
        if not list(module.children()) and not isinstance(module, torch.nn.Identity):
            module.register_forward_hook(lambda m, i, o, name=name: look(name, m, o))
    net(torch.empty(2, spec.in_channels, size, size, device="meta"))
    assert sum(p.numel() for p in net.parameters()) == sum(params for _, _, params, _ in ran)
    return ran


def counted(spec: Spec, size: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    return [(layer.name, layer.shape, layer.params, layer.macs) for layer in spec.layers(size)]


@pytest.mark.parametrize("name", FAMILY)
def test_arithmetic_equals_built_net_layer_by_layer(name: str) -> None:
    row = FAMILY[name]
    assert counted(row.spec, row.image_size) == measured(row.spec, row.image_size)


@pytest.mark.parametrize("name", FAMILY)
def test_cost_is_the_sum_of_the_layers(name: str) -> None:
    spec, size = FAMILY[name].spec, FAMILY[name].image_size
    rows = counted(spec, size)
    assert spec.cost(size) == (sum(r[2] for r in rows), sum(r[3] for r in rows), sum(4 * math.prod(r[1]) for r in rows))


@pytest.mark.parametrize("name", KERAS_COUNTS)
def test_params_are_those_that_keras_counts(name: str) -> None:
    spec, size = FAMILY[name].spec, FAMILY[name].image_size
    statistics = sum(2 * layer.shape[0] for layer in spec.layers(size) if layer.kind == "batchnorm")
    assert spec.cost(size).params + statistics == KERAS_COUNTS[name]


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
    [
        {"norm": "none"},
        {"norm": "group"},
        {"shortcut": "A"},
        {"shortcut": "C"},
        {"shortcut": "D"},
        {"shortcut": "none"},
        {"stride": "v1"},
        {"stride": "last"},
        {"stride": "pool"},
        {"stride": "pool", "order": "preact", "shortcut": "D"},
        {"stride": "none"},
        {"stem": "conv3"},
        {"stem": "conv7"},
        {"stem": "deep-conv"},
        {"antialias": True},
        {"squeeze": 16, "order": "preact"},
        {"order": "bn-after-add", "bias": "unnormed"},
        {"order": "relu-preact", "bias": "all"},
        {"norm": "none", "init": "fixup"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "size"), [("resnet18", 65), ("resnet50", 97)])
def test_variants_count_exactly_on_odd_sizes(name: str, size: int, changes: dict[str, object]) -> None:
    spec = reslab.spec(name, **changes)
    assert counted(spec, size) == measured(spec, size)


@pytest.mark.parametrize("changes", [{}, {"antialias": True}, {"stride": "pool"}, {"stride": "last"}, {"norm": "none", "init": "fixup"}], ids=str)
def test_a_late_shortcut_counts_exactly(changes: dict[str, object]) -> None:
    spec = reslab.spec("resnet18", shortcut="late", **changes)
    assert counted(spec, 65) == measured(spec, 65)


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
        (lambda: reslab.spec(None), "unknown net 'None'"),  # type: ignore[arg-type]
        (lambda: reslab.spec("resnet18", widht=(1,)), "unknown Spec field 'widht': did you mean 'widths'"),
        (lambda: reslab.spec("resnet18", block="bottelneck"), "unknown block 'bottelneck': did you mean 'bottleneck'"),
        (lambda: reslab.spec("resnet18", depths=(2, 2)), "one entry a stage"),
        (lambda: reslab.spec("resnet18", depths=(2, 2, 2, 10**9)), "whole numbers from 1"),
        (lambda: reslab.spec("resnet50", shortcut="late"), "shortcut late is for basic blocks in order original; received bottleneck and original"),
        (lambda: reslab.spec("plain18", zero_init=True), "zero_init, init, drop_path and carry need a shortcut"),
        (lambda: reslab.spec("plain18", drop_path=0.5), "zero_init, init, drop_path and carry need a shortcut"),
        (lambda: reslab.spec("resnet18", init="fixup"), "init fixup is for norm none"),
        (lambda: reslab.spec("resnet18", norm="none", init="fixup", order="preact"), "fixup is defined for order original; received preact"),
        (lambda: reslab.spec("preact20", antialias=True), "antialias is defined for order original"),
        (lambda: reslab.spec("resnet18", stem="raw7-pool"), "leaves its norm and ReLU to blocks of order preact"),
        (lambda: reslab.spec("preact20", order="relu-preact", stem="raw7-pool"), "leaves its norm and ReLU to blocks of order preact"),
        (lambda: reslab.spec("resnet110_relu_before_add", zero_init=True), "a branch that begins at zero behind a ReLU never gets a gradient"),
        (lambda: reslab.spec("resnet20", stem_width=32), "shortcut A adds channels of zeros and takes none away; received stem_width 32"),
        (lambda: reslab.spec("resnet18", shortcut="D", stride="last"), "take shortcut B"),
        (lambda: reslab.spec("resnet18", stem="conv5"), "unknown stem 'conv5': did you mean 'conv"),
        (lambda: reslab.spec("resnet18", drop_path=1.0), "drop_path must be at least 0 and below 1"),
        (lambda: reslab.spec("resnet18", squeeze=-1), "must be whole numbers from 0 to 65536; received 0, -1, 0"),
        (lambda: reslab.spec("skipblock8", squeeze=16), "skip blocks have no squeeze; received 16"),
        (lambda: reslab.spec("skipblock8", shortcut="A"), "shortcut of skip blocks must be B or none; received A"),
        (lambda: reslab.spec("skipblock8", widths=(64, 96, 128)), "as many channels as the one before, or twice"),
        (lambda: reslab.spec("skipblock8").check_size(64), "fixes the image size at 32 px; received 64"),
        (lambda: reslab.spec("resnet18", groups=2), "belong to bottleneck blocks"),
        (lambda: reslab.spec("resnet50", groups=7), "groups must divide the channels"),
    ],
)
def test_wrong_specs_name_the_rule(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call()  # type: ignore[operator]


def test_bottlenecks_of_2016_halve_in_their_first_convolution() -> None:
    """KaimingHe/resnet-1k-layers, resnet-pre-act.lua; no count of parameters shows it."""
    assert [reslab.spec(name).cost().macs for name in ("preact164", "preact1001")] == [244_500_992, 1_487_849_984]
    assert FAMILY["resnet164"].spec.stride == "v1"


def test_replace_makes_a_variant() -> None:
    variant = replace(reslab.spec("resnet20"), widths=(32, 64, 128))
    assert variant.cost().params == sum(p.numel() for p in reslab.build(variant).parameters())
    assert math.isclose(variant.cost().macs / reslab.spec("resnet20").cost().macs, 4, rel_tol=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dropout": "0.1"}, "dropout must be a number; received '0.1'"),
        ({"eps": True}, "eps must be a number; received True"),
        ({"depths": 3}, "depths must be whole numbers, one a stage; received 3"),
        ({"widths": (16, 32, True)}, "widths must be whole numbers, one a stage; received (16, 32, True)"),
        ({"num_classes": 10.0}, "num_classes must be a whole number; received 10.0"),
        ({"stem": ["conv3"]}, "stem must be a name; received ['conv3']"),
        ({"order": ["preact"]}, "unknown order \"['preact']\""),
        ({"antialias": "false"}, "antialias must be True or False; received 'false'"),
        ({"zero_init": 1}, "zero_init must be True or False; received 1"),
    ],
    ids=str,
)
def test_a_wrong_type_names_its_field(fields: dict[str, object], message: str) -> None:
    plain = reslab.spec("resnet20")
    for make in (lambda: replace(plain, **fields), lambda: reslab.spec("resnet20", **fields), lambda: Spec.from_dict(asdict(plain) | fields)):
        with pytest.raises(reslab.CallError) as caught:
            make()
        assert str(caught.value).startswith(message)


def test_a_spec_that_lacks_a_field_says_which_there_must_be() -> None:
    with pytest.raises(reslab.CallError, match="a Spec needs block, depths, widths, stem; received block, depths"):
        Spec.from_dict({"block": "basic", "depths": [1]})


@pytest.mark.parametrize(
    "spec",
    [
        Spec("bottleneck", (3,), (8,), "conv7-pool-valid", num_classes=2),
        Spec("basic", (1,), (8,), "conv7-pool-valid", antialias=True, num_classes=2),
        Spec("basic", (1, 1), (8, 16), "conv7-pool-valid", antialias=True, num_classes=2),
        Spec("basic", (1, 1), (8, 16), "conv7-pool", antialias=True, num_classes=2),
    ],
    ids=["unpadded pool", "blurred pool", "blurred stage", "padded pool"],
)
@torch.no_grad()
def test_a_size_is_taken_where_the_net_takes_it(spec: Spec) -> None:
    net = reslab.build(spec).eval()
    for size in range(spec.reduction, 20):
        image = torch.zeros(1, 3, size, size)
        try:
            spec.check_size(size)
        except reslab.CallError:
            with pytest.raises(RuntimeError):
                net(image)
        else:
            assert net(image).shape == (1, 2)


@pytest.mark.parametrize("size", [0, -5, (32, 0)])
def test_images_without_a_pixel_cost_nothing_to_refuse(size: object) -> None:
    spec = reslab.spec("resnet20")
    for ask in (spec.cost, spec.layers):
        with pytest.raises(reslab.CallError, match=r"must leave a pixel; of images of .* px conv1 leaves none"):
            ask(size)  # type: ignore[operator]


def test_layers_without_channels_or_pixels_are_refused() -> None:
    with pytest.raises(reslab.CallError, match="stem deep-pool begins with half of its channels, so it needs at least 2; received 1"):
        Spec("basic", (1,), (1,), "deep-pool")
    assert Spec("basic", (1,), (1,), "deep-pool", stem_width=2).cost().params
    with pytest.raises(reslab.CallError, match="needs at least 2 px a side; received 1 px"):
        Spec("skip", (1,), (16,), "conv3-pool", flatten=1)
    assert reslab.spec("skipblock8").fit(16, 3, 10).flatten == 16
