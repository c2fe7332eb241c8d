"""What is lost when a shortcut carries anything but its input?

Method: one deep residual net with each shortcut of He et al. 2016 (1603.05027, table 1 and figure 2): the identity, both
paths halved, an exclusive gate, a gate on the shortcut only (closed a little or half-way at the start), a 1x1 convolution
on every shortcut, and dropout. The same images, order, schedule, steps and seeds; test errors, as in the table, and
training errors beside them, for the paper calls it a matter of optimisation.

The learning rate is the one at which the identity trains best (`grid`), and no other serves the rest: on digits, 120 steps,
56 layers and one seed, scaling stays at 78 to 82 % training error at every rate from 0.005 to 0.05 and the convolutions at
70 to 76 %; at 0.1 the exclusive gate has 63 % and the half-open one 80 %; dropout has 84 % or more at 0.002 and 0.005
(docs/log.md).

A result shows what hurts a training of the given length. A gate that starts nearly closed for the branch (exclusive, bias
-6) learns slowly at first: a short training judges it more harshly than a long one. It does not show that no gate or
convolution could ever help: the paper only says that what obstructs the shortcut makes optimisation harder.

    reslab study shortcuts --budget 2m      digits, 56 layers

Expected (table 1, CIFAR-10, ResNet-110, test error, %): identity 6.61, scaling 12.35, exclusive gate 8.70, shortcut-only
gate 6.91 (bias -6) and 12.86 (bias 0), 1x1 convolution 12.22, dropout over 20.
"""

from reslab.run import Record
from reslab.study import grid, table
from reslab.study.data import Data
from reslab.study.kinds import Cell, Claim, Pace, Setting, Study
from reslab.study.table import Row

TABLE = {
    "identity": Row(0.0661, {}),
    "0.5 scaling": Row(0.1235, {"carry": "scaling"}),
    "exclusive gate, bias -6": Row(0.0870, {"carry": "exclusive-gate", "gate_bias": -6.0}),
    "shortcut gate, bias -6": Row(0.0691, {"carry": "shortcut-gate", "gate_bias": -6.0}),
    "shortcut gate, bias 0": Row(0.1286, {"carry": "shortcut-gate", "gate_bias": 0.0}),
    "1x1 convolution": Row(0.1222, {"shortcut": "C"}),
    "dropout 0.5": Row(0.20, {"carry": "dropout"}, least=True),
}
WORSE = ("0.5 scaling", "exclusive gate, bias -6", "shortcut gate, bias 0", "1x1 convolution", "dropout 0.5")


def cells(setting: Setting, data: Data, pace: Pace) -> list[Cell]:
    """Every row of the table for every seed."""
    return table.cells(TABLE, setting, data, pace)


def claims(records: list[Record]) -> list[Claim]:
    """Each row against the identity; the two biases against each other; and the order of all."""
    return [
        *(table.higher(TABLE, records, name, "identity", f"{name} is worse than the identity") for name in WORSE),
        table.higher(
            TABLE, records, "shortcut gate, bias 0", "shortcut gate, bias -6", "A gate that starts nearly as the identity is better than a half-open one"
        ),
        table.order(TABLE, records),
    ]


def answer(records: list[Record]) -> str:
    """All rows by their mean test error."""
    return table.answer(TABLE, records)


STUDY = Study(
    question="What is lost when a shortcut carries anything but its input?",
    method=(
        "One deep residual net with each of the shortcuts of the table; the same images, order, schedule, steps and seeds. Claims are about test errors, as "
        "the table; training errors stand beside them. The learning rate starts gently, as in the paper, and is the one at which the identity trains best; at "
        "no other rate tried do the rest train well."
    ),
    source="He et al. 2016 (1603.05027), table 1 and figure 2",
    shows="which shortcuts obstruct the training of a deep net, at the given depth and in the given steps",
    limits="that no gate or convolution can help; and a gate that starts closed for the branch learns slowly, so a short training judges it harshly",
    expected="CIFAR-10 test error of ResNet-110: " + ", ".join(f"{name} {row.percent}" for name, row in TABLE.items()),
    cells=cells,
    measure=grid.measure,
    claims=claims,
    answer=answer,
)
