"""Steps, read-outs and distances whose values are known; verdicts; one small net measured."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import reslab
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.nets.torch import ResNet
from reslab.report.studies.estimation import figures
from reslab.spec import Spec
from reslab.study.data import Data, prepare, spread
from reslab.study.estimation import SETTLING, answer, cells, claims, differences, measure, read_outs, steps
from reslab.study.kinds import Given, Ready, Setting
from reslab.study.probe import settle
from reslab.study.refinement import RIDGE, Distance, block_outputs, ridge, stage_ends, steps_of
from tests.study.tiny import everything, tiny

UNDECIDED = "not decided at this budget"
SCALE = 0.4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return prepare(split(open_images("digits"), 0), 8, tmp_path_factory.mktemp("images"))[0]


def scaling(factor: float) -> ResNet:
    """Two blocks whose branches multiply their positive input."""
    torch.manual_seed(0)
    net = reslab.build("resnet20", depths=(2,), widths=(4,), norm="none", bias="unnormed", order="relu-before-add", in_channels=1, num_classes=3)
    for block in net.stages[0]:
        nn.init.dirac_(block.conv1.weight)
        nn.init.dirac_(block.conv2.weight).data.mul_(factor)
    nn.init.constant_(net.conv1.weight, 0.1)
    return net


def test_a_branch_that_scales_has_that_norm_and_the_direction_of_its_input() -> None:
    net, x, y = scaling(SCALE), torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    found = steps_of(net, x, y)
    h = net.stem(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(net.head(h * (1 + SCALE) ** 2), y, reduction="sum"), h)
    cosine = nn.functional.cosine_similarity(h.detach().flatten(1), -gradient.flatten(1))
    for number in (0, 1):
        assert found[number][:, 1].tolist() == pytest.approx([SCALE] * 5, rel=1e-5)
        assert found[number][:, 0].tolist() == pytest.approx(cosine.tolist(), abs=1e-5)
        assert torch.allclose(found[number][:, :2], found[number][:, 2:], atol=1e-5), "no ReLU behind the addition: output minus input is the branch"


def test_a_branch_that_yields_nothing_has_no_direction() -> None:
    found = steps_of(scaling(0.0), torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2]))
    assert found[0][:, 0].isnan().all()
    assert (found[0][:, 1] == 0).all()


def test_the_branch_that_is_measured_is_what_reaches_the_addition() -> None:
    """The last branch is replaced by a constant, so that the gradient at its input is that behind the addition."""
    net, x, y = tiny(order="preact"), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    block = net.stages[2][1]
    h = block_outputs(net, x)[-2].requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(net.head(block(h)), y, reduction="sum"), h)
    with block.add.register_forward_pre_hook(lambda module, inputs: (-gradient + 0 * inputs[0], inputs[1])):
        swapped = steps_of(net, x, y)[6]
    h = h.detach().requires_grad_()
    (at_head,) = torch.autograd.grad(cross_entropy(net.head(h - gradient), y, reduction="sum"), h)
    expected = nn.functional.cosine_similarity(gradient.flatten(1), at_head.flatten(1))
    assert swapped[:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_only_blocks_that_keep_their_shape_are_steps_and_a_plain_block_steps_by_its_change() -> None:
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    assert list(steps_of(tiny(), x, y)) == [0, 1, 2, 4, 6]
    net = tiny(shortcut="none")
    found, outputs = steps_of(net, x, y), block_outputs(net, x)
    assert torch.equal(found[1][:, :2], found[1][:, 2:])
    ratio = (outputs[1] - outputs[0]).flatten(1).norm(dim=1) / outputs[0].flatten(1).norm(dim=1)
    assert found[1][:, 1].tolist() == pytest.approx(ratio.tolist(), rel=1e-4)


def test_read_out_is_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(3, 2, (200, 6))), torch.from_numpy(rng.integers(0, 4, 200))
    weight, bias = ridge(x, y, 4)
    alpha = len(x) * RIDGE * float(x.var(0, correction=0).mean())
    peer = Ridge(alpha).fit(x.numpy(), nn.functional.one_hot(y, 4).numpy())
    assert np.allclose(weight.numpy(), peer.coef_.T, atol=1e-8)
    assert np.allclose(bias.numpy(), peer.intercept_, atol=1e-8)


def test_read_out_of_constant_features_answers_the_commonest_class() -> None:
    weight, bias = ridge(torch.ones(10, 3), torch.tensor([0, 1, 1, 1, 2, 1, 0, 1, 1, 2]), 3)
    assert (torch.ones(1, 3, dtype=torch.float64) @ weight + bias).argmax().item() == 1


def test_distance_of_maps_that_differ_by_a_constant_a_channel() -> None:
    final = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    shift = torch.tensor([0.5, -0.5, 1.5], dtype=torch.float64)
    held = Distance()
    for part in (slice(0, 2), slice(2, 6)):  # batches add up
        held.add(final[part] + shift[:, None, None], final[part])
    std = float(final.std(correction=0))
    assert held.facts() == pytest.approx(
        {"mean": 0.5 / std, "spread": float(shift.std(correction=0)) / std, "rms": math.sqrt(float(shift.square().mean())) / std}
    )


def test_blocks_are_compared_with_the_last_of_their_stage_that_has_their_shape() -> None:
    net = tiny()
    assert stage_ends(net, block_outputs(net, torch.randn(1, 1, 8, 8))) == {0: 2, 1: 2, 2: 2, 3: 4, 4: 4, 5: 6, 6: 6}
    late = tiny(block="bottleneck", stride="last", order="preact")  # the last block of a stage halves the map
    assert stage_ends(late, block_outputs(late, torch.randn(1, 1, 8, 8))) == {0: 1, 1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("work", [steps, read_outs, differences])
def test_net_and_random_numbers_are_as_they_were_also_after_an_exception(data: Data, monkeypatch: pytest.MonkeyPatch, work, fails: bool) -> None:  # type: ignore[no-untyped-def]
    net = tiny().train()
    net.stages[1].eval()
    before = everything(net)
    if fails:

        def break_down(module: nn.Module, x: Tensor) -> Tensor:
            torch.rand(1)
            raise RuntimeError("in the middle")

        monkeypatch.setattr(ResNet, "head", break_down)
        with pytest.raises(RuntimeError, match="in the middle"):
            list(work(net, data, 50))
    else:
        assert list(work(net, data, 50))
    assert everything(net) == before


def test_every_measurement_is_claimed_and_drawn(data: Data) -> None:
    def pace(spec: Spec, batch: int) -> float:
        return 0.01

    twins = {name: tiny(shortcut=shortcut) for name, shortcut in (("with", "A"), ("without", "none"))}
    setting = Setting(1, 2, 1, twins["with"].spec, tuple(Given(name, net.spec, name) for name, net in twins.items()))
    made = cells(setting, data, pace)
    assert [cell.name for cell in made[-2:]] == ["without, differences", "with, untrained, steps"]
    assert made[-1].subject.weights == ""
    records = []
    for cell in made:
        found = measure(cell, Ready(twins.get(cell.subject.weights, tiny(1)), []), data)
        records += [{**r, "cell": cell.name, "seed": 0, **cell.facts} for r in found]
    assert {r["kind"] for r in records} == {"step", "read-out", "head", "difference"}
    found = claims(records)
    assert len(found) == 7
    assert all(claim.measured.startswith("with: ") and claim.verdict == UNDECIDED for claim in found), "nets that were not trained decide nothing"
    assert "with, untrained" in answer(records)
    assert len(figures(records)) == 4


def test_an_untrained_net_is_measured_with_statistics_of_the_images(data: Data) -> None:
    """Fresh from its seed, its norms would hand on what they get, and what it puts out would grow from block to block."""
    cell = cells(Setting(1, 2, 1, tiny().spec, (Given("with", tiny().spec, "with"),)), data, lambda spec, batch: 0.01)[-1]
    net = tiny()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    before = everything(net)
    fresh = list(steps(net, data, 50))
    found = list(measure(cell, Ready(net, []), data))
    assert everything(net) == before
    settle(net, data.train_batch(spread(len(data.train), SETTLING))[0])
    assert [r["ratio"] for r in found] == [r["ratio"] for r in steps(net, data, len(data.test))]
    assert found[-1]["ratio"] != pytest.approx(fresh[-1]["ratio"], rel=0.1)


def rows(
    net: str, cosine: float = 0.05, ratio: float = -0.05, mean: float = 0.02, spread: float = 0.0, head: float = 0.2, whole: float = 0.1, noise: float = 0.01
) -> list[dict]:
    """Two stages of five blocks with the given slopes and levels, and small differences between them."""
    more = head - whole
    made: list[dict] = [{"kind": "head", "error": head, "more": more, "low": more - 0.02, "high": more + 0.02, "n": 300, "whole": whole, "chance": 0.9}]
    for number in range(10):
        place = {"number": number, "stage": 1 + number // 5, "position": number % 5}
        wobble = noise * (-1) ** number
        step = cosine * (number + 1) / 10 + wobble / 10
        made.append(
            {"kind": "step", **place, "cosine": step, "cosine_low": step - 0.001, "cosine_high": step + 0.001, "ratio": 0.5 + ratio * (number % 5) + wobble}
        )
        made.append({"kind": "read-out", **place, "error": 0.8 + ratio * number + wobble})
        if number % 5 < 4:
            made.append({"kind": "difference", **place, "mean": mean + wobble, "spread": spread, "rms": 0.5 + ratio * (number % 5) + wobble})
    return [{**r, "net": net, "twin": net} for r in made]


@pytest.mark.parametrize(
    ("records", "verdicts"),
    [
        (rows("residual") + rows("plain", head=0.8), ["agrees"] * 7),
        (rows("residual", -0.05, 0.05, 0.6, head=0.9) + rows("plain", head=0.8), ["disagrees"] * 7),
        (rows("residual", head=0.79) + rows("plain", head=0.8), ["agrees"] * 6 + [UNDECIDED]),
        (rows("residual", head=0.4, whole=0.02) + rows("plain", head=0.52, whole=0.52), ["agrees"] * 6 + ["disagrees"]),  # which loses nothing
        (rows("residual", mean=0.0, spread=1.0) + rows("plain", head=0.8), ["agrees"] * 5 + ["disagrees", "agrees"]),  # features apart, whose mean is zero
        (rows("residual", whole=0.7) + rows("plain", head=0.8), [UNDECIDED] * 7),
        (rows("residual") + rows("plain", head=0.85, whole=0.8), ["agrees"] * 6 + [UNDECIDED]),
        (rows("residual")[:1], [UNDECIDED] * 6),
        (rows("residual")[1:], [UNDECIDED] * 6),
    ],
)
def test_verdicts(records: list[dict], verdicts: list[str]) -> None:
    assert [claim.verdict for claim in claims(records)] == verdicts


def test_cells_that_a_budget_cut_off_say_nothing() -> None:
    assert claims([]) == []
    assert answer([]).startswith("Nothing")
    assert figures([]) == []
