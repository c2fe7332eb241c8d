"""Verdicts on lesions whose answer is known, the plan, and one small net measured."""

from dataclasses import replace

import pytest
import torch

import reslab
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.report.studies.lesion import figures
from reslab.spec import Spec
from reslab.study.data import Data, prepare
from reslab.study.kinds import Cell, Given, Ready, Setting, Subject
from reslab.study.lesion import MEASURES, _over_images, answer, cells, claims, measure
from reslab.study.stats import Estimate

UNDECIDED = "not decided at this budget"
NET = reslab.spec("resnet20", depths=(2, 1, 1), widths=(4, 8, 16), in_channels=1)
PLAIN = replace(NET, shortcut="none")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return prepare(split(open_images("digits"), 0), 8, tmp_path_factory.mktemp("images"))[0]


def of(net: str, kind: str, **facts: object) -> dict:
    return {"kind": kind, "net": net, "twin": net, "cell": net, "images": 500, **facts}


def one_removed(net: str, rise: tuple[float, float, float], whole: float = 0.1, blocks: int = 27) -> list[dict]:
    low, middle, high = rise
    return [
        of(net, "whole", error=whole, chance=0.9),
        of(net, "removed", block="layer1.0", number=0, rise=middle, error=whole + middle),
        of(net, "median", rise=middle, rise_low=low, rise_high=high, blocks=blocks),
    ]


@pytest.mark.parametrize(
    ("net", "rise", "whole", "verdict"),
    [
        ("residual", (0.005, 0.01, 0.015), 0.1, "agrees"),
        ("residual", (0.03, 0.04, 0.05), 0.1, "disagrees"),
        ("residual", (0.01, 0.02, 0.03), 0.1, UNDECIDED),
        ("residual", (0.005, 0.01, 0.015), 0.7, UNDECIDED),
        ("plain", (0.6, 0.7, 0.8), 0.1, "agrees"),
        ("plain", (0.1, 0.2, 0.25), 0.1, "disagrees"),
        ("plain", (0.2, 0.35, 0.4), 0.1, UNDECIDED),
        ("plain", (0.0, 0.0, 0.0), 0.88, UNDECIDED),
    ],
)
def test_one_block_is_judged_by_the_bounds_and_a_net_near_chance_not_at_all(net: str, rise: tuple[float, float, float], whole: float, verdict: str) -> None:
    assert claims(one_removed(net, rise, whole))[0].verdict == verdict


def test_zero_of_n_images_leaves_the_interval_of_zero_of_n() -> None:
    """Wilson's upper limit for 0 of 500 is 0.76 %, for 0 of 64 it is 5.7 %: beyond the bound."""
    many = one_removed("residual", (0.0, 0.0, 0.0))
    assert "+0.0 points (95 % interval -0.8 to +0.8, n = 500)" in claims(many)[0].measured
    assert claims(many)[0].verdict == "agrees"
    assert claims([{**r, "images": 64} for r in many])[0].verdict == UNDECIDED
    assert _over_images(Estimate(0.4, 0.3, 0.5, 500)) == Estimate(0.4, 0.3, 0.5, 500), "a wider interval stays"


def test_of_few_blocks_each_does_much_and_the_claim_is_not_about_them() -> None:
    residual, plain = (claims(one_removed(net, (0.5, 0.6, 0.7), blocks=9))[0] for net in ("residual", "plain"))
    assert (residual.verdict, plain.verdict) == (UNDECIDED, "agrees")
    assert "nets of 20 and more blocks" in residual.measured


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], "agrees"),
        ([0.45, 0.46, 0.47, 0.48, 0.5], "disagrees"),
        ([0.12, 0.14, 0.44, 0.47, 0.5], "disagrees"),
        ([0.12, 0.14, 0.16, 0.2, 0.5], "disagrees"),
        ([0.1] * 5, UNDECIDED),
    ],
)
def test_errors_that_jump_at_any_block_are_not_smooth(errors: list[float], verdict: str) -> None:
    rows = [of("residual", "whole", error=0.1, chance=0.9)]
    rows += [of("residual", "several", draw=draw, removed=n, error=e + 0.01 * (draw - 2) * (n > 3)) for draw in range(5) for n, e in enumerate(errors, 1)]
    assert claims(rows)[1].verdict == verdict


@pytest.mark.parametrize(("slope", "verdict"), [(1.0, "agrees"), (-1.0, "disagrees"), (0.0, UNDECIDED)])
def test_disorder_is_judged_by_its_rank_correlation(slope: float, verdict: str) -> None:
    noise = [0.03, -0.01, 0.02, -0.03, 0.01, 0.0, -0.02, 0.025]
    rows = [of("residual", "permuted", draw=i, tau=1 - 0.02 * (i + 1), error=0.5 + slope * 0.05 * i + e) for i, e in enumerate(noise)]
    assert claims(rows)[2].verdict == verdict


def gradient(factor: float, r2: float | None, mean_length: float, spread: float = 0.01) -> list[dict]:
    rows = [of("residual", "fall", draw=d, factor=factor + spread * (d - 1), mean_length=mean_length + spread * (d - 1)) for d in range(3)]
    return [*rows, of("residual", "paths", blocks=27, factor=factor, r2=r2, first=3, last=10, effective=0.05)]


@pytest.mark.parametrize(
    ("rows", "verdicts"),
    [
        (gradient(0.5, 0.99, 9.0), ["agrees", "agrees"]),
        (gradient(0.5, 0.7, 9.0), [UNDECIDED, "agrees"]),
        (gradient(1.2, 0.99, 15.0), ["disagrees", "disagrees"]),
        (gradient(0.9, 0.99, 13.4, spread=0.4), [UNDECIDED, UNDECIDED]),
        (gradient(0.5, None, 9.0), [UNDECIDED, "agrees"]),
    ],
)
def test_gradient_by_path_length_is_judged_by_its_intervals(rows: list[dict], verdicts: list[str]) -> None:
    assert [claim.verdict for claim in claims(rows)[3:]] == verdicts


def test_kinds_that_a_budget_cut_off_are_not_decided() -> None:
    found = claims([of("residual", "whole", error=0.1, chance=0.9)])
    assert [claim.verdict for claim in found] == [UNDECIDED] * 5
    assert all("not measured" in claim.measured for claim in found)
    assert "No net" in answer([])


def pace(spec: Spec, batch: int) -> float:
    return 0.01


def test_given_nets_are_not_trained_and_twins_are_trained_once_for_all_kinds(data: Data) -> None:
    made = cells(Setting(60, 2, 3, NET), data, pace)
    assert len(made) == 7, "a plain net has no paths"
    assert len({cell.subject for cell in made}) == 2
    assert all(cell.subject.schedule and cell.subject.spec.depths == (6, 3, 3) for cell in made)
    assert [cell.facts["lesion"] for cell in made[:3]] == ["each block", "each block", "paths"]
    given = cells(Setting(60, 2, 3, NET, (Given("mine", NET, "key"),)), data, pace)
    assert [cell.subject for cell in given] == [Subject(NET, weights="key")] * 4


@pytest.mark.parametrize("seconds", [0.01, 0])
def test_images_are_at_least_some_and_at_most_all(data: Data, seconds: float) -> None:
    made = cells(Setting(seconds, 1, 1, NET, (Given("mine", NET, "key"),)), data, pace)
    wanted = {0.01: {64}, 0: {len(data.test), 1000}}[seconds]
    assert {cell.facts["images"] for cell in made} == wanted


def test_a_plain_net_has_no_twin_to_train(data: Data) -> None:
    with pytest.raises(reslab.CallError, match="has no shortcuts: name the residual net"):
        cells(Setting(60, 2, 1, PLAIN), data, pace)


def test_every_kind_is_measured_claimed_and_drawn(data: Data) -> None:
    records = []
    for twin, spec in (("residual", NET), ("plain", PLAIN)):
        torch.manual_seed(0)
        for kind in MEASURES:
            if (twin, kind) != ("plain", "paths"):
                cell = Cell(f"{twin}, {kind}", Subject(spec), facts={"net": twin, "twin": twin, "lesion": kind, "images": 64})
                records += [{**r, "cell": cell.name, "seed": 0, **cell.facts} for r in measure(cell, Ready(reslab.build(spec), []), data)]
    assert {r["kind"] for r in records} == {"whole", "removed", "median", "several", "permuted", "path", "paths", "fall"}
    assert len([r for r in records if r["kind"] == "removed"]) == 8
    assert all(r["rise_low"] < r["rise"] < r["rise_high"] for r in records if r["kind"] == "removed"), "an untrained net may miss no block"
    assert len(claims(records)) == 6
    drawn = figures(records)
    assert len(drawn) == 5
    assert all(d.rows and d.csv for d in drawn)


def test_measuring_twice_gives_the_same(data: Data) -> None:
    net = reslab.build(NET)
    for kind in ("permuted", "paths"):
        cell = Cell(kind, Subject(NET), facts={"lesion": kind, "images": 20})
        assert list(measure(cell, Ready(net, []), data)) == list(measure(cell, Ready(net, []), data))
