"""Strengths of branches and shortcuts that are known, and what the study makes of records."""

import math

import pytest
import torch

import reslab
from reslab.report.studies.signal import figures
from reslab.study.kinds import Given, Ready, Setting
from reslab.study.signal import answer, at_additions, cells, claims, growth, last_share, measure, responding, share_slope, single_stage
from reslab.study.stats import estimate, factor
from tests.study.probing import digits, made, same, state, tiny


def test_a_zeroed_branch_has_no_variance_and_a_normed_one_has_one() -> None:
    net = made(tiny(zero_init=True))
    found = at_additions(net, torch.randn(64, 1, 8, 8))
    assert found["branch"] == [0.0] * 6
    net, x = made(tiny()), torch.randn(64, 1, 8, 8)
    before = state(net)
    found = at_additions(net, x)
    assert found["branch"] == pytest.approx([1.0] * 6, rel=1e-3)
    assert same(before, state(net))


def test_identical_branches_double_the_signal_of_a_net_without_norm() -> None:
    """Each block adds what it gets: branch and shortcut are equal, and the mean square grows by four."""
    net = made(tiny(norm="none", depths=(3,), widths=(4,)))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.startswith("layer"):
                p.zero_()
                if p.ndim == 4:
                    p[torch.arange(4), torch.arange(4), 1, 1] = 1.0
    found = at_additions(net, torch.rand(8, 1, 8, 8))
    assert found["branch"] == pytest.approx(found["shortcut"])
    assert found["shortcut"][1] == pytest.approx(4 * found["shortcut"][0])


def test_responses_behind_a_norm_have_its_scale() -> None:
    net, x = made(tiny()), torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(0.25)
    before = state(net)
    found, answers = responding(net, x)
    assert found == pytest.approx([0.25] * 13, rel=0.02)
    assert len(answers) == 64
    assert same(before, state(net))


def addition(seed: int, norm: bool, power: float, rate: float) -> dict:
    shortcut = [rate**i if not norm else float(i + 1) for i in range(20)]
    branch = [s * (i + 1) ** (2 * power) * (1 + 0.01 * seed) for i, s in enumerate(shortcut)]
    return {"kind": "addition", "order": "single stage", "norm": norm, "seed": seed, "branch": branch, "shortcut": shortcut}


def test_the_law_is_found_in_made_up_strengths() -> None:
    assert share_slope(addition(0, True, -0.5, 1)) == pytest.approx(-0.5)
    assert last_share(addition(0, True, -0.5, 1)) == pytest.approx(20**-0.5)
    assert growth(addition(0, False, 0, 2.0)) == pytest.approx(math.log(2))


def response(seed: int, twin: str, layers: int, value: float, error: float = 0.1) -> dict:
    deviations = [value * (1 + 0.01 * seed)] * 9
    return {"kind": "response", "seed": seed, "pair": seed, "twin": twin, "layers": layers, "steps": 9, "deviations": deviations, "error": error, "chance": 0.9}


@pytest.mark.parametrize(
    ("power", "rate", "residual", "verdicts"),
    [(-0.5, 2.0, 0.5, ["agrees"] * 4), (0.0, 1.0, 1.5, ["disagrees", "not decided at this budget", "disagrees", "disagrees"])],
)
def test_verdicts(power: float, rate: float, residual: float, verdicts: list[str]) -> None:
    rows = [addition(seed, norm, power if norm else 0.0, rate) for seed in range(3) for norm in (True, False)]
    for seed in range(3):
        rows += [response(seed, twin, depth, residual if twin == "residual" and depth == 56 else 1.0) for twin in ("plain", "residual") for depth in (20, 56)]
    assert [claim.verdict for claim in claims(rows)] == verdicts
    assert len(figures(rows)) == 2
    assert "of the shortcut with norm" in answer(rows)


@pytest.mark.parametrize(("residual", "plain_error"), [(0.97, 0.1), (0.5, 0.7)])
def test_responses_that_hardly_differ_or_are_of_nets_that_hardly_trained_decide_nothing(residual: float, plain_error: float) -> None:
    rows = [
        response(seed, twin, 56, residual if twin == "residual" else 1.0, plain_error if twin == "plain" else 0.1)
        for seed in range(3)
        for twin in ("plain", "residual")
    ]
    (claim,) = [claim for claim in claims(rows) if "plain ones" in claim.paper]
    assert claim.verdict == "not decided at this budget"


@pytest.mark.parametrize("name", ["resnet18_blur", "resnet110_fixup", "resnet8", "resnet50", "wrn16-8"])
def test_the_single_stage_of_any_net_keeps_its_size(name: str) -> None:
    net = single_stage(reslab.spec(name))
    assert (net.reduction, len(net.depths), net.order) == (1, 1, "preact")


def test_missing_cells_decide_nothing() -> None:
    for some in ([], [addition(0, True, -0.5, 1)], [response(0, "plain", 20, 1.0)]):
        assert {claim.verdict for claim in claims(some)} == {"not decided at this budget"}
        assert not any("nan" in claim.measured for claim in claims(some))
        assert isinstance(answer(some), str)


def test_one_pair_of_given_nets_is_compared_layer_by_layer() -> None:
    nets = tuple(Given(twin, tiny(shortcut=kind), twin) for twin, kind in (("plain", "none"), ("residual", "A")))
    found = [cell for cell in cells(Setting(60, 1, 2, tiny(), nets), digits(), lambda spec, batch: 0.1) if cell.facts["look"] == "trained"]
    assert [(cell.facts["twin"], cell.facts["pair"], cell.subject.weights) for cell in found] == [("plain", 0, "plain"), ("residual", 0, "residual")]
    rows = [{**row, **cell.facts, "seed": 0} for cell in found for row in measure(cell, Ready(made(cell.subject.spec), []), digits())]
    assert claims(rows)[2].n == 13


def test_a_factor_is_said_whatever_its_size() -> None:
    assert factor(estimate([])) == "not measured"
    assert factor(estimate([math.log(2)])) == "2 (n = 1)"
    assert "1.014e+304" in factor(estimate([-5000.0, 5000.0]))
