"""Can a deep residual net train without norm, if it starts right?

Method: residual nets without any norm, at several depths, from four starts: none, that is He initialisation as it is;
Fixup (Zhang et al. 2019), which scales the branches down by the depth and starts each at zero; SkipInit (De & Smith 2020)
and ReZero (Bachlechner et al. 2020), which multiply each branch by a learned scalar that starts at zero; ReZero's
convolutions have no biases here, which is all that tells the two apart. The same images, order, schedule, steps and seeds.

The depths are as many of 20, 56, 110, 326 and 998 layers as the budget gives the steps that they need; the page says which.
The learning rate is 0.1, at which the three starts made for it train well in 150 to 200 steps; parameters that are a single
number learn at a tenth of it, as Fixup's recipe has it: with more, Fixup's nets of 56 layers break. The start without is no
victim of that rate: at 56 layers it fails at every rate from 0.002 to 0.2; only at 20 layers would a lower one serve it
better (docs/log.md).

A result shows which starts train at all, and how the training error goes with depth. It does not show where long trainings
would end, nor compare with norms (study `ablation`).

    reslab study init --budget 2m      digits, 20 and 56 layers

Expected: Fixup trains "as stable as training with normalization, even for networks with 10,000 layers" (Zhang et al. 2019,
abstract); with SkipInit "deep residual networks [train] without normalization" (De & Smith 2020, abstract).
"""

from dataclasses import replace
from typing import Any, get_args

from reslab.run import Record
from reslab.spec import Init, Spec
from reslab.study import grid
from reslab.study.data import Data
from reslab.study.grid import Arm, Ladder, beyond, claim, depths, differences, results, trained
from reslab.study.kinds import Cell, Claim, Pace, Setting, Study
from reslab.study.stats import estimate

STARTS: dict[Init, str] = {"he": "none", "fixup": "Fixup", "skipinit": "SkipInit", "rezero": "ReZero"}
PAPERS = {"Fixup": "Zhang et al. 2019", "SkipInit": "De & Smith 2020", "ReZero": "Bachlechner et al. 2020"}
LADDERS = (Ladder((1,), 1), Ladder((1, 3), 120), Ladder((1, 3, 6), 150), Ladder((1, 3, 6, 18), 150), Ladder((1, 3, 6, 18, 55.5), 150))
PAPER = (1, 3, 6, 18, 55.5)
SCALARS: dict[str, Any] = {"scalars": 0.1}
SHORT: dict[str, Any] = {"lr": 0.1, "warmup": 0.1, "milestones": (0.7, 0.9)}  # what starts at zero begins slowly


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """Every start at every depth for every seed."""
    assert set(STARTS) == set(get_args(Init))
    return grid.grid(_arms, LADDERS, PAPER, setting, data, pace, **SCALARS, **({} if setting.is_paper else SHORT))


def _arms(net: Spec) -> list[Arm]:
    return [Arm(replace(net, norm="none", init=init, zero_init=False), {"start": name}) for init, name in STARTS.items()]


def claims(records: list[Record]) -> list[Claim]:
    """What each start does for the deepest net, and that the rise with depth is that of the start without one."""
    shallow, deep = depths(records)[0], depths(records)[-1]

    def arm(start: str, layers: int = deep) -> dict[str, object]:
        return {"start": start, "layers": layers}

    def alive(start: str) -> str:
        return f"{start}: {trained(results(records, **arm(start)))}"

    made = [
        claim(
            f"A deep net without norm trains from {start} where it does not from He initialisation ({PAPERS[start]})",
            f"training error at {deep} layers, none beyond {start}",
            beyond(records, arm("none"), arm(start)),
            f"; {alive(start)}, {alive('none')}",
            alive=results(records, **arm(start)),
            dead=results(records, **arm("none")),
        )
        for start in PAPERS
    ]
    rise = {start: differences(records, arm(start), arm(start, shallow)) for start in ("none", "Fixup")}
    return [
        *made,
        claim(
            "From He initialisation depth does harm that it does not from Fixup (Zhang et al. 2019)",
            f"rise of the training error from {shallow} to {deep} layers, none beyond Fixup",
            estimate([rise["none"][seed] - rise["Fixup"][seed] for seed in sorted(rise["none"].keys() & rise["Fixup"].keys())]),
            f"; at {shallow} layers, none: {trained(results(records, **arm('none', shallow)))}",
            asked=results(records, **arm("none", shallow)),
        ),
    ]


def answer(records: list[Record]) -> str:
    """Who trained at the greatest depth, and the mean training errors."""
    deep = depths(records)[-1]
    told = []
    for start in STARTS.values():
        if rows := results(records, start=start, layers=deep):
            told.append(f"{start} {100 * estimate([r['train_error'] for r in rows]).mean:.1f} % ({trained(rows)})")
    return f"Mean training errors at {deep} layers without norm, by start: {', '.join(told)}."


STUDY = Study(
    question="Can a deep residual net train without norm, if it starts right?",
    method=(
        "Residual nets without norm at the depths that the budget allows, from He initialisation as it is (none), Fixup, SkipInit and ReZero; the same images, "
        "order, schedule, steps and seeds. The learning rate is 0.1, of parameters that are a single number a tenth of it, as Fixup asks; from He "
        "initialisation a net of 56 layers fails at lower rates too, one of 20 layers would take 0.05."
    ),
    source="Zhang et al. 2019 (1901.09321); De & Smith 2020 (2002.10444); Bachlechner et al. 2020 (2003.04887)",
    shows="which starts let a deep net without norm train at all, and how the training error goes with depth",
    limits="where long trainings would end, nor whether norms do better (study ablation)",
    expected=(
        "no table; Fixup is 'as stable as training with normalization, even for networks with 10,000 layers' (Zhang et al. 2019), SkipInit 'can train deep "
        "residual networks without normalization' (De & Smith 2020)"
    ),
    cells=cells,
    measure=grid.measure,
    claims=claims,
    answer=answer,
)
