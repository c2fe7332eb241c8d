"""Fields that are known by arithmetic, and what the study makes of records."""

import math
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch

import reslab
from reslab.report.studies.receptive import figures
from reslab.study.kinds import Given, Ready, Setting
from reslab.study.receptive import answer, cells, claims, describe, effective, measure, mirrored, stack, theoretical
from tests.study.probing import digits, made, same, state, tiny

SETTLING = torch.rand(2, 1, 8, 8)  # for nets without norm


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_a_stack_of_3x3_convolutions_sees_two_more_pixels_a_layer_and_nothing_outside(blocks: int) -> None:
    spec = stack(tiny(), blocks)
    sees = 1 + 2 * (2 * blocks + 1)
    assert theoretical(spec) == sees
    with torch.no_grad():
        net = made(spec)
        for p in net.parameters():
            p.copy_(p.abs() if p.ndim == 4 else p)  # every path is open
    field = effective(net, torch.rand(2, 1, 8, 8), SETTLING)
    middle, half = len(field.map) // 2, sees // 2
    inside = field.map[middle - half : middle + half + 1, middle - half : middle + half + 1]
    assert bool((inside > 0).all())
    assert int((field.map > 0).sum()) == sees**2


def test_strides_are_centred() -> None:
    """The map of a net that halves twice is symmetric when its kernels are."""
    net = made(tiny(norm="none", shortcut="none"))
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 4:
                p.fill_(0.05)
    found = effective(net, torch.ones(1, 1, 64, 64), SETTLING).map
    assert torch.allclose(found, found.T, atol=1e-4)
    assert torch.allclose(found, found.flip(0), atol=1e-4)
    assert int(found.argmax()) == found.numel() // 2


def test_random_weights_spread_as_the_theory_says() -> None:
    """Squared gradients of n random 3x3 convolutions are spread with a variance of 2 n / 3 pixels."""
    for blocks in (3, 8):
        spec = replace(stack(tiny(), blocks), widths=(32,))
        found = [effective(made(spec, seed), torch.randn(8, 1, 16, 16), SETTLING).spread ** 2 for seed in range(3)]
        assert sum(found) / 3 == pytest.approx((2 * blocks + 1) * 2 / 3, rel=0.12)


def test_a_gaussian_has_its_size_and_spread() -> None:
    away = torch.arange(-60, 61).double()
    energy = torch.exp(-(away**2 + away.view(-1, 1) ** 2) / (2 * 7.0**2))
    field = describe(energy)
    assert field.spread == pytest.approx(7, rel=1e-3)
    radius = math.sqrt(-4 * 7.0**2 * math.log(0.0455))  # where the root is 4.55 %
    assert field.size == pytest.approx(math.sqrt(math.pi) * radius, rel=0.01)


def test_mirrored_images_continue_as_numpy_pads() -> None:
    x = torch.rand(2, 1, 8, 8)
    want = np.pad(x.numpy(), ((0, 0), (0, 0), (13, 14), (13, 14)), mode="symmetric")
    assert np.array_equal(mirrored(x, 35).numpy(), want)
    assert torch.equal(mirrored(x, 4), x[:, :, 2:6, 2:6])


def test_a_flattened_map_is_refused_in_one_line() -> None:
    with pytest.raises(reslab.CallError, match="flattens a map of fixed size"):
        theoretical(reslab.spec("skipblock8", flatten=32))


@pytest.fixture(scope="module")
def records() -> list[dict]:
    found = []
    for cell in cells(Setting(60, 1, 2, tiny()), digits(), lambda spec, batch: 0.1):
        net = made(cell.subject.spec, cell.subject.seed)
        before = state(net)
        found += [{**row, "seed": cell.subject.seed, **cell.facts} for row in measure(cell, Ready(net, []), digits())]
        assert same(before, state(net))
    return found


def test_what_was_measured_makes_claims_and_figures(records: list[dict]) -> None:
    first = claims(records)[0]
    assert "to the power +0.5" in first.measured
    assert claims(records)[1].verdict == "agrees"
    assert len(figures(records)) == 3
    assert "pixels a side before training" in answer(records)


@pytest.mark.parametrize(("factor", "verdict"), [(1.5, "agrees"), (0.5, "disagrees"), (1.0, "not decided at this budget")])
def test_verdicts_on_training(records: list[dict], factor: float, verdict: str) -> None:
    turned = []
    for r in records:
        if r["look"] == "twin":
            base = 20.0 if r["twin"] == "residual" else 30.0 + 0.5 * r["seed"]
            r = r | {"size": base * (factor if r["trained"] else 1) * (1 + 0.01 * r["seed"] * r["trained"])}
        turned.append({**r, "image_size": 32})
    assert claims(turned)[2].verdict == verdict
    assert claims([{**r, "image_size": 8} for r in turned])[2].verdict == "not decided at this budget", "there may be nothing to enlarge it for"
    assert claims(turned)[3].verdict == "agrees"


def test_missing_cells_decide_nothing(records: list[dict]) -> None:
    for some in ([], [r for r in records if r["look"] == "stack"][:1], [r for r in records if r["look"] == "twin"][:1]):
        assert {claim.verdict for claim in claims(some)} == {"not decided at this budget"}
        assert isinstance(answer(some), str)


def test_what_a_budget_leaves_is_drawn_and_said_without_the_rest(records: list[dict]) -> None:
    stacks, twins = ([r for r in records if r["look"] == look] for look in ("stack", "twin"))
    shallow = [r for r in stacks if r["layers"] == 5]
    assert [len(figure.rows) for figure in figures(shallow)] == [len(shallow)]
    assert claims(shallow)[1].measured == "share as depth to the power not measured; 93% with 5 convolutions"
    for after, said in ((False, "before training"), (True, "after training")):
        some = [r for r in twins if r["trained"] is after]
        size, field = fmean(r["size"] for r in some if r["twin"] == "residual"), some[-1]["theoretical"]
        assert f"the residual net uses {size:.0f} of {field} pixels a side {said}; the plain" in answer(some)
        assert len(figures(some)) == 2
        for claim in claims(some):
            assert "nan" not in claim.measured
    assert claims(some)[1].measured == "share as depth to the power not measured"


def test_given_nets_are_compared_with_themselves_before_training() -> None:
    given = (Given("a", tiny(), "k"), Given("b", tiny(), "l"), Given("c", tiny(shortcut="none"), "m"))
    found = [c for c in cells(Setting(60, 1, 3, tiny(), given), digits(), lambda spec, batch: 0.1) if c.facts["look"] == "twin"]
    assert [(c.facts["twin"], c.facts["pair"], c.facts["trained"], c.subject.weights) for c in found] == [
        ("residual", 0, False, ""), ("residual", 0, True, "k"), ("residual", 1, False, ""), ("residual", 1, True, "l"),
        ("plain", 0, False, ""), ("plain", 0, True, "m"),
    ]  # fmt: skip
