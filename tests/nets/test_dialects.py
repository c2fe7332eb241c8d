import re
from dataclasses import replace

import pytest
import torch

import reslab
from reslab.family import FAMILY
from reslab.nets.configs import TIMM, contradiction
from reslab.nets.dialects import DIALECTS, Dialect, for_saving, from_ours, ours, recognise, theirs, to_ours
from reslab.nets.identify import fitting, state_shapes
from tests.nets.peers import CASES, make

NAMES = sorted({dialect.name for dialect in DIALECTS})
DEEP = 16  # blocks; beyond, nets are only deeper
# What a file with these names is: where a net has nothing of its own, torchvision's names are everybody's.
SAME_AS_TORCHVISION = {"timm", "ours", "torchvision"}


def rows_of(name: str) -> list[tuple[str, Dialect]]:
    found = []
    for row in (row for row in FAMILY if sum(FAMILY[row].spec.depths) < 4 * DEEP):
        try:
            found.append((row, for_saving(name, FAMILY[row].spec)))
        except reslab.CallError:
            continue
    return found


def shaped(row: str) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in state_shapes(FAMILY[row].spec).items()}


@pytest.mark.parametrize("name", NAMES)
def test_names_go_out_and_come_back_for_every_net_that_a_dialect_can_name(name: str) -> None:
    rows = rows_of(name)
    assert rows
    for row, dialect in rows:
        held = shaped(row)
        out = from_ours(dialect, held)
        assert len(out) == len(held)
        back = to_ours(dialect, out)
        assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in held.items()}
        recognised = recognise(out)
        assert recognised == dialect or {recognised.name, name} <= SAME_AS_TORCHVISION, row


@pytest.mark.parametrize(("library", "row"), [case for case in CASES if sum(FAMILY[case[1]].spec.depths) <= DEEP], ids=str)
def test_the_names_and_shapes_of_peers_are_those_of_the_row(library: str, row: str) -> None:
    with torch.device("meta"):
        held = make(library, row).state_dict()
    found = to_ours(recognise(held), held)
    assert row in fitting({name: tuple(tensor.shape) for name, tensor in found.items()})


@pytest.mark.parametrize(
    ("dialect", "theirs_name", "our_name"),
    [
        ("huggingface", "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight", "layer1.0.conv1.weight"),
        ("huggingface", "resnet.encoder.stages.3.layers.12.layer.2.normalization.running_var", "layer4.12.bn3.running_var"),
        ("huggingface", "resnet.encoder.stages.1.layers.0.shortcut.normalization.bias", "layer2.0.downsample.1.bias"),
        ("timm", "stages.2.blocks.5.norm3.num_batches_tracked", "layer3.5.bn3.num_batches_tracked"),
        ("timm", "head.fc.bias", "fc.bias"),
        ("akamaster", "layer2.0.shortcut.1.weight", "layer2.0.downsample.1.weight"),
        ("huggingface", "resnet.encoder.stages.0.layers.0.layer.0.activation.weight", "resnet.encoder.stages.0.layers.0.layer.0.activation.weight"),
    ],
)
def test_names_are_these(dialect: str, theirs_name: str, our_name: str) -> None:
    row = next(d for d in DIALECTS if d.name == dialect)
    assert ours(row, theirs_name) == our_name
    assert theirs(row, our_name) == theirs_name


@pytest.mark.parametrize(
    ("net", "dialect", "obstacle"),
    [
        ("resnet110_exclusive_gate", "huggingface", "carry exclusive-gate, stem conv3"),
        ("resnet50_v1", "torchvision", "stride v1,"),
        ("se_resnet50", "huggingface", "squeeze 16"),
        ("resnet50_gn", "torchvision", "norm group"),
        ("resnext50_32x4d", "huggingface", "groups 32, inner 2"),
        ("keras_resnet50", "huggingface", "bias all"),
        ("resnet18", "akamaster", "stem conv7-pool"),
        ("skipblock8", "timm", "block skip"),
    ],
)
def test_what_a_dialect_cannot_say_is_named(net: str, dialect: str, obstacle: str) -> None:
    with pytest.raises(reslab.CallError, match=f"it has .*{obstacle}.* save it with dialect 'ours'") as caught:
        for_saving(dialect, FAMILY[net].spec)
    assert "\n" not in str(caught.value)


def test_an_unknown_dialect_is_said_with_the_known_ones() -> None:
    with pytest.raises(reslab.CallError, match="unknown dialect 'timn': did you mean 'timm'"):
        for_saving("timn", FAMILY["resnet18"].spec)


def test_two_tensors_of_one_name_are_refused() -> None:
    row = next(d for d in DIALECTS if d.name == "akamaster")
    with pytest.raises(reslab.CallError, match=r"has fc.bias twice, also as linear.bias"):
        to_ours(row, {"fc.bias": torch.zeros(1), "linear.bias": torch.zeros(1)})
    stages = next(d for d in DIALECTS if d.name == "huggingface")
    with pytest.raises(reslab.CallError, match="twice"):
        to_ours(stages, {f"resnet.encoder.stages.{zero}.layers.0.layer.0.convolution.weight": torch.zeros(1) for zero in ("0", "00")})


@pytest.mark.parametrize("name", FAMILY)
def test_shapes_by_arithmetic_are_those_of_the_built_net(name: str) -> None:
    spec = replace(FAMILY[name].spec, depths=tuple(min(depth, 2) for depth in FAMILY[name].spec.depths))
    with torch.device("meta"):
        built = {k: tuple(v.shape) for k, v in reslab.build(spec).state_dict().items()}
    assert state_shapes(spec) == {k: v for k, v in built.items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize(("net", "changes"), [("resnet50", {"num_classes": 37, "in_channels": 1}), ("resnet1202", {}), ("skipblock8", {"num_classes": 3})])
def test_tensors_find_their_rows_whatever_the_classes_and_channels(net: str, changes: dict[str, int]) -> None:
    rows = fitting(state_shapes(reslab.spec(net, **changes)))
    assert net in rows
    assert all(FAMILY[row].spec.depths == FAMILY[net].spec.depths for row in rows)


def test_tensors_of_no_net_find_none() -> None:
    shapes = state_shapes(FAMILY["resnet50"].spec)
    assert fitting({**shapes, "fc.extra": (1,)}) == []
    assert fitting({**shapes, "layer1.0.conv1.weight": (64, 64, 3, 3)}) == []
    assert fitting({**shapes, "fc.weight": (1 << 40, 2048)}) == []
    assert fitting({}) == []


def test_every_architecture_is_one_of_timms(timm) -> None:  # type: ignore[no-untyped-def]
    assert all(re.fullmatch(r"[a-z0-9_]+", name) and timm.is_model(name) for name in TIMM.values())
    assert set(TIMM) <= set(FAMILY)


def test_a_config_of_transformers_is_heard_about_what_shapes_cannot_tell() -> None:
    config = {"model_type": "resnet", "hidden_act": "relu"}
    assert contradiction(config, reslab.spec("resnet50")) == ""
    for wrong, part in (("resnet50_blur", "with antialias False, and this net has True"), ("keras_resnet50", "with eps 1e-05")):
        held = {**config, "downsample_in_bottleneck": reslab.spec(wrong).stride == "v1"}
        assert part in contradiction(held, reslab.spec(wrong))
    assert "downsample_in_bottleneck is False" in contradiction(config, reslab.spec("resnet50_v1")), "a missing key is what transformers takes it for"
