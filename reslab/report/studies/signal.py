"""Branch and shortcut by block at the start (De & Smith 2020), responses by layer after training (He 2015, figure 7)."""

import math
from statistics import fmean

from reslab.report.charts import Drawn, Row, canvas, colours, logarithmic, titled
from reslab.run import Record

PATHS = colours(["shortcut", "branch"])
TWINS = colours(["residual", "plain"])
ORDERS = ("single stage", "the net")


def figures(records: list[Record]) -> list[Drawn]:
    """Mean squares at the additions, a panel a net; standard deviations of the responses, a panel a depth."""
    added = [r for r in records if r["kind"] == "addition"]
    responses = [r for r in records if r["kind"] == "response"]
    return [*([_additions(added)] if added else []), *([_responses(responses)] if responses else [])]


def _additions(added: list[Record]) -> Drawn:
    panels = [(order, norm) for order in ORDERS for norm in (True, False) if _of(added, order, norm)]
    rows: list[Row] = []
    with canvas(len(panels), 3.1, share=False) as c:
        for axes, (order, norm) in zip(c.axes, panels, strict=True):
            for path, colour in PATHS.items():
                for r in _of(added, order, norm):
                    axes.plot(range(1, len(r[path]) + 1), r[path], color=colour, linewidth=1, alpha=0.8)
                    rows += [{"net": order, "norm": norm, "seed": r["seed"], "path": path, "block": i, "variance": v} for i, v in enumerate(r[path], 1)]
                c.at_end(axes, len(r[path]), fmean(r[path][-1] for r in _of(added, order, norm)), path, colour)
            logarithmic(axes)
            titled(axes, f"{order}, {'norm' if norm else 'no norm'}", "block", "variance" if axes is c.axes[0] else "")
        return c.drawn("Variance of branch and shortcut where they are added, at the start, a line a seed", rows)


def _responses(responses: list[Record]) -> Drawn:
    depths = sorted({r["layers"] for r in responses})
    rows: list[Row] = []
    with canvas(len(depths), 3.0, share=False, sharey=True) as c:
        for axes, depth in zip(c.axes, depths, strict=True):
            for twin, colour in TWINS.items():
                found = [r for r in responses if (r["twin"], r["layers"]) == (twin, depth)]
                for r in found:
                    axes.plot(range(1, len(r["deviations"]) + 1), r["deviations"], color=colour, linewidth=1, alpha=0.8)
                    rows += [{"twin": twin, "layers": depth, "seed": r["seed"], "layer": i, "deviation": v} for i, v in enumerate(r["deviations"], 1)]
                if found:
                    c.at_end(axes, len(found[0]["deviations"]), fmean(r["deviations"][-1] or math.nan for r in found), twin, colour)
            logarithmic(axes)
            titled(axes, f"{depth} layers", "layer", "standard deviation" if axes is c.axes[0] else "")
        return c.drawn("Standard deviation of the layers' responses after training, a line a net", rows)


def _of(added: list[Record], order: str, norm: bool) -> list[Record]:
    return [r for r in added if (r["order"], r["norm"]) == (order, norm)]
