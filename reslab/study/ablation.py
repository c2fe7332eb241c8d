"""Which of skip and batch norm buys what?

Method: a grid of nets, with skips and without, with batch norm, group norm and no norm, at several depths, all with the
same order of images, steps, schedule and seeds; final errors, and whether a net has trained at all: whether its training
error is ten points better than naming the commonest class. What skips buy is how much higher the error is without them, a
mean over nets with and without batch norm; what batch norm buys, the same the other way round; what they buy together is
what skips buy with batch norm beyond what they buy without (the interaction of a 2 x 2 design). Intervals are over seeds.

All nets have one learning rate (`grid`), chosen for deep nets: those without norm fail at 56 layers at every rate from
0.002 to 0.2. At 8 layers it is low for them: 120 steps on digits leave 90 and 73 % training error without norm, without
skips and with, where rates of 0.1 and 0.2 leave 49 and 22 %. So what batch norm buys in shallow nets is in part that it
does not depend on the rate (docs/log.md).

A result shows what either part does to a training of the given steps at that rate. No error is much above that of a guess:
a net that fails without one part cannot lose more without both, which is a part of what "together" measures, and all of it
where residual nets without norm do not train: then it is what skips buy with batch norm once more, and decides nothing. It does not show
why (studies `gradients`, `signal`, `batchnorm`), nor what nets without norm do from an initialisation made for them
(`init`).

    reslab study ablation --budget 2m      digits, 8 to 56 layers

Expected: plain nets with batch norm get worse with depth, residual ones do not (He et al. 2015; test error at 20 / 56 / 110
layers with skips 7.37 / 5.89 / 5.79 %, without 8.18 / 13.31 / 16.44 %, Li et al. 2018); batch norm "dramatically increases
the largest trainable depth" of residual nets (De & Smith 2020, abstract).
"""

from collections.abc import Iterable
from dataclasses import replace

from reslab.run import Record
from reslab.spec import Norm, Spec
from reslab.study import grid
from reslab.study.data import Data
from reslab.study.grid import Arm, Ladder, beyond, by_seed, claim, depths, differences, results, trained
from reslab.study.kinds import Cell, Claim, Pace, Setting, Study
from reslab.study.stats import Estimate, estimate, paired, points
from reslab.study.twins import plain

SKIPS = ("residual", "plain")
NORMS: dict[Norm, str] = {"none": "no norm", "batch": "batch norm", "group": "group norm"}
LADDERS = (Ladder((1 / 3, 1), 1), Ladder((1 / 3, 1, 3), 60), Ladder((1 / 3, 1, 3, 6), 300))  # 8 to 110 layers
PAPER = (1 / 3, 1, 5 / 3, 3, 6)
EFFECTS = ("skip", "batch norm", "together")


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """The whole grid for every seed."""
    return grid.grid(_arms, LADDERS, PAPER, setting, data, pace)


def _arms(net: Spec) -> list[Arm]:
    return [Arm(replace(skip, norm=norm), {"skip": name, "norm": norm}) for norm in NORMS for name, skip in zip(SKIPS, (net, plain(net)), strict=True)]


def effects(records: list[Record], layers: int, error: str = "train_error") -> dict[str, Estimate]:
    """What skips buy, what batch norm buys and what they buy together, as shares of the images, at a depth."""
    rp, rb = (by_seed(records, error, layers=layers, skip="residual", norm=norm) for norm in ("none", "batch"))
    pp, pb = (by_seed(records, error, layers=layers, skip="plain", norm=norm) for norm in ("none", "batch"))
    seeds = sorted(rp.keys() & rb.keys() & pp.keys() & pb.keys())
    values: dict[str, Iterable[float]] = {
        "skip": ((pp[s] - rp[s] + pb[s] - rb[s]) / 2 for s in seeds),
        "batch norm": ((pp[s] - pb[s] + rp[s] - rb[s]) / 2 for s in seeds),
        "together": ((pb[s] - rb[s]) - (pp[s] - rp[s]) for s in seeds),
    }
    return {name: estimate(list(each)) for name, each in values.items()}


def claims(records: list[Record]) -> list[Claim]:
    """What the papers say of the deepest nets, decided by paired differences of training errors."""
    shallow, deep = min(depths(records)), max(depths(records))

    def arm(skip: str, norm: Norm, layers: int = deep) -> dict[str, object]:
        return {"skip": skip, "norm": norm, "layers": layers}

    def alive(skip: str, norm: Norm) -> str:
        return f"{skip} nets with {NORMS[norm]}: {trained(results(records, **arm(skip, norm)))}"

    skips = {n: differences(records, arm("plain", "batch", n), arm("residual", "batch", n)) for n in (shallow, deep)}
    bare = results(records, **arm("residual", "none"))
    return [
        claim(
            "With batch norm, deep nets need skips (He et al. 2015)",
            f"training error at {deep} layers with batch norm, without skips beyond with them",
            estimate(list(skips[deep].values())),
            f"; {alive('plain', 'batch')}",
        ),
        claim(
            "What skips buy grows with depth (He et al. 2015, Li et al. 2018)",
            f"the same difference, at {deep} layers beyond at {shallow}",
            paired(skips[deep], skips[shallow]),
        ),
        claim(
            "Skips alone do not train a deep net from He initialisation: it takes batch norm (De & Smith 2020)",
            f"training error at {deep} layers with skips, without norm beyond with batch norm",
            beyond(records, arm("residual", "none"), arm("residual", "batch")),
            f"; {alive('residual', 'none')}",
            alive=results(records, **arm("residual", "batch")),
            dead=results(records, **arm("residual", "none")),
        ),
        claim(
            "In deep nets batch norm works through the skips: the two buy more together than apart (this project's reading of De & Smith 2020)",
            f"training error at {deep} layers, what skips buy with batch norm beyond what they buy without",
            effects(records, deep)["together"],
            f"; without norm they buy {points(beyond(records, arm('plain', 'none'), arm('residual', 'none')))}; {alive('residual', 'none')}",
            asked=bare,
        ),
        claim(
            "Group norm, without statistics of a batch, trains deep residual nets too (Wu & He 2018)",
            f"training error at {deep} layers with skips, without norm beyond with group norm",
            beyond(records, arm("residual", "none"), arm("residual", "group")),
            f"; {alive('residual', 'group')}",
            alive=results(records, **arm("residual", "group")),
        ),
    ]


def answer(records: list[Record]) -> str:
    """The three effects at the greatest depth, in one sentence."""
    deep = max(depths(records))
    skip, norm, together = (effects(records, deep)[name] for name in EFFECTS)
    if not skip.n:
        return f"The four corners of the grid at {deep} layers were not all measured: nothing can be said of what buys what."
    return (
        f"At {deep} layers skips take {_less(skip)} off the training error, on average over nets with batch norm and without; batch norm takes "
        f"{_less(norm)}, on average over nets with skips and without. With batch norm skips take {_less(together)} more than without."
    )


def _less(e: Estimate) -> str:
    return f"{100 * e.mean:.1f} points" + (f" [{100 * e.low:.1f}, {100 * e.high:.1f}]" if e.has_interval else "")


STUDY = Study(
    question="Which of skip connections and batch norm buys what?",
    method=(
        "Nets with and without skips, with batch norm, group norm and no norm, at several depths; the same images, order, schedule, steps and seeds. One "
        "learning rate for all, chosen for deep nets: those without norm fail at every one. What a part buys is a mean over nets with and without the other."
    ),
    source="He et al. 2015 (1512.03385), section 4; De & Smith 2020 (2002.10444); Wu & He 2018 (1803.08494); Li et al. 2018 (1712.09913)",
    shows="what each part does to the error of a net trained in the given steps, how much of that takes both, and which nets do not train at all",
    limits=(
        "what each net could do at a rate of its own, which shallow nets without norm would take higher; nor more loss than down to a guess: a net that fails "
        "without one part cannot lose more without both; nor why (studies gradients, signal, batchnorm), nor what nets without norm do from an "
        "initialisation made for them (study init)"
    ),
    expected=(
        "CIFAR-10 test error with batch norm at 20 / 56 / 110 layers: with skips 7.37 / 5.89 / 5.79 %, without 8.18 / 13.31 / 16.44 % (Li et al. 2018). "
        "Without norm no table: batch norm 'dramatically increases the largest trainable depth' (De & Smith 2020)"
    ),
    cells=cells,
    measure=grid.measure,
    claims=claims,
    answer=answer,
)
