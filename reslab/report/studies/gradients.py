"""Gradients and activations by depth and time; branch and shortcut apart; growth a layer at the start."""

import math
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from reslab.report.charts import Drawn, Row, canvas, colours, heat, logarithmic, titled
from reslab.report.svg import MUTED
from reslab.run import Record

TWINS = (("plain", True), ("residual", True), ("plain", False), ("residual", False))
COLOURS = colours(["residual", "plain"])
PATHS = colours(["shortcut", "branch"])
TICKS = 5
Grid = list[list[float]]


def figures(records: list[Record]) -> list[Drawn]:
    """Heat maps of gradients and of activations, lines by depth, and the growth in nets with known answers."""
    flows = [r for r in records if r["kind"] == "flow"]
    growth = [r for r in records if r["kind"] == "growth" and "norms" in r]
    return [
        *(_maps(flows, what) for what in ("gradient", "activation") if flows),
        *([_apart(flows)] if any(r["where"] == "branch" for r in flows) else []),
        *([_growth(growth)] if growth else []),
    ]


def _maps(flows: list[Record], what: str) -> Drawn:
    """One panel a net: blocks upwards, the measured steps to the right, colour the logarithm; twins share their scale."""
    grids = {twin: _mean(found) for twin in TWINS if (found := _of(flows, twin, "out", what))}
    said = {"gradient": "Norm of the gradient", "activation": "Root mean square"}[what]
    with canvas(len(grids), 3.3, share=False, grid=False, sharey=True) as c:
        panels = dict(zip(grids, c.axes, strict=True))
        for norm in (True, False):
            pair = [twin for twin in grids if twin[1] == norm]
            known = [value for twin in pair for row in grids[twin][1] for value in row if math.isfinite(value)]
            low, high = (max(-8.0, min(known)), min(8.0, max(known))) if known else (0.0, 1.0)
            for twin in pair:
                picture = _map(panels[twin], *grids[twin], low, high)
                titled(panels[twin], _name(twin), "step", "block" if panels[twin] is c.axes[0] else "")
            if pair:
                bar = c.figure.colorbar(picture, ax=[panels[twin] for twin in pair], shrink=0.9, pad=0.02)
                bar.set_label("log10" if norm and len(grids) > len(pair) else f"log10 of the {said.lower()}")
        rows = [
            {"net": _name(twin), "step": step, "block": block, f"log10_{what}": _round(value)}
            for twin, (steps, grid) in grids.items()
            for step, row in zip(steps, grid, strict=True)
            for block, value in enumerate(row)
        ]
        return c.drawn(
            f"{said} at every block's output, from input (0) to output, through the training; mean of the logarithms over seeds; empty where nothing came", rows
        )


def _map(axes: Axes, steps: list[int], grid: Grid, low: float, high: float) -> Any:
    at = [round(i * (len(steps) - 1) / (TICKS - 1)) for i in range(TICKS)] if len(steps) > TICKS else list(range(len(steps)))
    axes.set_xticks(at, [f"{steps[i]}" for i in at])
    return heat(axes, [list(column) for column in zip(*grid, strict=True)], low, high)


def _apart(flows: list[Record]) -> Drawn:
    """Residual nets: what branch and shortcut bring, at the first and at the last measured step."""
    kinds = [(norm, what) for norm in (True, False) for what in ("activation", "gradient") if _of(flows, ("residual", norm), "branch", what)]
    rows: list[Row] = []
    with canvas(len(kinds), 3.1, share=False) as c:
        for axes, (norm, what) in zip(c.axes, kinds, strict=True):
            for path, colour in PATHS.items():
                steps, grid = _mean(_of(flows, ("residual", norm), path, what))
                for when, style in ((0, "-"), (-1, ":")):
                    y = [10**value if math.isfinite(value) and abs(value) < 300 else math.nan for value in grid[when]]
                    axes.plot(range(len(y)), y, color=colour, linestyle=style)
                    rows += [{"norm": norm, "what": what, "path": path, "step": steps[when], "block": i, "value": _round(v)} for i, v in enumerate(y) if i]
                    if when == 0:
                        c.at_end(axes, len(y) - 1, y[-1], path, colour)
            logarithmic(axes)
            titled(axes, f"{what}, {'norm' if norm else 'no norm'}", "block")
        return c.drawn("Branch and shortcut apart in the residual nets: at the first step (solid) and at the last measured one (dotted)", rows)


def _growth(growth: list[Record]) -> Drawn:
    """Gradient norms by layer where the growth is known: fully connected, and without norm."""
    dense = [r for r in growth if r["look"] == "dense"]
    weak = [r for r in growth if r["look"] == "weak"]
    panels = [(rows, title) for rows, title in ((dense, "fully connected, batch norm"), (weak, "plain, without norm")) if rows]
    with canvas(len(panels), 3.0, share=False) as c:
        for axes, (rows, title) in zip(c.axes, panels, strict=True):
            for r in rows:
                colour = COLOURS["plain"] if r.get("scale", 1) < 1 else COLOURS["residual"]
                axes.plot(range(1, len(r["norms"]) + 1), r["norms"], color=colour, linewidth=1, alpha=0.8)
            logarithmic(axes)
            titled(axes, title, "layer" if rows is dense else "block", "gradient norm")
        if dense:
            n = len(dense[0]["norms"])
            last = dense[0]["norms"][-1]
            c.axes[0].plot(range(1, n + 1), [last * (math.pi / (math.pi - 1)) ** ((n - layer) / 2) for layer in range(1, n + 1)], color=MUTED, linestyle=":")
            c.axes[0].annotate("1.2112 a layer", (n / 3, last * 1.2112 ** (2 * n / 3)), xytext=(8, 8), textcoords="offset points", color=MUTED, fontsize=9)
        for r in weak[:2]:
            name, colour, beside = ("weights / sqrt(2)", "plain", (10, -10)) if r["scale"] < 1 else ("He's weights", "residual", (0, 12))
            at = len(r["norms"]) // 3  # the upper line is flat there, the lower one rises
            c.axes[-1].annotate(name, (1 + at, r["norms"][at]), xytext=beside, textcoords="offset points", color=COLOURS[colour], fontsize=9)
        rows = [{"net": r["look"], "scale": r.get("scale", 1), "seed": r["seed"], "layer": i, "norm": v} for r in growth for i, v in enumerate(r["norms"], 1)]
        return c.drawn("Gradient norms at the start where the growth a layer is known, a line a seed", rows)


def _of(flows: list[Record], twin: tuple[str, bool], where: str, what: str) -> list[Record]:
    return [r for r in flows if ((r["twin"], r["norm"]), r["where"], r["what"]) == (twin, where, what)]


def _mean(flows: list[Record]) -> tuple[list[int], Grid]:
    """Steps, and log10 of the values by step and block, averaged over the seeds that came so far."""
    steps = max((r["at"] for r in flows), key=len)
    grid = [[_log_mean([r["values"][i][block] for r in flows if i < len(r["values"])]) for block in range(len(flows[0]["blocks"]))] for i in range(len(steps))]
    return steps, grid


def _log_mean(values: list[float | None]) -> float:
    known = [math.log10(value) for value in values if value]
    return fmean(known) if known else math.nan


def _name(twin: tuple[str, bool]) -> str:
    return f"{twin[0]}, {'norm' if twin[1] else 'no norm'}"


def _round(value: float) -> Any:
    return float(f"{value:.4g}") if math.isfinite(value) else None
