"""What a study is made of: its text, its cells, what each cell looks at, and the claims that its records decide."""

import ast
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import reslab
from reslab.run import Record
from reslab.spec import Spec

if TYPE_CHECKING:
    from reslab.nets.torch import ResNet
    from reslab.study.data import Data

Verdict = Literal["agrees", "disagrees", "not decided at this budget"]
UNDECIDED: Verdict = "not decided at this budget"
ROOM = 0.3  # of error, below chance: a net that errs more is hardly trained, and decides nothing
PACKAGE = Path(reslab.__file__).parent
TRAINING = ("nets/torch.py", "study/training.py")


@dataclass(frozen=True)
class Schedule:
    """How a net trains: SGD with momentum, the learning rate divided by ten twice (He et al. 2015, section 4.2).

    A short training needs a gentler start than the paper's 64k steps: its learning rate was chosen on digits as the one at
    which plain and residual nets of 20 and 56 layers all train best (docs/log.md).
    """

    steps: int
    batch_size: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.3  # share of the steps
    milestones: tuple[float, float] = (0.5, 0.75)
    augment: bool = True
    scalars: float = 1.0  # learning rate of parameters that are a single number, as a share of the others' (Fixup asks for a tenth)


@dataclass(frozen=True)
class Subject:
    """A net that cells look at: as its seed initialises it, trained by a schedule first, or with given weights.

    Cells with equal subjects share one training.
    """

    spec: Spec
    seed: int = 0
    schedule: Schedule | None = None
    weights: str = ""  # key of given weights

    def key(self, fingerprint: str) -> str:
        """Names the weights by content: by all that decides them."""
        return self.weights or content_key([asdict(self), fingerprint, code(*TRAINING)])


@dataclass(frozen=True)
class Cell:
    """One independent piece of a study's work, and all that decides its records besides the data and the code.

    `training` is for a study that measures while it trains; a net that is only looked at afterwards has its schedule in
    the subject.
    """

    name: str
    subject: Subject
    training: Schedule | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def key(self, study: str, fingerprint: str) -> str:
        """Names the cell's records by content: equal only where they would be."""
        return content_key([study, self.subject.key(fingerprint), asdict(self), fingerprint, code(f"study/{study}.py")])


class Given(NamedTuple):
    """A trained net that a person gave: its name, and the key of its weights in the store."""

    name: str
    spec: Spec
    weights: str


class Setting(NamedTuple):
    """What a person asked of a study. `net` is the net of the family to vary, made for the data."""

    seconds: float  # the budget; 0 for the published protocol
    jobs: int
    seeds: int
    net: Spec
    given: tuple[Given, ...] = ()
    sharing: int = 0  # seeds that the budget is shared out among, when others than `seeds`

    @property
    def is_paper(self) -> bool:
        return not self.seconds


class Ready(NamedTuple):
    """A subject made real: the net, and the loss of every step of its training (none when it was not trained here)."""

    net: "ResNet"
    losses: list[float]


class Claim(NamedTuple):
    """What a paper says, what was measured here, and whether the two agree. `n` is the number of seeds or samples behind it."""

    paper: str
    measured: str
    verdict: Verdict
    n: int


Pace = Callable[[Spec, int], float]  # seconds that a training step of that batch size takes


@dataclass(frozen=True)
class Study:
    """A question, how it is answered, and what an answer is worth. `expected` are the published numbers.

    `answer` is one sentence or two made from the numbers. `shipped` names the package's own trained nets that a study of
    trained nets looks at when none is given; a study without them trains or initialises all that it needs. The page of a
    `live` one is drawn again and again while it runs.
    """

    question: str
    method: str
    source: str
    shows: str
    limits: str
    expected: str
    cells: "Callable[[Setting, Data, Pace], list[Cell]]"
    measure: "Callable[[Cell, Ready, Data], Iterator[Record]]"
    claims: Callable[[list[Record]], list[Claim]]
    answer: Callable[[list[Record]], str]
    shipped: tuple[str, ...] = ()
    live: bool = False


def content_key(value: Any) -> str:
    """A name that only equal values have under this version of torch, which has a part in every number of a study."""
    return hashlib.sha256(json.dumps([value, version("torch")], sort_keys=True).encode()).hexdigest()[:24]


@cache
def code(*names: str) -> str:
    """A digest of these files and of all in the package that they import, directly or not."""
    found, waiting = set(names), [*names]
    while waiting:
        for node in ast.walk(ast.parse((PACKAGE / waiting.pop()).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
                files = {module.removeprefix("reslab.").replace(".", "/") + ".py" for module in modules if module.startswith("reslab.")}
                new = {file for file in files - found if (PACKAGE / file).is_file()}
                found |= new
                waiting += new
    return hashlib.sha256(b"\0".join((PACKAGE / name).read_bytes() for name in sorted(found))).hexdigest()[:16]
