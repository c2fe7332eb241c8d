"""The net that predicts against the net that was trained: the same function, on values."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reslab
from reslab.nets.torch import ResNet
from reslab.run import Run
from reslab.spec import Spec
from reslab.use import inference
from reslab.use.artefact import TorchModel
from reslab.use.inference import Quick, agreement, folded, lowered, weigh
from tests.conftest import relative, scramble
from tests.use.conftest import TINY, classifier_of, photos_of

ROWS = (
    "resnet20", "plain20", "preact20", "se_resnet20", "resnet110_bn_after_add", "resnet110_relu_before_add", "resnet110_relu_preact", "resnet110_scaling",
    "resnet110_exclusive_gate", "resnet110_conv_shortcut", "resnet110_dropout_shortcut", "resnet110_stochastic", "resnet110_fixup", "skipblock8",
    "resnet18_blur", "resnet50d_blur", "resnext50_32x4d", "resnet50_gn", "keras_resnet50v2", "resnetrs50", "resnet8",
)  # fmt: skip


def shallow(name: str) -> Spec:
    """The row with a block a stage, where it is deep; its kinds of layers are all there."""
    spec = replace(reslab.spec(name), num_classes=10)
    if name == "skipblock8":  # its head would take most of the time
        return replace(spec, widths=tuple(width // 4 for width in spec.widths))
    return replace(spec, depths=(1,) * len(spec.depths))


def net_of(spec: Spec) -> ResNet:
    net = scramble(ResNet(spec)).eval()
    assert isinstance(net, ResNet)
    return net


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_folding_is_exact_and_fusing_rounds_only(name: str) -> None:
    net = net_of(shallow(name))
    side = net.spec.flatten or 64
    x = torch.randn(3, net.spec.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    want = net.double()(x.double())
    graph = folded(net)
    assert relative(graph(x.double()), want) < 1e-13
    quick = lowered(net.float(), torch.float32)
    for size in (3, 1, 2, 3):
        assert relative(quick(x[:size]), want[:size].float()) < 1e-5
    if not net.spec.flatten:  # weights are laid out for an image size, and anew for the next
        part = x[:2, :, 8:, 4:-12]
        assert relative(quick(part), net.float()(part)) < 1e-4
        assert relative(quick(x), want.float()) < 1e-5


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="weights are laid out for oneDNN only")
@torch.no_grad()
def test_weights_are_laid_out_once_for_one_image_and_once_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    lay_out = torch.ops.mkldnn._reorder_convolution_weight

    def counting(weight: Tensor, *settings: object) -> Tensor:
        sizes.append(settings[-1][0])  # type: ignore[index]
        laid: Tensor = lay_out(weight, *settings)
        return laid

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", counting)
    net = net_of(TINY)
    quick = lowered(net, torch.float32)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for size in (4, 1, 3, 1, 4, 2):
        assert relative(quick(x[:size]), net(x[:size])) < 1e-5
    convolutions = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    assert sizes == [4] * convolutions + [1] * convolutions


def test_no_batch_norm_is_left_behind_a_convolution() -> None:
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded(net_of(reslab.spec("resnet20"))).modules())
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded(net_of(reslab.spec("preact20"))).modules())
    assert left == 9, "those that follow an addition: one a block"


@torch.no_grad()
def test_a_wrong_statistic_would_be_noticed() -> None:
    net = net_of(TINY)
    x = torch.randn(2, 3, 24, 24)
    want = net(x)
    net.bn1.running_var *= 1.01  # type: ignore[union-attr, operator]
    assert relative(lowered(net, torch.float32)(x), want) > 1e-4


@torch.no_grad()
def test_the_net_stays_as_it_is_and_its_changes_are_seen() -> None:
    net = net_of(TINY)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    quick, x, outputs = Quick(net), torch.randn(2, 3, 24, 24), dict[str, torch.Tensor]()
    before = quick(x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    net(x, outputs)
    assert list(outputs) == ["stem", "layer1.0", "layer2.0"]
    net.fc.bias += 1
    assert relative(quick(x), before + 1) < 1e-5


BF16 = {"agreement": 0.998}
INT8 = {"agreement": 0.997, "agreement_low": 0.985}
RECORD = {"precision": "bf16", "processor": "here", "bf16": BF16, "int8": INT8}
ELSEWHERE = {**RECORD, "processor": "another"}


@pytest.mark.parametrize(
    ("record", "gains", "precision"),
    [
        ({}, (9.0, 9.0), "fp32"),
        (RECORD, (0.1, 0.1), "bf16"),  # measured on this processor: not again
        ({**RECORD, "precision": "int8"}, (0.1, 0.1), "int8"),
        ({**RECORD, "precision": "fp32"}, (9.0, 9.0), "fp32"),
        ({**RECORD, "bf16": {"agreement": 0.99}}, (9.0, 9.0), "int8"),
        ({"precision": "bf16", "processor": "here", "agreement": 0.998}, (0.1, 0.1), "bf16"),  # an older run's
        (ELSEWHERE, (2.0, 1.5), "bf16"),
        (ELSEWHERE, (2.0, 3.0), "int8"),
        ({**ELSEWHERE, "precision": "fp32"}, (2.0, 1.0), "bf16"),
        ({**RECORD, "bf16": {"agreement": 1, "agreement_low": 0.94}}, (9.0, 1.0), "fp32"),  # some fifty images
        (ELSEWHERE, (1.0, 1.05), "fp32"),
        ({**ELSEWHERE, "int8": {**INT8, "agreement": 0.99}}, (1.0, 3.0), "fp32"),
        ({**ELSEWHERE, "int8": {**INT8, "agreement_low": 0.97}}, (1.0, 3.0), "fp32"),  # too few images to know
        ({**ELSEWHERE, "int8": {**INT8, "exchanged": 0.99}}, (1.5, 3.0), "bf16"),  # by luck, these images kept theirs
    ],
)
@pytest.mark.parametrize("asked_first", [True, False])
@torch.no_grad()
def test_a_precision_needs_agreement_on_val_with_these_weights_and_speed_on_this_processor(
    record: dict, gains: tuple[float, float], precision: str, asked_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raced(made: dict[str, object], x: Tensor) -> dict[str, float]:
        return {name: gain for name, gain in zip(("bf16", "int8"), gains, strict=True) if name in made}

    net, x = net_of(TINY), torch.randn(2, 3, 24, 24)
    for name, value in (("has_bf16", lambda _: True), ("has_int8", lambda _: True), ("processor", lambda _: "here"), ("_gains", raced)):
        monkeypatch.setattr(inference, name, value)
    monkeypatch.setattr(inference, "in_int8", lambda net, ranges, x: lowered(net, torch.float32))
    quick = Quick(net, record)
    if asked_first:
        out = quick(x)
        assert (quick.precision, out.dtype) == (precision, torch.float32)
    net.fc.bias += 1
    quick(x)
    assert quick.precision == "fp32", "what was measured is of other weights"


@torch.no_grad()
def test_a_machine_that_lacks_a_kernel_predicts_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "has_int8", lambda _: True)
    monkeypatch.setattr(inference, "in_int8", lambda net, ranges, x: None)
    net, x = net_of(TINY), torch.randn(2, 3, 24, 24)
    for made_on in (inference.processor(x.device), "another"):
        quick = Quick(net, {"precision": "int8", "processor": made_on, "int8": INT8})
        assert relative(quick(x), net(x)) < 1e-5
        assert quick.precision == "fp32"


def test_agreement_is_counted_against_the_classes_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batches = net_of(TINY), [torch.randn(64, 3, 24, 24) for _ in range(5)]
    wrong = {"bf16": 0, "int8": 0}

    def nearly(name: str) -> Callable[[Tensor], Tensor]:
        """fp32, with the best class of the first images made the worst."""

        def forward(x: Tensor) -> Tensor:
            out, k = net(x), wrong.get(name, 0)
            return torch.cat([-out[:k], out[k:]]) if x is batches[0] else out

        return forward

    for name, value in (
        ("has_bf16", lambda _: True),
        ("has_int8", lambda _: True),
        ("_gains", lambda made, x: {kind: gain for kind, gain in (("bf16", 2.0), ("int8", 3.0)) if kind in made}),
        ("lowered", lambda net, dtype: nearly("bf16" if dtype == torch.bfloat16 else "fp32")),
        ("in_int8", lambda net, ranges, x: nearly("int8")),
    ):
        monkeypatch.setattr(inference, name, value)
    found = weigh(net, iter(batches), batches[:1], nn.Identity())
    assert (found["n"], found["bf16"]["agreement"], found["int8"]["agreement"], found["precision"]) == (320, 1.0, 1.0, "int8")
    assert found["int8"]["agreement_low"] < 1 and found["int8"]["ranges"]
    monkeypatch.setattr(inference, "in_int8", lambda net, ranges, x: None)
    assert "int8" not in weigh(net, iter(batches), batches[:1], nn.Identity())
    monkeypatch.setattr(inference, "in_int8", lambda net, ranges, x: nearly("int8"))
    wrong["int8"] = 2
    worse = weigh(net, iter(batches), batches[:1], nn.Identity())
    assert (worse["bf16"]["agreement"], worse["int8"]["agreement"], worse["precision"]) == (1.0, 318 / 320, "bf16")
    wrong["bf16"] = 2
    assert weigh(net, iter(batches), batches[:1], nn.Identity())["precision"] == "fp32"
    assert weigh(net, iter(batches[1:3]), batches[:1], nn.Identity())["precision"] == "bf16", "128 images without a difference are too few for int8"
    of_pairs = weigh(net, iter(batches), batches[:1], lambda logits: (logits[:32] + logits[32:]) / 2)
    assert of_pairs["n"] == 160, "an image is counted once, however many views it has"
    monkeypatch.setattr(inference, "has_bf16", lambda _: False)
    monkeypatch.setattr(inference, "has_int8", lambda _: False)
    assert weigh(net, iter(batches), batches[:1], nn.Identity()) == {}


def test_the_rounding_of_other_images_shows_what_luck_hides() -> None:
    """One image of 200 is a near tie and was rounded to the right side, which half of the others are not."""
    want, rounding = torch.tensor([[1.0, 0.0]] * 199 + [[0.1, 0.0]]), torch.tensor([[0.0, 0.2], [0.2, 0.0]] * 100)
    found = agreement(want, want + rounding)
    assert found["agreement"] == 1
    assert found["exchanged"] == pytest.approx(1 - 0.5 / 200, abs=1e-6)
    assert agreement(want, want)["exchanged"] == 1
    assert agreement(want[:1], want[:1].flip(1))["agreement"] == 0


def test_training_records_what_it_measured_and_predicting_does_not_rewrite_it(trained: Run) -> None:
    file = trained.model / "inference.json"
    before, held = file.read_bytes(), json.loads(file.read_bytes())
    assert not held or (held["n"] > 0 and held["processor"] and all(held[name]["agreement"] <= 1 for name in ("bf16", "int8") if name in held))
    classifier = reslab.load(trained.path)
    assert isinstance(classifier.model, TorchModel)
    assert classifier.model.inference == held
    classifier.predict([photos_of(trained) / "red" / "1.png"])
    assert file.read_bytes() == before


def test_older_artefacts_predict_and_damaged_ones_say_so(trained: Run, tmp_path: Path, copy_of: Callable[[Run], Path]) -> None:
    folder = copy_of(trained)
    (folder / "inference.json").unlink()
    photo = photos_of(trained) / "red" / "1.png"
    assert reslab.load(folder).predict([photo])[0].label == reslab.load(trained.path).predict([photo])[0].label
    for damaged in ('{"agreement": "all"}', '{"int8": {"agreement": 1, "agreement_low": true}}', '{"bf16": []}', "[]"):
        (folder / "inference.json").write_text(damaged)
        with pytest.raises(reslab.WorkError, match=r"inference\.json must hold"):
            reslab.load(folder)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Run], Path]:
    def copy(run: Run) -> Path:
        (tmp_path / "model").mkdir()
        for file in run.model.iterdir():
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
        return tmp_path / "model"

    return copy


def test_quick_and_exact_logits_agree(tmp_path: Path) -> None:
    classifier = classifier_of(reslab.spec("resnet20"))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    assert np.allclose(classifier.model.quick(pixels), classifier.logits(pixels), atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["resnet20", "preact20", "resnext50_32x4d", "resnet18_blur", "resnet8"])
@torch.no_grad()
def test_a_gpu_predicts_by_fused_convolutions_and_recordings_what_the_net_does(name: str) -> None:
    net = net_of(shallow(name)).cuda()
    x = torch.randn(70, net.spec.in_channels, 64, 64, generator=torch.Generator().manual_seed(0)).cuda()
    want = net.cpu().double()(x.cpu().double()).float()
    quick = lowered(net.float().cuda(), torch.float32)
    for _ in range(2):
        for size in (3, 1, 70):
            assert relative(quick(x[:size]).cpu(), want[:size]) < 1e-2, "TF32 rounds to ten bits"
    assert torch.equal(quick(x[3:6]), quick(x[3:6]))
    assert not torch.equal(quick(x[3:6]), quick(x[:3])), "a recording is given its images"


@torch.no_grad()
def test_weights_that_are_put_in_place_of_others_are_seen() -> None:
    net = net_of(TINY)
    quick, x = Quick(net), torch.randn(2, 3, 24, 24)
    before = quick(x)
    net.fc.bias.data = net.fc.bias.data + 1
    assert relative(quick(x), before + 1) < 1e-5
    net.fc.bias = nn.Parameter(net.fc.bias - 2)
    assert relative(quick(x), before - 1) < 1e-5
    made = quick.made
    quick(x)
    assert quick.made is made, "and what did not change is not made anew"
