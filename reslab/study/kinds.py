"""What a study is made of: its text, its cells, and the claims that its records decide."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import reslab
from reslab.run import Record
from reslab.spec import Spec

if TYPE_CHECKING:
    from reslab.study.data import Data

Verdict = Literal["agrees", "disagrees", "not decided at this budget"]
CODE = ("spec.py", "layout.py", "nets", "study", "train", "data")  # a change here may change a record


@dataclass(frozen=True)
class Schedule:
    """How a cell trains: SGD with momentum, the learning rate divided by ten twice (He et al. 2015, section 4.2).

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


@dataclass(frozen=True)
class Cell:
    """One independent piece of a study's work, and all that decides its records besides the data and the code."""

    name: str
    spec: Spec
    seed: int
    schedule: Schedule | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def key(self, study: str, fingerprint: str) -> str:
        """Names the cell's records by content: equal only where they would be."""
        text = json.dumps([study, asdict(self), fingerprint, code_version()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


class Setting(NamedTuple):
    """What a person asked of a study."""

    seconds: float  # the budget; 0 for the published protocol
    jobs: int
    seeds: int

    @property
    def is_paper(self) -> bool:
        return not self.seconds


class Claim(NamedTuple):
    """What a paper says, what was measured here, and whether the two agree."""

    paper: str
    measured: str
    verdict: Verdict
    n: int


Pace = Callable[[Spec, int], float]  # seconds that a training step of that batch size takes


@dataclass(frozen=True)
class Study:
    """A question, how it is answered, and what an answer is worth. `expected` are the published numbers."""

    question: str
    method: str
    source: str
    shows: str
    limits: str
    expected: str
    cells: "Callable[[Setting, Data, Pace], list[Cell]]"
    measure: "Callable[[Cell, Data], Iterator[Record]]"
    claims: Callable[[list[Record]], list[Claim]]


@cache
def code_version() -> str:
    """A hash over the code that records depend on."""
    package = Path(reslab.__file__).parent
    files = [f for name in CODE for f in ([package / name] if name.endswith(".py") else sorted((package / name).glob("*.py")))]
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:16]
