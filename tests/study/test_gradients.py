"""Gradients of nets whose answer is known, and what the study makes of records."""

import math

import numpy as np
import pytest
import torch

from reslab.report.studies.gradients import figures
from reslab.seeds import seeded
from reslab.study.dense import Dense, gradient_norms, input_gradient
from reslab.study.gradients import GROWTH, WEAK, answer, cells, claims, measure, rate
from reslab.study.kinds import Ready, Setting
from tests.conftest import distance
from tests.study.probing import digits, made, same, state, tiny


def test_batch_norm_makes_gradients_grow_as_the_theory_says() -> None:
    norms = gradient_norms(30, 256, 256, seeded(0))
    growth = math.exp(-np.polyfit(range(22), np.log(norms[5:-3]), 1)[0])
    assert growth == pytest.approx(GROWTH, rel=0.02)


def test_without_norm_hes_weights_keep_the_gradient() -> None:
    norms = gradient_norms(12, 512, 128, seeded(1), norm=False)
    assert norms[0] / norms[-1] == pytest.approx(1, rel=0.3)


def test_a_linear_nets_gradient_is_the_product_of_its_weights() -> None:
    """One convolution of 1x1 after the other with positive weights and inputs: ReLU passes, each layer multiplies."""
    net = made(tiny(norm="none", shortcut="none", depths=(4,), widths=(1,), stride="none"))
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 4:
                p.zero_()
                p[0, 0, 1, 1] = 0.5
    from reslab.study.probe import flowing

    with flowing(net) as flow:
        net(torch.rand(4, 1, 8, 8) + 1)[:, 0].sum().backward()
        taken = flow.read()
    norms = [taken[f"layer1.{i}", "out", "gradient"] for i in range(4)]
    assert norms == pytest.approx([norms[-1] * 0.25**i for i in (3, 2, 1, 0)], rel=1e-5)
    assert rate(taken, net.spec) == pytest.approx(0.5, rel=1e-5)


def by_autograd(net: Dense, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """df/dx of a net as `Dense` has it written, means and deviations detached."""

    def drawn(outputs: int, inputs: int, variance: float = 1.0) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) * math.sqrt(variance)

    def normed(value: torch.Tensor) -> torch.Tensor:
        centred = value - value.detach().mean(1, keepdim=True)
        return centred if net.norm == "mean" else centred / (value.detach().var(1, correction=0, keepdim=True) + 1e-5).sqrt()

    at = x.double().requires_grad_()
    value = drawn(net.width, 1) * at + drawn(net.width, 1)
    for _ in range(net.layers - 1):
        weight = drawn(net.width, net.width, 2 / net.width)
        value = value + net.beta * weight @ normed(value).relu() if net.beta else normed(weight @ value.relu())
    return torch.autograd.grad((drawn(1, net.width, 2 / net.width) @ value.relu()).sum(), at)[0]


@pytest.mark.parametrize("net", [Dense(1, "mean"), Dense(3, "mean"), Dense(3, "batch"), Dense(3, "batch", 0.5)])
def test_the_gradient_along_a_line_is_that_of_autograd(net: Dense) -> None:
    x = torch.linspace(-2, 2, 200)
    slope = input_gradient(net, x, seeded(0))
    assert slope.std() > 0
    assert distance(slope, by_autograd(net, x, seeded(0))) < 1e-12


def test_weak_weights_lose_the_square_root_of_two_a_layer_and_leave_the_net_alone() -> None:
    cell = next(c for c in cells(Setting(60, 1, 1, tiny()), digits(), lambda spec, batch: 0.1) if c.facts["look"] == "weak")
    net = made(cell.subject.spec)
    before = state(net)
    he, weak = measure(cell, Ready(net, []), digits())
    assert weak["rate"] / he["rate"] == pytest.approx(WEAK, rel=1e-4)
    assert same(before, state(net))


@pytest.fixture(scope="module")
def records() -> list[dict]:
    found = []
    for cell in cells(Setting(15, 1, 2, tiny(depths=(1, 1, 1))), digits(), lambda spec, batch: 0.2):
        ready = Ready(made(cell.subject.spec, cell.subject.seed), [])
        found += [{**row, "seed": cell.subject.seed, **cell.facts} for row in measure(cell, ready, digits()) if cell.facts["look"] != "dense"]
    return found


def test_what_was_measured_makes_claims_and_figures(records: list[dict]) -> None:
    assert len(claims(records)) == 5
    assert "nan" not in answer(records)
    assert [len(figure.rows) > 20 for figure in figures(records)] == [True] * 4
    for figure in figures(records):
        assert figure.svg.count("<svg") == 1


def test_missing_cells_decide_nothing() -> None:
    for some in ([], [{"kind": "growth", "look": "dense", "seed": 0, "rate": GROWTH}]):
        assert {claim.verdict for claim in claims(some)} == {"not decided at this budget"}
        assert isinstance(answer(some), str)


def flows(early: list[float], late: list[float], seeds: int = 3) -> list[dict]:
    facts = {"kind": "flow", "where": "out", "what": "gradient", "twin": "plain", "norm": True, "look": "training", "at": [0, 1, 2]}
    return [{**facts, "seed": seed, "blocks": ["stem", "a", "b"], "values": [early, late, [v * (1 + 0.01 * seed) for v in late]]} for seed in range(seeds)]


def test_verdicts() -> None:
    verdicts = [claim.verdict for claim in claims(flows([100.0, 10.0, 1.0], [1.0, 1.1, 1.0]))]
    assert verdicts[2:4] == ["agrees", "agrees"]
    verdicts = [claim.verdict for claim in claims(flows([2.0, 1.0, 1.0], [0.001, 0.001, 1.0]))]
    assert verdicts[2:4] == ["disagrees", "disagrees"], "gradients that vanish and spread"
    slowly = flows([100.0, 10.0, 1.0], [99.0, 10.0, 1.0])
    assert claims([{**r, "values": [*r["values"][:2], [1.0, 1.1 + 0.01 * r["seed"], 1.0]]} for r in slowly])[2].verdict == "disagrees", "one step did nothing"
    rates = [{"kind": "growth", "look": "dense", "seed": seed, "rate": value} for seed, value in enumerate((1.35, 1.36, 1.35))]
    assert claims(rates)[0].verdict == "disagrees"
