"""Grids: the depths that a budget allows, fair twins, effects known by hand, verdicts, figures of what is missing."""

import importlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import reslab
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.report.charts import at_ends, canvas
from reslab.run import Record
from reslab.spec import Spec
from reslab.study import ablation, grid, init, orderings, shortcuts, table
from reslab.study.data import Data, prepare
from reslab.study.grid import Arm, Ladder
from reslab.study.kinds import Cell, Ready, Schedule, Setting, Subject
from reslab.study.lab import find, initial
from reslab.study.stats import Estimate
from reslab.study.training import train

NET = reslab.spec("resnet20", in_channels=1, num_classes=10)
SETTING = Setting(seconds=120, jobs=2, seeds=3, net=NET)
UNDECIDED = "not decided at this budget"
STUDIES = {"ablation": ablation, "shortcuts": shortcuts, "orderings": orderings, "init": init}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return prepare(split(open_images("digits", lambda *a: None), 0), 8, tmp_path_factory.mktemp("grid"))[0]


class Pace:
    """Seconds a step in proportion to the blocks, and which nets were timed."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.timed = seconds, []  # type: ignore[var-annotated]

    def __call__(self, spec: Spec, batch: int) -> float:
        self.timed.append(sum(spec.depths))
        return self.seconds * sum(spec.depths)


def made_up(name: str, data: Data, error: object) -> list[Record]:
    """Records of every cell of a study; `error` says of a cell's facts and its spec what its errors are."""
    rows: list[Record] = []
    for cell in STUDIES[name].cells(SETTING, data, Pace(0.001)):
        e = error(cell)  # type: ignore[operator]
        common = {"seed": cell.subject.seed, "cell": cell.name, **cell.facts}
        rows += [
            {"kind": "curve", "every": 2, "loss": [2.3, e, None if e > 0.85 else e / 2], **common},
            {"kind": "result", "steps": 6, "lost": e > 0.85, "parameters": 9, "train_error": e, "test_error": e, "guess_error": 0.9, **common},
        ]
    return rows


def luck(cell: Cell) -> float:
    return 0.001 * cell.subject.seed


@pytest.mark.parametrize(("seconds", "blocks", "timed"), [(0.1, 9, {9}), (0.004, 27, {9, 27}), (0.0003, 54, {9, 27, 54})])
def test_the_depth_is_the_greatest_that_leaves_enough_steps_and_deeper_nets_are_not_even_timed(
    data: Data, seconds: float, blocks: int, timed: set[int]
) -> None:
    pace = Pace(seconds)
    ladders = (Ladder((1,), 1), Ladder((3,), 100), Ladder((6,), 400))
    cells = grid.grid(lambda net: [Arm(net, {"kind": "it"})], ladders, (6,), SETTING, data, pace)
    assert {sum(cell.subject.spec.depths) for cell in cells} == {blocks}
    assert set(pace.timed) == timed


@pytest.mark.parametrize("name", STUDIES)
def test_twins_share_schedule_and_seed_and_seeds_are_outermost(name: str, data: Data) -> None:
    cells = STUDIES[name].cells(SETTING, data, Pace(0.001))
    rates = {cell.facts.get("rate") for cell in cells}
    assert len({cell.subject.schedule for cell in cells}) == len(rates)
    assert all(cell.subject.schedule and cell.subject.schedule.lr == cell.facts.get("rate", cell.subject.schedule.lr) for cell in cells)
    seeds = [cell.subject.seed for cell in cells]
    assert seeds == sorted(seeds)
    one_seed = len(cells) // 3
    assert len({(cell.subject.spec, cell.facts.get("rate")) for cell in cells[:one_seed]}) == one_seed, "no net twice"
    assert len({cell.subject.spec for cell in cells[:one_seed]}) * len(rates) == one_seed, "every net at every rate"
    assert len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize("name", STUDIES)
def test_paper_is_the_published_protocol(name: str, data: Data) -> None:
    cells = STUDIES[name].cells(SETTING._replace(seconds=0), data, Pace(0.001))
    schedule = cells[0].subject.schedule
    assert schedule
    assert (schedule.steps, schedule.batch_size, schedule.lr) == (64_000, 128, 0.1)
    assert max(cell.facts["layers"] for cell in cells) == (998 if name == "init" else 110)


@pytest.mark.parametrize("name", STUDIES)
def test_nets_for_which_the_question_makes_no_sense_are_refused_in_one_line(name: str, data: Data) -> None:
    for net, words in (("plain20", "varies nets with skip connections; received a plain one"), ("skipblock8", "skip blocks")):
        setting = SETTING._replace(net=reslab.spec(net))
        with pytest.raises(reslab.CallError, match=words) as refused:
            STUDIES[name].cells(setting, data, Pace(0.001))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", STUDIES)
def test_bottlenecks_of_large_images_are_studied_too(name: str, data: Data) -> None:
    for net in ("resnet18", "resnet50"):
        assert STUDIES[name].cells(SETTING._replace(net=reslab.spec(net)), data, Pace(0.001))


def test_a_cell_is_measured_beside_a_guess(data: Data) -> None:
    spec = replace(NET, depths=(1, 1, 1), widths=(4, 4, 4))
    subject = Subject(spec, 0, Schedule(3, 32))
    net = initial(subject)
    before = torch.random.get_rng_state()
    records = list(grid.measure(Cell("it", subject), Ready(net, [2.3, 2.2, 2.1]), data))
    assert torch.equal(before, torch.random.get_rng_state())
    (result,) = grid.results(records)
    assert result["guess_error"] == pytest.approx(1 - max((data.train_labels == c).mean() for c in range(10)))
    assert not grid.has_trained({**result, "train_error": result["guess_error"] - 0.05})
    assert grid.has_trained({**result, "train_error": 0.5})
    assert not grid.has_trained({**result, "train_error": 0.5, "lost": True})


def test_that_nets_train_or_do_not_is_no_matter_of_a_difference_alone() -> None:
    def nets(*errors: float) -> list[Record]:
        return [{"lost": False, "train_error": e, "guess_error": 0.9} for e in errors]

    def verdict(gap: float, alive: list[Record], dead: list[Record]) -> str:
        return grid.claim("", "", Estimate(gap, gap - 0.01, gap + 0.01, 3), alive=alive, dead=dead).verdict

    undecided = "not decided at this budget"
    assert verdict(0.6, nets(0.3, 0.3, 0.3), nets(0.9, 0.9, 0.4)) == "agrees"
    assert verdict(0.1, nets(0.3, 0.3, 0.3), nets(0.4, 0.4, 0.9)) == undecided, "those that should not train do"
    assert verdict(0.1, nets(0.8, 0.8, 0.3), []) == undecided, "those that should do not"
    assert verdict(-0.1, nets(0.8, 0.8, 0.8), []) == "disagrees"
    for gap in (0.1, -0.1):
        assert grid.claim("", "", Estimate(gap, gap - 0.01, gap + 0.01, 3), asked=nets(0.85, 0.85, 0.3)).verdict == undecided, "asked of nets that train"


def test_scalars_learn_at_their_share_of_the_rate(data: Data) -> None:
    spec = replace(NET, depths=(1, 1, 1), norm="none", init="skipinit")
    moved = {}
    for share in (1.0, 0.1):
        net = initial(Subject(spec))
        train(net, data, Schedule(1, 32, scalars=share, weight_decay=0), seed=0)
        moved[share] = {name: p.detach() for name, p in net.named_parameters()}
    scalars = [name for name, p in moved[1.0].items() if p.numel() == 1]
    assert len(scalars) == 3
    for name, p in moved[1.0].items():
        assert torch.allclose(p * 0.1 if name in scalars else p, moved[0.1][name], rtol=1e-5, atol=0)


def corners(pn: float, pb: float, rn: float, rb: float) -> object:
    """Errors of plain and residual nets without norm and with batch norm; group norm is like batch norm."""
    errors = {("plain", "none"): pn, ("plain", "batch"): pb, ("residual", "none"): rn, ("residual", "batch"): rb}

    def error(cell: Cell) -> float:
        norm = "batch" if cell.facts["norm"] == "group" else cell.facts["norm"]
        base = errors[cell.facts["skip"], norm] if cell.facts["layers"] > 20 else 0.1
        return base + luck(cell) * (1 + (cell.facts["skip"] == "plain"))

    return error


def test_effects_are_those_of_a_two_by_two_design(data: Data) -> None:
    records = made_up("ablation", data, corners(pn=0.80, pb=0.50, rn=0.60, rb=0.10))
    found = ablation.effects(records, grid.depths(records)[-1])
    assert found["skip"].mean == pytest.approx((0.2 + 0.4) / 2 + 0.001)
    assert found["batch norm"].mean == pytest.approx((0.3 + 0.5) / 2)
    assert found["together"].mean == pytest.approx(0.4 - 0.2)
    assert found["skip"].n == 3
    assert not ablation.effects(grid.results(records, skip="plain"), 56)["skip"].n


@pytest.mark.parametrize(
    ("errors", "verdicts"),
    [
        ((0.9, 0.5, 0.9, 0.1), ["agrees", "agrees", "agrees", UNDECIDED, "agrees"]),  # together is the first once more
        ((0.6, 0.5, 0.5, 0.1), ["agrees", "agrees", UNDECIDED, "agrees", "agrees"]),
        ((0.9, 0.1, 0.5, 0.3), ["disagrees", "disagrees", UNDECIDED, "disagrees", "agrees"]),
        ((0.9, 0.5, 0.1, 0.1), ["agrees", "agrees", UNDECIDED, "disagrees", UNDECIDED]),
    ],
)
def test_verdicts_of_ablation(data: Data, errors: tuple[float, ...], verdicts: list[str]) -> None:
    records = made_up("ablation", data, corners(*errors))
    assert [claim.verdict for claim in ablation.claims(records)] == verdicts
    assert "points" in ablation.answer(records)


def test_residual_and_plain_twins_of_ablation_have_the_same_parameters(data: Data) -> None:
    cells = ablation.cells(SETTING, data, Pace(0.001))
    for residual, plain in zip(cells[::2], cells[1::2], strict=True):
        assert (residual.facts["skip"], plain.facts["skip"], residual.facts["norm"]) == ("residual", "plain", plain.facts["norm"])
        assert residual.subject.spec.cost(8).params == plain.subject.spec.cost(8).params


@pytest.mark.parametrize("name", ["shortcuts", "orderings"])
def test_a_table_that_is_reproduced_agrees_and_one_upside_down_does_not(name: str, data: Data) -> None:
    study = STUDIES[name]
    same = made_up(name, data, lambda cell: cell.facts["published"] + luck(cell))
    assert {claim.verdict for claim in study.claims(same)} == {"agrees"}
    assert table.correlation(study.TABLE, same).mean == pytest.approx(1)
    upside_down = made_up(name, data, lambda cell: 0.5 - cell.facts["published"] + luck(cell))
    assert {claim.verdict for claim in study.claims(upside_down)} == {"disagrees"}
    equal = made_up(name, data, lambda cell: 0.5)
    assert {claim.verdict for claim in study.claims(equal)} == {UNDECIDED}


@pytest.mark.parametrize("seeds", [1, 3, 40])
def test_seeds_make_no_more_rows_of_a_table(seeds: int, data: Data) -> None:
    errors = dict(zip(orderings.TABLE, (0.2, 0.4, 0.5, 0.3, 0.1), strict=True))
    first = [r for r in made_up("orderings", data, lambda cell: errors[cell.facts["variant"]]) if r["seed"] == 0]
    claim = table.order(orderings.TABLE, [{**r, "seed": seed} for seed in range(seeds) for r in first])
    assert (claim.verdict, claim.n) == (UNDECIDED, 5)
    assert claim.measured == "rank correlation of the mean test errors with the table's: +0.90 (95 % interval -0.17 to +1.00, n = 5 rows)"
    assert "rank with the table's" in claim.paper, "single rows may have changed places"


def test_rows_that_are_missing_or_equal_have_no_order(data: Data) -> None:
    records = made_up("orderings", data, lambda cell: 0.5)
    assert table.order(orderings.TABLE, records).measured.endswith("none, all are equal")
    part = [r for r in records if r["variant"] != "original"]
    assert table.order(orderings.TABLE, part)[1:] == ("rank correlation of the mean test errors with the table's: not measured", UNDECIDED, 0)


def test_each_order_stands_with_the_rate_at_which_it_trains_best(data: Data) -> None:
    likes = {"original": 0.02, "full pre-activation": 0.1}

    def error(cell: Cell) -> float:
        variant = cell.facts["variant"]
        return cell.facts["published"] + luck(cell) + 0.3 * (cell.facts["rate"] != likes.get(variant, 0.02))

    records = made_up("orderings", data, error)
    kept = table.best(records)
    assert {(r["variant"], r["rate"]) for r in kept} >= set(likes.items())
    assert len(kept) == len(records) / 2
    assert {claim.verdict for claim in orderings.claims(records)} == {"agrees"}


def test_the_tables_hold_every_carry_and_every_order_and_change_nothing_else(data: Data) -> None:
    carries = {cell.subject.spec.carry for cell in shortcuts.cells(SETTING, data, Pace(0.001))}
    assert carries == {"identity", "scaling", "exclusive-gate", "shortcut-gate", "dropout"}
    assert {cell.subject.spec.order for cell in orderings.cells(SETTING, data, Pace(0.001))} == {
        "original", "bn-after-add", "relu-before-add", "relu-preact", "preact",
    }  # fmt: skip
    for cell in orderings.cells(SETTING, data, Pace(0.001)):
        assert replace(cell.subject.spec, order="original", depths=NET.depths) == NET


def test_verdicts_of_init(data: Data) -> None:
    def dies(cell: Cell) -> float:
        return (0.9 if cell.facts["start"] == "none" and cell.facts["layers"] > 20 else 0.2) + luck(cell)

    records = made_up("init", data, dies)
    assert [claim.verdict for claim in init.claims(records)] == ["agrees"] * 4
    assert "none 90.1 % (0 of 3 trained at all)" in init.answer(records)
    lives = made_up("init", data, lambda cell: 0.2)
    assert [claim.verdict for claim in init.claims(lives)] == [UNDECIDED] * 4


def parts(records: list[Record]) -> Iterator[list[Record]]:
    """What a budget may leave of a study's records."""
    whole = len(records) // 3
    return (records[:n] for n in (2, whole + 2))


@pytest.mark.parametrize("name", STUDIES)
def test_claims_answers_and_figures_survive_missing_cells_and_lost_losses(name: str, data: Data) -> None:
    drawing = importlib.import_module(f"reslab.report.studies.{name}")
    records = made_up(name, data, lambda cell: 0.9 if len(cell.name) % 2 else 0.3)
    for part in parts(records):
        if len(grid.results(part)) < len(records) // 2 // 3 * 2:
            assert {claim.verdict for claim in STUDIES[name].claims(part)} <= {UNDECIDED}
        assert find(name).answer(part)
        for figure in drawing.figures(part):
            assert figure.svg.startswith("<svg")
            assert figure.rows


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    with canvas() as c:
        axes = c.axes[0]
        axes.set_ylim(0, 100)
        at_ends(axes, 1, [(99, "a", "k"), (98, "b", "k"), (99.5, "c", "k"), (10, "d", "k")], least=0.1)
        heights = sorted(text.xy[1] for text in axes.texts)  # type: ignore[attr-defined]
    assert heights[0] == pytest.approx(0.1), "parts of the axis"
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(heights))
    assert heights[-1] <= 1 + 1e-9


def test_the_text_of_each_study_names_its_own_file() -> None:
    for name, study in STUDIES.items():
        assert f"reslab study {name}" in (study.__doc__ or "")
        assert Path(study.__file__ or "").stem == name
