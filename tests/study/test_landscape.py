"""Surfaces and spectra whose answer is known; what a killed study leaves; verdicts on made-up records."""

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import reslab
from reslab.nets.torch import ResNet
from reslab.report.studies.landscape import figures
from reslab.run import Record
from reslab.seeds import seeded
from reslab.studies import Call, study
from reslab.study import lab, landscape
from reslab.study.data import Data
from reslab.study.hessian import hessian_product, lanczos
from reslab.study.kinds import Cell, Ready, Setting, Subject
from reslab.study.lab import Outcome, Place
from reslab.study.landscape import Plan, _spectrum, claims, falls, reach
from reslab.study.surface import along, direction, filters, for_surface, mean_loss
from reslab.study.twins import plain
from tests.conftest import scramble

TINY = reslab.spec("resnet20", depths=(1, 1), widths=(4, 8), in_channels=1)
SETTING = Setting(seconds=60, jobs=1, seeds=1, net=TINY)
UNDECIDED = "not decided at this budget"


def tiny(spec: reslab.Spec = TINY, seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    net = ResNet(spec)
    scramble(net, seed)
    return net


def state(net: ResNet) -> list[Any]:
    held = [tensor.clone() for tensor in net.state_dict().values()]
    return [held, [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()], torch.get_rng_state()]


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else all(map(same, a, b)) if isinstance(a, list) else a == b


def test_a_quadratics_landscape_is_exact() -> None:
    half = torch.tensor([[2.0, 1.0], [1.0, 4.0]]) / 2
    weight = torch.nn.Parameter(torch.zeros(2))
    first, second = [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])]
    points = [(a, b) for a in (-1.0, -0.5, 0.0, 0.5, 1.0) for b in (-1.0, 0.0, 0.25)]
    found = along([weight], [first, second], points, lambda: float(weight @ half @ weight))
    assert found == [a * a + a * b + 2 * b * b for a, b in points]


def test_weights_come_back_bit_for_bit_also_after_an_exception() -> None:
    net = tiny()
    before, weights = state(net), filters(net)
    calls: list[float] = []

    def fails() -> float:
        calls.append(float(weights[0].sum()))
        if len(calls) == 2:
            raise ZeroDivisionError
        return 0.0

    with pytest.raises(ZeroDivisionError):
        along(weights, [direction(weights, seeded(1))], [(0.5,), (1.0,)], fails)
    assert calls[0] != calls[1], "the weights were moved"
    assert same(state(net), before)


def test_every_filter_of_a_direction_is_as_long_as_the_nets_and_nothing_else_moves() -> None:
    net = tiny()
    net.conv1.weight.data[2] = 0  # type: ignore[union-attr, index]
    weights = filters(net)
    assert {name for name, p in net.named_parameters() if p.ndim == 1} == {name for name, p in net.named_parameters() if all(p is not w for w in weights)}
    for d, weight in zip(direction(weights, seeded(3)), weights, strict=True):
        for filter_of_d, own in zip(d, weight, strict=True):
            assert filter_of_d.norm().item() == pytest.approx(own.norm().item(), rel=1e-5)
    again, other = direction(weights, seeded(3)), direction(weights, seeded(4))
    assert all(torch.equal(a, b) for a, b in zip(again, direction(weights, seeded(3)), strict=True))
    cosine = torch.nn.functional.cosine_similarity(again[3].flatten(), other[3].flatten(), dim=0)
    assert abs(cosine) < 0.2, "random directions in many dimensions are almost orthogonal"


def test_a_nets_scale_does_not_change_its_landscape() -> None:
    """With batch norm a longer filter computes the same; the surface must not look flatter for it."""
    net, longer = tiny().eval(), tiny().eval()
    bn = longer.bn1
    assert isinstance(bn, torch.nn.BatchNorm2d)
    with torch.no_grad():
        longer.conv1.weight.mul_(8)  # type: ignore[operator, union-attr]
        bn.running_mean.mul_(8)  # type: ignore[union-attr]
        bn.running_var.mul_(64)  # type: ignore[union-attr]
        bn.eps *= 64
    x, y = torch.randn(16, 1, 8, 8, generator=seeded(5)), torch.arange(16) % 10
    found = [along(filters(n), [direction(filters(n), seeded(6))], [(-0.7,), (0.4,)], lambda n=n: mean_loss(n, [(x, y)])) for n in (net, longer)]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_nets_scale_does_not_change_its_curvature() -> None:
    net, longer = tiny().eval(), tiny().eval()
    with torch.no_grad():
        longer.conv1.weight.mul_(8)  # type: ignore[operator, union-attr]
        longer.bn1.running_mean.mul_(8)  # type: ignore[union-attr, operator]
        longer.bn1.running_var.mul_(64)  # type: ignore[union-attr, operator]
        longer.bn1.eps *= 64  # type: ignore[union-attr, operator]
    data = SimpleNamespace(train=range(60), train_batch=lambda items: (torch.randn(len(items), 1, 8, 8, generator=seeded(5)), torch.as_tensor(items) % 10))
    found = [_spectrum(n, data, 60, 0)["largest"][0] for n in (net, longer)]  # type: ignore[arg-type]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_twins_share_their_directions_whatever_the_shortcut() -> None:
    nets = [ResNet(replace(TINY, shortcut=kind)) for kind in ("B", "none")]
    moved = [dict(zip(map(id, filters(net)), direction(filters(net), seeded(3)), strict=True)) for net in nets]
    ours, theirs = ({name: moved[i][id(p)] for name, p in net.named_parameters() if id(p) in moved[i]} for i, net in enumerate(nets))
    assert set(theirs) < set(ours)
    for name in theirs:
        assert torch.nn.functional.cosine_similarity(ours[name].flatten(1), theirs[name].flatten(1)).min() > 0.999, name


@pytest.mark.parametrize("order", ["original", "bn-after-add", "relu-before-add", "relu-preact", "preact"])
@pytest.mark.parametrize("changes", [{}, {"shortcut": "none"}, {"shortcut": "B"}, {"squeeze": 4}, {"norm": "group"}, {"norm": "none"}], ids=str)
def test_the_quick_copy_computes_the_same_and_leaves_the_net_alone(order: str, changes: dict[str, Any]) -> None:
    net = tiny(replace(TINY, order=order, **changes))
    net.train()
    before = state(net)
    quick = for_surface(net, 8)
    assert same(state(net), before)
    x = torch.randn(4, 1, 8, 8, generator=seeded(1))
    held = x.clone()
    with torch.inference_mode():
        assert torch.allclose(quick(x), net.eval()(x), atol=1e-4, rtol=1e-4)
    assert torch.equal(x, held)


def test_the_quick_copy_folds_and_its_surface_is_the_nets() -> None:
    net = tiny()
    quick = for_surface(net, 8)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in quick.modules())
    d = direction(filters(net), seeded(2))
    moved = ResNet(TINY)
    moved.load_state_dict(net.state_dict())
    with torch.no_grad():
        for weight, part in zip(filters(moved), d, strict=True):
            weight.add_(part, alpha=0.3)
    scales = [q.detach().flatten(1).norm(dim=1) / w.detach().flatten(1).norm(dim=1) for q, w in zip(filters(quick), filters(net), strict=True)]
    folded = [part * s.view(-1, *[1] * (part.ndim - 1)) for part, s in zip(d, scales, strict=True)]
    x, y = torch.randn(16, 1, 8, 8, generator=seeded(5)), torch.arange(16) % 10
    (found,) = along(filters(quick), [folded], [(0.3,)], lambda: mean_loss(quick, [(x, y)]))
    assert found == pytest.approx(mean_loss(moved.eval(), [(x, y)]), rel=1e-4)


def test_hessian_and_its_ends_equal_a_dense_one() -> None:
    net = tiny(replace(TINY, depths=(1,), widths=(2,), num_classes=3)).eval()
    x, y = torch.randn(24, 1, 8, 8, generator=seeded(7)), torch.arange(24) % 3
    names = [name for name, p in net.named_parameters() if p.ndim > 1]
    weights = filters(net)
    shapes, sizes = [w.shape for w in weights], [w.numel() for w in weights]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = {name: part.view(shape) for name, part, shape in zip(names, flat.split(sizes), shapes, strict=True)}
        return cross_entropy(functional_call(net, parts, (x,)), y)

    dense = torch.autograd.functional.hessian(loss, torch.cat([w.detach().flatten() for w in weights])).double()
    product = hessian_product(net, weights, [(x[:15], y[:15]), (x[15:], y[15:])])
    vector = torch.randn(len(dense), dtype=torch.float64, generator=seeded(8))
    assert torch.allclose(product(vector), dense @ vector, atol=1e-3 * (dense @ vector).abs().max().item())
    found, true = lanczos(product, len(dense), 40, seeded(9)), torch.linalg.eigvalsh(dense).numpy()
    assert np.allclose(found.values[-3:], true[-3:], rtol=1e-3)
    assert np.allclose(found.values[0], true[0], rtol=1e-3)


def test_lanczos_finds_each_eigenvalue_once_and_its_bounds_hold() -> None:
    """Without reorthogonalisation the separated ends would come again as copies."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    true = np.sort(np.r_[-5.0, rng.uniform(-1, 1, 56), 9.0, 30.0, 1000.0])
    matrix = torch.from_numpy(q @ np.diag(true) @ q.T)
    all_of_it = lanczos(lambda v: matrix @ v, 60, 500, seeded(1))
    assert np.allclose(all_of_it.values, true, atol=1e-8)
    some = lanczos(lambda v: matrix @ v, 60, 20, seeded(1))
    assert np.allclose(some.values[-3:], [9, 30, 1000])
    assert all(np.abs(true - value).min() <= error + 1e-9 for value, error in zip(some.values, some.errors, strict=True))


def test_lanczos_stops_where_nothing_is_left() -> None:
    found = lanczos(lambda v: 2 * v, 50, 10, seeded(1))
    assert found.values.tolist() == pytest.approx([2.0])


def test_every_part_is_measured_and_leaves_net_and_random_numbers_alone(data: Data) -> None:
    net = tiny().train()
    before = state(net)
    for part in ("errors", "line", "row", "hessian"):
        facts = {"part": part, "number": 1, "side": 3, "images": 60, "net": "residual", "skips": True, "layers": 6}
        (record,) = landscape.measure(Cell(part, Subject(TINY), facts=facts), Ready(net, []), data)
        assert json.loads(json.dumps(record))["kind"] == part
        assert same(state(net), before), part
    assert set(record["largest"]).isdisjoint(record["smallest"])


def test_a_row_of_the_plane_goes_through_the_trained_weights(data: Data) -> None:
    net = tiny()
    facts = {"part": "row", "number": 1, "side": 3, "images": 60}
    (row,) = landscape.measure(Cell("row", Subject(TINY), facts=facts), Ready(net, []), data)
    facts = {"part": "line", "number": 0, "side": 3, "images": 60}
    (line,) = landscape.measure(Cell("line", Subject(TINY), facts=facts), Ready(net, []), data)
    assert row["loss"][1] == line["loss"][1]
    assert row["loss"][0] != line["loss"][0], "the plane's directions are not the lines'"


class Here:
    """A pool that works at once, until it is killed."""

    left = 10**6
    _processes = None

    def __init__(self, *facts: object) -> None: ...
    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *facts: object) -> None: ...
    def shutdown(self, cancel_futures: bool) -> None: ...
    def submit(self, work: Any, *arguments: Any) -> Future[None]:
        if Here.left == 0:
            raise KeyboardInterrupt
        Here.left -= 1
        future: Future[None] = Future()
        work(*arguments)
        future.set_result(None)
        return future


def test_killed_half_way_the_surface_is_the_same_bit_for_bit_and_nothing_is_done_again(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(landscape, "PLANS", (Plan(5, 40),))
    monkeypatch.setattr(landscape, "trained", lambda twins, *rest: {name: Subject(spec, 3) for name, spec in twins.items()})
    setting = SETTING._replace(seconds=3600)  # the plan is the same, and a busy machine cuts nothing off
    measured: list[str] = []
    measure = landscape.measure

    def counted(cell: Cell, ready: Ready, data: Data) -> Iterator[Record]:
        measured.append(cell.name)
        yield from measure(cell, ready, data)

    monkeypatch.setattr(lab, "find", lambda name: replace(landscape.STUDY, measure=counted))
    whole = lab.run("landscape", place._replace(out=tmp_path / "whole"), setting, lambda text: None)
    planned, killed = len(measured), place._replace(out=tmp_path / "killed")
    assert whole.done == whole.planned == planned

    measured.clear()
    monkeypatch.setattr(Here, "left", planned // 2)
    with pytest.raises(KeyboardInterrupt):
        lab.run("landscape", killed, setting, lambda text: None)
    monkeypatch.setattr(Here, "left", 10**6)
    drawn: list[Outcome] = []
    again = lab.run("landscape", killed, setting, lambda text: None, lambda outcome, running: drawn.append(outcome))
    assert len(measured) == len(set(measured)) == planned, "every cell once"
    assert again == whole
    files = [sorted((tmp_path / name / "cells").iterdir()) for name in ("whole", "killed")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert drawn
    assert planned // 2 <= drawn[0].done < planned, "drawn while it ran, of what was there"
    assert figures(drawn[0].records)
    assert next(f.title for f in figures(whole.records)).startswith("Loss on a plane")


def test_the_page_of_a_study_that_breaks_off_does_not_say_that_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(landscape, "PLANS", (Plan(3, 40),))
    monkeypatch.setattr(landscape, "trained", lambda twins, *rest: {name: Subject(TINY, 3) for name in twins})
    monkeypatch.setattr(Here, "left", 9)
    pages: list[str] = []

    class Quiet:
        def say(self, text: str) -> None:
            pages.extend(page.read_text() for page in tmp_path.glob("study.html"))

        def reading(self, what: str, done: int, total: int) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        study("landscape", Call(data="digits", budget="1m", jobs=1, out=tmp_path), Quiet())
    assert 'http-equiv="refresh"' in pages[-1]
    page = (tmp_path / "study.html").read_text()
    assert "refresh" not in page
    assert "Only 9 of 22 cells are measured: the same command does the rest." in page


def line(net: str, number: int, loss: list[float | None], layers: int = 56) -> Record:
    return {"kind": "line", "net": net, "skips": net == "residual", "layers": layers, "number": number, "at": np.linspace(-1, 1, len(loss)).tolist(),
            "classes": 10, "loss": loss, "side": 5, "images": 9}  # fmt: skip


def spectrum(net: str, number: int, largest: float, layers: int = 56) -> Record:
    return {"kind": "hessian", "net": net, "skips": net == "residual", "layers": layers, "number": number, "largest": [largest], "largest_within": [0.0],
            "smallest": [-1.0], "smallest_within": [0.0]}  # fmt: skip


def test_reach_is_where_the_loss_has_risen_by_that_of_guessing() -> None:
    guess = math.log(10)
    level = 0.1 + guess
    assert reach(line("a", 0, [level * 4, level, 0.1, level, level * 4])) == pytest.approx(0.5)
    assert reach(line("a", 0, [level * 4, level / 4, 0.1, level / 4, level * 4])) == pytest.approx(0.75), "half-way in the logarithm"
    assert reach(line("a", 0, [1.0] * 5)) == 1.0
    assert reach(line("a", 0, [None, 1.0, 0.1, None, None])) == pytest.approx(0.25)


@pytest.mark.parametrize("middle", [0.01, 1.0, 2.0])
def test_a_net_that_trained_worse_does_not_look_sharper_for_it(middle: float) -> None:
    at = np.linspace(-1, 1, 401)
    assert reach(line("a", 0, (middle + 8 * at**2).tolist())) == pytest.approx(math.sqrt(math.log(10) / 8), abs=2e-3)


def test_falls_are_counted_outwards() -> None:
    assert falls(line("a", 0, [4, 2, 1, 3, 9])) == 0
    assert falls(line("a", 0, [4, 5, 1, 3, 2])) == 0.5
    assert falls(line("a", 0, [None, 5, 1, 3, None])) == 0
    assert falls(line("a", 0, [2.3, 2.3 + 1e-6, 2.3, 2.3 + 1e-6, 2.3])) == 0, "a net that answers all alike is no chaos"


BOWL, CHAOS = [90.0, 9.0, 0.1, 9.0, 90.0], [80.0, 99.0, 0.9, 99.0, 9.0]


@pytest.mark.parametrize(
    ("residual", "plain_", "layers", "verdicts"),
    [
        ([0.1, 0.1, 0.1], [0.9, 0.8, 0.9], 56, ["agrees", "agrees", "agrees"]),
        ([0.1], [0.9], 56, [UNDECIDED] * 3),
        ([0.1, 0.1, 0.1], [], 56, [UNDECIDED] * 3),
        ([0.1, 0.1, 0.1], [0.9, 0.8, 0.9], 20, [UNDECIDED] * 2 + ["disagrees"]),
    ],
)
def test_verdicts(residual: list[float], plain_: list[float], layers: int, verdicts: list[str]) -> None:
    rows = []
    for net, middles, shape, sharp in (("residual", residual, BOWL, 10.0), ("plain", plain_, CHAOS, 40.0)):
        for n, middle in enumerate(middles):
            rows += [line(net, n, [*shape[:2], middle, *shape[3:]], layers), spectrum(net, n, sharp + n, layers)]
    assert [claim.verdict for claim in claims(rows)] == verdicts
    assert landscape.answer(rows)


def test_a_steeper_net_with_skips_disagrees() -> None:
    rows = [line(net, n, [99 * steep, 9 * steep, 0.1, (9 + n) * steep, 99 * steep]) for net, steep in (("residual", 9), ("plain", 1)) for n in range(3)]
    assert claims(rows)[0].verdict == "disagrees"


def test_one_net_alone_is_drawn_and_compared_with_nothing() -> None:
    rows = [line("c1", n, [float(abs(i)) for i in range(-8, 9)], 20) for n in range(3)]
    assert [claim.verdict for claim in claims(rows)] == [UNDECIDED, UNDECIDED, "agrees"]
    assert [f.title for f in figures(rows)] == ["Loss along random directions, a line each"]
    assert claims([]) and landscape.answer([]) and figures([]) == []


@pytest.mark.parametrize(("lines", "side", "high", "verdict"), [(3, 5, "24.2", UNDECIDED), (4, 25, "3.8", "agrees")])
def test_that_no_step_falls_is_as_sure_as_there_are_steps(lines: int, side: int, high: str, verdict: str) -> None:
    """Wilson's upper limits for 0 of 12 and 0 of 96."""
    rows = [line("c1", n, [float(abs(i)) for i in range(-(side // 2), side // 2 + 1)], 20) for n in range(lines)]
    assert claims(rows)[2].verdict == verdict
    assert f"c1 0.0 % (95 % interval 0.0 to {high})" in claims(rows)[2].measured


def test_lost_points_are_drawn_as_gaps() -> None:
    rows = [{"kind": "row", "net": "plain", "number": n, "at": [-1, 0, 1], "loss": [None, 0.1, 3.0], "side": 3} for n in range(3)]
    contours, perspective = figures(rows)
    assert "<svg" in contours.svg
    assert "<svg" in perspective.svg
    assert len(contours.rows) == 9
    nothing = figures([{**r, "net": r"$\\frac$", "loss": [None] * 3} for r in rows])
    assert "frac" in nothing[0].svg, "a name is no formula"


@pytest.mark.parametrize(("low", "high", "marks"), [(2.2, 9, "468"), (1.1, 19, ("5", "10", "15")), (0.5, 40, ("1", "10"))])
def test_losses_within_one_power_of_ten_have_marks_too(low: float, high: float, marks: Sequence[str]) -> None:
    loss = [[high, 0.6 * high, high], [0.6 * high, low, 0.6 * high], [high, 0.6 * high, high]]
    rows = [{"kind": "row", "net": "plain", "number": n, "at": [-1, 0, 1], "loss": values, "side": 3} for n, values in enumerate(loss)]
    for figure in figures(rows):
        assert all(f">{mark}<" in figure.svg for mark in marks)


def test_rows_come_coarse_first_and_twins_share_sizes(data: Data) -> None:
    made = landscape.cells(SETTING, data, lambda spec, batch: 0.01)
    assert {cell.facts["net"] for cell in made} == {"residual", "plain"}
    assert len({(cell.facts["side"], cell.facts["images"]) for cell in made}) == 1
    rows = [cell.facts["number"] for cell in made if cell.facts["part"] == "row" and cell.facts["net"] == "plain"]
    assert sorted(rows) == list(range(made[0].facts["side"]))
    assert rows[:2] == [0, 8]
    assert made[1].subject.spec == plain(TINY)
