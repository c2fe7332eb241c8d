"""Probes that leave no trace, noise that is what it says, verdicts on made-up records."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reslab
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.nets.torch import ResNet
from reslab.report.studies.batchnorm import figures
from reslab.run import Record
from reslab.study import batchnorm
from reslab.study.batchnorm import Drift, claims
from reslab.study.data import Data, prepare
from reslab.study.kinds import Cell, Ready, Schedule, Setting, Subject
from reslab.study.line import along_gradient
from reslab.study.noise import SHIFT, SPREAD, STRETCH, noisy
from reslab.study.training import train
from reslab.study.untouched import untouched

TINY = reslab.spec("resnet20", depths=(1, 1), widths=(4, 8), in_channels=1)
PLAN = Schedule(12, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return prepare(split(open_images("digits"), 0), 8, tmp_path_factory.mktemp("study"))[0]


def tiny(norm: str = "batch") -> ResNet:
    torch.manual_seed(0)
    return ResNet(replace(TINY, norm="none" if norm == "none" else "batch"))


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in net.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_along_the_gradient_of_a_quadratic_everything_is_known() -> None:
    net = nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[1.0, 2.0]])
    curvature = torch.tensor([[2.0, 6.0]])
    found = along_gradient(net, lambda: (curvature * net.weight.square()).sum() / 2, [0.1, 0.5])
    assert found.loss == 13  # (2 + 6 * 4) / 2, with the gradient (2, 12)
    assert found.gradient == pytest.approx((4 + 144) ** 0.5)
    assert found.losses == pytest.approx([(2 * 0.8**2 + 6 * 0.8**2) / 2, (2 * 0**2 + 6 * 4**2) / 2])
    size = (4**2 + 72**2) ** 0.5  # the Hessian times the gradient
    assert found.changes == pytest.approx([0.1 * size, 0.5 * size])
    assert found.smoothness([0.1, 0.5]) == pytest.approx(size / 148**0.5)


def test_a_probe_gives_back_weights_and_statistics_bit_for_bit_also_after_an_exception() -> None:
    net = tiny().train()
    x = torch.randn(8, 1, 8, 8)
    before = weights(net)
    along_gradient(net, lambda: net(x).square().mean(), [0.1, 10.0])
    assert same(weights(net), before), "running statistics too"
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ZeroDivisionError), untouched(net):
        net(x)
        with torch.no_grad():
            net.fc.weight.add_(1)
        raise ZeroDivisionError
    assert same(weights(net), before)


@pytest.mark.parametrize("norm", ["batch", "none", "noisy"])
def test_training_is_the_same_with_probes_and_without(norm: str, data: Data) -> None:
    looked = tiny(norm)
    random = torch.get_rng_state()
    cell = Cell(norm, Subject(looked.spec, 3), PLAN, {"norm": norm, "shape": "residual", "layers": 6})
    rows = list(batchnorm.measure(cell, Ready(looked, []), data))
    assert torch.equal(torch.get_rng_state(), random)
    alone = tiny(norm)
    with torch.random.fork_rng():
        if norm == "noisy":
            with noisy(alone):
                losses = train(alone, data, PLAN, 3)
        else:
            losses = train(alone, data, PLAN, 3)
    assert same(weights(looked), weights(alone))
    probes = [r for r in rows if r["kind"] == "probe"]
    assert [r["step"] for r in probes] == list(range(12))
    assert [r["loss"] for r in probes] == pytest.approx(losses), "the probe sees the step's own images and noise"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in looked.modules())
    assert json.loads(json.dumps(rows)) == rows


def test_noise_has_another_mean_and_scale_at_each_step_and_an_own_one_for_each_image() -> None:
    norm = nn.BatchNorm2d(2)
    x = torch.randn(4000, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    clean = norm(x)
    with noisy(norm):
        torch.manual_seed(1)
        first = norm(x)
        torch.manual_seed(1)
        again = norm(x)
        second = norm(x)
    assert torch.equal(first, again)
    assert torch.equal(norm(x), clean), "it is gone afterwards"
    means = [out.detach().mean(0) for out in (first, second)]
    for mean in means:
        assert mean.abs().max() < SHIFT + 0.1
        assert mean.std() > 0.1
    assert (means[0] - means[1]).abs().mean() > 0.1
    slope = ((first - means[0]) * clean).mean(0) / clean.square().mean(0)
    assert slope.min() > 1 - 0.05
    assert slope.max() < STRETCH + 0.05
    rest = (first - slope * clean - means[0]).detach().std(0)
    assert torch.allclose(rest, torch.full_like(rest, SPREAD * (1 + 1 / 3) ** 0.5), rtol=0.1), "normal in the scale, uniform in the shift"


def test_drift_is_zero_for_equal_steps_and_counts_no_pause() -> None:
    net = nn.Sequential(nn.ReLU()).train()
    x = torch.randn(6, 3)
    with Drift(net) as drift:
        net(x)
        net(x)
        assert drift.found == [0.0]
        with drift.paused():
            net(x + 5)
        net(x + 2)
    net(x)
    assert drift.found[1:] == pytest.approx([2 / x.var(0).mean().sqrt().item()])


def test_all_nets_of_a_seed_train_alike_and_differ_in_one_thing(data: Data) -> None:
    made = batchnorm.cells(Setting(60, 2, 2, TINY), data, lambda spec, batch: 0.01)
    assert len(made) == 12
    assert len({cell.training for cell in made}) == 1
    assert [cell.subject.seed for cell in made] == [0] * 6 + [1] * 6
    for plain_net, residual in zip(made[:3], made[3:6], strict=True):
        assert replace(plain_net.subject.spec, shortcut="A") == residual.subject.spec


def records(mean_losses: dict[str, list[float]], smoothness: dict[str, list[float]]) -> list[Record]:
    rows: list[Record] = []
    for norm, losses in mean_losses.items():
        for seed, loss in enumerate(losses):
            facts = {"shape": "plain", "norm": norm, "seed": seed, "layers": 8}
            rows.append({"kind": "speed", "mean_loss": loss, "drift": {"batch": 0.1, "none": 0.2, "noisy": 0.5}[norm] + 0.01 * seed, **facts})
            rows.append({"kind": "curve", "every": 1, "loss": [2.0, None if seed else loss], **facts})
            for step in (0, 5):
                told = dict.fromkeys(("range", "change", "smoothness"), smoothness[norm][seed])
                rows.append({"kind": "probe", "step": step, "learning": True, **told, **facts})
    return rows


FAST = {"batch": [0.3, 0.31, 0.3], "none": [1.2, 1.3, 1.25], "noisy": [0.4, 0.41, 0.4]}
ROUGH = {"batch": [1.0, 1.1, 0.9], "none": [3.0, 3.2, 2.9], "noisy": [1.0, 1.2, 0.9]}


@pytest.mark.parametrize(
    ("losses", "smoothness", "verdicts"),
    [
        (FAST, ROUGH, ["agrees"] * 5),
        ({**FAST, "noisy": [1.4, 1.41, 1.4]}, ROUGH, ["agrees"] * 4 + ["disagrees"]),
        (FAST, {**ROUGH, "none": [0.1, 0.11, 0.1]}, ["disagrees"] * 3 + ["agrees"] * 2),
        ({"batch": [0.3], "none": [1.2], "noisy": [0.4]}, ROUGH, ["not decided at this budget"] * 5),
        ({"batch": [0.3, 0.31, 0.3], "none": [], "noisy": []}, ROUGH, ["not decided at this budget"] * 5),
    ],
)
def test_verdicts(losses: dict[str, list[float]], smoothness: dict[str, list[float]], verdicts: list[str]) -> None:
    rows = records(losses, smoothness)
    assert [claim.verdict for claim in claims(rows)] == verdicts
    assert batchnorm.answer(rows)


def test_a_plateau_does_not_count() -> None:
    rows = records(FAST, ROUGH)
    flat = [{**r, "learning": False, "smoothness": 1e-9, "change": 1e-9, "range": 1e-9} for r in rows if r["kind"] == "probe" and r["norm"] == "none"]
    assert claims(rows + 3 * flat) == claims(rows)
    only = [r for r in rows if r["kind"] != "probe" or r["norm"] != "none"] + flat
    assert [claim.verdict for claim in claims(only)][:3] == ["not decided at this budget"] * 3


def test_lost_trainings_are_drawn_as_far_as_they_went(tmp_path: Path) -> None:
    rows = records({"batch": [0.3, 0.31], "none": [1.2, 1.3], "noisy": [0.4, 0.41]}, ROUGH)
    lost: dict[str, Any] = {"range": None, "change": None, "smoothness": None}
    rows += [{**r, **lost, "seed": 2} for r in rows if r["kind"] == "probe" and r["norm"] == "none"]
    drawn = figures(rows)
    assert len(drawn) == 5
    assert all("<svg" in figure.svg and figure.rows for figure in drawn)
    assert batchnorm.typical(rows, "none", "smoothness").keys() == {0, 1}
    assert claims([]) == []
    assert batchnorm.answer([])
