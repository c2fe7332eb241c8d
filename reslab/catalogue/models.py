"""The family as a list: which networks there are, what they cost, how well they did. Standard library only."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from reslab.catalogue.table import table
from reslab.errors import CallError, shown
from reslab.family import FAMILY, Row
from reslab.spec import Cost

Sort = Literal["name", "params", "macs", "top1"]
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
HEADINGS = ("net", "parameters", "multiply-adds", "image", "top-1", "from", "top-1 on, by")


class Model(NamedTuple):
    """A row of `FAMILY` with its name and its cost at the image size it was published for."""

    name: str
    row: Row
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `top1` is a fraction, or None where none was published."""
        row, cost = self.row, self.cost
        return {
            "name": self.name,
            "params": cost.params,
            "macs": cost.macs,
            "image_size": row.image_size,
            "top1": row.top1,
            "top1_source": row.top1_source,
            "source": row.source,
        }


ORDERS: dict[Sort, Callable[[Model], Any]] = {
    "name": lambda model: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", model.name)],  # resnet20 before resnet110
    "params": lambda model: model.cost.params,
    "macs": lambda model: model.cost.macs,
    "top1": lambda model: (model.row.top1 is None, model.row.image_size, -(model.row.top1 or 0.0)),  # the best of each image size first
}


def models(patterns: Iterable[str] = (), sort: Sort | None = None, image_size: int | None = None, max_params: str | None = None) -> list[Model]:
    """The networks that any pattern fits (all without one), in the family's order or sorted.

    A pattern is a glob for the whole name, or text found in the name or in where the net is from; case does not matter.
    Raises CallError for a pattern that fits none, with the nearest name, and when the rest leaves none.
    """
    most = None if max_params is None else amount(max_params)
    fitting = [_fitting(pattern) for pattern in patterns]
    named = [name for name in FAMILY if not fitting or any(name in names for names in fitting)]
    found = [Model(name, row := FAMILY[name], row.spec.cost(row.image_size)) for name in named]
    found = [model for model in found if image_size in (None, model.row.image_size) and (most is None or model.cost.params <= most)]
    if not found:
        raise CallError(f"a filter must leave a net; of {len(named)} none has this --image-size and --max-params: loosen one")
    return sorted(found, key=ORDERS[sort]) if sort else found


def _fitting(pattern: str) -> set[str]:
    """Names of the nets that a pattern fits, at least one."""
    found = {name for name, row in FAMILY.items() if _fits(pattern.lower(), name, row)}
    if not found:
        near = get_close_matches(pattern.strip("*?"), FAMILY, n=1, cutoff=0.5)
        raise CallError(f"a pattern must fit a net; received '{shown(pattern)}': " + (f"did you mean {near[0]!r}?" if near else "`reslab models` lists them"))
    return found


def _fits(pattern: str, name: str, row: Row) -> bool:
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return pattern in name or pattern in row.source.lower()


def amount(text: str) -> int:
    """A number such as 269722, 5M or 1.5G as an integer. Raises CallError."""
    parts = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmg]?)", text.strip().lower().replace(",", "").replace("_", ""))
    if not parts:
        raise CallError(f"--max-params must be a number such as 800k, 5M or 1.5G; received '{shown(text)}'")
    return int(float(parts[1]) * UNITS[parts[2]])


def listing(found: list[Model], width: int | None) -> list[str]:
    """The models as a table and what its figures mean; no wider than `width`."""
    rows = [
        (
            name,
            f"{cost.params:,}",
            f"{cost.macs / 1e6:,.1f} M",
            f"{row.image_size} px",
            f"{row.top1:.2%}" if row.top1 else "",
            row.source,
            row.top1_source,
        )
        for name, row, cost in found
    ]
    lines = table(HEADINGS, rows, numbers=HEADINGS[1:5], width=width)
    count = f"{len(rows)} net{'s' * (len(rows) > 1)}"
    return [*lines, f"{count}, counted at that image size. Top-1 is the authors' own: it compares within one source only."]
