import json
from dataclasses import asdict
from pathlib import Path

import pytest

import reslab
from reslab.catalogue.sheet import find, sheet, to_dict
from reslab.family import FAMILY
from reslab.receptive import receptive_field


def told(name: str, whole: bool = False) -> list[str]:
    return sheet(find(name), 32, whole, width=None)


def cells(lines: list[str], start: str) -> list[str]:
    line = next(line for line in lines if line.startswith(start))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_equal_blocks_are_told_once_unless_all_are_asked_for() -> None:
    lines = told("resnet1202")
    assert len(lines) < 70
    assert cells(lines, "layer2.1 … layer2.199")[1:5] == ["199 equal blocks", "32 x 16 x 16", "199 x 18,560", "199 x 4,718,592"]
    blocks = [line for line in told("resnet1202", whole=True) if line.startswith("layer") and " block " in line]
    assert len(blocks) == 600


def test_a_row_says_kernel_output_cost_share_and_receptive_field() -> None:
    lines = told("resnet20")
    assert cells(lines, "conv1") == ["conv1", "conv 3x3", "16 x 32 x 32", "432", "442,368", "1.1%", "▏", "3 px"]
    assert cells(lines, "layer1.0 … layer1.2") == ["layer1.0 … layer1.2", "3 equal blocks", "16 x 32 x 32", "3 x 4,672", "3 x 4,718,592", "34.9%", "█" * 16]
    assert cells(lines, "  layer1.0.conv2") == ["layer1.0.conv2", "conv 3x3", "16 x 32 x 32", "3 x 2,304", "3 x 2,359,296", "17.5%", "█" * 8, "7 … 15 px"]
    assert cells(lines, "fc")[:5] == ["fc", "linear", "10", "650", "640"]
    assert any("conv 3x3 /2, 32 groups" in line for line in told("resnext50_32x4d"))
    assert "269,722 parameters, 40,551,040 multiply-adds" in lines[-4]


def test_receptive_fields_are_those_that_araujo_et_al_derive() -> None:
    """Table 1 of Araujo et al. 2019 (distill.pub/2019/computing-receptive-fields) has 483 for v1, which halves one convolution earlier."""
    for name, pixels in (("resnet50", 427), ("resnet50_v1", 483)):
        assert to_dict(find(name), 1)["layers"][-3]["receptive_field"] == pixels


@pytest.mark.parametrize("name", ["resnet50", "keras_resnet50v2", "resnet110_stochastic", "skipblock8"])
def test_json_has_every_layer_and_sums_that_agree(name: str) -> None:
    given = json.loads(json.dumps(to_dict(find(name), batch=8)))
    row = FAMILY[name]
    assert [layer["name"] for layer in given["layers"]] == [layer.name for layer in row.spec.layers(row.image_size)]
    for what in ("params", "macs"):
        assert sum(layer[what] for layer in given["layers"]) == given["cost"][what]
    assert given["memory"]["batch"] == 8
    assert reslab.Spec.from_dict(given["spec"]) == row.spec


def test_a_run_is_told_as_the_net_it_trained(tmp_path: Path) -> None:
    spec = reslab.spec("resnet20", in_channels=1, num_classes=3)
    model = tmp_path / "photos" / "model"
    model.mkdir(parents=True)
    (model / "spec.json").write_text(json.dumps(asdict(spec)))
    (model / "preprocess.json").write_text('{"image_size": 28}')
    for folder in (model.parent, model):
        assert find(str(folder)) == ("photos", spec, 28, "trained here")
    card = model.rename(tmp_path / "card")
    assert find(str(card)).name == "card"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"image_size": "big"}', '{"image_size": true}', "[" * 100_000, "\xff"])
def test_a_damaged_run_is_an_error_of_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(asdict(reslab.spec("resnet20"))))
    (tmp_path / "preprocess.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(reslab.WorkError, match="is damaged") as raised:
        find(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet19", None, "unknown net 'resnet19': did you mean 'resnet1"),
        ("resnet50", 31, "needs at least 32 px a side; received 31 px"),
        ("resnet50", 0, "--image-size must be from 1 to 4096; received 0"),
        ("skipblock8", 64, "fixes the image size at 32 px; received 64"),
        ("/", None, "/ has no model/spec.json"),
    ],
)
def test_what_cannot_be_shown_says_why(name: str, size: int | None, message: str) -> None:
    with pytest.raises(reslab.CallError, match=message):
        find(name, size)


def test_what_sees_all_of_the_image_has_no_receptive_field() -> None:
    found = receptive_field(list(reslab.spec("resnet20", squeeze=16).layers(32)))
    assert not {"avgpool", "fc", "layer1.0.se.pool", "layer1.0.se.fc1"} & found.keys()
