"""A stored model is held against itself before it answers: what is damaged says so, and takes no memory."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reslab
from reslab.spec import Spec
from reslab.tensors import read_tensors, write_tensors
from reslab.use import artefact
from tests.use.conftest import TINY, classifier_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    artefact.save(classifier_of(TINY), tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def put(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([3]), value)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("layer1.0.bn1.running_var", put(-1.0), "layer1.0.bn1.running_var holds variances below zero"),
        ("conv1.weight", put(float("nan")), "conv1.weight holds values that are not finite"),
        ("layer2.0.bn2.bias", put(float("inf")), "layer2.0.bn2.bias holds values that are not finite"),
        ("fc.weight", lambda weight: weight.to(torch.complex64), "fc.weight has dtype torch.complex64, the net needs torch.float32"),
        ("bn1.num_batches_tracked", lambda count: count.to(torch.complex64), "has dtype torch.complex64, the net needs torch.int64"),
        ("fc.weight", lambda weight: weight.int(), "fc.weight has dtype torch.int32, the net needs torch.float32"),
    ],
    ids=["variance", "nan", "infinite", "complex", "complex counter", "integers"],
)
def test_damaged_weights_give_no_answer(name: str, damage: Callable[[Tensor], Tensor], message: str, model: Path) -> None:
    weights, _ = read_tensors(model / "weights.safetensors")
    write_tensors(model / "weights.safetensors", {**weights, name: damage(weights[name])})
    with pytest.raises(reslab.WorkError, match=f"the weights in .* are damaged: .*{message}"):
        reslab.load(model)


RECORDED = {
    "zero behind a ReLU": replace(TINY, order="relu-before-add", zero_init=True),
    "cropped shortcut": replace(TINY, shortcut="A", stem_width=32),
    "pooled and subsampled": replace(TINY, shortcut="D", stride="last"),
    "stem without its ReLU": replace(TINY, stem="raw7-pool"),
}


@pytest.mark.parametrize("spec", RECORDED.values(), ids=list(RECORDED))
def test_a_model_may_be_older_than_a_rule_for_new_nets(spec: Spec, tmp_path: Path) -> None:
    stored = classifier_of(spec)
    artefact.save(stored, tmp_path / "model")
    weights = reslab.load(tmp_path / "model").net.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in stored.net.state_dict().items())
    with pytest.raises(reslab.CallError):
        reslab.build(spec)


@pytest.mark.parametrize("claim", [{"widths": (1 << 20, 1 << 20)}, {"depths": (1, 2)}, {"norm": "none"}], ids=str)
def test_no_net_is_built_for_weights_that_are_of_another(claim: dict[str, object], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact, "ResNet", lambda spec: pytest.fail("memory was taken for what the spec claims"))
    change(model / "spec.json", **claim)
    with pytest.raises(reslab.WorkError, match=r"are of another net than its spec\.json"):
        reslab.load(model)


@pytest.mark.parametrize(
    "rows", [{"extra.num_batches_tracked": torch.tensor(1)}, {"bn1.num_batches_tracked": torch.ones(2, dtype=torch.long)}], ids=["one more", "a list"]
)
def test_counters_are_those_of_the_net(rows: dict[str, Tensor], model: Path) -> None:
    weights, _ = read_tensors(model / "weights.safetensors")
    write_tensors(model / "weights.safetensors", weights | rows)
    with pytest.raises(reslab.WorkError, match=r"are of another net than its spec\.json"):
        reslab.load(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": 1, "mean": [0.5], "std": [0.5]}, "its net takes images of 3 channels, and its preprocessing gives 1"),
        ({"image_size": 1}, "needs at least 2 px a side; received 1 px"),
    ],
    ids=["channels", "size"],
)
def test_preprocessing_is_held_against_the_net(values: dict[str, object], message: str, model: Path) -> None:
    change(model / "preprocess.json", **values)
    with pytest.raises(reslab.WorkError, match=f"the model in .* is damaged: .*{message}"):
        reslab.load(model)


@pytest.mark.parametrize("share", ["NaN", "1.5", "-0.1", "Infinity", "true", "null"])
@pytest.mark.parametrize("record", ['{"agreement": %s}', '{"int8": {"agreement": 1, "agreement_low": 1, "exchanged": %s}}'])
def test_agreements_are_shares(share: str, record: str, model: Path) -> None:
    (model / "inference.json").write_text(record % share)
    with pytest.raises(reslab.WorkError, match=r"inference\.json must hold agreements from 0 to 1; delete it"):
        reslab.load(model)


def test_what_was_saved_is_loaded(model: Path) -> None:
    (model / "inference.json").write_text('{"bf16": {"agreement": 1, "exchanged": 0.5}}')
    assert asdict(reslab.load(model).spec) == asdict(classifier_of(TINY).spec)
