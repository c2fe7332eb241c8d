"""Noises whose correlation is known, and what the study makes of records."""

import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch

from reslab.report.studies.shattering import figures
from reslab.seeds import seeded
from reslab.study import shattering
from reslab.study.autocorrelation import autocorrelation, brown_noise, white_noise
from reslab.study.kinds import Ready, Setting
from reslab.study.shattering import answer, between_images, cells, claims, measure, whiteness
from tests.conftest import distance
from tests.study.probing import digits, made, same, state, tiny


def test_white_noise_has_no_autocorrelation_and_brown_noise_much() -> None:
    white = autocorrelation(white_noise(5_000, seeded(0)), 10)
    assert white[0] == 1
    assert max(map(abs, white[1:])) < 4 / math.sqrt(5_000)
    assert autocorrelation(brown_noise(5_000, seeded(0)), 10)[10] > 0.9


def test_a_moving_average_has_the_correlation_of_its_overlap() -> None:
    noise = white_noise(100_000, seeded(1))
    sums = noise[2:] + noise[1:-1] + noise[:-2]
    assert autocorrelation(sums, 4) == pytest.approx([1, 2 / 3, 1 / 3, 0, 0], abs=0.02)


def test_vectors_are_correlated_as_all_their_features_together() -> None:
    sequence = torch.randn(50, 7, generator=seeded(2), dtype=torch.float64)
    centred = (sequence - sequence.mean(0)).numpy()
    want = sum(np.correlate(column, column, "full") for column in centred.T)[49:]
    assert autocorrelation(sequence, 5) == pytest.approx((want / want[0])[:6].tolist())


def test_lines_between_images_differ_and_the_net_is_left_alone() -> None:
    net = made(tiny())
    before = state(net)
    lines = list(between_images(net, digits(), 0))
    assert [line.shape for line in lines] == [(256, 64)] * 2
    assert same(before, state(net))
    assert not torch.equal(lines[0], lines[1])


def test_the_gradient_between_images_is_that_of_the_first_logit_at_each_point_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, gradient = [], shattering._gradient
    monkeypatch.setattr(shattering, "_gradient", lambda net, x: (taken.append(x), gradient(net, x))[1])
    net = made(tiny())
    lines = between_images(net, digits(), 0)
    line, points = next(lines), torch.cat(taken)  # here the net is still as it was looked at
    for i in (0, 100, 255):
        x = points[i : i + 1].detach().requires_grad_()
        assert distance(line[i], torch.autograd.grad(net(x)[0, 0], x)[0].flatten()) < 1e-5
    lines.close()
    images = digits().normalised(digits().train)
    assert all((images - end).abs().amax((1, 2, 3)).min() < 1e-5 for end in (points[0], points[-1]))
    assert torch.allclose(points[1:] - points[:-1], (points[-1] - points[0]) / 255, atol=1e-5)


def test_lines_between_equal_images_say_nothing() -> None:
    data = digits()
    blank = replace(data, train=np.zeros_like(data.train))
    found = []
    for cell in cells(Setting(60, 1, 2, tiny()), blank, lambda spec, batch: 0.1):
        if cell.facts["look"] == "images":
            rows = measure(cell, Ready(made(cell.subject.spec, cell.subject.seed), []), blank)
            found += [{**row, "seed": cell.subject.seed, **cell.facts} for row in rows]
    assert [r["scores"] for r in found] == [[]] * len(found) != []
    assert shattering._images(found).verdict == "not decided at this budget"
    assert figures(found) == []


@pytest.fixture(scope="module")
def records() -> Iterator[list[dict]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shattering, "NETS", 6)
        yield _measured()


def _measured() -> list[dict]:
    found = []
    for cell in cells(Setting(60, 1, 2, tiny()), digits(), lambda spec, batch: 0.1):
        if cell.facts["look"] == "dense" and cell.subject.seed:
            continue
        ready = Ready(made(cell.subject.spec, cell.subject.seed), [])
        found += [{**row, "seed": cell.subject.seed, **cell.facts} for row in measure(cell, ready, digits())]
    return found


def test_what_balduzzi_saw_is_seen(records: list[dict]) -> None:
    assert [claim.verdict for claim in claims(records)][:4] == ["agrees"] * 4
    assert all(claim.n >= 6 for claim in claims(records)[:4])
    assert len(figures(records)) == 3
    assert "white noise (0)" in answer(records)


def test_nets_that_do_not_shatter_disagree(records: list[dict]) -> None:
    brown = next(r["scores"] for r in records if r["net"] == "brown noise")
    turned = [r | {"scores": brown} if r["net"].startswith("plain") and r["look"] == "dense" else r for r in records]
    verdicts = [claim.verdict for claim in claims(turned)]
    assert verdicts[:2] == ["agrees", "disagrees"]
    assert verdicts[3] == "disagrees"
    assert fmean(brown) > 0.5


def test_the_noises_own_errors_count() -> None:
    """A net half-way takes half of either noise's error on, and errors add up in squares."""

    def dense(net: str, layers: int, scores: list[float]) -> dict:
        return {"look": "dense", "net": net, "layers": layers, "scores": scores}

    net, exact = dense("plain", 50, [0.4, 0.5, 0.6]), [0.2, 0.2, 0.2]
    surest = whiteness([net, dense("white noise", 0, exact), dense("brown noise", 0, [0.8] * 3)], "plain", 50)
    both = whiteness([net, dense("white noise", 0, [0.1, 0.2, 0.3]), dense("brown noise", 0, [0.7, 0.8, 0.9])], "plain", 50)
    white = whiteness([net, dense("white noise", 0, [0.1, 0.2, 0.3]), dense("brown noise", 0, [0.8] * 3)], "plain", 50)
    assert (surest.mean, both.mean) == pytest.approx((0.5, 0.5))
    assert (both.high - 0.5) / (surest.high - 0.5) == pytest.approx(math.sqrt(1 + 1 / 4 + 1 / 4))
    assert (white.high - 0.5) / (surest.high - 0.5) == pytest.approx(math.sqrt(1 + 1 / 4))
    assert not whiteness([net, dense("white noise", 0, exact), dense("brown noise", 0, [0.8])], "plain", 50).has_interval


def test_missing_cells_decide_nothing() -> None:
    assert {claim.verdict for claim in claims([])} == {"not decided at this budget"}
    assert claims([])[0].measured == "not measured; agreement means the nearer to brown noise (above one half)"
    assert not any("nan" in claim.measured for claim in claims([]))
    assert isinstance(answer([]), str)
