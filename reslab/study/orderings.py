"""In which order should a residual block convolve, normalise, activate and add?

Method: one deep residual net in each of the five orders of He et al. 2016 (1603.05027, table 2 and figure 4). The same
images, order of images, schedule, steps and seeds; test errors, as in the table, and training errors beside them.

A result shows which order trains best at the given depth and in the given steps. The paper's differences are small at 110
layers (0.1 to 1.6 points) and grow with depth (1001 layers: original 7.61, full pre-activation 4.92 %): a short training
of a shallower net can decide the large ones at best.

    reslab study orderings --budget 2m      digits, 56 layers

Expected (table 2, CIFAR-10, ResNet-110, test error, %): original 6.61, BN after addition 8.17, ReLU before addition 7.84,
ReLU-only pre-activation 6.71, full pre-activation 6.37.
"""

from reslab.run import Record
from reslab.study import grid, table
from reslab.study.data import Data
from reslab.study.kinds import Cell, Claim, Pace, Setting, Study
from reslab.study.table import Row

TABLE = {
    "original": Row(0.0661, {"order": "original"}),
    "BN after addition": Row(0.0817, {"order": "bn-after-add"}),
    "ReLU before addition": Row(0.0784, {"order": "relu-before-add"}),
    "ReLU-only pre-activation": Row(0.0671, {"order": "relu-preact"}),
    "full pre-activation": Row(0.0637, {"order": "preact"}),
}


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """Every order for every seed."""
    return table.cells(TABLE, setting, data, pace)


def claims(records: list[Record]) -> list[Claim]:
    """What the paper says of pairs of orders, and the order of all."""
    return [
        table.higher(TABLE, records, "BN after addition", "original", "BN on the shortcut's path makes it worse"),
        table.higher(TABLE, records, "ReLU before addition", "original", "A branch that can only add makes it worse"),
        table.higher(TABLE, records, "original", "full pre-activation", "Full pre-activation is better than the original"),
        table.higher(TABLE, records, "ReLU-only pre-activation", "full pre-activation", "Pre-activation needs BN before the ReLU"),
        table.order(TABLE, records),
    ]


def answer(records: list[Record]) -> str:
    """All orders by their mean test error."""
    return table.answer(TABLE, records)


STUDY = Study(
    question="In which order should a residual block convolve, normalise, activate and add?",
    method=(
        "One deep residual net in each of the five orders of the table; the same images, order of images, schedule, steps and seeds. Claims are about test "
        "errors, as the table; training errors stand beside them. The learning rate is the one at which the original order trains best."
    ),
    source="He et al. 2016 (1603.05027), table 2 and figure 4",
    shows="which order trains best at the given depth and in the given steps",
    limits="the paper's smaller differences, 0.1 to 0.3 points after 64,000 steps; nor those at 1001 layers, where pre-activation gains most",
    expected="CIFAR-10 test error of ResNet-110: " + ", ".join(f"{name} {row.percent}" for name, row in TABLE.items()) + "; at 1001 layers 7.61 and 4.92 %",
    cells=cells,
    measure=grid.measure,
    claims=claims,
    answer=answer,
)
