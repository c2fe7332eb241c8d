"""Does a plain net train worse the deeper it is, and a residual one not?

Method: plain and residual twins with exactly the same parameters (shortcut A has none), the same order of images, the
same augmentation, steps and seeds, at several depths; training error beside test error (He et al. 2015, figure 6).

A result shows whether depth alone hurts the optimisation, since a deeper plain net could represent the shallower one. It
does not show why; with batch norm the paper finds vanishing gradients unlikely (section 4.1; study `gradients`).

    reslab study degradation --budget 2m       digits
    reslab study degradation                   CIFAR-10 at half resolution, ten minutes

Expected at the full protocol (CIFAR-10 test error, %): residual 20 / 56 / 110: 8.75 / 6.97 / 6.43 (the paper, table 6);
plain 20 / 56: 9.78 / 12.95 (a five-run reproduction of the protocol), plain 110 over 60.
"""

from collections.abc import Iterator

import torch

from reslab.family import spec as find_spec
from reslab.nets.torch import ResNet
from reslab.run import Record
from reslab.study.data import Data
from reslab.study.kinds import Cell, Claim, Pace, Schedule, Setting, Study, Verdict
from reslab.study.stats import Estimate, paired, points
from reslab.study.training import errors, train

DEPTHS = {"short": (20, 56), "long": (20, 32, 56), "paper": (20, 32, 44, 56, 110)}
PAPER_STEPS = 64_000
SHARE = 0.72  # of the budget that is planned to be spent in steps
A_THIRD = 1 / 3
POINTS = 80  # of a curve


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """Twins of every depth for every seed, seeds outermost: what a short budget cuts off is a whole seed."""
    depths = DEPTHS["paper" if setting.is_paper else "short" if setting.seconds < 300 else "long"]
    specs = {f"{kind}{depth}": (kind, depth) for depth in depths for kind in ("plain", "resnet")}
    batch = min(128, len(data.train) // 4)
    shape = {"in_channels": data.facts.channels, "num_classes": data.facts.classes}
    made = {name: find_spec(name, **shape) for name in specs}
    cost = sum(pace(spec, batch) for spec in made.values()) * setting.seeds / setting.jobs
    steps = PAPER_STEPS if setting.is_paper else min(PAPER_STEPS, int(SHARE * setting.seconds / cost))
    schedule = Schedule(steps, batch, lr=0.1, warmup=0.01) if setting.is_paper else Schedule(steps, batch)
    return [
        Cell(f"{name} seed {seed}", made[name], seed, schedule, {"cell_kind": kind, "depth": depth})
        for seed in range(setting.seeds)
        for name, (kind, depth) in specs.items()
    ]


def measure(cell: Cell, data: Data) -> Iterator[Record]:
    """Trains one net: its running loss, then its errors."""
    assert cell.schedule
    torch.manual_seed(cell.seed)
    net = ResNet(cell.spec)
    losses = train(net, data, cell.schedule, cell.seed)
    every = max(1, len(losses) // POINTS)
    smooth = [sum(losses[i : i + every]) / len(losses[i : i + every]) for i in range(0, len(losses), every)]
    yield {"kind": "curve", "every": every, "loss": [round(value, 5) if value < 1e9 else None for value in smooth]}
    yield {"kind": "result", "steps": len(losses), "parameters": cell.spec.cost(data.facts.size).params, **errors(net, data)}


def claims(records: list[Record]) -> list[Claim]:
    """What figure 6 says, decided by paired differences between the deepest and the shallowest twin."""
    results = [r for r in records if r["kind"] == "result"]
    shallow, deep = min(r["depth"] for r in results), max(r["depth"] for r in results)

    def rise(kind: str, error: str) -> Estimate:
        found = {depth: {r["seed"]: r[error] for r in results if (r["cell_kind"], r["depth"]) == (kind, depth)} for depth in (shallow, deep)}
        return paired(found[deep], found[shallow])

    plain, residual = rise("plain", "train_error"), rise("resnet", "train_error")
    said = f"from {shallow} to {deep} layers"
    return [
        Claim(
            "The deeper plain net has the higher training error",
            f"training error of the plain net {said}: {points(plain)}",
            "agrees" if plain.is_above_zero else "disagrees" if plain.is_below_zero else "not decided at this budget",
            plain.n,
        ),
        Claim("The deeper residual net does not", f"training error of the residual net {said}: {points(residual)}", _harmless(residual, plain), residual.n),
        _deep_comparison(results, deep),
    ]


def _harmless(residual: Estimate, plain: Estimate) -> Verdict:
    """That nothing was found is no agreement: the rise must be shown to be far below that of the plain twin."""
    if residual.is_below_zero or (plain.is_above_zero and residual.mean <= A_THIRD * plain.mean and residual.high < plain.low):
        return "agrees"
    return "disagrees" if residual.is_above_zero else "not decided at this budget"


def _deep_comparison(results: list[Record], deep: int) -> Claim:
    by_kind = {kind: {r["seed"]: r["test_error"] for r in results if (r["cell_kind"], r["depth"]) == (kind, deep)} for kind in ("plain", "resnet")}
    gap = paired(by_kind["plain"], by_kind["resnet"])
    return Claim(
        "Of two deep twins the residual one has the lower test error",
        f"test error of plain{deep} beyond resnet{deep}: {points(gap)}",
        "agrees" if gap.is_above_zero else "disagrees" if gap.is_below_zero else "not decided at this budget",
        gap.n,
    )


STUDY = Study(
    question="Does a plain net train worse the deeper it is, and a residual one not?",
    method="Plain and residual twins with exactly the same parameters, order of images, augmentation, steps and seeds; training error beside test error.",
    source="He et al. 2015 (1512.03385), section 4.2 and figure 6",
    shows="whether depth alone hurts the optimisation: a deeper plain net could represent the shallower one",
    limits="not why; and a short budget compares how fast the nets train, not where they would end",
    expected="CIFAR-10 test error at the full protocol: residual 20 / 56 / 110 8.75 / 6.97 / 6.43 %; plain 20 / 56 9.78 / 12.95 % (five-run reproduction)",
    cells=cells,
    measure=measure,
    claims=claims,
)
